"""A backend on each protocol version: the same calls, whatever the version makes of them.

One server for all: it offers another version to a client that has hung up on the last one.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import numpy as np
import pytest

from client.backend import Backend
from client.connection import connect
from client.errors import VersionMismatch
from protocol.commands import Command
from protocol.dialects import DIALECTS, find_dialects
from protocol.ggml_ops import Op
from protocol.ggml_types import GgmlType
from tests.upstream_server import Endpoint

VERSIONS = list(dict.fromkeys(f"{d.version[0]}.{d.version[1]}" for d in DIALECTS))


@contextlib.asynccontextmanager
async def backend(server: Endpoint, version: str) -> AsyncIterator[Backend]:
    """A client that is started again until it is offered ``version``."""
    for _ in range(2 * len(DIALECTS)):
        try:
            connection = await connect(server.host, server.port, version=version)
        except VersionMismatch:
            continue
        async with connection:
            yield await Backend.open(connection)
        return
    pytest.fail(f"the server never offered protocol {version}")


@pytest.mark.parametrize("version", VERSIONS)
async def test_the_same_on_every_version(ours: Endpoint, version: str) -> None:
    x = np.linspace(-3, 3, 96, dtype=np.float32).reshape(3, 32)
    async with backend(ours, version) as b:
        assert b.connection.dialect in find_dialects(version)
        g = b.graph
        tensor = await b.tensor(GgmlType.F32, (32, 3), x)
        # UNARY and GLU have other numbers in other versions.
        y = g.swiglu(g.relu(tensor))
        plan = await b.prepare(y)
        for factor in (1, 2):
            await b.upload(tensor, factor * x)
            await plan.run()
            gate, value = np.split(np.maximum(factor * x, 0), 2, -1)
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


async def test_a_graph_with_an_op_that_the_version_lacks_takes_no_memory(ours: Endpoint) -> None:
    async with backend(ours, "3.6") as b:
        node = b.graph.op(Op.LIGHTNING_INDEXER, GgmlType.F32, (4,))
        with pytest.raises(ValueError, match="no op LIGHTNING_INDEXER"):
            await b.prepare(node)
        assert not node.placed
