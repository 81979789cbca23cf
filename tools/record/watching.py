"""What was seen, kept for a moment: recording and counting wait until the bytes have gone on.

A client that generates text sends a dozen small pieces for a token and waits for one answer. What
there is to do for each piece would delay the next one; a moment later the server computes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from protocol.observe.events import Side
from tools.record.frames import Address
from tools.record.proxy import WatchedConnection, Watcher

_DELAY = 1e-3
# Bytes that may wait.
_MOST = 4 << 20


class Backlog:
    """Passes on what it is told to ``watchers``, in order and about a millisecond later."""

    def __init__(self, *watchers: Watcher) -> None:
        self._watchers = watchers
        self._waiting: deque[Callable[[], None]] = deque()
        self._bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def opened(self, client: Address, server: Address, time_ns: int) -> WatchedConnection:
        """Count a client that has been connected to a server."""
        self.work()
        return _Waiting(self, [w.opened(client, server, time_ns) for w in self._watchers])

    def refused(self, client: Address, server: Address, time_ns: int) -> None:
        """Count a client for which the server could not be reached."""
        self.work()
        for watcher in self._watchers:
            watcher.refused(client, server, time_ns)

    def work(self) -> None:
        """Do now what waits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._bytes = 0
        while self._waiting:
            self._waiting.popleft()()

    def add(self, call: Callable[[], None], size: int = 0) -> None:
        """Let ``call``, which keeps ``size`` bytes, wait."""
        self._waiting.append(call)
        self._bytes += size
        if self._bytes > _MOST:
            self.work()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_DELAY, self.work)


class _Waiting:
    """One connection of a backlog."""

    def __init__(self, backlog: Backlog, connections: Sequence[WatchedConnection]) -> None:
        self._backlog, self._connections = backlog, connections

    def data(self, side: Side, data: bytes, time_ns: int) -> None:
        for c in self._connections:
            self._backlog.add(lambda c=c: c.data(side, data, time_ns), len(data))  # type: ignore[misc]

    def ended(self, side: Side, time_ns: int) -> None:
        for c in self._connections:
            self._backlog.add(lambda c=c: c.ended(side, time_ns))  # type: ignore[misc]

    def reset(self, side: Side, time_ns: int) -> None:
        for c in self._connections:
            self._backlog.add(lambda c=c: c.reset(side, time_ns))  # type: ignore[misc]
