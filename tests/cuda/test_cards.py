"""Two emulated cards as two devices of one server, to one client."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from client.backend import Backend
from client.connection import Connection, connect
from protocol.dialects import DIALECTS
from protocol.ggml.types import GgmlType
from protocol.graph_payload import GraphPayload, decode_graph, encode_graph
from protocol.tensor import Tensor
from tests.cuda import emulation
from tools.serving.ports import free_port
from tools.serving.processes import Process, listens

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason=emulation.NO_COMPILER)

MIB = 1 << 20
F32 = GgmlType.F32


class Server(Process):
    """The server with two cards; ``peering``: whether they reach each other's memory."""

    def __init__(self, peering: str, *options: str) -> None:
        self.port = free_port()
        command = [sys.executable, "-m", "tests.cuda.serve", "--port", str(self.port), *options]
        env = {**os.environ, "EMULATED_CARDS": "2", "EMULATED_PEERS": peering}
        super().__init__(command, env=env)
        self.wait_until(lambda: listens(self.port), 60, "its port")


@pytest.fixture(scope="module", params=["1", "0"], ids=["peers", "strangers"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with Server(request.param) as started:
        yield started


async def both(connection: Connection) -> tuple[Backend, Backend]:
    """The two devices over one connection; ids of tensors are not used twice."""
    first, second = await Backend.open(connection, 0), await Backend.open(connection, 1)
    second.graph = first.graph
    return first, second


def numbers(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


async def test_both_are_offered_with_memory_of_their_own(server: Server) -> None:
    # It listens before it prints.
    server.wait_for(r"CUDA1: emulated GPU")
    assert re.findall(r"CUDA\d: emulated GPU", server.log) == [
        "CUDA0: emulated GPU",
        "CUDA1: emulated GPU",
    ]
    async with await connect("127.0.0.1", server.port) as connection:
        assert await connection.device_count() == 2
        before = [await connection.get_device_memory(i) for i in (0, 1)]
        await connection.alloc_buffer(3 * MIB, 1)
        await connection.alloc_buffer(MIB, 0)
        after = [await connection.get_device_memory(i) for i in (0, 1)]
        assert [b[0] - a[0] for b, a in zip(before, after, strict=True)] == [MIB, 3 * MIB]
        assert [await connection.get_alignment(i) for i in (0, 1)] == [128, 128]


@pytest.mark.parametrize("way", [(0, 1), (1, 0)])
async def test_bytes_go_from_card_to_card(server: Server, way: tuple[int, int]) -> None:
    """More than a chunk; what the copy leaves alone stays as it was."""
    n = 5 * MIB // 4 + 3
    async with await connect("127.0.0.1", server.port) as connection:
        backends = await both(connection)
        source, target = (backends[i] for i in way)
        y = await target.tensor(F32, (n,), numbers(3, n))
        rest = await source.tensor(F32, (n,), numbers(2, n))
        # Last, so that nothing but the copy waits for it.
        x = await source.tensor(F32, (n,), numbers(1, n))
        assert await connection.copy_tensor(x, y)
        # It has been copied: what happens to the source now doesn't matter.
        await source.upload(x, numbers(4, n))
        np.testing.assert_array_equal(np.ravel(await target.download(y)), numbers(1, n))
        np.testing.assert_array_equal(np.ravel(await source.download(x)), numbers(4, n))
        np.testing.assert_array_equal(np.ravel(await source.download(rest)), numbers(2, n))
        await connection.buffer_clear(x.buffer, 0)
        assert await connection.copy_tensor(x, y)
        np.testing.assert_array_equal(np.ravel(await target.download(y)), np.zeros(n, np.float32))


async def test_a_graph_on_each_and_copies_between(server: Server) -> None:
    """As llama.cpp splits a model: what one card computes goes to the other, again and again.

    Nothing but the order of requests says that the copy comes after the graph that wrote its
    source, and before the graph that reads its target.
    """
    async with await connect("127.0.0.1", server.port) as connection:
        first, second = await both(connection)
        x = await first.tensor(F32, (64, 3))
        y = first.graph.sqr(x)
        here = await first.prepare(y)
        z = await second.tensor(F32, (64, 3))
        w = await second.tensor(F32, (64, 8), np.ones((8, 64), np.float32))
        product = second.graph.mul_mat(w, second.graph.scale(z, 0.5))
        there = await second.prepare(product)
        back = await first.tensor(F32, (8, 3))
        for value in (1.0, 2.0, 3.0, 4.0):
            await first.upload(x, np.full((3, 64), value, np.float32))
            await here.run()
            assert await connection.copy_tensor(y, z)
            await there.run()
            assert await connection.copy_tensor(product, back)
            expected = np.full(24, 32 * value * value, np.float32)
            np.testing.assert_array_equal(np.ravel(await first.download(back)), expected)


async def test_a_buffer_of_the_other_card_is_refused(server: Server) -> None:
    async with await connect("127.0.0.1", server.port) as connection:
        first, second = await both(connection)
        x = await second.tensor(F32, (64,), numbers(1, 64), name="stranger")
        y = first.graph.sqr(x)
        await (await first.prepare(y)).run()
        await connection.wait_closed()
    server.wait_until(lambda: "stranger" in server.log, 10, "the reason in its log")
    (line,) = [line for line in server.log.splitlines() if "stranger" in line]
    assert "data of source 0 'stranger' not here" in line
    assert "the graph runs on device 0, has tensors on device 1" in line


async def test_tensors_of_the_other_card_that_nobody_reads_are_no_matter(server: Server) -> None:
    """llama.cpp's graphs name what their inputs were computed from, wherever that was."""
    async with await connect("127.0.0.1", server.port) as connection:
        first, second = await both(connection)
        far = await second.tensor(F32, (64,), numbers(1, 64))
        x = await first.tensor(F32, (64,), numbers(2, 64))
        node = first.graph.sqr(x)
        await first.allocate([node])
        graph = first.graph.build([node])
        payload = _with_source(graph.encode(connection.dialect, 0), x, far)
        await connection.graph_compute(payload)
        np.testing.assert_allclose(np.ravel(await first.download(node)), numbers(2, 64) ** 2)


def _with_source(payload: bytes, x: Tensor, far: Tensor) -> bytes:
    """The graph, with a leaf of another device as the source of its leaf."""
    dialect = DIALECTS[0]
    graph = decode_graph(bytearray(payload), dialect)
    tensors = np.concatenate([graph.tensors, graph.tensors[:1]])
    leaf = next(t for t in tensors[:-1] if t["data"] == x.location[1])
    added = tensors[-1]
    added["id"], added["name"] = 0xFFFF, b"far"
    added["src"], added["view_src"] = 0, 0
    added["buffer"], added["data"] = far.location
    leaf["src"][0] = 0xFFFF
    return encode_graph(GraphPayload(graph.device, graph.nodes, tensors), dialect)


@pytest.mark.parametrize("device", [0, 1], ids=["GPU", "CPU"])
async def test_a_gpu_and_the_cpu_read_nothing_of_each_other(device: int) -> None:
    """An address of one means nothing to the other: the graph is refused before it runs."""
    with Server("1", "--device", "CUDA0,CPU") as server:
        async with await connect("127.0.0.1", server.port) as connection:
            backends = await both(connection)
            here, there = backends[device], backends[1 - device]
            x = await there.tensor(F32, (64,), numbers(1, 64), name="stranger")
            await (await here.prepare(here.graph.sqr(x))).run()
            await connection.wait_closed()
        server.wait_for("data of source 0 'stranger' not here")
        async with await connect("127.0.0.1", server.port) as connection:
            backend = await Backend.open(connection, device)
            y = await backend.tensor(F32, (64,), numbers(2, 64))
            result = np.ravel(await backend.compute(backend.graph.sqr(y)))
            np.testing.assert_allclose(result, numbers(2, 64) ** 2)
