"""Makes the pictures of terminals in docs/pictures from real runs, as SVG files.

    python -m tools.pictures                    # all of them
    python -m tools.pictures dump -o DIR        # one, elsewhere

Programs run in a pseudo-terminal, so that what is drawn is what one sees. The server and the split
are used by llama.cpp (python -m tools.upstream) with SmolLM2 meanwhile; the dump is of a capture in
tests/data.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.style import Style
from rich.terminal_theme import MONOKAI
from rich.text import Text

from tools import smollm2, upstream
from tools.arguments import command_line
from tools.serving.ports import free_port
from tools.serving.processes import HOST, PROJECT, ProgramError, own_command

COLUMNS = 100
# Of a terminal high enough that nothing scrolls out of it.
ROWS = 400
SECONDS = 120.0
# rich's own format asks a server elsewhere for a font.
_FORMAT = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
  <style>
    .{unique_id}-matrix {{
      font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
      font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width;
    }}
    .{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: system-ui, sans-serif; }}
    {styles}
  </style>
  <defs>
    <clipPath id="{unique_id}-clip-terminal">
      <rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
    </clipPath>
    {lines}
  </defs>
  {chrome}
  <g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
    {backgrounds}
    <g class="{unique_id}-matrix">{matrix}</g>
  </g>
</svg>
"""


class Terminal:
    """A program in a pseudo-terminal, and what is on the screen."""

    def __init__(self, words: Sequence[str], shown: str) -> None:
        """Start a program; ``shown`` is the command line to draw above what it prints."""
        import fcntl
        import pty
        import struct
        import termios

        import pyte

        self._shown = shown
        self._screen = pyte.Screen(COLUMNS, ROWS)
        self._stream = pyte.ByteStream(self._screen)
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", ROWS, COLUMNS, 0, 0))
        self._process = subprocess.Popen(
            words,
            cwd=PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"},
        )
        os.close(slave)

    def _read(self, seconds: float) -> bool:
        """Take what the program prints within some time; False once it has ended."""
        if select.select([self._master], [], [], seconds)[0]:
            try:
                data = os.read(self._master, 1 << 16)
            except OSError:
                return False
            self._stream.feed(data)
            return bool(data)
        return True

    @property
    def text(self) -> str:
        return "\n".join(self._screen.display)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Read until a pattern is on the screen.

        Raises: ProgramError after two minutes, or when the program ends before.
        """
        until = time.monotonic() + SECONDS
        while not (found := re.search(pattern, self.text)):
            if time.monotonic() > until or not self._read(0.5):
                raise ProgramError(f"no '{pattern}' from {self._shown}:\n{self.text.strip()}")
        return found

    def pause(self, seconds: float) -> None:
        """Let the program go on."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and self._read(left):
            pass

    def end(self) -> None:
        """Let the program come to its end."""
        while self._read(SECONDS):
            pass
        self._process.wait(SECONDS)

    def close(self) -> None:
        """Stop the program as Ctrl-C does."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    def lines(self) -> list[Text]:
        """Return the command and what is on the screen, in its colours, without the empty end."""
        rows = [_styled(self._screen.buffer[y]) for y in range(ROWS)]
        while rows and not rows[-1].plain:
            rows.pop()
        return [Text.assemble(("$ ", "bold green"), (self._shown, "bold")), *rows]


def _styled(row: Any) -> Text:
    """A row of a screen."""
    text = Text()
    for style, chars in itertools.groupby((row[x] for x in range(COLUMNS)), _style):
        text.append("".join(char.data for char in chars), style)
    text.rstrip()
    return text


def _style(char: Any) -> Style:
    return Style(
        color=_color(char.fg),
        bgcolor=_color(char.bg),
        bold=char.bold,
        italic=char.italics,
        underline=char.underscore,
        reverse=char.reverse,
    )


def _color(name: str) -> str | None:
    """rich's name of a colour of pyte's."""
    if name == "default":
        return None
    if re.fullmatch(r"[0-9a-f]{6}", name):
        return f"#{name}"
    # Yellow is brown there.
    return re.sub(r"^bright", "bright_", name.replace("brown", "yellow"))


@contextlib.contextmanager
def running(words: Sequence[str], shown: str) -> Iterator[Terminal]:
    """Run a program in a terminal, stopped at the end."""
    terminal = Terminal(words, shown)
    try:
        yield terminal
    finally:
        terminal.close()


def _svg(lines: Sequence[Text], title: str, name: str) -> str:
    """Lines as a picture of a terminal with a title."""
    console = Console(
        record=True,
        width=COLUMNS,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
    )
    for line in lines:
        console.print(line, no_wrap=True, overflow="crop")
    return console.export_svg(
        title=title, theme=MONOKAI, code_format=_FORMAT, unique_id=f"terminal-{name}"
    )


# -- scenes ----------------------------------------------------------------------------------------


def _client(port: int, prompt: str) -> list[str]:
    """llama-completion with SmolLM2 on a server. Raises ProgramError where it isn't there."""
    program = upstream.find_program("llama-completion")
    if program is None:
        raise ProgramError("no llama-completion: run python -m tools.upstream")
    return [
        *(str(program), "-m", str(smollm2.fetch()), "--rpc", f"{HOST}:{port}", "-ngl", "99"),
        *("-p", prompt, "-n", "48", "-c", "512", "--temp", "0", "--no-conversation"),
    ]


