"""What a person sees while the server works: what arrives, and how fast graphs run.

On a terminal a line for each busy client changes in place, below bars for what the server itself
is long at (``progress``); elsewhere there is a line in the log now and then. What clients do is
made of what ``metrics`` counts anyway.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from rpc_server.observability import progress
from rpc_server.observability.metrics import ClientStats, ServerStats

log = logging.getLogger(__name__)

# Seconds between two looks at the statistics: on a terminal, and for lines in the log.
_REDRAW = 0.5
_CALM = 15.0

# Inputs of graphs are uploads too; what comes faster than this are weights.
_WEIGHTS_FROM = 4 << 20


@dataclass(slots=True)
class Snapshot:
    """The counts of a client at a time."""

    when: float
    uploaded: int
    tensors: int
    cached: int
    graphs: int
    graph_seconds: float
    tokens: int

    @classmethod
    def at(cls, client: ClientStats, now: float) -> Snapshot:
        return cls(
            now,
            client.upload_bytes + client.cache_hit_bytes,
            client.uploads + client.cache_hits,
            client.cache_hit_bytes,
            client.graphs + client.programs_run,
            client.graph_seconds,
            client.tokens,
        )


def describe(client: ClientStats, before: Snapshot, now: Snapshot) -> str:
    """Return what a client has done between two looks; empty if that was nothing to speak of.

    While weights arrive: all of them so far. Of graphs: how many a second, the milliseconds of
    each, and tokens a second where the client reads logits here.
    """
    seconds = max(now.when - before.when, 1e-6)
    uploaded = now.uploaded - before.uploaded
    if uploaded >= _WEIGHTS_FROM * min(seconds, 1):
        cached = f", {_size(now.cached)} of it from the cache" if now.cached else ""
        rate = uploaded / seconds / (1 << 20)
        return f"{now.tensors} tensors, {_size(now.uploaded)} ({rate:.0f} MiB/s){cached}"
    graphs = now.graphs - before.graphs
    if not graphs:
        return "computes" if client.activity() == "graph" else ""
    each = 1e3 * (now.graph_seconds - before.graph_seconds) / graphs
    text = f"{graphs / seconds:.1f} graphs/s, {each:.1f} ms each"
    tokens = now.tokens - before.tokens
    return f"{tokens / seconds:.1f} tokens/s, {text}" if tokens else text


def _size(n: int) -> str:
    return f"{n / (1 << 30):.2f} GiB" if n >= 1 << 30 else f"{n / (1 << 20):.0f} MiB"


class Snapshots:
    """Looks at all clients again and again, and tells what each has done in between."""

    def __init__(self, stats: ServerStats) -> None:
        self._stats = stats
        self._before: dict[int, Snapshot] = {}

    def news(self) -> Iterator[tuple[ClientStats, str]]:
        """Yield the clients that did something since the last time, and what."""
        now = time.monotonic()
        seen: dict[int, Snapshot] = {}
        for number, client in self._stats.clients.items():
            look = seen[number] = Snapshot.at(client, now)
            before = self._before.get(number) or Snapshot(client.since, 0, 0, 0, 0, 0.0, 0)
            if text := describe(client, before, look):
                yield client, text
        self._before = seen


async def report(stats: ServerStats) -> None:
    """Show what clients do until cancelled: in place on a terminal, else as lines in the log."""
    if sys.stderr.isatty():
        await _in_place(stats)
    else:
        await _as_lines(stats)


async def _as_lines(stats: ServerStats) -> None:
    looks = Snapshots(stats)
    while True:
        await asyncio.sleep(_CALM)
        for client, text in looks.news():
            log.info("%s: %s", client.name, text, extra={"client": client.name, "event": "working"})


async def _in_place(stats: ServerStats) -> None:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    looks = Snapshots(stats)
    # What is logged meanwhile goes above the lines that change.
    console = Console(stderr=True, highlight=False)
    live = Live(console=console, transient=True, auto_refresh=False, redirect_stdout=False)
    with progress.drawn(), live:
        while True:
            await asyncio.sleep(_REDRAW)
            lines = Text("\n").join(
                Text(f"  {client.name}: {text}", style="cyan", no_wrap=True, overflow="ellipsis")
                for client, text in looks.news()
            )
            live.update(Group(progress.bars(), lines), refresh=True)
