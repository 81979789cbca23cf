"""Sockets: listens, lets clients in, moves bytes between each connection and its session."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import ssl
import time
from collections.abc import Iterable, Iterator
from typing import cast

from client.tunnel import End, keep_alive
from protocol.endpoint import format_endpoint
from rpc_server.net.admission import Admission, Network, is_allowed
from rpc_server.net.timeouts import Deadlines, Watched, sweep
from rpc_server.net.tls import SecureListener
from rpc_server.observability.metrics import ClientStats
from rpc_server.session.context import ServerContext
from rpc_server.session.dispatch import dispatch
from rpc_server.session.state import Session
from rpc_server.sockets import shut_down

log = logging.getLogger(__name__)

# How long one client's requests are handled before others have their turn, seconds.
_TURN_SECONDS = 0.005
# How long devices are waited for, when the server ends, once nothing holds them any more.
_CLOSE_SECONDS = 5.0

_numbers = itertools.count(1)


class ClientConnection(asyncio.BufferedProtocol):
    """One client's socket. Received bytes go where the reader says, weights into their buffer."""

    def __init__(self, server: Server, guest: ClientStats | None = None) -> None:
        """``guest`` was let in already, and this is the near end of its tunnel."""
        self._server = server
        self._session: Session | None = None
        self._stats = guest
        self._tunnelled = guest is not None
        self._transport: asyncio.Transport | None = None
        self._paused = False
        # Whether requests that have come wait for the next turn.
        self._queued = False
        self.clock = Deadlines(server.context.limits, time.monotonic())

    @property
    def session(self) -> Session | None:
        """None until the client is let in."""
        return self._session

    def connection_made(self, base: asyncio.BaseTransport) -> None:
        # uvloop's transports behave like asyncio's but don't inherit from them.
        transport = self._transport = cast(asyncio.Transport, base)
        stats = self._stats
        if stats is None:
            stats = self._server.introduce(transport.get_extra_info("peername"))
            if not self._server.admission.admit(stats.address, stats.name):
                transport.abort()
                return
        # Any unsent byte counts as full: see Session, which must not change what is being sent.
        transport.set_write_buffer_limits(high=0)
        # A client whose machine is gone must not keep memory, or a thread that reads its stream.
        keep_alive(transport.get_extra_info("socket"))
        context = self._server.context
        self._stats = stats
        self._session = Session(context, transport, stats, self._pump)
        context.stats.connected(stats)
        self._server.connections.add(self)
        self._session.log.debug("connected")

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        session, stats = self._session, self._stats
        if session is None or stats is None:
            return
        self._server.connections.discard(self)
        if not self._tunnelled:
            self._server.admission.leave(stats.address)
        if error is not None:
            session.log.warning("connection lost: %s", error)
        session.connection_lost()
        # Transport, connection and session name each other: without that, memory of clients that
        # are gone would be held until the collector of cycles comes along, which is seldom.
        self._session = None

    def eof_received(self) -> bool:
        return False

    def get_buffer(self, sizehint: int) -> memoryview:
        assert self._session is not None
        return self._session.reader.receive_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        assert self._session is not None
        assert self._stats is not None
        self._stats.bytes_in += nbytes
        self._session.reader.received(nbytes)
        self._pump()

    def pause_writing(self) -> None:
        if self._session is not None:
            self._session.pause_writing()

    def resume_writing(self) -> None:
        if self._session is not None:
            self._session.resume_writing()
            self._leave_at_rest()

    def drain(self) -> None:
        """Close as soon as the client has the answers to all it has asked so far."""
        if self._session is not None:
            self._session.leaving = True
            self._leave_at_rest()

    def _leave_at_rest(self) -> None:
        session = self._session
        if session is not None and session.leaving and session.at_rest and self._transport:
            self._transport.close()

    def abort(self) -> None:
        """Close at once; the session frees what it has."""
        if self._transport is not None:
            if self._session is not None:
                self._session.leaving = True
                self._session.stop_running()
                if self._session.lent:
                    # A thread waits on the socket: closing it would not wake it.
                    shut_down(self._transport.get_extra_info("socket").fileno())
            self._transport.abort()

    def _next_turn(self) -> None:
        self._queued = False
        self._pump()

    def _pump(self) -> None:
        """Take events until one has to wait, more bytes are needed or the turn is over."""
        session, transport = self._session, self._transport
        if session is None or transport is None or transport.is_closing():
            return
        end = time.monotonic() + _TURN_SECONDS
        try:
            while not (session.busy or self._queued):
                event = session.reader.next_event()
                session.share.message(session.reader.held)
                if event is None:
                    break
                dispatch(session, event)
                if time.monotonic() > end:
                    self._queued = True
                    asyncio.get_running_loop().call_soon(self._next_turn)
        except Exception as error:
            session.failed(error)
            transport.abort()
            return
        if session.leaving:
            self._leave_at_rest()
        # A program that runs reads the socket by itself, and so do swaps.
        if (session.reader.full or session.lent) != self._paused:
            self._paused = not self._paused
            if self._paused:
                transport.pause_reading()
            else:
                transport.resume_reading()


