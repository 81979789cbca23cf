"""Limits in time. Nothing is timed where requests are handled: a sweep looks at all connections.

So a limit costs nothing while it isn't reached, and is noticed up to a quarter of it too late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol

from rpc_server.limits import STALL_BYTES, LimitReached, ServerLimits

_SHORTEST, _LONGEST = 0.02, 5.0


class Watched(Protocol):
    """A connection as the sweep sees it. Bytes, seconds, monotonic times."""

    # How many messages were handled, and bytes received and taken by the peer, so far.
    handled: int

    @property
    def received(self) -> int: ...
    @property
    def taken(self) -> int: ...
    @property
    def greeted(self) -> bool:
        """Return whether HELLO has come."""
        ...

    @property
    def awaits_rest(self) -> bool:
        """Return whether a message has begun and it is the peer's turn to go on with it."""
        ...

    @property
    def awaits_taking(self) -> bool:
        """Return whether answers wait for the peer to take them."""
        ...

    @property
    def at_rest(self) -> bool:
        """Return whether nothing is under way in either direction."""
        ...

    def graph_seconds(self, now: float) -> float:
        """Return how long a graph has been running; 0 if none is."""
        ...

    def overran(self, error: LimitReached) -> None:
        """End the client, whose graph has run too long."""
        ...

    def end(self, error: LimitReached) -> None:
        """End the connection because of this."""
        ...


class _Pace:
    """The pace of one direction: a window begins anew with every 64 KiB and every message."""

    def __init__(self) -> None:
        self._since = 0.0
        self._at = 0
        self._message = -1

    def still(self, now: float, waiting: bool, moved: int, message: int) -> float:
        """Seconds since the window began."""
        if not waiting or message != self._message or moved - self._at >= STALL_BYTES:
            self._since, self._at, self._message = now, moved, message
        return now - self._since


class Deadlines:
    """The times of one connection, and which of its limits is reached."""

    def __init__(self, limits: ServerLimits, now: float) -> None:
        self._limits = limits
        self._since = now
        self._in = _Pace()
        self._out = _Pace()
        self._idle = _Pace()

    def look(self, peer: Watched, now: float) -> None:
        """End the connection if it is at a limit."""
        limits = self._limits
        if limits.graph is not None and peer.graph_seconds(now) > limits.graph:
            peer.overran(
                LimitReached("--graph-timeout", f"a graph runs longer than {limits.graph:g} s")
            )
            return
        if not peer.greeted and now - self._since > limits.handshake:
            peer.end(LimitReached("--handshake-timeout", f"no HELLO within {limits.handshake:g} s"))
            return
        if limits.stall is not None:
            still = self._in.still(now, peer.awaits_rest, peer.received, peer.handled)
            if still > limits.stall:
                peer.end(
                    LimitReached(
                        "--stall-timeout", f"a message does not go on for {limits.stall:g} s"
                    )
                )
                return
            # Of answers there is no end to see: bytes alone count.
            still = self._out.still(now, peer.awaits_taking, peer.taken, 0)
            if still > limits.stall:
                peer.end(
                    LimitReached("--stall-timeout", f"answers are not taken for {limits.stall:g} s")
                )
                return
        if limits.idle is not None:
            still = self._idle.still(now, peer.at_rest, 0, peer.handled)
            if still > limits.idle:
                peer.end(LimitReached("--idle-timeout", f"idle for {limits.idle:g} s"))


async def sweep(
    limits: ServerLimits, connections: Callable[[], Iterable[tuple[Deadlines, Watched]]]
) -> None:
    """Look at all connections again and again, until cancelled."""
    times = (limits.handshake, limits.stall, limits.graph, limits.idle)
    shortest = min(t for t in times if t is not None)
    pause = min(max(shortest / 4, _SHORTEST), _LONGEST)
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(pause)
        now = loop.time()
        for clock, peer in list(connections()):
            clock.look(peer, now)
