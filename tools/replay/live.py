"""A connection to the server that a recording is played to.

Answers are received whenever they come: a server that waits for its answer to be taken would not
read the requests behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections import deque

_SIZE = struct.Struct("<Q")
_BUFFER = 4 << 20


class ServerGoneError(Exception):
    """The server closed the connection or answers with what no answer can be."""


class Live:
    """Sends requests; answers come in the order in which they were announced by ``expect``."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._answers: deque[asyncio.Future[tuple[bytes, float]]] = deque()
        self._due: asyncio.Queue[tuple[int, bool, asyncio.Future[tuple[bytes, float]]]] = (
            asyncio.Queue()
        )
        self._receiving = asyncio.create_task(self._receive())

    @classmethod
    async def connect(cls, host: str, port: int, timeout: float) -> Live:
        """Connect; OSError or TimeoutError."""
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(host, port, limit=_BUFFER)
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(reader, writer)

    async def send(self, data: bytes, *, ahead: bool = False) -> float:
        """Send bytes; when they had left. Raises ServerGoneError.

        Those that are sent ``ahead`` may be wanted later only, and are not waited for.
        """
        try:
            self._writer.write(data)
            if not ahead:
                await self._writer.drain()
        except ConnectionError as error:
            raise ServerGoneError("it closed the connection") from error
        return time.perf_counter()

    def expect(self, size: int, *, framed: bool = True) -> None:
        """Expect an answer of about ``size`` bytes, or exactly that many unframed bytes."""
        answer = asyncio.get_running_loop().create_future()
        self._answers.append(answer)
        self._due.put_nowait((size, framed, answer))

    async def answer(self, timeout: float) -> tuple[bytes, float]:
        """Return the next answer without its size, and when it came.

        Raises ServerGoneError, TimeoutError.
        """
        async with asyncio.timeout(timeout):
            return await self._answers.popleft()

    async def close(self) -> None:
        """End the connection."""
        self._receiving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._receiving
        for answer in self._answers:
            answer.cancel()
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _receive(self) -> None:
        while True:
            size, framed, answer = await self._due.get()
            try:
                if framed:
                    (announced,) = _SIZE.unpack(await self._reader.readexactly(_SIZE.size))
                    if announced > size + (1 << 20):
                        raise ServerGoneError(
                            f"its answer would have {announced} bytes, not {size}"
                        )
                    size = announced
                data = await self._reader.readexactly(size)
                if not answer.done():
                    answer.set_result((data, time.perf_counter()))
            except (asyncio.IncompleteReadError, ConnectionError):
                self._fail(answer, ServerGoneError("it closed the connection"))
            except ServerGoneError as error:
                self._fail(answer, error)

    @staticmethod
    def _fail(answer: asyncio.Future[tuple[bytes, float]], error: ServerGoneError) -> None:
        if not answer.done():
            answer.set_exception(error)
            # Nobody need have asked for it yet.
            answer.exception()
