"""The command line of tools.dump."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from protocol.commands import Command
from protocol.dialects import Dialect, find_dialects
from tools import arguments
from tools.dump.filters import Filters, pattern

_DESCRIPTION = """\
Shows what ggml RPC clients (llama.cpp with --rpc) and servers said to each other, from a capture of
their network traffic: a line for each message, with the tensor it is about and how long its answer
took. Reads pcap and pcapng files, as tcpdump and Wireshark write them.
"""
_EXAMPLES = """\
examples:
  sudo tcpdump -i lo -w run.pcap port 50052       capture a run of llama.cpp (Ctrl-C ends it)
  python -m tools.dump run.pcap                   every message, a line each
  python -m tools.dump run.pcap --stats           by command and decode step
  python -m tools.dump run.pcap --tensor Qcur -v  whole messages about some tensors
  python -m tools.dump run.pcap --graph 2         the second graph, node by node
  sudo tcpdump -i lo -U -w - port 50052 | python -m tools.dump -
                                                  the same while it happens

exit status: 0 done, 1 nothing of ggml RPC found or the capture can't be read, 2 wrong options
"""


def _commands(text: str) -> list[Command]:
    found = []
    for name in text.split(","):
        try:
            found.append(Command[name.strip().upper()])
        except KeyError:
            names = ", ".join(command.name for command in Command)
            raise argparse.ArgumentTypeError(f"'{name}' is no command; they are {names}") from None
    return found


def _dialect(text: str) -> Dialect:
    try:
        return find_dialects(text)[0]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _number(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 1 on")
    return int(text)


def parser() -> argparse.ArgumentParser:
    made = arguments.command_line("tools.dump", _DESCRIPTION, _EXAMPLES)
    add = made.add_argument_group("what to read").add_argument
    add("capture", nargs="?", metavar="FILE", help="a pcap or pcapng file; - is standard input")
    add("--live", metavar="INTERFACE", help="listen on a network interface, such as lo, by tcpdump")
    add("-p", "--port", type=arguments.port, action="append", default=[], metavar="N",
        help="the server's port; without it ggml RPC is found by its content")  # fmt: skip
    add(
        "--protocol", type=_dialect, metavar="X.Y",
        help="version spoken by connections whose start wasn't captured (else it is guessed)",
    )  # fmt: skip

    add = made.add_argument_group("which messages").add_argument
    add("--command", type=_commands, action="extend", default=[], metavar="NAME[,NAME]",
        help="of these commands only, such as SET_TENSOR")  # fmt: skip
    add("--tensor", action="append", default=[], metavar="NAME",
        help="about tensors whose name has this in it; * and ? are wildcards")  # fmt: skip
    add("--client", action="append", default=[], metavar="HOST[:PORT]",
        help="of connections from this address")  # fmt: skip
    add("--connection", type=_number, action="append", default=[], metavar="N",
        help="of the connection with this number (#N in the lines)")  # fmt: skip

    add = made.add_argument_group("what to show (a line for each message unless told)").add_argument
    add("-v", "--verbose", action="store_true", help="whole messages, field by field")
    add("--hex", action="store_true", help="the bytes of messages, and what each is")
    add("--json", action="store_true", help="a JSON object a line; with -v whole graphs, too")
    add("--stats", action="store_true", help="figures instead: by command and by decode step")
    add("--graph", type=_number, metavar="N", help="the Nth graph instead (numbered in the lines)")
    add(
        "--format", choices=("text", "dot", "svg"), default="text",
        help="of --graph: a line a node, Graphviz' language, or drawn by Graphviz (text)",
    )  # fmt: skip
    add("--extract", type=Path, metavar="DIR",
        help="write the weights that were uploaded into files there, and index.json")  # fmt: skip
    add(
        "--save-session", type=Path, metavar="FILE",
        help="write the connections' packets into a pcapng of their own, as tools.replay plays",
    )  # fmt: skip
    add("--color", choices=("auto", "always", "never"), default="auto",
        help="colours (auto: on a terminal, unless NO_COLOR is set)")  # fmt: skip
    return made


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; end the program with status 2 for wrong ones."""
    made = parser()
    options = made.parse_args(argv)
    if (options.capture is None) == (options.live is None):
        made.error("give a capture file (or -), or --live INTERFACE")
    if options.format != "text" and options.graph is None:
        made.error("--format is for --graph")
    if options.graph is not None and (options.stats or options.hex or options.json):
        made.error("--graph shows a graph instead of --stats, --hex and --json")
    if options.hex and (options.json or options.stats):
        made.error("--hex is for lines, not for --json or --stats")
    return options


def filters_of(options: argparse.Namespace) -> Filters:
    return Filters(
        frozenset(options.command),
        tuple(map(pattern, options.tensor)),
        tuple(options.client),
        frozenset(options.connection),
    )