def _generate(port: int) -> None:
    """Have llama.cpp generate some text on a server."""
    done = subprocess.run(
        _client(port, "Once upon a time"), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        raise ProgramError(f"llama-completion:\n{done.stderr[-2000:]}")


def server() -> list[Text]:
    """Show a server with a client that comes, generates and goes."""
    port = free_port()
    # Once before: kernels are compiled, which is not what is to be seen.
    for shot in range(2):
        with running(own_command(port), "python -m rpc_server --port 50052") as terminal:
            terminal.wait_for("Devices:")
            _generate(port)
            terminal.pause(2)
            lines = terminal.lines()
        if shot:
            return _with_port(lines, port, 50052)
    raise AssertionError


def split() -> list[Text]:
    """Show a coordinator of two servers, and what tools.split_status shows of it."""
    ports = [free_port() for _ in range(3)]
    named = [(ports[0], 50060), (ports[1], 50052), (ports[2], 50053)]
    workers = ",".join(f"{HOST}:{port}" for port in ports[1:])
    told = "127.0.0.1:50052,127.0.0.1:50053"
    with contextlib.ExitStack() as stack:
        for port in ports[1:]:
            worker = stack.enter_context(running(own_command(port), ""))
            worker.wait_for("Devices:")
        words = own_command(ports[0], "--split", workers, "--split-mode", "tensor")
        shown = f"python -m rpc_server --port 50060 --split {told} --split-mode tensor"
        coordinator = stack.enter_context(running(words, shown))
        coordinator.wait_for("Devices:")
        _generate(ports[0])
        status_words = [sys.executable, "-m", "tools.split_status", f"{HOST}:{ports[0]}"]
        client = subprocess.Popen(
            _client(ports[0], "Once upon a time"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(client.wait)
        stack.callback(client.kill)
        coordinator.pause(3)
        status = Terminal(status_words, "python -m tools.split_status 127.0.0.1:50060")
        stack.callback(status.close)
        status.end()
        lines = [*coordinator.lines(), Text(), *status.lines()]
    for real, drawn in named:
        lines = _with_port(lines, real, drawn)
    return lines


def dump() -> list[Text]:
    """Show the beginning of a dump: the connection that has a model's weights and graphs."""
    words = ["tests/data/captures/llama-7.0.0.pcapng", "--connection", "9"]
    shown = f"python -m tools.dump {' '.join(words)}"
    with running([sys.executable, "-m", "tools.dump", *words], shown) as terminal:
        terminal.end()
        return [*terminal.lines()[:32], Text("...")]


def _with_port(lines: list[Text], real: int, drawn: int) -> list[Text]:
    """The port that was free replaced by the one that people use."""
    replaced = []
    for line in lines:
        start = line.plain.find(f":{real}")
        while start >= 0:
            parts = line.divide([start + 1, start + 1 + len(str(real))])
            number = Text(str(drawn), style=parts[1].get_style_at_offset(_PLAIN, 0))
            line = Text.assemble(parts[0], number, parts[2])
            start = line.plain.find(f":{real}", start + 1)
        replaced.append(line)
    return replaced


_PLAIN = Console(file=io.StringIO())

SCENES: dict[str, tuple[str, Callable[[], list[Text]]]] = {
    "server": ("a server, used by llama.cpp", server),
    "split": ("one model on two servers", split),
    "dump": ("what is on the wire", dump),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = command_line("tools.pictures", __doc__)
    # argparse would check the default of no names against the choices.
    parser.add_argument("name", nargs="*", metavar="NAME", help=f"which: {', '.join(SCENES)}")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", default=PROJECT / "docs/pictures",
        help="the folder (docs/pictures)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if unknown := set(options.name) - set(SCENES):
        parser.error(f"no picture '{min(unknown)}'; there are {', '.join(SCENES)}")
    try:
        for name in options.name or SCENES:
            title, scene = SCENES[name]
            path = options.output / f"terminal-{name}.svg"
            path.write_text(_svg(scene(), title, name))
            print(path)
    except (ProgramError, smollm2.ModelUnavailableError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"{error}: pip install 'ggml-rpc-server[pictures,tools]'", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
