"""Programs of the split extension on an emulated card: what an exchange is, to the card as well.

That streams are kept, and hostile ones refused, is seen beside the CPU's in tests/split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pytest

from client.backend import Backend
from client.split.steps import Step
from protocol.commands import Command
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.split import peers_fields
from rpc_server.devices.cuda import program as programs
from rpc_server.devices.cuda import storage
from rpc_server.devices.cuda.card import Card
from rpc_server.devices.cuda.plan import CudaPlanBuilder
from rpc_server.devices.cuda.planner import LOWERINGS
from rpc_server.devices.cuda.resources import MAIL
from tests.cuda import emulation, standin
from tests.cuda.test_queues import Serving, eventually, serving
from tests.split.cluster import backend
from tests.split.test_programs import Stream, doubling, program, run_message, step
from tests.split.weights import values

__all__ = ["serving"]

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason=emulation.NO_COMPILER)

F16, F32, I32 = GgmlType.F16, GgmlType.F32, GgmlType.I32


@pytest.fixture
async def b(serving: Serving) -> AsyncIterator[Backend]:
    async with backend(serving.port) as made:
        yield made


async def odd_step(b: Backend, sizes: Sequence[int]) -> Step:
    """A step that gives back what it takes: so many elements of two bytes each."""
    given = [b.graph.new_tensor(F16, (n,), f"x{n}") for n in sizes]
    return await step(b, given, [b.graph.cont(t) for t in given])


def halves(sizes: Sequence[int], seed: int) -> bytes:
    return values(sum(sizes), seed=seed).astype(np.float16).tobytes()


async def exchange(b: Backend, number: int, data: bytes, size: int) -> bytes:
    """Run a program of one step; what it gives, bytes."""
    async with Stream.of(b) as stream:
        await stream.send(run_message(b.connection, number), data)
        return (await stream.receive(size // 4)).tobytes()


async def test_an_exchange_is_a_copy_there_a_graph_and_a_copy_back(
    b: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first on: nothing is planned, compiled or captured in one."""
    w = await b.tensor(F32, (256, 96), values(96, 256, seed=1))
    x = b.graph.new_tensor(F32, (256,), "x")
    steps = [
        await step(b, [x], [b.graph.mul_mat(w, x)]),
        await odd_step(b, [2, 4]),
        # More of them than one launch has room for.
        await odd_step(b, range(2, 22, 2)),
        await step(b, [], [b.graph.scale(x, 2.0)]),
    ]
    await program(b, steps)
    made: list[str] = []
    for kind, name in ((CudaPlanBuilder, "lower"), (Card, "capture"), (Card, "function")):
        monkeypatch.setattr(kind, name, lambda *_, name=name: made.append(name))
    for run in range(3):
        before, within = Counter(standin.given), Counter(standin.given_in_graphs)
        async with Stream.of(b) as stream:
            data = values(256, seed=run)
            await stream.send(run_message(b.connection, 0), data.tobytes())
            product = await stream.receive(96)
            assert np.allclose(product, values(96, 256, seed=1) @ data, atol=1e-3)
            for sizes in ([2, 4], range(2, 22, 2)):
                sent = halves(sizes, run)
                await stream.send(sent)
                assert (await stream.receive(len(sent) // 4)).tobytes() == sent
            assert np.array_equal(await stream.receive(256), data * 2)
        given = standin.given - before
        # What was uploaded is waited for once.
        assert set(given) == ({"graph"} if run else {"graph", "event"})
        assert given["graph"] == 4
        done = standin.given_in_graphs - within
        # The last step takes nothing.
        assert (done["to the card"], done["to the host"]) == (3, 4)
        assert set(done) == {"to the card", "to the host", "kernel"}
    assert not made


async def test_pieces_that_lie_anywhere(b: Backend) -> None:
    """In the order of the stream one begins where the other ends, by bytes."""
    sizes = [*range(1, 20), 21, 5]
    await program(b, [await odd_step(b, sizes)])
    for seed in range(2):
        data = halves(sizes, seed)
        assert await exchange(b, 0, data, len(data)) == data


@pytest.mark.parametrize("size", [33, 64, 100, 128])
async def test_what_is_larger_goes_in_pieces(
    b: Backend, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of inputs and outputs; what they are made of is the same, and so is the next exchange."""
    monkeypatch.setattr(programs, "MAIL", 256)
    for module in (programs, storage):
        monkeypatch.setattr(module, "CHUNK", 256)
    g = b.graph
    x, y = (g.new_tensor(F32, (size,), name) for name in "xy")
    large = await step(b, [x, y], [g.add(x, y), g.mul(x, y)])
    await program(b, [large, await doubling(b, 4)])
    for seed in range(3):
        p, q, r = (values(n, seed=seed + i) for i, n in enumerate((size, size, 4)))
        async with Stream.of(b) as stream:
            await stream.send(run_message(b.connection, 0), p.tobytes(), q.tobytes())
            assert np.array_equal(await stream.receive(size), p + q)
            assert np.array_equal(await stream.receive(size), p * q)
            await stream.send(r.tobytes())
            assert np.array_equal(await stream.receive(4), r * 2)


async def test_products_by_cublas(b: Backend) -> None:
    """Which is in no capture."""
    w = await b.tensor(F16, (64, 8), np.ones((8, 64), np.float16))
    x = b.graph.new_tensor(F32, (64, 40), "x")
    await program(b, [await step(b, [x], [b.graph.mul_mat(w, b.graph.sqr(x))])])
    for value in (1.0, 3.0):
        async with Stream.of(b) as stream:
            data = np.full((40, 64), value, np.float32)
            await stream.send(run_message(b.connection, 0), data.tobytes())
            assert np.array_equal(await stream.receive(40, 8), np.full((40, 8), 64 * value * value))


async def test_a_node_that_runs_on_the_host(
    serving: Serving, b: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between what the card computes of the same step."""
    serving.device.allow_host_ops = True
    monkeypatch.delitem(LOWERINGS, Op.SCALE)
    x = b.graph.new_tensor(F32, (64,), "x")
    y = b.graph.sqr(b.graph.scale(b.graph.sqr(x), 2.0))
    await program(b, [await step(b, [x], [y])])
    for seed in range(2):
        data = values(64, seed=seed)
        async with Stream.of(b) as stream:
            await stream.send(run_message(b.connection, 0), data.tobytes())
            assert np.allclose(await stream.receive(64), 4 * data**4)


async def test_an_index_out_of_range_ends_the_connection(
    serving: Serving, b: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of what failed is sent, nor of what comes behind it."""
    g = b.graph
    table = await b.tensor(F32, (4, 3), values(3, 4))
    rows = g.new_tensor(I32, (1,), "rows")
    steps = [
        await doubling(b),
        await step(b, [rows], [g.get_rows(table, rows)]),
        await doubling(b),
    ]
    await program(b, steps)
    for row in (2, 3):
        async with Stream.of(b) as stream:
            x = values(64)
            await stream.send(run_message(b.connection, 0), x.tobytes())
            assert np.array_equal(await stream.receive(64), x * 2)
            await stream.send(np.array([row], np.int32).tobytes(), x.tobytes())
            if row == 2:
                assert np.array_equal(await stream.receive(4), values(3, 4)[2])
                assert np.array_equal(await stream.receive(64), x * 2)
            else:
                assert await stream.ended()
    ours = [r for r in caplog.records if r.name.startswith("rpc_server.")]
    (line,) = [r.getMessage() for r in ours if r.levelname == "ERROR"]
    assert "GET_ROWS" in line
    assert "out of range" in line
    await eventually(lambda: not serving.server.context.stats.clients)


@pytest.mark.parametrize("at", [0, 1])
async def test_a_card_that_fails_within_a_program(
    serving: Serving, b: Backend, at: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Before its first exchange, or between two."""
    await program(b, [await doubling(b), await doubling(b)])
    x = values(64)
    async with Stream.of(b) as stream:
        if not at:
            standin.fail()
        await stream.send(run_message(b.connection, 0), x.tobytes())
        if at:
            assert np.array_equal(await stream.receive(64), x * 2)
            standin.fail()
            await stream.send(x.tobytes())
        assert await stream.ended()
    await eventually(lambda: not serving.server.context.stats.clients)
    assert "CUDA0 is lost" in caplog.text
    assert serving.server.context.device_lost.is_set()


async def refused(b: Backend, steps: Sequence[Step]) -> None:
    with pytest.raises(Exception, match=r"."):
        await program(b, steps)
    await b.connection.wait_closed()


async def test_no_memory_within_an_exchange(
    serving: Serving,
    b: Backend,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of the host's, for what is larger than the mailbox, before the first piece is taken."""
    monkeypatch.setattr(programs, "MAIL", 64)
    await program(b, [await doubling(b, 4), await doubling(b)])
    x = values(64)

    def full(_: storage.PinnedPool) -> storage.PinnedPair:
        raise MemoryError("8388608 bytes of pinned memory: none left")

    monkeypatch.setattr(storage.PinnedPool, "take", full)
    async with Stream.of(b) as stream:
        await stream.send(run_message(b.connection, 0), x[:4].tobytes())
        assert np.array_equal(await stream.receive(4), x[:4] * 2)
        await stream.send(x.tobytes())
        assert await stream.ended()
    await eventually(lambda: not serving.server.context.stats.clients)
    assert "pinned memory: none left; closing the connection" in caplog.text


async def test_no_memory_for_the_first_program(
    serving: Serving,
    b: Backend,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The client is given up, and what it had is free; the next one is served."""
    before, steps = standin.used(), [await doubling(b)]
    allocate = Card.allocate

    def full(card: Card, size: int) -> int:
        if size > MAIL:
            raise MemoryError(f"{size} bytes on {card.name}: none left")
        return allocate(card, size)

    with monkeypatch.context() as patched:
        patched.setattr(Card, "allocate", full)
        await refused(b, steps)
    assert "no memory for exchanges" in caplog.text
    await eventually(lambda: standin.used() <= before)
    async with backend(serving.port) as other:
        await program(other, [await doubling(other)])
        x = values(64)
        assert await exchange(other, 0, x.tobytes(), x.nbytes) == (x * 2).tobytes()


async def test_memory_of_programs_is_freed_with_the_client(serving: Serving) -> None:
    before = standin.used()
    for hangs_up in (False, True):
        async with backend(serving.port) as b:
            await program(b, [await doubling(b)])
            x = values(64)
            assert await exchange(b, 0, x.tobytes(), x.nbytes) == (x * 2).tobytes()
            assert standin.used() > before + 2 * MAIL
            if hangs_up:
                # In the middle of an input.
                await b.connection.send_raw(run_message(b.connection, 0) + bytes(10))
                b.connection.abort()
                await b.connection.wait_closed()
        await eventually(lambda: standin.used() == before)


async def test_others_compute_beside_a_program_that_waits(serving: Serving, b: Backend) -> None:
    await program(b, [await doubling(b)])
    async with Stream.of(b) as stream, serving.client() as other:
        await stream.send(run_message(b.connection, 0), bytes(100))
        x = await other.tensor(F32, (64,), values(64))
        result: Any = await other.compute(other.graph.scale(x, 3.0))
        assert np.array_equal(np.ravel(result), values(64) * np.float32(3))
        await stream.send(bytes(156))
        assert not (await stream.receive(64)).any()


async def test_links_are_refused_and_the_client_told_why(b: Backend) -> None:
    """A coordinator then adds up sums itself."""
    fields = peers_fields(bytes(range(32)), 1.0, 1, [("127.0.0.1", 1, True), ("", 0, False)])
    answer = await b.connection.request(Command.SPLIT_PEERS, device=0, **fields)
    assert answer.result == 1
    assert b"a GPU" in bytes(answer.reason)
