"""Passes TCP connections on to a server, byte for byte, and lets somebody watch.

Each client gets a connection of its own to the server. Bytes are passed on before they are shown to
the watcher. A side that doesn't take its bytes stops the other side from sending (back-pressure);
one that has ended its stream may still receive (half-close); a connection that is broken off on one
side is broken off on the other.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Callable
from typing import Protocol, cast

from protocol.endpoint import format_endpoint
from protocol.observe.events import Side
from tools.record.frames import Address

# Bytes that may wait for a side that is slow to take them.
_BUFFER = 4 << 20
_CONNECT_SECONDS = 10.0
_ENDING_SECONDS = 1.0
_ABORT = struct.pack("ii", 1, 0)


class WatchedConnection(Protocol):
    """Is told what happens on one connection; times are nanoseconds since 1970."""

    def data(self, side: Side, data: bytes, time_ns: int) -> None: ...

    def ended(self, side: Side, time_ns: int) -> None: ...

    def reset(self, side: Side, time_ns: int) -> None: ...


class Watcher(Protocol):
    """Is told which connections there are; ``server`` is the address that the client asked for."""

    def opened(self, client: Address, server: Address, time_ns: int) -> WatchedConnection: ...

    def refused(self, client: Address, server: Address, time_ns: int) -> None: ...


class Proxy:
    """Serves until it is closed. ``report`` takes lines for the user."""

    def __init__(
        self, to: tuple[str, int], watcher: Watcher, report: Callable[[str], None]
    ) -> None:
        self.to = to
        self.watcher = watcher
        self.report = report
        self.links: set[_Link] = set()
        self._server: asyncio.Server | None = None

    async def listen(self, host: str, port: int) -> int:
        """Accept connections there; the port, which the system chooses for 0. OSError."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Link(self).ends[Side.CLIENT], host, port)
        number: int = self._server.sockets[0].getsockname()[1]
        return number

    async def close(self) -> None:
        """Accept nobody any more and break off what is open.

        Connections that a side has ended get a moment for the other to do so.
        """
        if self._server is not None:
            self._server.close()
        end = time.monotonic() + _ENDING_SECONDS
        while any(link.ending for link in self.links) and time.monotonic() < end:
            await asyncio.sleep(0.01)
        for link in list(self.links):
            if link.watch is not None:
                link.watch.reset(Side.SERVER, time.time_ns())
            link.break_off()
        # Transports tell of their end in the next turn of the loop.
        await asyncio.sleep(0)


class _Link:
    """A client's connection and the one made for it."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.ends = {side: _End(self, side) for side in Side}
        self.watch: WatchedConnection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._early = b""

    @property
    def ending(self) -> bool:
        """True if one side has ended its stream."""
        return any(end.ended for end in self.ends.values())

    def accepted(self) -> None:
        self.proxy.links.add(self)
        self._connecting = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        transport = self.ends[Side.CLIENT].transport
        client = Address(*transport.get_extra_info("peername")[:2])
        server = Address(*transport.get_extra_info("sockname")[:2])
        now = time.time_ns()
        loop = asyncio.get_running_loop()
        host, port = self.proxy.to
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await loop.create_connection(lambda: self.ends[Side.SERVER], host, port)
        except OSError as error:
            reason = error.strerror or "no answer"
            self.proxy.report(
                f"{client}: no connection to {format_endpoint(host, port)} ({reason})"
            )
            self.proxy.watcher.refused(client, server, now)
            self.break_off()
            return
        self.watch = self.proxy.watcher.opened(client, server, now)
        early, self._early = self._early, b""
        if early:
            self.passed(Side.CLIENT, early)
        if self.ends[Side.CLIENT].ended:
            self.ended(Side.CLIENT)
        transport.resume_reading()

    def passed(self, side: Side, data: bytes) -> None:
        if self.watch is None:
            # There is no server yet; this is a HELLO, and no more is read before it has gone on.
            self._early += data
            self.ends[side].transport.pause_reading()
            return
        now = time.time_ns()
        self.ends[side.other].transport.write(data)
        self.watch.data(side, data, now)

    def ended(self, side: Side) -> None:
        if self.watch is None:
            return
        now = time.time_ns()
        other = self.ends[side.other]
        if not other.transport.is_closing():
            other.transport.write_eof()
        self.watch.ended(side, now)
        if other.ended:
            for end in self.ends.values():
                end.transport.close()

    def lost(self, side: Side) -> None:
        """A side's connection is over, by an error unless both streams had ended."""
        if not all(end.ended for end in self.ends.values()) and self in self.proxy.links:
            if self.watch is not None:
                self.watch.reset(side, time.time_ns())
            self.break_off()
        self.proxy.links.discard(self)

    def break_off(self) -> None:
        self.proxy.links.discard(self)
        if self._connecting is not None:
            self._connecting.cancel()
        for end in self.ends.values():
            end.break_off()


class _End(asyncio.Protocol):
    """One side of a link, as asyncio knows it."""

    def __init__(self, link: _Link, side: Side) -> None:
        self._link = link
        self._side = side
        self._made = False
        self.transport: asyncio.Transport
        self.ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._made = True
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=_BUFFER)
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._side is Side.CLIENT:
            self._link.accepted()

    def data_received(self, data: bytes) -> None:
        self._link.passed(self._side, data)

    def eof_received(self) -> bool:
        self.ended = True
        self._link.ended(self._side)
        # The other direction stays open.
        return True

    def pause_writing(self) -> None:
        self._link.ends[self._side.other].transport.pause_reading()

    def resume_writing(self) -> None:
        self._link.ends[self._side.other].transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._link.lost(self._side)

    def break_off(self) -> None:
        if not self._made or self.transport.is_closing():
            return
        sock = self.transport.get_extra_info("socket")
        # The peer is told that this is no proper end.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
        self.transport.abort()
