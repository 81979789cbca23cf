"""Sockets: listens, and moves bytes between each connection and its session."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from typing import cast

from client.connection import keep_alive
from rpc_server.context import ServerContext
from rpc_server.session import Session
from rpc_server.sockets import shut_down

log = logging.getLogger(__name__)


class Connection(asyncio.BufferedProtocol):
    """One client's socket. Received bytes go where the reader says, weights into their buffer."""

    _numbers = itertools.count(1)

    def __init__(self, context: ServerContext, connections: set[Connection]) -> None:
        self._context = context
        self._connections = connections
        self._session: Session | None = None
        self._transport: asyncio.Transport | None = None
        self._paused = False

    def connection_made(self, base: asyncio.BaseTransport) -> None:
        # uvloop's transports behave like asyncio's but don't inherit from them.
        transport = self._transport = cast(asyncio.Transport, base)
        peer = transport.get_extra_info("peername")
        address = str(peer[0]) if peer else "?"
        name = f"client {next(self._numbers)} ({address}:{peer[1] if peer else '?'})"
        # Any unsent byte counts as full: see Session, which must not change what is being sent.
        transport.set_write_buffer_limits(high=0)
        # A client whose machine is gone must not keep memory, or a thread that reads its stream.
        keep_alive(transport.get_extra_info("socket"))
        self._session = Session(self._context, transport, address, name, self._pump)
        self._connections.add(self)
        log.debug("%s: connected", name)

    def connection_lost(self, error: Exception | None) -> None:
        session = self._session
        assert session is not None
        self._connections.discard(self)
        if error is not None:
            log.warning("%s: connection lost: %s", session.name, error)
        session.connection_lost()
        self._transport = None

    def eof_received(self) -> bool:
        return False

    def get_buffer(self, sizehint: int) -> memoryview:
        assert self._session is not None
        return self._session.reader.receive_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        assert self._session is not None
        self._session.reader.received(nbytes)
        self._pump()

    def pause_writing(self) -> None:
        assert self._session is not None
        self._session.pause_writing()

    def resume_writing(self) -> None:
        assert self._session is not None
        self._session.resume_writing()

    def abort(self) -> None:
        """Close at once; the session frees what it has."""
        if self._transport is not None:
            if self._session is not None and self._session.streaming:
                # A thread waits on the socket: closing it would not wake it.
                shut_down(self._transport.get_extra_info("socket").fileno())
            self._transport.abort()

    def _pump(self) -> None:
        """Take events until one has to wait or more bytes are needed."""
        session, transport = self._session, self._transport
        if session is None or transport is None or transport.is_closing():
            return
        try:
            while not session.busy:
                event = session.reader.next_event()
                if event is None:
                    break
                session.handle(event)
        except Exception as error:
            session.failed(error)
            transport.abort()
            return
        # A program that runs reads the socket by itself.
        if (session.reader.full or session.streaming) != self._paused:
            self._paused = not self._paused
            if self._paused:
                transport.pause_reading()
            else:
                transport.resume_reading()


class Server:
    """Serves ``context`` on one address. Raises OSError from :meth:`start` if it can't listen."""

    def __init__(self, context: ServerContext) -> None:
        self.context = context
        self._connections: set[Connection] = set()
        self._listener: asyncio.AbstractServer | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; the port, which the system chose if ``port`` is 0."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(
            lambda: Connection(self.context, self._connections), host, port, backlog=64
        )
        bound: int = self._listener.sockets[0].getsockname()[1]
        return bound

    async def stop(self) -> None:
        """Stop listening, drop all clients, end the devices' threads after what they run."""
        if self._listener is not None:
            self._listener.close()
        for connection in list(self._connections):
            connection.abort()
        if self._listener is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._listener.wait_closed(), 5)
        for budget in self.context.budgets:
            await asyncio.to_thread(budget.device.close)
