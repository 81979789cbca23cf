"""Weights cut by rows over servers of all kinds: products, bytes, and a server that dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
import pytest

from client import backend as client_backend
from client.backend import Backend
from client.connection import Connection, connect, connect_any
from client.errors import AllocationFailed, ServerLost, VersionMismatch
from client.split.backend import SplitBackend
from client.split.partition import Rows
from client.tensors import Array, ShapeError
from protocol.commands import Command
from protocol.dialects import DIALECTS, Version
from protocol.ggml.types import GgmlType
from protocol.negotiation import retry_pause
from protocol.split import MAX_PROGRAMS
from tests.server.process import running
from tests.upstream_server import running_upstream
from tools.serving.ports import free_port

HOST = "127.0.0.1"
NEWEST = DIALECTS[0]
F32, F16, I32, Q4_0, Q8_0 = GgmlType.F32, GgmlType.F16, GgmlType.I32, GgmlType.Q4_0, GgmlType.Q8_0
# test-backend-ops' bound for products.
NMSE = 5e-4

Ports = list[tuple[str, int]]


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, int]]:
    """Servers by name: two of this project's, one that speaks an older protocol."""
    environment = {**os.environ, "LLAMA_CACHE": str(tmp_path_factory.mktemp("cache"))}
    with (
        running("-t", "1", "--cache", env=environment) as one,
        running("-t", "1", "--cache", env=environment) as two,
        running("-t", "1", "--protocol", "5.0") as old,
    ):
        yield {"one": one.port, "two": two.port, "old": old.port}
        for process in (one, two, old):
            assert process.alive, f"a server died:\n{process.log}"


@pytest.fixture(scope="module")
def upstream_ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, int]]:
    """Two of llama.cpp's own servers."""
    folder = tmp_path_factory.mktemp("upstream")
    with (
        running_upstream(folder / "one.log", "-t", "1") as one,
        running_upstream(folder / "two.log", "-t", "1") as two,
    ):
        yield {"upstream one": one.port, "upstream two": two.port}


MIXTURES = [
    pytest.param(["one", "two"], id="ours"),
    pytest.param(["old", "one"], id="ours of two protocols"),
    pytest.param(["upstream one", "upstream two"], id="upstream", marks=pytest.mark.upstream),
    pytest.param(["one", "upstream one", "old"], id="mixed", marks=pytest.mark.upstream),
]


@pytest.fixture(params=MIXTURES)
def endpoints(request: pytest.FixtureRequest, ports: dict[str, int]) -> Ports:
    """Servers of all kinds; a test sees that what one mixture does, the others do."""
    known = dict(ports)
    if any(name.startswith("upstream") for name in request.param):
        known |= request.getfixturevalue("upstream_ports")
    return [(HOST, known[name]) for name in request.param]


@pytest.fixture
def ours(ports: dict[str, int]) -> Ports:
    return [(HOST, ports["one"]), (HOST, ports["two"])]


