"""Who may run programs on a device: one client at a time, the others in the order they came in.

A program of several steps waits for its client between them, and a client that splits a model runs
one on several servers at once. If two such clients each had one server and waited for the other's,
both would wait for ever. So a client takes the lease of every server before it starts any of its
programs, and waits for one lease while it has none (``rpc_server.devices.split.holding``); a
program whose client has no lease waits for it here, and has it for one run.

Everything is done on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from rpc_server.limits import LimitReached


class LeaseHolder(Protocol):
    """A session as a lease needs it of those who want it."""

    name: str

    def end(self, error: LimitReached) -> None:
        """End the connection because of this."""
        ...


class Lease:
    """The right to run programs on one device.

    A holder that others wait for has to give it up within ``limit`` seconds of running nothing, and
    may not start another run so long after it last let them pass. ``let_go`` is called when there
    is no holder any more.
    """

    def __init__(self, limit: float, let_go: Callable[[], None] | None = None) -> None:
        self._limit = limit
        self._let_go = let_go
        self._holder: LeaseHolder | None = None
        self._queue: deque[tuple[LeaseHolder, asyncio.Future[None]]] = deque()
        self._running = False
        # When the holder got it or last let others pass, and since when it runs nothing.
        self._renewed = self._idle_since = 0.0
        self._watch: asyncio.TimerHandle | None = None

    @property
    def holder(self) -> str:
        """Return the name of the client that holds it, '' if there is none."""
        return self._holder.name if self._holder is not None else ""

    def held_by(self, client: LeaseHolder) -> bool:
        """Return whether ``client`` holds it."""
        return self._holder is client

    # -- getting it

    def take(self, client: LeaseHolder) -> bool:
        """Give it to ``client`` if nobody else has it; return whether the client has it now."""
        if self._holder is None:
            self._give(client)
        return self._holder is client

    def wait(self, client: LeaseHolder) -> asyncio.Future[None]:
        """Put ``client`` at the end of the queue; return what is done when it holds the lease.

        Cancelled when the client leaves meanwhile.
        """
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((client, granted))
        self._look_after()
        return granted

    async def acquire(self, client: LeaseHolder, seconds: float) -> bool:
        """Wait up to ``seconds`` for the lease; return whether ``client`` holds it."""
        if self.take(client):
            return True
        if seconds <= 0:
            return False
        granted = self.wait(client)
        await asyncio.wait([granted], timeout=seconds)
        if not granted.done():
            self._queue.remove((client, granted))
            return False
        return not granted.cancelled()

    def _give(self, client: LeaseHolder) -> None:
        self._holder = client
        self._running = False
        self._renewed = self._idle_since = time.monotonic()

    # -- having it

    def began(self) -> None:
        """Note that the holder starts a run. Raises LimitReached if others wait too long for it."""
        if self._queue and time.monotonic() - self._renewed > self._limit:
            raise self._overdue("runs one program after the other")
        self._running = True

    def ended(self) -> None:
        """Note that the holder's run is over."""
        self._running = False
        self._idle_since = time.monotonic()
        self._look_after()

    def renew(self, client: LeaseHolder) -> bool:
        """Keep it, unless somebody waits: return whether ``client`` still holds it."""
        if self._holder is not client:
            return False
        if self._queue:
            self.release(client)
            return False
        self._renewed = self._idle_since = time.monotonic()
        return True

    def release(self, client: LeaseHolder) -> None:
        """Give it to the next who waits, if ``client`` holds it."""
        if self._holder is not client:
            return
        self._holder = None
        self._running = False
        if self._let_go is not None:
            self._let_go()
        while self._queue:
            following, granted = self._queue.popleft()
            if not granted.done():
                self._give(following)
                granted.set_result(None)
                self._look_after()
                return

    def leave(self, client: LeaseHolder) -> None:
        """Forget that ``client`` waits: its connection has ended."""
        for waiting, granted in list(self._queue):
            if waiting is client:
                self._queue.remove((waiting, granted))
                granted.cancel()

    # -- those who don't give it up

    def _look_after(self) -> None:
        """See to it that a holder that does nothing is noticed, as long as somebody waits."""
        if self._watch is None and self._queue and not self._running:
            loop = asyncio.get_running_loop()
            left = self._idle_since + self._limit - time.monotonic()
            self._watch = loop.call_later(max(left, 0.0), self._look)

    def _look(self) -> None:
        self._watch = None
        if self._holder is None or not self._queue or self._running:
            return
        if time.monotonic() - self._idle_since >= self._limit:
            self._holder.end(self._overdue("runs nothing"))
            return
        self._look_after()

    def _overdue(self, what: str) -> LimitReached:
        return LimitReached(
            "--peer-timeout",
            f"has the device's lease for {self._limit:g} s, {what} and others wait",
        )
