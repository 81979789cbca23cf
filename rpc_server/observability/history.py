"""What the server did in the last ten minutes, in samples of two seconds: never more than these."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from rpc_server.observability.metrics import ServerStats

SECONDS = 600.0
STEP = 2.0


class Moment(NamedTuple):
    """The counts up to a time (monotonic seconds)."""

    when: float
    tokens: int
    graphs: int
    graph_seconds: float
    uploaded: int


class Rate(NamedTuple):
    """The work done in the time before ``when``: a second each, and seconds a graph."""

    when: float
    tokens: float
    uploaded: float
    graph_seconds: float


class History:
    """Samples of a server's statistics; of each client the bytes uploaded at the last two."""

    def __init__(self, stats: ServerStats) -> None:
        self._stats = stats
        self._moments: deque[Moment] = deque(maxlen=int(SECONDS / STEP) + 1)
        self._task: asyncio.Task[None] | None = None
        self._uploads: tuple[dict[int, int], dict[int, int]] = ({}, {})

    def start(self) -> None:
        """Take samples from now on, as long as the event loop runs."""
        self._task = asyncio.create_task(self.sample())

    async def sample(self) -> None:
        """Take samples until cancelled."""
        while True:
            self.take(time.monotonic())
            await asyncio.sleep(STEP)

    def take(self, now: float) -> None:
        """Take one sample."""
        total = self._stats.total()
        uploaded = total.upload_bytes + total.cache_hit_bytes
        moment = Moment(now, total.tokens, total.graphs, total.graph_seconds, uploaded)
        self._moments.append(moment)
        now_sent = {n: c.upload_bytes + c.cache_hit_bytes for n, c in self._stats.clients.items()}
        self._uploads = (self._uploads[1], now_sent)

    def rates(self) -> Iterator[Rate]:
        """Return what was done between each two samples, the oldest first."""
        moments = list(self._moments)
        for a, b in itertools.pairwise(moments):
            seconds = max(b.when - a.when, 1e-6)
            graphs = b.graphs - a.graphs
            yield Rate(
                b.when,
                (b.tokens - a.tokens) / seconds,
                (b.uploaded - a.uploaded) / seconds,
                (b.graph_seconds - a.graph_seconds) / graphs if graphs else 0.0,
            )

    def upload_rate(self, client: int) -> float:
        """Return how many bytes a second a client uploaded between the last two samples."""
        if len(self._moments) < 2:
            return 0.0
        seconds = max(self._moments[-1].when - self._moments[-2].when, 1e-6)
        before, now = self._uploads
        return max(0.0, (now.get(client, 0) - before.get(client, 0)) / seconds)
