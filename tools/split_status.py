"""What a coordinator (--split) and its workers are doing.

    python -m tools.split_status 127.0.0.1:50052
    python -m tools.split_status 127.0.0.1:50052 --watch 2      # again and again, with speeds
    python -m tools.split_status 127.0.0.1:50052 --json

For each part: the rows of weights it holds and their bytes, exchanges and what was sent and
received in them, the round trip of a small request, and how long the coordinator has waited for it.
Of a part that is waited for much more than others the share is too large (--tensor-split), or its
link is slow. Tokens a second are over the time in which graphs ran; with --watch over the time
since the last look.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from client.connection import Connection, connect_any
from client.errors import ConnectionLost, VersionMismatch
from protocol.commands import Command
from protocol.endpoint import format_endpoint
from protocol.errors import ProtocolError
from protocol.text import printable
from tools.arguments import command_line, endpoint, seconds

_TIMEOUT = 10.0


class StatusError(Exception):
    """There is no status to be had; the message tells why."""


@dataclass(frozen=True, slots=True)
class PartStatus:
    """One part as the coordinator counts; times are seconds."""

    name: str
    rows: int
    bytes: int
    exchanges: int
    bytes_sent: int
    bytes_received: int
    round_trip_seconds: float
    wait_seconds: float


@dataclass(frozen=True, slots=True)
class CoordinatorStatus:
    """All that a coordinator has counted since it started."""

    graphs: int
    graph_seconds: float
    tokens: int
    parts: tuple[PartStatus, ...]

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.graph_seconds if self.graph_seconds > 0 else None

    def since(self, earlier: CoordinatorStatus) -> CoordinatorStatus:
        """Return what was added since then; rows, bytes and round trips as they are now.

        Where a worker was reached anew, its counts are those since then.
        """
        before = {part.name: part for part in earlier.parts}
        return CoordinatorStatus(
            self.graphs - earlier.graphs,
            self.graph_seconds - earlier.graph_seconds,
            self.tokens - earlier.tokens,
            tuple(_part_since(part, before.get(part.name)) for part in self.parts),
        )

    def as_json(self) -> str:
        """Return it in JSON, one line."""
        return json.dumps({**asdict(self), "tokens_per_second": self.tokens_per_second})


def _part_since(part: PartStatus, earlier: PartStatus | None) -> PartStatus:
    if earlier is None or earlier.exchanges > part.exchanges:
        return part
    return PartStatus(
        part.name,
        part.rows,
        part.bytes,
        part.exchanges - earlier.exchanges,
        part.bytes_sent - earlier.bytes_sent,
        part.bytes_received - earlier.bytes_received,
        part.round_trip_seconds,
        part.wait_seconds - earlier.wait_seconds,
    )


async def open_coordinator(host: str, port: int) -> Connection:
    """Open a connection to a server that has the split extension. Raises StatusError."""
    name = format_endpoint(host, port)
    try:
        connection = await connect_any(host, port, timeout=_TIMEOUT, split=True)
    except TimeoutError:
        raise StatusError(f"{name} accepts but does not answer") from None
    except VersionMismatch as error:
        raise StatusError(f"{name}: {error}") from None
    except (OSError, ProtocolError) as error:
        raise StatusError(f"can't ask {name}: {error}") from None
    if not connection.split_version:
        version = connection.dialect.name
        await connection.close()
        raise StatusError(
            f"{name} is a server of protocol {version} without the split extension, such as "
            "llama.cpp's own: ask the server that was started with --split"
        )
    return connection


async def read_status(connection: Connection, name: str, device: int = 0) -> CoordinatorStatus:
    """Ask for the status. Raises StatusError if the server is no coordinator or hangs up."""
    try:
        answer = await connection.request(Command.SPLIT_STATUS, device=device)
    except (ConnectionLost, ProtocolError) as error:
        raise StatusError(f"{name}: {error}") from None
    if not answer.n_parts:
        raise StatusError(
            f"{name} is no coordinator: it keeps weights whole (it may be a worker of one). "
            "Ask the server that was started with --split"
        )
    parts = tuple(_part(part) for part in answer.parts[: answer.n_parts])
    return CoordinatorStatus(answer.graphs, answer.graph_seconds, answer.tokens, parts)


def _part(record: Any) -> PartStatus:
    name = bytes(record.name).split(b"\0")[0].decode("utf-8", "replace")
    return PartStatus(
        name,
        record.rows,
        record.bytes,
        record.exchanges,
        record.bytes_sent,
        record.bytes_received,
        record.round_trip_seconds,
        record.wait_seconds,
    )


_HEAD = ("part", "rows", "MiB", "exchanges", "sent MiB", "recv MiB", "round trip", "waited")


def as_text(name: str, status: CoordinatorStatus) -> str:
    """Return a line for the whole and a table of the parts."""
    speed = status.tokens_per_second
    rate = "" if speed is None else f", {speed:.1f} tokens/s"
    lines = [
        f"{name}: {len(status.parts)} parts, {status.graphs} graphs in "
        f"{status.graph_seconds:.1f} s, {status.tokens} tokens{rate}"
    ]
    table = [_HEAD] + [_row(part, status.graph_seconds) for part in status.parts]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _row(part: PartStatus, graph_seconds: float) -> tuple[str, ...]:
    waited = f"{part.wait_seconds:.2f} s"
    if graph_seconds > 0:
        waited += f" ({100 * part.wait_seconds / graph_seconds:.0f} %)"
    # What is computed by the coordinator itself is neither sent nor waited for.
    remote = part.round_trip_seconds > 0
    return (
        printable(part.name),
        str(part.rows),
        _mib(part.bytes),
        str(part.exchanges) if remote else "-",
        _mib(part.bytes_sent) if remote else "-",
        _mib(part.bytes_received) if remote else "-",
        f"{part.round_trip_seconds * 1e6:.0f} us" if remote else "-",
        waited if remote else "-",
    )


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f}"


async def show(host: str, port: int, device: int, watch: float | None, as_json: bool) -> None:
    """Print the status, with ``watch`` every so many seconds. Raises StatusError."""
    name = format_endpoint(host, port)
    async with await open_coordinator(host, port) as connection:
        status = await read_status(connection, name, device)
        shown = status
        while True:
            print(shown.as_json() if as_json else as_text(name, shown), flush=True)
            if watch is None:
                return
            await asyncio.sleep(watch)
            earlier, status = status, await read_status(connection, name, device)
            shown = status.since(earlier)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_line("tools.split_status", __doc__)
    parser.add_argument("endpoint", type=endpoint, metavar="HOST:PORT", help="the coordinator")
    parser.add_argument(
        "--watch", type=seconds, metavar="N", help="every N seconds what was added, until Ctrl-C"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--device", type=int, default=0, help="the server's device (0)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 shown, 1 no status to be had (the reason is printed)."""
    options = make_parser().parse_args(arguments)
    host, port = options.endpoint
    try:
        asyncio.run(show(host, port, options.device, options.watch, options.json))
    except StatusError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
