"""Clients side by side on one emulated card: each has a stream, and what runs on it, of its own."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest

from client.backend import Backend, PreparedGraph
from client.errors import ConnectionLost
from protocol.ggml.types import GgmlType
from protocol.negotiation import Negotiator
from protocol.tensor import Tensor
from rpc_server.devices.cpu.streaming.direct import DirectTransfers
from rpc_server.devices.cuda.card import Card
from rpc_server.devices.cuda.device import CudaDevice
from rpc_server.devices.cuda.queue import CudaQueue
from rpc_server.devices.cuda.storage import CudaStorage, PinnedPool
from rpc_server.net.listener import Server
from rpc_server.net.listening import listen
from rpc_server.session.buffers import Budget
from rpc_server.session.context import ServerContext
from tests.cuda import emulation, standin

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason=emulation.NO_COMPILER)

F32 = GgmlType.F32


class Serving:
    """A server with one emulated card, in this process."""

    def __init__(self) -> None:
        self.device = CudaDevice(0, transfers=DirectTransfers)
        context = ServerContext([Budget(self.device)], Negotiator(None))
        self.server = Server(context)
        self.port = 0

    async def start(self) -> None:
        """Listen on a port of its own."""
        sockets = await listen("127.0.0.1", 0)
        self.port = sockets[0].getsockname()[1]
        await self.server.start(sockets)

    def client(self) -> Any:
        return Backend.connect("127.0.0.1", self.port)

    def queue(self, number: int) -> CudaQueue:
        """That of the client that came as the so-manieth, of those that are there."""
        sessions = [c.session for c in self.server.connections if c.session is not None]
        queue = sorted(sessions, key=lambda s: s.stats.number)[number].queue(0)
        assert isinstance(queue, CudaQueue)
        return queue


@pytest.fixture
async def serving() -> AsyncIterator[Serving]:
    with standin.installed():
        made = Serving()
        await made.start()
        yield made
        await made.server.stop()


class Work:
    """A graph of one client that is run again and again: squares of what is uploaded, summed."""

    def __init__(self, backend: Backend, x: Tensor, y: Tensor, plan: PreparedGraph) -> None:
        self._backend = backend
        self._x = x
        self._y = y
        self._plan = plan

    @classmethod
    async def of(cls, backend: Backend, columns: int = 2) -> Work:
        x = await backend.tensor(F32, (64, columns))
        w = await backend.tensor(GgmlType.F16, (64, 8), np.ones((8, 64), np.float16))
        y = backend.graph.mul_mat(w, backend.graph.sqr(x))
        return cls(backend, x, y, await backend.prepare(y))

    async def start(self) -> None:
        await self._plan.run()

    async def run(self, value: float) -> None:
        """Compute with ``value`` everywhere, and look at the result."""
        await self._backend.upload(self._x, np.full(self._x.ne[1::-1], value, np.float32))
        await self._plan.run()
        result = np.asarray(await self._backend.download(self._y))
        np.testing.assert_array_equal(result, np.full_like(result, 64 * value * value))


# Longer than anything takes, on a busy machine too.
PATIENCE = 60


async def eventually(what: Callable[[], bool]) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE):
            while not what():
                await asyncio.sleep(0.01)
    assert what()


async def test_a_captured_graph_fetches_its_status_itself(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token is one launch and one wait: nothing is copied beside the graph."""
    copied: list[int] = []
    to_host = Card.to_host

    def counted(card: Card, host: int, address: int, size: int, stream: Any) -> None:
        if size == 4:
            copied.append(address)
        to_host(card, host, address, size, stream)

    monkeypatch.setattr(Card, "to_host", counted)
    async with serving.client() as client:
        work = await Work.of(client)
        seen = []
        for value in (1.0, 2.0, 3.0, 4.0):
            await work.run(value)
            seen.append(len(copied))
        # By itself, then while it is captured.
        assert seen == [1, 2, 2, 2]
        # What fails is told all the same, by a captured graph too.
        table = await client.tensor(F32, (4, 3), np.zeros((3, 4), np.float32))
        rows = await client.tensor(GgmlType.I32, (1,), np.array([2], np.int32))
        plan = await client.prepare(client.graph.get_rows(table, rows))
        for _ in range(4):
            await plan.run()
        assert await client.connection.device_count() == 1
        await client.upload(rows, np.array([3], np.int32))
        await plan.run()
        with pytest.raises(ConnectionLost):
            await client.connection.device_count()


