"""Writes completions of this project's commands for a shell.

    python -m tools.completion bash             # for all commands, where bash looks for them
    python -m tools.completion zsh -o DIR       # a folder that is in zsh's fpath

The files are made once and need nothing afterwards; write them again after an update. They complete
the commands that are installed (ggml-rpc-dump), not the modules (python -m tools.dump).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import conformance.__main__
import rpc_server.options
import tools.dump.options
import tools.record.__main__
import tools.replay.__main__
import tools.split_status
import tools.wireshark.__main__
import tools.workers.__main__
from tools.arguments import command_line

# What [project.scripts] of pyproject.toml installs, and the parser of each.
COMMANDS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "ggml-rpc-server-py": rpc_server.options.make_parser,
    "ggml-rpc-conformance": conformance.__main__.make_parser,
    "ggml-rpc-dump": tools.dump.options.parser,
    "ggml-rpc-record": tools.record.__main__.make_parser,
    "ggml-rpc-replay": tools.replay.__main__.make_parser,
    "ggml-rpc-split-status": tools.split_status.make_parser,
    "ggml-rpc-workers": tools.workers.__main__.make_parser,
    "ggml-rpc-wireshark": tools.wireshark.__main__.make_parser,
    "ggml-rpc-completion": lambda: make_parser(),
}
# The folder in a user's data folder, and what a file is called there.
SHELLS = {
    "bash": ("bash-completion/completions", "{}"),
    "zsh": ("zsh/site-functions", "_{}"),
}


class CompletionError(Exception):
    """The completions can't be written; the message says why."""


def script(command: str, shell: str) -> str:
    """Return the text that a shell reads to complete a command.

    Raises: CompletionError where shtab, which makes it, isn't installed.
    """
    try:
        import shtab
    except ImportError:
        raise CompletionError(
            "shtab is not installed: pip install 'ggml-rpc-server[completion]'"
        ) from None
    parser = COMMANDS[command]()
    parser.prog = command
    # shtab reads usage as one line of help.
    parser.usage = None
    for action in parser._actions:
        if action.metavar == "DIR":
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.type is Path or action.metavar == "FILE":
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    text: str = shtab.complete(parser, shell=shell)
    return text


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_line("tools.completion", __doc__)
    parser.add_argument("shell", choices=list(SHELLS), help="the shell")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="a folder (default: in ~/.local/share)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = make_parser().parse_args(arguments)
    place, name = SHELLS[options.shell]
    data = Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser()
    folder: Path = options.output or data / place
    try:
        texts = {command: script(command, options.shell) for command in COMMANDS}
        folder.mkdir(parents=True, exist_ok=True)
        for command, text in texts.items():
            (folder / name.format(command)).write_text(text)
    except CompletionError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"can't write to {folder}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{len(texts)} completions in {folder}")
    if options.shell == "zsh":
        print(f"zsh finds them if ~/.zshrc has, before compinit: fpath+=({folder})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
