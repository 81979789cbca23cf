"""What the server counts: plain integers, so that counting costs nothing beside a request.

Of each client there is a :class:`ClientStats`, of the server one :class:`ServerStats`, which has
the live clients and the sum of those that are gone. All are written on the event loop's thread
alone and may be read there at any time. Who shows them (``exporter.py``, the terminal) reads;
nothing here knows about them.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from protocol.commands import Command

# Upper bounds of the histogram's buckets, seconds; a last one takes what is longer.
GRAPH_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 30.0)

_COMMANDS = 1 + max(Command)


@dataclass(slots=True, eq=False)
class Counts:
    """The counts of one client, or of several together. Bytes and seconds."""

    bytes_in: int = 0
    bytes_out: int = 0
    # By command number.
    commands: list[int] = field(default_factory=lambda: [0] * _COMMANDS)
    graphs: int = 0
    nodes: int = 0
    graph_seconds: float = 0.0
    # By bucket, not cumulated.
    graph_times: list[int] = field(default_factory=lambda: [0] * (len(GRAPH_BUCKETS) + 1))
    programs_run: int = 0
    plan_hits: int = 0
    plan_misses: int = 0
    plan_seconds: float = 0.0
    uploads: int = 0
    upload_bytes: int = 0
    # Rows of logits that were read: in llama.cpp's graphs those of a tensor with a known name.
    tokens: int = 0
    # Offered by hash: found on disk, their bytes, and not found.
    cache_hits: int = 0
    cache_hit_bytes: int = 0
    cache_misses: int = 0
    # Those of them that were found in the operator's models.
    model_hits: int = 0
    model_hit_bytes: int = 0
    # Written to the cache.
    cache_stored: int = 0
    cache_stored_bytes: int = 0

    def graph(self, nodes: int, seconds: float) -> None:
        """Count a graph that was computed."""
        self.graphs += 1
        self.nodes += nodes
        self.graph_seconds += seconds
        self.graph_times[bisect_left(GRAPH_BUCKETS, seconds)] += 1

    def add(self, other: Counts) -> None:
        """Take the statistics of another into these."""
        for name in Counts.__slots__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if isinstance(mine, list):
                mine[:] = [a + b for a, b in zip(mine, theirs, strict=True)]
            else:
                setattr(self, name, mine + theirs)

    def by_command(self) -> dict[str, int]:
        """Return how often each command came; those that didn't are left out."""
        return {c.name: self.commands[c] for c in Command if self.commands[c]}


@dataclass(slots=True, eq=False)
class ClientStats(Counts):
    """One client. ``since`` is the monotonic time of its connection."""

    number: int = 0
    name: str = ""
    address: str = ""
    secure: bool = False
    since: float = field(default_factory=time.monotonic)
    # What it speaks, once that is known.
    protocol: str = ""
    # What it holds now.
    buffers: int = 0
    memory: int = 0
    # What it is doing now: "handshake", "idle", "message", "upload", "graph", "program", "answer",
    # "link" (to another part of a split).
    activity: Callable[[], str] = field(default=lambda: "handshake", repr=False)


@dataclass(slots=True, eq=False)
class ServerStats:
    """The whole server."""

    clients: dict[int, ClientStats] = field(default_factory=dict)
    clients_total: int = 0
    # Connections that were not let in, by reason: see access.Refusal.
    refused: Counter[str] = field(default_factory=Counter)
    # Connections that the server ended, by kind: see session.error_kind.
    errors: Counter[str] = field(default_factory=Counter)
    # Clients that were at a limit, by the option that sets it.
    limits: Counter[str] = field(default_factory=Counter)
    draining: bool = False
    # Why a device can't be used any more, if one can't.
    lost: str = ""
    started: float = field(default_factory=time.time)
    gone: Counts = field(default_factory=Counts)

    def connected(self, client: ClientStats) -> None:
        self.clients[client.number] = client
        self.clients_total += 1

    def disconnected(self, client: ClientStats) -> None:
        """Forget a client, not what it did."""
        if self.clients.pop(client.number, None) is not None:
            self.gone.add(client)

    def total(self) -> Counts:
        """Return the counts of all clients since the start."""
        total = Counts()
        for counts in self._all():
            total.add(counts)
        return total

    def work(self) -> int:
        """Return a number that grows while clients compute or upload; from any thread."""
        done = 0
        for counts in (self.gone, *list(self.clients.values())):
            done += counts.graphs + counts.programs_run + counts.uploads
        # A graph that takes long changes no count until it is over.
        at_work = any(c.activity() in ("graph", "program") for c in list(self.clients.values()))
        return done + (time.monotonic_ns() if at_work else 0)

    def _all(self) -> Iterator[Counts]:
        yield self.gone
        yield from self.clients.values()