class Server:
    """Serves ``context``, and refuses clients from elsewhere than ``allowed`` if that is given."""

    def __init__(self, context: ServerContext, allowed: tuple[Network, ...] = ()) -> None:
        self.context = context
        context.lets_in = lambda address: is_allowed(address, allowed)
        self.connections: set[ClientConnection] = set()
        self.admission = Admission(allowed, context.limits, context.stats)
        # Of the TLS port: the far ends of tunnels.
        self.tunnels: set[End] = set()
        self._listeners: list[asyncio.AbstractServer | SecureListener] = []
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self, sockets: Iterable[socket.socket]) -> None:
        """Let clients in that connect to ``sockets``, which listen (see listening.listen)."""
        loop = asyncio.get_running_loop()
        for listening in sockets:
            listener = await loop.create_server(lambda: ClientConnection(self), sock=listening)
            self._listeners.append(listener)
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(sweep(self.context.limits, self._watched))

    def start_tls(
        self, sockets: Iterable[socket.socket], tls: ssl.SSLContext, token: bytes | None
    ) -> None:
        """Let in clients with TLS on ``sockets``; they have to show ``token`` if there is one."""
        self._listeners.append(SecureListener(self, sockets, tls, token))

    def connection(self, guest: ClientStats) -> ClientConnection:
        """Return the near end of a tunnel, for a client that was let in."""
        return ClientConnection(self, guest)

    def introduce(self, peer: tuple[object, ...] | None, *, secure: bool = False) -> ClientStats:
        """Return statistics of a new client, with its number and name."""
        number = next(_numbers)
        address, port = (str(peer[0]), str(peer[1])) if peer else ("?", "?")
        name = f"client {number} ({format_endpoint(address, port)})"
        return ClientStats(number=number, name=name, address=address, secure=secure)

    def tunnel_ended(self, end: End, address: str) -> None:
        """Take note that the client at the far end is gone."""
        self.tunnels.discard(end)
        self.admission.leave(address)

    def _watched(self) -> Iterator[tuple[Deadlines, Watched]]:
        for connection in self.connections:
            if connection.session is not None:
                yield connection.clock, connection.session

    async def drain(self, seconds: float) -> None:
        """Let no one in, and end each connection when what it has asked for is done.

        Returns when all have ended, or after ``seconds``.
        """
        self.context.stats.draining = True
        for listener in self._listeners:
            listener.close()
        for connection in list(self.connections):
            connection.drain()
        sessions = [c.session for c in self.connections if c.session is not None]
        # Links end with what they are for.
        waiting = [s for s in sessions if not (s.at_rest or s.linked)]
        if waiting and seconds:
            log.info(
                "%d clients have something under way; waiting %g s for them (--drain-seconds)",
                len(waiting),
                seconds,
                extra={"event": "draining", "clients": len(waiting)},
            )
        end = time.monotonic() + seconds
        while (self.connections or self.tunnels) and time.monotonic() < end:
            await asyncio.sleep(0.02)

    async def stop(self) -> bool:
        """Drop all clients that are left, end the devices' threads; whether these have ended.

        What runs is stopped at its next node.
        """
        for listener in self._listeners:
            listener.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in list(self.connections):
            connection.abort()
        for tunnel in list(self.tunnels):
            tunnel.abort()
        closing = [asyncio.to_thread(b.device.close) for b in self.context.budgets]
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await asyncio.gather(*closing)
                for listener in self._listeners:
                    if isinstance(listener, asyncio.AbstractServer):
                        await listener.wait_closed()
        except TimeoutError:
            return False
        return True