async def test_small_results_are_read_where_they_are_asked_for(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of a token wait for no thread; what is large, or still on its way there, has one."""
    here: list[bool] = []
    loop, download = threading.get_ident(), CudaStorage._download

    def noted(storage: CudaStorage, start: int, size: int) -> memoryview:
        here.append(threading.get_ident() == loop)
        return download(storage, start, size)

    monkeypatch.setattr(CudaStorage, "_download", noted)
    async with serving.client() as client:
        await (await Work.of(client)).run(2.0)
        x = await client.tensor(F32, (1024,), np.ones(1024, np.float32))
        await client.download(x)
        large = await client.tensor(F32, (1024, 257), np.ones((257, 1024), np.float32))
        doubled = client.graph.add(large, large)
        await client.compute(doubled)
    assert here == [True, False, False]


async def test_a_graph_waits_for_no_other_clients(serving: Serving) -> None:
    """While one client's stream stands still, another uploads, computes (captured, too), reads."""
    async with serving.client() as a, serving.client() as b:
        held, free = await Work.of(a), await Work.of(b)
        await held.run(1.0)
        with serving.queue(0).stream.queue.held() as reached:
            waiting = asyncio.create_task(held.run(3.0))
            assert await asyncio.to_thread(reached.wait, PATIENCE)
            for value in (1.0, 2.0, 4.0, 5.0):
                await free.run(value)
            assert not waiting.done()
        await waiting


@pytest.mark.parametrize("columns", [2, 40])
async def test_clients_take_turns_and_keep_apart(serving: Serving, columns: int) -> None:
    """Requests of two interleaved in every way that the server takes them; by cuBLAS as well."""
    async with serving.client() as a, serving.client() as b:
        works = [await Work.of(a, columns), await Work.of(b, columns)]
        for round in range(4):
            await asyncio.gather(*(work.run(10.0 * i + round) for i, work in enumerate(works)))
        assert serving.queue(0).stream != serving.queue(1).stream


async def test_more_clients_than_threads(serving: Serving) -> None:
    async with (
        serving.client() as a, serving.client() as b, serving.client() as c, serving.client() as d,
        serving.client() as e, serving.client() as f, serving.client() as g, serving.client() as h,
        serving.client() as i, serving.client() as j,
    ):  # fmt: skip
        works = [await Work.of(backend) for backend in (a, b, c, d, e, f, g, h, i, j)]
        for round in range(3):
            await asyncio.gather(*(work.run(float(round + n)) for n, work in enumerate(works)))


async def test_a_lane_is_freed_with_its_client(serving: Serving) -> None:
    """Scratch, status, handle of cuBLAS: all memory is back, for a client that was cut off too."""
    before = standin.used()
    async with serving.client() as a:
        await (await Work.of(a, 40)).run(1.0)
        without = standin.used()
        async with serving.client() as b:
            await b.tensor(F32, (64,))
            assert standin.used() == without + 256
            work = await Work.of(b, 40)
            for value in (1.0, 2.0):
                await work.run(value)
            # More than the buffers.
            assert standin.used() > before + serving.server.context.budgets[0].used
            assert len(standin.handles()) == 2
        await eventually(lambda: standin.used() == without)
        a.connection.abort()
    await eventually(lambda: standin.used() == before)
    assert not standin.handles()


async def test_a_client_that_goes_in_the_middle_of_a_graph(serving: Serving) -> None:
    before = standin.used()
    async with serving.client() as a:
        work = await Work.of(a)
        await work.run(1.0)
        with serving.queue(0).stream.queue.held() as reached:
            waiting = asyncio.create_task(work.run(3.0))
            assert await asyncio.to_thread(reached.wait, PATIENCE)
            a.connection.abort()
            await asyncio.sleep(0.05)
            assert standin.used() > before
        with pytest.raises(Exception, match=r"."):
            await waiting
    await eventually(lambda: standin.used() == before)


async def test_memory_is_given_while_another_captures(serving: Serving) -> None:
    """A capture is not spoilt, nor is memory given in the middle of it."""
    card, queue = serving.device.card, serving.device.queue()
    inside, go = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def enqueue() -> None:
        loop.call_soon_threadsafe(inside.set)
        asyncio.run_coroutine_threadsafe(go.wait(), loop).result(PATIENCE)

    capture = asyncio.create_task(asyncio.to_thread(card.capture, queue.stream, enqueue))
    await inside.wait()
    address = asyncio.create_task(asyncio.to_thread(card.allocate, 64))
    await asyncio.sleep(0.05)
    assert not address.done()
    go.set()
    (await capture).launch(queue.stream)
    card.free(await address)


async def test_what_is_dropped_within_a_capture_is_freed_behind_it(serving: Serving) -> None:
    """A finalizer may run anywhere."""
    card, queue = serving.device.card, serving.device.queue()
    address = card.allocate(64)

    def enqueue() -> None:
        card.free(address)
        assert standin.used() == 64
        gc.collect()

    card.capture(queue.stream, enqueue).launch(queue.stream)
    assert standin.used() == 0


async def test_a_card_that_fails_ends_its_clients(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    """Each with one line that says so; nothing of them stays behind, and nobody is let in."""
    context = serving.server.context
    async with serving.client() as a, serving.client() as b:
        works = [await Work.of(a, 40), await Work.of(b, 40)]
        await asyncio.gather(*(work.run(1.0) for work in works))
        standin.fail()
        await works[0].start()
        await a.connection.wait_closed()
    await eventually(lambda: not context.stats.clients)
    assert context.budgets[0].used == 0
    # asyncio may complain of what others have left, when that is collected.
    ours = [r for r in caplog.records if r.name.startswith("rpc_server.")]
    lost, line = [r.getMessage() for r in ours if r.levelname == "ERROR"]
    assert "CUDA0 is lost" in lost
    assert "CUDA0 failed" in line
    assert "cudaErrorIllegalAddress" in line
    assert context.device_lost.is_set()
    with pytest.raises(ConnectionLost):
        await Backend.connect("127.0.0.1", serving.port).__aenter__()
    assert context.stats.refused["device"] == 1


def test_pinned_memory_is_kept_while_the_card_reads_it() -> None:
    """What is left over of it goes back to CuPy, and from there to whoever asks."""
    gc.collect()
    before = standin.pinned()
    with standin.installed():
        card = Card(0)
        pool, stream, address = PinnedPool(card), card.stream(), card.allocate(6)
        taken = [pool.take() for _ in range(6)]
        for i, pair in enumerate(taken):
            pair.chunks[0].view[:1] = bytes([i])
            card.to_device(address + i, pair.chunks[0].address, 1, stream)
            pair.copied[0] = card.mark(stream)
            pool.give(pair)
        assert standin.pinned() == before + 12
        del taken, pair
        assert pool.download(address, 6, stream) == bytes(range(6))
        for _ in range(4):
            pool.give(pool.take())
        assert standin.pinned() < before + 12
