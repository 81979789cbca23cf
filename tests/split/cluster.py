"""Servers that share weights, and clients of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from client.backend import Backend
from client.connection import connect
from protocol.commands import Command
from tests.server.process import ServerProcess

HOST = "127.0.0.1"


class WorkerProcess(ServerProcess):
    """A server with one thread."""

    def __init__(self, *options: str) -> None:
        super().__init__("--threads", "1", *options)

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"


class Coordinator(WorkerProcess):
    """A server that splits over ``parts``: workers, addresses, or 'local'."""

    def __init__(self, parts: Sequence[WorkerProcess | str], *options: str) -> None:
        names = [p if isinstance(p, str) else p.address for p in parts]
        super().__init__("--split", ",".join(names), *options)


@contextlib.asynccontextmanager
async def backend(server: WorkerProcess | int, timeout: float = 20.0) -> AsyncIterator[Backend]:
    """A client that has the split extension."""
    port = server if isinstance(server, int) else server.port
    async with await connect(HOST, port, split=True, timeout=timeout) as connection:
        yield await Backend.open(connection)


async def status(b: Backend) -> Any:
    """SPLIT_STATUS, its parts cut to those there are."""
    answer = await b.connection.request(Command.SPLIT_STATUS, device=0)
    answer.parts = answer.parts[: answer.n_parts]
    return answer


async def emptied(b: Backend) -> None:
    """Wait until the parts hold nothing: what clients had is given back behind their backs."""
    async with asyncio.timeout(20):
        while any(part.bytes for part in (await status(b)).parts):
            await asyncio.sleep(0.01)