def values(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def stored(type: GgmlType, x: Array) -> tuple[Array, Array]:
    """``x`` as a weight of ``type`` is uploaded, and what it then is."""
    if type in (F32, F16):
        dense = x.astype(np.float32 if type is F32 else np.float16)
        return dense, dense.astype(np.float32)
    kind = gguf.GGMLQuantizationType(int(type))
    blocks = gguf.quants.quantize(x, kind)
    return blocks, gguf.quants.dequantize(blocks, kind)


def nmse(got: Array, expected: Array) -> float:
    assert got.shape == expected.shape
    return float(((got - expected) ** 2).sum() / (expected**2).sum())


async def whole(port: int, type: GgmlType, weight: Array, x: Array, ids: Any = None) -> Array:
    """The product on one server."""
    async with Backend.connect(HOST, port) as b:
        cols = x.shape[-1]
        w = await b.tensor(type, (cols, *weight.shape[-2::-1]), weight)
        tx = await b.tensor(F32, x.shape[::-1], x)
        if ids is None:
            return np.asarray(await b.compute(b.graph.mul_mat(w, tx)))
        ti = await b.tensor(I32, ids.shape[::-1], ids)
        return np.asarray(await b.compute(b.graph.mul_mat_id(w, tx, ti)))


# -- products


@pytest.mark.parametrize("shape", [(64,), (1, 64), (5, 64), (2, 3, 64), (90, 64)], ids=str)
async def test_products_of_weights_that_share_an_input(
    endpoints: Ports, shape: tuple[int, ...]
) -> None:
    gate, up, x = values(300, 64), values(97, 64, seed=2), values(*shape, seed=3)
    async with SplitBackend.connect(endpoints, tensor_split=range(1, len(endpoints) + 1)) as s:
        weights = [
            await s.weight(F32, (64, 300), gate),
            await s.weight(F16, (64, 97), up),
        ]
        got = await s.mul_mat(weights, x)
        assert nmse(got[0], x @ gate.T) < 1e-9
        assert nmse(got[1], x @ up.astype(np.float16).T.astype(np.float32)) < NMSE
        # A weight by itself, and again from what was prepared.
        for _ in range(2):
            assert np.array_equal(await s.mul_mat(weights[0], x), got[0])


async def test_products_of_blocks(endpoints: Ports) -> None:
    blocks, weight = stored(Q4_0, values(200, 96))
    x = values(4, 96, seed=2)
    async with SplitBackend.connect(endpoints, tensor_split=(1,) * len(endpoints)) as s:
        w = await s.weight(Q4_0, (96, 200), blocks, name="blk.0.ffn_up.weight")
        assert nmse(await s.mul_mat(w, x), x @ weight.T) < NMSE
        assert repr(w).startswith("<SplitWeight 'blk.0.ffn_up.weight' Q4_0 96x200x1, rows ")


async def test_products_of_experts(endpoints: Ports) -> None:
    experts, ids = values(6, 160, 32), np.array([[4, 0], [1, 5], [2, 3]])
    async with SplitBackend.connect(endpoints, tensor_split=(1,) * len(endpoints)) as s:
        w = await s.weight(F32, (32, 160, 6), experts)
        for used in (1, 2):
            x = values(3, used, 32, seed=2)
            got = await s.mul_mat_id([w, w], x, ids)
            each = np.broadcast_to(x, (3, 2, 32))
            expected = np.einsum("tkrc,tkc->tkr", experts[ids], each)
            assert nmse(got[0], expected) < 1e-9
            assert np.array_equal(got[0], got[1])
        one = await s.mul_mat_id(w, x[0], ids[0])
        assert nmse(one, expected[0]) < 1e-9


@pytest.mark.parametrize("type", [F32, F16, Q4_0, Q8_0], ids=lambda t: t.name)
@pytest.mark.parametrize("columns", [1, 7])
async def test_the_same_to_the_bit_as_on_one_server(
    ours: Ports, type: GgmlType, columns: int
) -> None:
    content, _ = stored(type, values(330, 128))
    x = values(columns, 128, seed=2)
    expected = await whole(ours[0][1], type, content, x)
    async with SplitBackend.connect(ours, tensor_split=(2, 1)) as s:
        w = await s.weight(type, (128, 330), content)
        assert w.rows == (Rows(0, 224), Rows(224, 330))
        assert np.array_equal(await s.mul_mat(w, x), expected[0, 0])


async def test_experts_the_same_to_the_bit_as_on_one_server(ours: Ports) -> None:
    content, _ = stored(Q4_0, values(4, 96, 64))
    x, ids = values(5, 1, 64, seed=2), np.array([[3, 0], [1, 2], [0, 1], [2, 2], [3, 1]])
    expected = await whole(ours[0][1], Q4_0, content, x, ids)
    async with SplitBackend.connect(ours, tensor_split=(1, 2)) as s:
        w = await s.weight(Q4_0, (64, 96, 4), content)
        assert np.array_equal(await s.mul_mat_id(w, x, ids), expected[0])


@pytest.mark.parametrize("columns", [1, 6])
async def test_inputs_in_fewer_bytes(endpoints: Ports, columns: int) -> None:
    weight, x = values(256, 64), values(columns, 64, seed=2)
    halves = x.astype(np.float16).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    bytes_ = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
    shares = (1,) * len(endpoints)
    async with SplitBackend.connect(endpoints, tensor_split=shares, wire="f16") as s:
        w = await s.weight(F32, (64, 256), weight)
        assert nmse(await s.mul_mat(w, x), halves @ weight.T) < 1e-9
    async with SplitBackend.connect(endpoints, tensor_split=shares, wire="q8_0") as s:
        w = await s.weight(F32, (64, 256), weight)
        assert nmse(await s.mul_mat(w, x), bytes_ @ weight.T) < 1e-9
        # Rows that are no whole blocks go as F16.
        odd = await s.weight(F32, (40, 256), weight[:, :40])
        got = await s.mul_mat(odd, np.ascontiguousarray(x[:, :40]))
        assert nmse(got, halves[:, :40] @ weight[:, :40].T) < 1e-9


async def test_many_at_once(endpoints: Ports) -> None:
    # Shapes of their own, so that programs are made and memory grows while others run.
    weight = values(128, 512)
    inputs = [values(n, 512, seed=n) for n in (1, 900, 3, 1500, 1, 40)]
    async with SplitBackend.connect(endpoints, tensor_split=(1,) * len(endpoints)) as s:
        w = await s.weight(F32, (512, 128), weight)
        for _ in range(2):
            results = await asyncio.gather(*(s.mul_mat(w, x) for x in inputs))
            for x, got in zip(inputs, results, strict=True):
                assert nmse(got, x @ weight.T) < 1e-9


async def test_more_shapes_than_programs(ours: Ports) -> None:
    weight = values(64, 32)
    async with SplitBackend.connect(ours, tensor_split=(1, 1)) as s:
        w = await s.weight(F32, (32, 64), weight)
        first = await s.product(w, (1, 32))
        for n in range(1, MAX_PROGRAMS + 3):
            x = values(n, 32, seed=n)
            assert nmse(await s.mul_mat(w, x), x @ weight.T) < 1e-9
        # Its number is another's by now.
        x = values(1, 32)
        (again,) = await first.run(x)
        assert nmse(again, x @ weight.T) < 1e-9


async def test_one_exchange_for_all_weights(ours: Ports, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    exchange = Connection.exchange

    async def counted(self: Connection, parts: Any, answers: Any, **kind: Any) -> Any:
        sent.append(len(answers))
        return await exchange(self, parts, answers, **kind)

    monkeypatch.setattr(Connection, "exchange", counted)
    async with SplitBackend.connect(ours, tensor_split=(1, 1)) as s:
        weights = [await s.weight(F32, (32, 64), values(64, 32, seed=i)) for i in range(3)]
        await s.mul_mat(weights, values(32))
    assert sent == [3, 3]


async def test_nothing_times_a_weight(ours: Ports) -> None:
    async with SplitBackend.connect(ours, tensor_split=(1, 1)) as s:
        w = await s.weight(F32, (32, 64), values(64, 32))
        assert (await s.mul_mat(w, values(0, 32))).shape == (0, 64)


async def test_what_is_cancelled_leaves_no_trace(endpoints: Ports) -> None:
    weight = values(256, 64)
    async with SplitBackend.connect(endpoints, tensor_split=(1,) * len(endpoints)) as s:
        w = await s.weight(F32, (64, 256), weight)
        step = await s.product(w, (3, 64))
        for turns in range(6):
            task = asyncio.create_task(step.run(values(3, 64, seed=turns)))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            x = values(3, 64, seed=100 + turns)
            assert nmse((await step.run(x))[0], x @ weight.T) < 1e-9


async def test_shapes_must_fit(ours: Ports) -> None:
    async with SplitBackend.connect(ours, tensor_split=(1, 1)) as s:
        w = await s.weight(F32, (32, 64))
        with pytest.raises(ShapeError, match="don't fit"):
            await s.mul_mat(w, values(33))
        with pytest.raises(ShapeError, match="differ in columns"):
            await s.mul_mat([w, await s.weight(F32, (33, 64))], values(32))
        with pytest.raises(ShapeError, match="2 or 3 dimensions"):
            await s.weight(F32, (8, 8, 2, 2))
        step = await s.product(w, (2, 32))
        with pytest.raises(ShapeError, match=r"shape \(3, 32\), not \(2, 32\)"):
            await step.run(values(3, 32))


# -- weights


@pytest.mark.parametrize("matrices", [1, 3])
async def test_rows_come_back(endpoints: Ports, matrices: int) -> None:
    blocks, _ = stored(Q4_0, values(matrices, 170, 64))
    async with SplitBackend.connect(endpoints, tensor_split=range(1, len(endpoints) + 1)) as s:
        w = await s.weight(Q4_0, (64, 170, matrices), blocks)
        assert np.array_equal((await s.download(w))[0], blocks)
        for first, last in ((0, 1), (31, 33), (60, 170), (64, 64), (169, 170)):
            got = await s.download(w, range(first, last))
            assert np.array_equal(got[0], blocks[:, first:last])
        with pytest.raises(ShapeError):
            await s.download(w, range(100, 171))


async def test_known_rows_are_not_sent(ours: Ports, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_backend, "HASH_THRESHOLD", 1000)
    sent: list[int] = []
    set_tensor = Connection.set_tensor

    async def counted(self: Connection, tensor: Any, data: Any, *rest: Any, **more: Any) -> None:
        sent.append(len(data))
        await set_tensor(self, tensor, data, *rest, **more)

    monkeypatch.setattr(Connection, "set_tensor", counted)
    two, three = values(128, 64), values(3, 128, 64, seed=2)
    for known in (False, True):
        sent.clear()
        async with SplitBackend.connect(ours, tensor_split=(1, 1)) as s:
            for content in (two, three):
                w = await s.weight(F32, content.shape[::-1], content, cache=True)
                got = await s.download(w)
                assert np.array_equal(got.reshape(content.shape), content)
        size = two.nbytes + three.nbytes
        assert sum(sent) == (0 if known else size)


async def test_freed_memory_is_free(ours: Ports) -> None:
    async with SplitBackend.connect(ours, tensor_split=(1, 1)) as s:
        w = await s.weight(F32, (32, 64), values(64, 32))
        kept = await s.weight(F32, (32, 64), values(64, 32, seed=2))
        step = await s.product(w, (32,))
        await s.free(w)
        assert w.freed
        for use in (step.run(values(32)), s.mul_mat(w, values(32)), s.download(w)):
            with pytest.raises(ShapeError, match="was freed"):
                await use
        # A second time does nothing, and others are as they were.
        await s.free(w)
        x = values(32, seed=3)
        assert nmse(await s.mul_mat(kept, x), x @ values(64, 32, seed=2).T) < 1e-9


async def test_a_server_without_room_is_named() -> None:
    # What is free of a machine changes by itself, what is left of --mem doesn't.
    with running("-t", "1", "--mem", "64M") as roomy, running("-t", "1", "--mem", "8M") as small:
        endpoints = [(HOST, roomy.port), (HOST, small.port)]
        async with SplitBackend.connect(endpoints, tensor_split=(1, 1)) as s:
            before = await s.servers[0].connection.get_device_memory()
            with pytest.raises(AllocationFailed, match=f"server {HOST}:{small.port}: "):
                await s.weight(F32, (1024, 8192))
            # What the other one gave is given back, and it goes on.
            after = await s.servers[0].connection.get_device_memory()
            assert before == after
            w = await s.weight(F32, (32, 64), values(64, 32))
            x = values(32, seed=2)
            assert nmse(await s.mul_mat(w, x), x @ values(64, 32).T) < 1e-9


# -- shares


async def test_shares_by_free_memory(ours: Ports) -> None:
    with running("-t", "1", "--mem", "64M") as small, running("-t", "1", "--mem", "192M") as large:
        async with SplitBackend.connect([(HOST, small.port), (HOST, large.port)]) as s:
            assert [server.free >> 20 for server in s.servers] == [64, 192]
            w = await s.weight(F32, (8, 1024))
            assert w.rows == (Rows(0, 256), Rows(256, 1024))


async def test_a_server_without_a_share(ours: Ports) -> None:
    weight, x = values(100, 32), values(2, 32, seed=2)
    async with SplitBackend.connect(ours, tensor_split=(0, 1)) as s:
        w = await s.weight(F32, (32, 100), weight)
        assert w.parts[0] is None
        assert nmse(await s.mul_mat(w, x), x @ weight.T) < 1e-9
        assert np.array_equal((await s.download(w))[0, 0], weight)


@pytest.mark.parametrize("shares", [(1,), (1, 1, 1), (0, 0), (-1, 2)])
async def test_shares_that_are_none(ours: Ports, shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"shares for|no proportions"):
        async with SplitBackend.connect(ours, tensor_split=shares):
            pass


async def test_shares_by_speed(ours: Ports) -> None:
    async with SplitBackend.connect(ours, tensor_split="auto") as s:
        assert len(s.proportions) == 2
        assert sum(s.proportions) == pytest.approx(1)
        # They run on one machine with one thread each: neither can be left without work.
        assert min(s.proportions) > 0.02
        limited = await s.balance(size=int(s.servers[0].free * 1.5))
        assert max(limited) <= 0.7
        w = await s.weight(F32, (32, 100), values(100, 32))
        assert np.array_equal((await s.download(w))[0, 0], values(100, 32))


# -- versions


async def test_the_newest_version_that_the_server_speaks(ports: dict[str, int]) -> None:
    async with await connect_any(HOST, ports["old"]) as c:
        assert c.dialect.version == (5, 0, 0)
    async with Backend.connect(HOST, ports["old"], version=None) as b:
        assert b.connection.dialect.version == (5, 0, 0)
    async with await connect_any(HOST, ports["one"], split=True) as c:
        assert c.dialect.version == NEWEST.version
        assert c.split_version
        # A client that hangs up right after HELLO counts as one of another version.
        await c.device_count()
    with pytest.raises(VersionMismatch, match=r"speaks protocol 5\.0"):
        await connect_any(HOST, ports["old"], versions=("7", "6"))


async def test_the_newest_version_of_a_server_that_expects_an_older_client() -> None:
    with running("-t", "1") as server:
        await _check_newest_after_older(server.port)


async def _check_newest_after_older(port: int) -> None:
    refused: list[Version] = []
    while (pause := retry_pause(refused)) is not None:
        try:
            async with await connect(HOST, port, version="5.0") as older:
                await older.device_count()
                break
        except VersionMismatch as error:
            refused.append(error.theirs)
            await asyncio.sleep(pause)
    else:
        pytest.fail("the server never offered 5.0")
    async with SplitBackend.connect([(HOST, port)], tensor_split=(1,)) as s:
        assert s.servers[0].connection.dialect.version == NEWEST.version
        assert s.servers[0].extended


async def test_a_coordinator_as_one_of_the_servers(ports: dict[str, int]) -> None:
    weight, x = values(320, 64), values(3, 64, seed=2)
    parts = f"local,{HOST}:{ports['two']}"
    options = ("--tensor-split", "1,1", "--split-mode", "row")
    with running("-t", "1", "--split", parts, *options) as coordinator:
        endpoints = [(HOST, ports["one"]), (HOST, coordinator.port)]
        async with SplitBackend.connect(endpoints, tensor_split=(1, 1)) as s:
            w = await s.weight(F32, (64, 320), weight, name="blk.0.ffn_up.weight")
            for _ in range(2):
                assert nmse(await s.mul_mat(w, x), x @ weight.T) < 1e-9
            assert np.array_equal((await s.download(w))[0, 0], weight)


# -- failures


async def test_a_server_that_is_not_there_is_named(ours: Ports) -> None:
    nobody = free_port()
    with pytest.raises(ServerLost, match=f"server {HOST}:{nobody}: ") as caught:
        async with SplitBackend.connect([ours[0], (HOST, nobody)]):
            pass
    assert caught.value.server == f"{HOST}:{nobody}"


async def test_a_server_that_is_busy_is_named(ours: Ports) -> None:
    # Accepts, as llama.cpp's server does while it serves another client, and says nothing.
    with socket.create_server((HOST, 0)) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(ServerLost, match=f"{port}: accepts but does not answer"):
            async with SplitBackend.connect([ours[0], (HOST, port)], timeout=1.0):
                pass


async def test_a_server_that_dies_is_named_and_the_others_go_on(ours: Ports) -> None:
    weight = values(128, 32)
    with running("-t", "1") as mortal:
        async with SplitBackend.connect([ours[0], (HOST, mortal.port)], tensor_split=(1, 1)) as s:
            w = await s.weight(F32, (32, 128), weight)
            step = await s.product(w, (2, 32))
            await step.run(values(2, 32))
            mortal.kill()
            for _ in range(2):
                with pytest.raises(ServerLost, match=f"server {HOST}:{mortal.port}: "):
                    await step.run(values(2, 32))
            with pytest.raises(ServerLost, match=str(mortal.port)):
                await s.weight(F32, (32, 128), weight)
            await s.free(w)
            # The other one is in step: its answers are those to what is asked now.
            s.proportions = (1, 0)
            alone = await s.weight(F32, (32, 128), weight)
            x = values(2, 32, seed=5)
            assert nmse(await s.mul_mat(alone, x), x @ weight.T) < 1e-9


@pytest.mark.slow
async def test_a_server_that_stalls_is_given_up(ours: Ports) -> None:
    with running("-t", "1") as slow:
        async with SplitBackend.connect(
            [ours[0], (HOST, slow.port)], tensor_split=(1, 1), exchange_timeout=1.5
        ) as s:
            w = await s.weight(F32, (32, 128), values(128, 32))
            step = await s.product(w, (32,))
            slow.child.send_signal(signal.SIGSTOP)
            try:
                with pytest.raises(ServerLost, match=f"{slow.port}: did not answer within 1.5 s"):
                    await step.run(values(32))
            finally:
                slow.child.send_signal(signal.SIGCONT)
            assert not s.servers[0].connection.closed
            assert s.servers[0].connection.in_flight == 0


async def test_a_program_the_server_refuses_names_it(ours: Ports) -> None:
    async with SplitBackend.connect(ours, tensor_split=(1, 1)) as s:
        with pytest.raises(ServerLost, match=f"server {HOST}:{ours[1][1]}: .*SPLIT_PROGRAM"):
            await s.servers[1].attempt(
                lambda: s.servers[1].connection.request(
                    Command.SPLIT_PROGRAM, data=b"\1\0\0\0", device=0, program=0
                )
            )
