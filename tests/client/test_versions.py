"""A backend on each protocol version: the same calls, whatever the version makes of them.

A server that is new to the client offers another version after each hang-up, at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest

from client.backend import Backend
from client.connection import connect
from client.errors import VersionMismatch
from protocol.commands import Command
from protocol.dialects import DIALECTS, Dialect, Version, find_dialects
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.negotiation import retry_pause
from tests.parameters import mostly_slow
from tests.server.process import running
from tests.upstream_server import Endpoint


@pytest.fixture
def ours() -> Iterator[Endpoint]:
    """A server that has met nobody yet."""
    with running("--threads", "1", "-d", "CPU") as process:
        yield Endpoint("127.0.0.1", process.port)


VERSIONS = list(dict.fromkeys(f"{d.version[0]}.{d.version[1]}" for d in DIALECTS))


@contextlib.asynccontextmanager
async def backend(server: Endpoint, version: str | Dialect) -> AsyncIterator[Backend]:
    """A client that is started again until it is offered ``version``."""
    refused: list[Version] = []
    while (pause := retry_pause(refused)) is not None:
        try:
            connection = await connect(server.host, server.port, version=version)
        except VersionMismatch as error:
            refused.append(error.theirs)
            await asyncio.sleep(pause)
            continue
        async with connection:
            yield await Backend.open(connection)
        return
    pytest.fail(f"the server never offered protocol {version}")


@pytest.mark.parametrize("version", mostly_slow(VERSIONS, quick=3))
async def test_the_same_on_every_version(ours: Endpoint, version: str) -> None:
    x = np.linspace(-3, 3, 96, dtype=np.float32).reshape(3, 32)
    async with backend(ours, version) as b:
        assert b.connection.dialect in find_dialects(version)
        g = b.graph
        tensor = await b.tensor(GgmlType.F32, (32, 3), x)
        # UNARY and GLU have other numbers in other versions; the oldest has no GLU.
        gated = Op.GLU in b.connection.dialect.ops
        y = g.swiglu(g.relu(tensor)) if gated else g.silu(g.relu(tensor))
        plan = await b.prepare(y)
        for factor in (1, 2):
            await b.upload(tensor, factor * x)
            await plan.run()
            positive = np.maximum(factor * x, 0)
            gate, value = np.split(positive, 2, -1) if gated else (positive, 1)
            expected = gate / (1 + np.exp(-gate)) * value
            assert np.allclose((await b.download(y))[0, 0], expected, rtol=1e-5, atol=1e-6)
        quantized = await b.tensor(GgmlType.Q4_0, (96, 2))
        assert await b.alloc_size(quantized) >= quantized.nbytes
        copy = await b.tensor(GgmlType.F32, (32, 3))
        assert await b.connection.copy_tensor(tensor, copy)
        if Command.MEMSET_TENSOR in b.connection.dialect.commands:
            await b.connection.memset_tensor(copy, 0, 0, 128)
        else:
            await b.connection.set_tensor(copy, bytes(128))
        assert np.array_equal((await b.download(copy))[0, 0, 1:], 2 * x[1:])
        assert not (await b.download(copy))[0, 0, 0].any()
        await plan.free()


@pytest.mark.parametrize("version", mostly_slow(["7.0.0", "5.1", "3.6", "2.0"]))
async def test_a_client_with_long_names(ours: Endpoint, version: str) -> None:
    """As one whose ggml is compiled with GGML_MAX_NAME = 128."""
    x = np.linspace(-3, 3, 96, dtype=np.float32).reshape(3, 32)
    async with backend(ours, find_dialects(version)[0].with_names(128)) as b:
        assert b.connection.dialect.tensor_size == 360
        tensor = await b.tensor(GgmlType.F32, (32, 3), x, name="n" * 63)
        assert np.array_equal((await b.download(tensor))[0, 0], x)
        y = b.graph.neg(b.graph.relu(tensor))
        assert np.array_equal((await b.compute(y))[0, 0], -np.maximum(x, 0))
        quantized = await b.tensor(GgmlType.Q4_0, (96, 2))
        assert await b.alloc_size(quantized) >= quantized.nbytes


async def test_a_graph_with_an_op_that_the_version_lacks_takes_no_memory(ours: Endpoint) -> None:
    async with backend(ours, "3.6") as b:
        node = b.graph.op(Op.LIGHTNING_INDEXER, GgmlType.F32, (4,))
        with pytest.raises(ValueError, match="no op LIGHTNING_INDEXER"):
            await b.prepare(node)
        assert not node.placed


async def test_any_version_beside_an_old_client(ours: Endpoint) -> None:
    async with backend(ours, "4.0"):
        # The old client is at work, so its address is offered what it speaks.
        with pytest.raises(VersionMismatch, match=r"4\.0\.3"):
            await connect(ours.host, ours.port)
        async with Backend.connect(ours.host, ours.port, version=None) as b:
            assert b.connection.dialect.version == DIALECTS[0].version
