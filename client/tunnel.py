"""ggml RPC inside of TLS: a connection whose near end is an ordinary socket.

What speaks ggml RPC here lends its socket to compiled code at times (a split model exchanges a
hundred messages a token), so it has to be a plain one. A tunnel is a pair of connected sockets, one
of them for the speaker; an :class:`End` at the other and an End at the TLS connection hand over
what arrives, each waiting when the other is full. The server uses the same for its TLS port.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

from client.errors import ConnectionLost
from protocol.token import ACCEPTED, check_token, encode_token

P = TypeVar("P", bound=asyncio.BaseProtocol)

# What may wait on its way; an activation of a token is some ten kilobytes.
_WAITING = 256 << 10
_SOCKET_BUFFER = 1 << 20


class SecretError(ValueError):
    """A certificate, key or token can't be used; the message has no secret in it."""


class End(asyncio.Protocol):
    """One end of a tunnel. What arrives before it is joined to the other is for :meth:`read`."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._other: End | None = None
        self._early = bytearray()
        self._news = asyncio.Event()
        self._lost = False
        # Called when the connection has ended.
        self.on_lost: Callable[[], None] = lambda: None

    def use(self, transport: asyncio.BaseTransport) -> None:
        """Speak over this transport."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_WAITING)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.use(transport)

    def data_received(self, data: bytes) -> None:
        if self._other is not None:
            self._other.write(data)
            return
        self._early += data
        self._news.set()
        if len(self._early) > _WAITING and self._transport is not None:
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._lost = True
        self._news.set()
        if self._other is not None:
            self._other.close()
        self.on_lost()

    def pause_writing(self) -> None:
        if self._other is not None:
            self._other.pause(True)

    def resume_writing(self) -> None:
        if self._other is not None:
            self._other.pause(False)

    async def peek(self, n: int) -> bytes:
        """Return the first ``n`` bytes, left where they are. Raises ConnectionLost."""
        while len(self._early) < n:
            if self._lost:
                raise ConnectionLost("the peer hung up")
            self._news.clear()
            await self._news.wait()
        return bytes(self._early[:n])

    async def read(self, n: int) -> bytes:
        """Return the first ``n`` bytes. Raises ConnectionLost."""
        data = await self.peek(n)
        del self._early[:n]
        return data

    def write(self, data: bytes | bytearray) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def pause(self, paused: bool) -> None:
        """Take nothing more for now, or go on."""
        if self._transport is None or self._transport.is_closing():
            return
        # Both are errors when they change nothing.
        with contextlib.suppress(RuntimeError):
            if paused:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def close(self) -> None:
        """Hang up, after what is on its way."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def join(self, other: End) -> None:
        """Send on from now on what arrives at one by the other."""
        self._other, other._other = other, self
        for end, beyond in ((self, other), (other, self)):
            early, end._early = end._early, bytearray()
            if early:
                beyond.write(early)
            if end._lost:
                beyond.close()
            else:
                end.pause(False)


async def near_end(far: End, factory: Callable[[], P]) -> P:
    """Return a protocol of ``factory`` on a plain socket, whose bytes go through ``far``."""
    loop = asyncio.get_running_loop()
    near_socket, far_socket = socket.socketpair()
    for s in (near_socket, far_socket):
        s.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            s.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)
    local = hasattr(socket, "AF_UNIX") and near_socket.family == socket.AF_UNIX
    connect = loop.create_unix_connection if local else loop.create_connection
    inner = End()
    await connect(lambda: inner, sock=far_socket)
    protocol = factory()
    await connect(lambda: protocol, sock=near_socket)
    far.join(inner)
    return protocol


async def open_tunnel(
    host: str, port: int, factory: Callable[[], P], tls: ssl.SSLContext, token: bytes | None
) -> P:
    """Connect by TLS, show the token, and make a protocol on the near end of it.

    Raises ConnectionLost if the token is refused, ssl.SSLError, OSError.
    """
    loop = asyncio.get_running_loop()
    end = End()
    transport, _ = await loop.create_connection(lambda: end, host, port, ssl=tls)
    try:
        keep_alive(transport.get_extra_info("socket"))
        if token is not None:
            end.write(encode_token(token))
            try:
                answer = await end.read(1)
            except ConnectionLost:
                answer = b""
            if answer != ACCEPTED:
                raise ConnectionLost("the server refused the token")
        return await near_end(end, factory)
    except BaseException:
        transport.abort()
        raise


def keep_alive(sock: socket.socket, idle: int = 10, interval: int = 5, probes: int = 3) -> None:
    """Probe an idle peer after ``idle`` seconds, and give up after ``probes`` without an answer.

    Nothing to do for a socket within this machine.
    """
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", idle),
        ("TCP_KEEPINTVL", interval),
        ("TCP_KEEPCNT", probes),
    ):
        # Not every system has all three.
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def client_context(
    ca: Path | None = None, cert: Path | None = None, key: Path | None = None
) -> ssl.SSLContext:
    """Return TLS to a server whose certificate ``ca`` vouches for (None: the system's).

    ``cert`` and ``key`` are this client's own, for servers that ask. Raises SecretError.
    """
    try:
        context = ssl.create_default_context(cafile=ca)
        if cert is not None:
            context.load_cert_chain(cert, key)
    except OSError as error:
        files = ", ".join(str(f) for f in (ca, cert, key) if f is not None)
        raise SecretError(f"can't use {files}: {_reason(error)}") from None
    return context


def server_context(cert: Path, key: Path | None, ca: Path | None = None) -> ssl.SSLContext:
    """Return TLS for a server.

    With ``ca`` only clients whose certificate it vouches for are let in.

    Raises SecretError.
    """
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ca)
        if ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(cert, key)
    except OSError as error:
        files = ", ".join(str(f) for f in (cert, key, ca) if f is not None)
        raise SecretError(f"can't use {files}: {_reason(error)}") from None
    return context


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def read_token(path: Path | None, variable: str) -> bytes | None:
    """Return the token in a file, or else in an environment variable; None if there is neither.

    White space around it doesn't count. Raises SecretError.
    """
    try:
        if path is not None:
            return check_token(path.read_bytes().strip())
        text = os.environ.get(variable)
        return check_token(text.strip().encode()) if text is not None else None
    except OSError as error:
        raise SecretError(f"can't read {path}: {error.strerror}") from None
    except ValueError as error:
        raise SecretError(f"{path or variable}: {error}") from None
