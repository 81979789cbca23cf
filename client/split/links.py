"""A link: a connection to a server of a split whose bytes are those of exchanged tensors."""

from __future__ import annotations

import asyncio

from client.connection import Connection, connect_any
from protocol.commands import Command
from protocol.endpoint import format_endpoint
from protocol.errors import ProtocolError
from protocol.split import SWAPS_SINCE

_TIMEOUT = 10.0


class LinkError(Exception):
    """There is no link to a server; the message names it and says why."""


class Link:
    """A connection that is a link; its socket is for the caller to read and write."""

    def __init__(self, connection: Connection, fd: int) -> None:
        self._connection = connection
        self._fd = fd

    def fileno(self) -> int:
        """Return the socket's file descriptor; it is non-blocking."""
        return self._fd

    def abort(self) -> None:
        """Give the socket back to the system; a twin of it stays connected."""
        self._connection.abort()


async def open_link(host: str, port: int, secret: bytes, number: int) -> Link:
    """Join the group that has ``secret`` at a server, as its member ``number``.

    Raises LinkError.
    """
    name = format_endpoint(host, port)
    try:
        connection = await connect_any(host, port, timeout=_TIMEOUT, split=True)
    except (OSError, ProtocolError) as error:
        raise LinkError(f"{name} can't be reached ({_text(error)})") from None
    try:
        if connection.split_version < SWAPS_SINCE:
            raise LinkError(f"{name} has no version {SWAPS_SINCE} of the split extension")
        connection.enable_keepalive()
        async with asyncio.timeout(_TIMEOUT):
            await connection.request(Command.SPLIT_JOIN, secret=secret, number=number)
            return Link(connection, await connection.lend())
    except (OSError, ProtocolError) as error:
        connection.abort()
        raise LinkError(f"{name} does not let us in ({_text(error)})") from None
    except BaseException:
        connection.abort()
        raise


def _text(error: Exception) -> str:
    """Return what an error says; a time that ran out says nothing."""
    if isinstance(error, TimeoutError):
        return f"no answer within {_TIMEOUT:g} s"
    return str(getattr(error, "strerror", None) or error)
