"""Counts the instructions that both servers execute for a token on 64-bit ARM, in emulation.

    python -m tools.aarch64 --model MODEL.gguf                   # on all processors
    python -m tools.aarch64 --model A.gguf --model B.gguf --processor cortex-a76
    python -m tools.aarch64 --root                               # make what is needed, and end

llama-server, of this machine, generates tokens on a server that is emulated: some, and then more,
by the same prompt. The difference is counted, so that starting, uploading, compiling and the prompt
fall out. Servers have one thread each, so that none waits for another.

Needed are Debian's qemu-user (5 to 9 at least) and g++-aarch64-linux-gnu, a C compiler, and
llama.cpp's programs (python -m tools.upstream). What is made from these lies in that tool's cache.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rpc_server.options import NO_PREPARE_VARIABLE
from tools import upstream
from tools.aarch64 import emulation
from tools.aarch64.processors import PROCESSORS, Processor
from tools.bench.results import OURS, UPSTREAM
from tools.bench.servers import answers
from tools.serving.llama_server import LlamaServer
from tools.serving.ports import free_port
from tools.serving.processes import HOST, Process, ProgramError

_START_SECONDS = 600.0
_PROMPT = "Once upon a time"
# Tokens of the shorter answer, and how many more the longer one has.
_TOKENS, _MORE = 2, 4
# Each is asked for so often, and the least counts: Python looks for garbage now and then.
_TIMES = 3


@dataclass(frozen=True)
class Counted:
    """Instructions that a server executes for a token of a model, and what it answered."""

    server: str
    processor: str
    model: str
    instructions: float
    text: str = ""


class _Emulated:
    """A server in emulation whose instructions are counted."""

    def __init__(self, server: str, processor: Processor, *, own_compiler: bool) -> None:
        self.port = free_port()
        self._stack = ExitStack()
        scratch = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="counting-")))
        self._counter = scratch / "instructions"
        options = ("-H", HOST, "-p", str(self.port), "-t", "1")
        if server == OURS:
            command = emulation.own_command(
                processor, self._counter, options, own_compiler=own_compiler
            )
            env = {**emulation.own_environment(processor), NO_PREPARE_VARIABLE: "1"}
        else:
            program = emulation.ensure_upstream(processor)
            command, env = emulation.command(processor, [program, *options], self._counter), {}
        self._process = Process(command, env=env)

    def __enter__(self) -> _Emulated:
        self._stack.enter_context(self._process)
        try:
            ready = "answer to HELLO"
            self._process.wait_until(lambda: answers(self.port), _START_SECONDS, ready, pause=0.2)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def instructions(self) -> int:
        return int.from_bytes(self._counter.read_bytes(), sys.byteorder)

    def generate(self, client: LlamaServer, tokens: int) -> tuple[int, str]:
        """Return the instructions of an answer of so many tokens, and the answer."""
        before = self.instructions()
        text = str(client.complete(_PROMPT, tokens)["content"])
        return self.instructions() - before, text


def count(server: str, processor: Processor, model: Path, *, own_compiler: bool = False) -> Counted:
    """Return what a server executes for a token of a model.

    Raises ProgramError, UpstreamError, OSError.
    """
    options = ("-c", "512", "--parallel", "1", "-t", "1", "-fa", "on")
    with (
        _Emulated(server, processor, own_compiler=own_compiler) as running,
        LlamaServer(model, f"{HOST}:{running.port}", options) as client,
    ):
        client.wait_until(client.ready, _START_SECONDS, "model")
        # The first answer compiles, and is planned anew; the others are alike but for their length.
        running.generate(client, _TOKENS)
        few, many = [], []
        for _ in range(_TIMES):
            few.append(running.generate(client, _TOKENS)[0])
            instructions, text = running.generate(client, _TOKENS + _MORE)
            many.append(instructions)
    return Counted(server, processor.name, model.stem, (min(many) - min(few)) / _MORE, text)


def table(counts: Sequence[Counted]) -> str:
    """Return the counts as Markdown, in millions, ours beside upstream's."""
    found = {(c.processor, c.model, c.server): c.instructions for c in counts}
    lines = [
        f"| processor | model | {OURS} | {UPSTREAM} | ratio |",
        "|---|---|---|---|---|",
    ]
    for processor, model in dict.fromkeys((c.processor, c.model) for c in counts):
        ours = found.get((processor, model, OURS))
        theirs = found.get((processor, model, UPSTREAM))
        cells = ["-" if n is None else f"{n / 1e6:.1f}" for n in (ours, theirs)]
        ratio = f"{ours / theirs:.2f}" if ours and theirs else "-"
        lines.append(f"| {processor} | {model} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.aarch64", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", type=Path, action="append", default=[], help="a GGUF file")
    parser.add_argument(
        "--processor", action="append", choices=list(PROCESSORS), help="(default: all of them)"
    )
    parser.add_argument(
        "--server", action="append", choices=(OURS, UPSTREAM), help="(default: both)"
    )
    parser.add_argument(
        "--own-compiler", action="store_true", help="compile in emulation too: minutes for each"
    )
    parser.add_argument("--root", action="store_true", help="make what is needed, and end")
    options = parser.parse_args(arguments)
    processors = [PROCESSORS[name] for name in options.processor or PROCESSORS]
    counts = []
    try:
        emulation.check()
        if options.root:
            print(emulation.ensure_root(), emulation.ensure_plugin(), sep="\n")
            return 0
        for processor in processors:
            for model in options.model:
                for server in options.server or (OURS, UPSTREAM):
                    found = count(server, processor, model, own_compiler=options.own_compiler)
                    print(found, file=sys.stderr, flush=True)
                    counts.append(found)
    except (
        emulation.MissingError,
        upstream.UpstreamError,
        ProgramError,
        subprocess.CalledProcessError,
        OSError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
