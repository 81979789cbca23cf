"""Play a recorded session to a server and compare its answers with the recorded ones.

    python -m tools.replay session.pcapng --to 127.0.0.1:50052
    python -m tools.replay session.pcapng --to 127.0.0.1:50052 --tolerance 1e-6

The capture is one of tools.record, tcpdump or Wireshark, whole from the beginning of its
connections. Requests go out in the recorded order, as fast as they are answered, with the server's
own handles and addresses in place of the recorded ones. Everything that a client computes with is
compared; free memory, alignment, and sizes that a server chooses are not.

Of servers that add up among themselves one is played to, and the player is the others, with the
bytes that these have sent: their links with it have to be in the capture, too.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from protocol.endpoint import format_endpoint
from tools import arguments
from tools.capture.errors import CaptureError
from tools.replay.errors import ReplayError
from tools.replay.player import Player, ReplayResult

_EPILOG = """\
exit status: 0 all answers are equal; 1 some differ; 2 wrong options, no connection, or a recording
that can't be played
"""


def report(result: ReplayResult, tolerance: float) -> str:
    """Return what came of a replay, for people."""
    lines = [
        f"{result.connections} connections, {result.requests} requests, {result.answers} answers "
        f"in {result.seconds:.2f} s"
    ]
    lines += [f"note: {note}" for note in result.notes]
    if result.timings:
        lines.append(f"{'command':<20}{'answers':>8}{'recorded ms':>14}{'now ms':>10}")
        slowest = sorted(result.timings.items(), key=lambda item: -item[1].live)
        for command, timing in slowest:
            n = timing.answers
            lines.append(
                f"{command.name:<20}{n:>8}{timing.recorded / n * 1e3:>14.3f}"
                f"{timing.live / n * 1e3:>10.3f}"
            )
    if result.differences:
        lines.append(f"{len(result.differences)} differences; the first:")
        lines.append(result.differences[0])
    elif tolerance:
        lines.append(f"no difference; the largest NMSE of F32 data is {result.worst_nmse:.3g}")
    else:
        lines.append("no difference")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = arguments.command_line("tools.replay", __doc__, _EPILOG)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="the capture")
    arguments.add_server(parser)
    add(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="NMSE",
        help="how far F32 data that is read back may differ (0: not at all)",
    )
    add(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="for an answer (%(default)s)"
    )
    add(
        "--recorded",
        type=arguments.endpoint,
        metavar="HOST:PORT",
        help="of a recording of several servers that add up among themselves: the one to play",
    )
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = make_parser().parse_args(words)
    host, port = options.to
    player = Player(
        host,
        port,
        tolerance=options.tolerance,
        timeout=options.timeout,
        recorded=format_endpoint(*options.recorded) if options.recorded else "",
    )
    try:
        result = asyncio.run(player.play(options.file))
    except (ReplayError, CaptureError) as error:
        print(f"can't play {options.file}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        reason = error.strerror or "no answer in time"
        where = format_endpoint(host, port)
        print(f"no connection to {where}: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 2
    print(report(result, options.tolerance))
    return 1 if result.differences else 0


if __name__ == "__main__":
    sys.exit(main())
