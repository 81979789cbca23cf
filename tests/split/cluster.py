"""Servers that share weights, and clients of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pytest

from client.backend import Backend
from client.connection import connect
from protocol.commands import Command
from tests.cuda import emulation
from tests.server.process import ServerProcess

HOST = "127.0.0.1"


class WorkerProcess(ServerProcess):
    """A server with one thread."""

    module = "rpc_server"
    env: Mapping[str, str] | None = None

    def __init__(self, *options: str) -> None:
        super().__init__("--threads", "1", *options, env=self.env, module=self.module)

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"


class CardWorker(WorkerProcess):
    """A server with an emulated card, whose accesses to memory are not checked."""

    module = "tests.cuda.serve"
    env: Mapping[str, str] | None = MappingProxyType({"EMULATION": "fast"})


# What a worker may compute on; for parametrize, with the names of these.
WORKERS = [
    WorkerProcess,
    pytest.param(
        CardWorker,
        marks=pytest.mark.skipif(emulation.compiler() is None, reason=emulation.NO_COMPILER),
    ),
]
WORKER_IDS = ["CPU", "GPU"]


class Coordinator(WorkerProcess):
    """A server that splits over ``parts``: workers, addresses, or 'local'.

    By rows, unless the options have a mode.
    """

    def __init__(self, parts: Sequence[WorkerProcess | str], *options: str) -> None:
        names = [p if isinstance(p, str) else p.address for p in parts]
        mode = () if "--split-mode" in options else ("--split-mode", "row")
        super().__init__("--split", ",".join(names), *mode, *options)


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
