"""A server that says what a test tells it to, byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from client.connection import Connection, connect
from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import DIALECTS, Dialect

_FRAME = struct.Struct("<BQ")


@dataclass
class Peer:
    """The server's end of one connection."""

    dialect: Dialect
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def take(self, command: Command) -> tuple[Any, bytes]:
        """The next request, which has to be ``command``: its fields and what follows them."""
        number, size = _FRAME.unpack(await self.reader.readexactly(_FRAME.size))
        assert number == command
        payload = await self.reader.readexactly(size)
        head = codec(self.dialect.commands[command].request)
        return head.parse(payload), payload[head.size :]

    async def answer(self, command: Command, **fields: Any) -> None:
        await self.send(codec(self.dialect.commands[command].response).build(fields))

    async def send(self, payload: bytes) -> None:
        """An answer of any content."""
        await self.send_raw(struct.pack("<Q", len(payload)) + payload)

    async def send_raw(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def hello(self, version: tuple[int, int, int] | None = None) -> None:
        major, minor, patch = version or self.dialect.version
        await self.take(Command.HELLO)
        await self.answer(Command.HELLO, major=major, minor=minor, patch=patch, conn_caps=bytes(24))


Script = Callable[[Peer], Awaitable[None]]


@contextlib.asynccontextmanager
async def scripted(dialect: Dialect, script: Script) -> AsyncIterator[int]:
    """Serve one connection by ``script``; yields the port. What the script raises is raised."""
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            # A client that gives up before HELLO is answered resets the connection.
            with contextlib.suppress(ConnectionResetError):
                await script(Peer(dialect, reader, writer))
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 22)
    async with server:
        yield server.sockets[0].getsockname()[1]
        await asyncio.wait_for(done, 60)


@contextlib.asynccontextmanager
async def talking_to(
    script: Script, dialect: Dialect = DIALECTS[0], *, version: str | None = None
) -> AsyncIterator[Connection]:
    """A client's connection to a server that goes by ``script``, HELLO included."""
    async with (
        scripted(dialect, script) as port,
        await connect("127.0.0.1", port, version=version or dialect) as connection,
    ):
        yield connection
