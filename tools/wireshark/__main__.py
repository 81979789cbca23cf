"""Make a Wireshark dissector for the ggml RPC protocol, all versions.

    python -m tools.wireshark -o ggml_rpc.lua
    wireshark -X lua_script:ggml_rpc.lua session.pcapng
    tshark -X lua_script:ggml_rpc.lua -r session.pcapng -Y ggml_rpc.command==10 -V

To have Wireshark load it always, put the file into its plugin folder (Help, About Wireshark,
Folders, Personal Lua Plugins; on Linux ~/.local/lib/wireshark/plugins).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from protocol.dialects import DIALECTS
from tools import arguments
from tools.wireshark.tables import Tables

_TABLES = "-- TABLES\n"
# One script in the end: the second part uses the local functions of the first.
_PARTS = ("reading.lua", "showing.lua")
_HEAD = """\
-- ggml RPC for Wireshark: the protocol of llama.cpp's --rpc, versions {oldest} to {newest}.
-- Made by `python -m tools.wireshark` of ggml-rpc-server; changes belong there.
"""


def dissector(port: int = arguments.DEFAULT_PORT) -> str:
    """Return the dissector as Lua source.

    Connections to ``port`` are ggml RPC to it in any case.
    """
    folder = resources.files(__package__)
    engine = "\n".join((folder / part).read_text() for part in _PARTS)
    head = _HEAD.format(oldest=DIALECTS[-1].name, newest=DIALECTS[0].name)
    tables = f"local DEFAULT_PORT = {port}\n\n{Tables().text()}\n"
    return head + "\n" + engine.replace(_TABLES, tables)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = arguments.command_line("tools.wireshark", __doc__)
    add = parser.add_argument
    add("-o", "--output", metavar="FILE", default="ggml_rpc.lua", help="- for stdout (%(default)s)")
    add(
        "--port",
        type=arguments.port,
        default=arguments.DEFAULT_PORT,
        help="a port that is always ggml RPC; on others it is recognised by its first bytes "
        "(%(default)s)",
    )
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0 written, 1 not, 2 wrong options."""
    options = make_parser().parse_args(words)
    text = dissector(options.port)
    if options.output == "-":
        sys.stdout.write(text)
        return 0
    try:
        Path(options.output).write_text(text)
    except OSError as error:
        print(f"can't write {options.output}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{options.output}: {len(text)} bytes; load it with -X lua_script:{options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
