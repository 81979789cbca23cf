"""The TLS port: a handshake, a token if one is asked for, then a client as on the plain port."""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
import ssl
from collections.abc import Coroutine, Iterable
from typing import Any, Protocol

from client.errors import ConnectionLost
from client.tunnel import End, keep_alive, near_end
from protocol.token import ACCEPTED, HEAD_SIZE, LONGEST, REFUSED, token_size
from rpc_server.net.admission import Admission
from rpc_server.observability.metrics import ClientStats
from rpc_server.session.context import ServerContext

log = logging.getLogger(__name__)

# How long a peer is waited for that doesn't say that it has ended TLS.
_SHUTDOWN_SECONDS = 2.0
# When the process has no file descriptors left.
_ACCEPT_AGAIN_SECONDS = 0.5


class TokenRefusedError(Exception):
    """The client showed no token or another one; the message says which, not what."""


class Host(Protocol):
    """The server that the TLS port is part of."""

    context: ServerContext
    admission: Admission
    # The far ends of tunnels.
    tunnels: set[End]

    def introduce(self, peer: tuple[object, ...] | None, *, secure: bool = False) -> ClientStats:
        """Return the statistics of a new client, with its number and name."""
        ...

    def connection(self, guest: ClientStats) -> asyncio.BaseProtocol:
        """Return the near end of a tunnel, for a client that was let in."""
        ...

    def tunnel_ended(self, end: End, address: str) -> None:
        """Note that the client at the far end is gone."""
        ...


class SecureListener:
    """Listens for TLS, and makes a tunnel to a connection of ``server`` for whoever is let in.

    Sockets are accepted here rather than by a protocol: TLS has to have them from the first byte.
    """

    def __init__(
        self,
        server: Host,
        sockets: Iterable[socket.socket],
        tls: ssl.SSLContext,
        token: bytes | None,
    ) -> None:
        """``sockets`` listen (see listening.listen)."""
        self._server = server
        self._tls = tls
        self._token = token
        self._sockets = list(sockets)
        self._tasks: set[asyncio.Task[None]] = set()
        for listener in self._sockets:
            self._begin(self._accept(listener))

    def close(self) -> None:
        """Accept no more, and drop those who are being let in."""
        for task in self._tasks:
            task.cancel()
        for listener in self._sockets:
            listener.close()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, peer = await loop.sock_accept(listener)
            except OSError as error:
                log.warning("can't accept a connection: %s", error.strerror or error)
                await asyncio.sleep(_ACCEPT_AGAIN_SECONDS)
                continue
            stats = self._server.introduce(peer, secure=True)
            if not self._server.admission.knock(stats.address, stats.name):
                accepted.close()
                continue
            self._begin(self._let_in(accepted, stats))

    async def _let_in(self, accepted: socket.socket, stats: ClientStats) -> None:
        server = self._server
        end: End | None = None
        try:
            async with asyncio.timeout(server.context.limits.handshake):
                end = await self._open(accepted)
                await self._check_token(end)
        except (ConnectionLost, TimeoutError, OSError, TokenRefusedError) as error:
            if isinstance(error, TokenRefusedError) and end is not None:
                end.write(REFUSED)
                end.close()
            else:
                accepted.close() if end is None else end.abort()
            reason = "token" if isinstance(error, TokenRefusedError) else "tls"
            server.admission.refuse(reason, stats.name, _text(error))
            return
        except BaseException:
            accepted.close()
            raise
        finally:
            server.admission.let_go(stats.address)
        if not server.admission.admit(stats.address, stats.name):
            end.abort()
            return
        tunnel = end
        tunnel.on_lost = lambda: server.tunnel_ended(tunnel, stats.address)
        server.tunnels.add(tunnel)
        await near_end(tunnel, lambda: server.connection(stats))

    async def _open(self, accepted: socket.socket) -> End:
        """TLS on a socket. Raises OSError, which SSLError is."""
        accepted.setblocking(False)
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        keep_alive(accepted)
        # Which protocol this returns, event loops do not agree on.
        end = End()
        await asyncio.get_running_loop().connect_accepted_socket(
            lambda: end,
            accepted,
            ssl=self._tls,
            ssl_handshake_timeout=self._server.context.limits.handshake,
            ssl_shutdown_timeout=_SHUTDOWN_SECONDS,
        )
        return end

    async def _check_token(self, end: End) -> None:
        """Raises TokenRefusedError, ConnectionLost."""
        size = token_size(await end.peek(HEAD_SIZE))
        if size is None:
            if self._token is not None:
                raise TokenRefusedError("it showed no token")
            return
        if size > LONGEST:
            raise TokenRefusedError("its token is too long to be one")
        await end.read(HEAD_SIZE)
        shown = await end.read(size)
        if self._token is not None and not hmac.compare_digest(shown, self._token):
            raise TokenRefusedError("its token is another one")
        end.write(ACCEPTED)


def _text(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or error}"
    if isinstance(error, TimeoutError):
        return "no TLS handshake and token in time (--handshake-timeout)"
    return f"TLS: {error}" if not isinstance(error, TokenRefusedError) else str(error)
