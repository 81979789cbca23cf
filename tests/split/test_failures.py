"""What goes wrong between machines: always an error in bounded time that says whose fault it was.

Real processes are killed and stopped here. Whatever happens, a client never gets a wrong number:
it gets its result or loses its connection. What it had is freed on all workers that are left, and
the coordinator serves the next client as soon as all workers are there.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from client.backend import Backend
from client.errors import ConnectionLost
from protocol.commands import Command
from protocol.dialects import DIALECTS
from protocol.ggml.types import GgmlType
from rpc_server.devices.split import worker as links
from rpc_server.devices.split.worker import Worker, WorkerLost
from rpc_server.options import parse_options
from tests.client.scripted import Peer, scripted
from tests.parameters import mostly_slow
from tests.split.cluster import (
    HOST,
    WORKER_IDS,
    WORKERS,
    Coordinator,
    WorkerProcess,
    backend,
    emptied,
    status,
)
from tests.split.relay import Relay
from tests.split.weights import content, nmse, values, weight
from tools.serving.ports import free_port
from tools.serving.processes import (
    Process,
    listens,
    own_command,
    upstream_command,
)

F32, I32 = GgmlType.F32, GgmlType.I32
# What any of these may take at most, on a busy machine.
PATIENCE = 20.0


class Cluster:
    """A coordinator and two workers of its own, of which the second is the one that suffers."""

    def __init__(self, *options: str, kind: type[WorkerProcess] = WorkerProcess) -> None:
        self._kind = kind
        self.good, self.bad = kind("--mem", "512"), kind("--mem", "512")
        try:
            self.coordinator = Coordinator([self.good, self.bad], *options)
        except BaseException:
            self.good.stop()
            self.bad.stop()
            raise

    @property
    def servers(self) -> tuple[WorkerProcess, WorkerProcess, WorkerProcess]:
        return self.coordinator, self.good, self.bad

    def revive(self) -> None:
        """Start the worker again where it was, and wait until the coordinator has it."""
        address, before = self.bad.address, self.connections()
        self.bad.stop()
        self.bad.forget()
        self.bad = self._kind("--mem", "512", "--port", address.rpartition(":")[2])
        self.wait_for_reconnection(before)

    def connections(self) -> int:
        return len(re.findall(rf"worker {re.escape(self.bad.address)}: protocol", self.log))

    def wait_for_reconnection(self, before: int) -> None:
        self.coordinator.wait_until(lambda: self.connections() > before, PATIENCE, "reconnection")

    @property
    def log(self) -> str:
        return self.coordinator.log

    def stop(self) -> None:
        for server in self.servers:
            if server.alive:
                server.child.send_signal(signal.SIGCONT)
            server.stop()
            server.forget()


# Longer than any exchange here takes on a busy machine, and shorter than PATIENCE.
EXCHANGE = 15.0


@contextlib.contextmanager
def sound_cluster(exchange: float, kind: type[WorkerProcess] = WorkerProcess) -> Iterator[Cluster]:
    """A cluster whose workers have so long for an exchange; whom nobody killed is sound after."""
    made = Cluster("--split-timeout", str(exchange), "--drain-seconds", "0.3", kind=kind)
    try:
        yield made
        assert made.coordinator.alive, made.log
        assert made.good.alive, made.good.log
        for log in (made.log, made.good.log):
            assert "internal error" not in log, log
            assert "Traceback" not in log, log
            assert "never retrieved" not in log, log
    finally:
        made.stop()


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with sound_cluster(EXCHANGE, getattr(request, "param", WorkerProcess)) as made:
        yield made


@pytest.fixture
def impatient(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """One whose coordinator waits for 2 s."""
    with sound_cluster(2, getattr(request, "param", WorkerProcess)) as made:
        yield made


# Sets the event once it is at what it is for.
Job = Callable[[Backend, asyncio.Event], Awaitable[None]]
SQUARE = (1024, 1024)
SHAPE = (1024, 8192)
# Of SHAPE on one of two workers, which is more than exchanges take.
HALF_A_WEIGHT = 16 << 20


async def uploading(b: Backend, begun: asyncio.Event) -> None:
    data = bytes(2 * HALF_A_WEIGHT)
    w = await weight(b, F32, SHAPE)
    while True:
        begun.set()
        await b.connection.set_tensor(w, data)


async def prompting(b: Backend, begun: asyncio.Event) -> None:
    """Products of a few seconds, of which exchanges take less than HALF_A_WEIGHT of memory."""
    w = await weight(b, F32, SQUARE, content(F32, SQUARE))
    x = await b.tensor(F32, (1024, 1000), values(1000, 1024))
    y = x
    for _ in range(60):
        y = b.graph.mul_mat(w, y)
    plan = await b.prepare(y)
    while True:
        # The first run compiles and plans, which takes as long as the machine likes.
        await plan.run()
        await b.download(y)
        begun.set()


async def generating(b: Backend, begun: asyncio.Event) -> None:
    data = values(8192, 1024)
    w = await weight(b, F32, SHAPE, data.tobytes())
    x = await b.tensor(F32, (1024, 1))
    y = b.graph.mul_mat(w, x)
    plan = await b.prepare(y)
    while True:
        new = values(1, 1024)
        await b.upload(x, new)
        await plan.run()
        assert nmse((await b.download(y)).reshape(1, 8192), new @ data.T) < 1e-9
        begun.set()


JOBS: dict[str, Job] = {"upload": uploading, "prompt": prompting, "decode": generating}


async def lost(task: asyncio.Task[None], seconds: float = PATIENCE) -> None:
    """The job ends since the coordinator hung up."""
    with pytest.raises(ConnectionLost):
        await asyncio.wait_for(task, seconds)


async def check_works(coordinator: WorkerProcess) -> None:
    """A new client gets right numbers, and nothing is left of those before it."""
    data, x = values(256, 512, seed=50), values(7, 512, seed=51)
    async with backend(coordinator) as b:
        await emptied(b)
        w = await weight(b, F32, (512, 256), data.tobytes())
        for part in (await status(b)).parts:
            assert part.bytes == w.nbytes // 2
        leaf = await b.tensor(F32, (512, 7), x)
        got = await b.compute(b.graph.mul_mat(w, leaf))
        assert nmse(got.reshape(7, 256), x @ data.T) < 1e-9


async def freed(worker: WorkerProcess) -> None:
    """All weights on a worker were given back; what is left are places for exchanges."""

    async def used() -> int:
        async with backend(worker) as b:
            free, total = await b.connection.get_device_memory()
            return total - free

    end = time.monotonic() + PATIENCE
    while await used() >= HALF_A_WEIGHT:
        assert time.monotonic() < end, f"{await used()} bytes are still in use:\n{worker.log}"
        await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def running(coordinator: WorkerProcess, job: Job) -> AsyncIterator[asyncio.Task[None]]:
    """``job`` on its way, as a client of the coordinator."""
    begun = asyncio.Event()
    async with backend(coordinator) as b:
        task = asyncio.ensure_future(job(b, begun))
        waiter = asyncio.ensure_future(begun.wait())
        await asyncio.wait((task, waiter), return_when=asyncio.FIRST_COMPLETED)
        assert waiter.done(), task
        await asyncio.sleep(0.1)
        assert not task.done(), task
        yield task


@pytest.mark.parametrize("cluster", WORKERS, ids=WORKER_IDS, indirect=True)
@pytest.mark.parametrize("stage", mostly_slow(JOBS))
async def test_a_worker_is_killed(stage: str, cluster: Cluster) -> None:
    async with running(cluster.coordinator, JOBS[stage]) as task:
        cluster.bad.kill()
        await lost(task)
    name = re.escape(f"worker {cluster.bad.address}")
    assert re.search(rf"ERROR +client [^\n]*{name}[^\n]*; closing the connection", cluster.log)
    await freed(cluster.good)
    await asyncio.to_thread(cluster.revive)
    await check_works(cluster.coordinator)


@pytest.mark.slow
async def test_a_worker_is_killed_while_nobody_needs_it(cluster: Cluster) -> None:
    async with backend(cluster.coordinator) as b:
        w = await weight(b, F32, SHAPE, content(F32, SHAPE))
        x = await b.tensor(F32, (1024, 1), values(1, 1024))
        y = b.graph.mul_mat(w, x)
        plan = await b.prepare(y)
        await plan.run()
        await b.download(y)
        cluster.bad.kill()
        address = cluster.bad.address
        lost_line = rf"ERROR +worker {address} was lost; trying to reach it again"
        await asyncio.to_thread(cluster.coordinator.wait_for, lost_line)
        # A new client is told that there is no room.
        async with backend(cluster.coordinator) as other:
            with pytest.raises(MemoryError):
                await weight(other, F32, SHAPE)
        assert re.search(rf"no buffer of \d+ bytes: worker {address}", cluster.log)
        await asyncio.to_thread(cluster.revive)
        # Rows that are gone don't come back: whoever had some there must begin again.
        await plan.run()
        with pytest.raises(ConnectionLost):
            await b.download(y)
        assert re.search(rf"client [^\n]*worker {address}[^\n]*; closing", cluster.log)
    await check_works(cluster.coordinator)


@pytest.mark.upstream
@pytest.mark.parametrize("stage", JOBS)
@pytest.mark.slow
async def test_an_upstream_worker_is_killed(stage: str, tmp_path: Path) -> None:
    """One without the extension: its exchanges are ordinary commands."""
    with WorkerProcess("--mem", "512") as good, contextlib.ExitStack() as stack:
        port = free_port()

        def start() -> None:
            command = upstream_command(port, "-t", "1")
            if command is None:
                pytest.skip("no ggml-rpc-server: run python -m tools.upstream")
            bad = stack.enter_context(Process(command, tmp_path / "upstream.log"))
            bad.wait_until(lambda: listens(port), PATIENCE, "listening socket")
            workers.append(bad)

        workers: list[Process] = []
        start()
        name = f"{HOST}:{port}"
        coordinator = stack.enter_context(Coordinator([good, name], "--tensor-split", "1,1"))
        async with running(coordinator, JOBS[stage]) as task:
            workers[0].kill()
            await lost(task)
        assert re.search(rf"ERROR +client [^\n]*worker {name}[^\n]*; closing", coordinator.log)
        await freed(good)
        start()
        again = rf"(?s)worker {name}: protocol.*worker {name}: protocol"
        await asyncio.to_thread(coordinator.wait_for, again)
        await check_works(coordinator)


@pytest.mark.slow
async def test_all_clients_of_a_lost_worker(cluster: Cluster) -> None:
    async with (
        running(cluster.coordinator, generating) as first,
        running(cluster.coordinator, generating) as second,
        running(cluster.coordinator, uploading) as third,
    ):
        cluster.bad.kill()
        await asyncio.gather(*map(lost, (first, second, third)))
    await asyncio.to_thread(cluster.revive)
    await check_works(cluster.coordinator)


@pytest.mark.slow
@pytest.mark.parametrize("impatient", WORKERS, ids=WORKER_IDS, indirect=True)
@pytest.mark.parametrize("stage", mostly_slow(["upload", "decode"]))
async def test_a_worker_that_falls_silent(stage: str, impatient: Cluster) -> None:
    """Its machine still takes bytes, as one that swaps or was suspended does."""
    async with running(impatient.coordinator, JOBS[stage]) as task:
        impatient.bad.child.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        await lost(task, 2 + PATIENCE)
        assert time.monotonic() - started > 1
    # Between graphs the lease is offered: it may be that which is not answered.
    pattern = {
        "upload": "no answer within 2 s",
        "decode": "(did not answer in time|no answer within 2 s)",
    }[stage]
    assert re.search(
        rf"ERROR +client [^\n]*worker {impatient.bad.address}[^\n]*{pattern}[^\n]*; closing",
        impatient.log,
    )
    before = impatient.connections()
    impatient.bad.child.send_signal(signal.SIGCONT)
    await asyncio.to_thread(impatient.wait_for_reconnection, before)
    await check_works(impatient.coordinator)
    # It has noticed, and given back what was there.
    await freed(impatient.bad)


async def a_product(b: Backend) -> None:
    w = await weight(b, F32, SQUARE, content(F32, SQUARE))
    x = await b.tensor(F32, (1024, 4), values(4, 1024))
    y = b.graph.mul_mat(w, x)
    await (await b.prepare(y)).run()
    await b.download(y)


@contextlib.contextmanager
def held_at_a_program(*, hangs: bool) -> Iterator[tuple[Coordinator, Relay]]:
    """A coordinator of a worker that doesn't answer its program; one that ``hangs``, nobody."""
    with WorkerProcess() as worker, contextlib.ExitStack() as stack:
        relay = Relay(worker.port, holds=Command.SPLIT_PROGRAM, hangs=hangs)
        stack.callback(relay.close)
        yield (
            stack.enter_context(Coordinator([relay.address], "--split-timeout", "2")),
            relay,
        )


@pytest.mark.slow
async def test_a_worker_that_hangs_at_a_program() -> None:
    """It isn't waited for as long as one that compiles, and answers others meanwhile."""
    with held_at_a_program(hangs=True) as (coordinator, relay):
        async with backend(coordinator) as b:
            with pytest.raises(ConnectionLost):
                await asyncio.wait_for(a_product(b), PATIENCE)
        coordinator.wait_for("no answer within 2 s, nor to a greeting")
        assert relay.holding.is_set()


@pytest.mark.slow
async def test_others_compute_while_a_worker_does_not_get_ready() -> None:
    """Graphs that don't need it; and that the worker takes long is no reason to leave it."""
    with held_at_a_program(hangs=False) as (coordinator, relay):
        async with backend(coordinator) as b, backend(coordinator) as other:
            waiting = asyncio.ensure_future(a_product(b))
            assert await asyncio.to_thread(relay.holding.wait, PATIENCE)
            x = await other.tensor(F32, (64,), values(64))
            for _ in range(3):
                got = await asyncio.wait_for(other.compute(other.graph.scale(x, 3.0)), PATIENCE)
                assert np.array_equal(got.reshape(64), values(64) * np.float32(3))
                # Longer than an exchange may take, in all.
                await asyncio.sleep(1.0)
            assert not waiting.done()
            waiting.cancel()
            await asyncio.wait([waiting])


@pytest.mark.slow
async def test_the_coordinator_is_killed(cluster: Cluster) -> None:
    async with running(cluster.coordinator, generating) as task:
        cluster.coordinator.kill()
        await lost(task)
    for worker in (cluster.good, cluster.bad):
        await freed(worker)
        async with backend(worker) as b:
            x = await b.tensor(F32, (4,), [1, 2, 3, 4])
            got = await asyncio.wait_for(b.compute(b.graph.scale(x, 2.0)), PATIENCE)
            assert got.ravel().tolist() == [2, 4, 6, 8]
    cluster.coordinator = Coordinator([cluster.good, cluster.bad])
    await check_works(cluster.coordinator)


@pytest.mark.slow
async def test_a_client_is_killed_within_an_upload(cluster: Cluster) -> None:
    async with running(cluster.coordinator, uploading) as task:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await asyncio.to_thread(cluster.coordinator.wait_for, r"hung up within SET_TENSOR")
    await asyncio.to_thread(cluster.coordinator.wait_for, r"disconnected; freed [1-9]")
    await check_works(cluster.coordinator)


@pytest.mark.slow
async def test_the_coordinator_stops_within_a_graph(cluster: Cluster) -> None:
    """It doesn't wait for a worker that says nothing."""
    async with running(cluster.coordinator, generating) as task:
        cluster.bad.child.send_signal(signal.SIGSTOP)
        await asyncio.sleep(0.1)
        started = time.monotonic()
        assert await asyncio.to_thread(cluster.coordinator.stop, PATIENCE) == 0
        assert time.monotonic() - started < EXCHANGE / 2, "that was the --split-timeout"
        await lost(task)
    cluster.bad.child.send_signal(signal.SIGCONT)
    cluster.coordinator = Coordinator([cluster.good, cluster.bad])
    await check_works(cluster.coordinator)


@pytest.mark.slow
async def test_a_graph_that_fails_between_exchanges(cluster: Cluster) -> None:
    """The workers' streams are out of step then: they are left, and begun anew."""
    before = cluster.connections()
    async with backend(cluster.coordinator) as b:
        w = await weight(b, F32, SHAPE, content(F32, SHAPE))
        x = await b.tensor(F32, (1024, 4), values(4, 1024))
        bad = await b.tensor(I32, (2,), np.array([0, 1 << 20], np.int32))
        y = b.graph.mul_mat(w, x)
        part = b.graph.cont(b.graph.view_2d(y, 1024, 4, y.nb[1], 0))
        z = b.graph.mul_mat(w, b.graph.get_rows(part, bad))
        with pytest.raises(ConnectionLost):
            await b.compute(z)
    assert "out of range" in cluster.log
    await asyncio.to_thread(cluster.wait_for_reconnection, before)
    await check_works(cluster.coordinator)


@pytest.mark.slow
async def test_a_worker_without_room() -> None:
    """What it can't take stays on the coordinator, which has no room for all things either."""
    with (
        WorkerProcess() as good,
        WorkerProcess("--mem", "1") as small,
        Coordinator([good, small]) as coordinator,
    ):
        async with backend(coordinator) as b:
            # Shares are by free memory: here they are given.
            data = content(F32, SHAPE)
            w = await weight(b, F32, SHAPE, data, shares=(1, 1))
            assert (await b.connection.get_tensor(w)).tobytes() == data
            assert [part.bytes for part in (await status(b)).parts] == [0, 0]
        assert re.search(
            rf"worker {small.address} has no room for 16777216 bytes of '[^']+': it stays here",
            coordinator.log,
        )
        async with backend(coordinator) as b:
            rows = values(128, 1024)
            w = await weight(b, F32, (1024, 128), rows.tobytes(), shares=(1, 1))
            assert (await b.connection.get_tensor(w)).tobytes() == rows.tobytes()
            assert [part.bytes for part in (await status(b)).parts] == [64 * 4096] * 2


# -- at the start


def test_it_does_not_start_without_its_workers() -> None:
    with WorkerProcess() as good:
        address = f"{HOST}:{free_port()}"
        done = subprocess.run(
            own_command(0, "--split", f"{good.address},{address}"),
            capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert re.search(rf"^error: worker {address}: Connection refused", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr


async def mute(peer: Peer) -> None:
    await peer.reader.read()


async def mute_after_hello(peer: Peer) -> None:
    await peer.hello()
    await peer.reader.read()


async def mute_later(peer: Peer) -> None:
    await peer.hello()
    await peer.take(Command.GET_ALIGNMENT)
    await peer.answer(Command.GET_ALIGNMENT, alignment=64)
    await peer.reader.read()


async def speaks_http(peer: Peer) -> None:
    await peer.reader.read(1)
    await peer.send_raw(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 8)
    await peer.reader.read()


async def hangs_up(peer: Peer) -> None:
    await peer.reader.read(1)


async def hangs_up_after_hello(peer: Peer) -> None:
    await peer.hello()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (mute, "accepts but does not answer"),
        (mute_after_hello, "accepts but does not answer"),
        (mute_later, "accepts but does not answer"),
        (speaks_http, "speaks something else"),
        (hangs_up, "hung up"),
        (hangs_up_after_hello, "hung up"),
    ],
)
async def test_what_is_no_worker(
    script: Callable[[Peer], Awaitable[None]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = "does not answer" in message
    monkeypatch.setattr(links, "CONNECT_TIMEOUT", 0.3 if silent else PATIENCE)

    async def play(peer: Peer) -> None:
        # On a busy machine one that is silent later may be left before it is.
        with contextlib.suppress(asyncio.IncompleteReadError):
            await script(peer)

    async with scripted(DIALECTS[0], play) as port:
        with pytest.raises(WorkerLost, match=message) as caught:
            await Worker.open(HOST, port, 30.0)
    assert f"worker {HOST}:{port}" in str(caught.value)


@pytest.mark.slow
async def test_answers_that_are_none(cluster: Cluster) -> None:
    """A worker that sends what nobody asked for is let go, by name."""

    async def script(peer: Peer) -> None:
        await peer.hello()
        for command, answer in (
            (Command.GET_ALIGNMENT, {"alignment": 64}),
            (Command.GET_MAX_SIZE, {"max_size": 1 << 40}),
            (Command.GET_DEVICE_MEMORY, {"free_mem": 1 << 30, "total_mem": 1 << 30}),
            *[(Command.GET_ALIGNMENT, {"alignment": 64})] * 5,
        ):
            await peer.take(command)
            await peer.answer(command, **answer)
        await peer.take(Command.ALLOC_BUFFER)
        await peer.send(b"what?")
        await peer.reader.read()

    async with scripted(DIALECTS[0], script) as port:
        link = await Worker.open(HOST, port, 30.0)
        with pytest.raises(WorkerLost, match=rf"worker {HOST}:{port}: .*ALLOC_BUFFER has 5 bytes"):
            await link.place(F32, (256, 64), "some")
        assert link.lost
        with pytest.raises(WorkerLost, match="was lost"):
            link.require()


def test_a_listener_behind_a_full_backlog_is_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody accepts there at all: the connection itself doesn't come about, or no answer does."""
    monkeypatch.setattr(links, "CONNECT_TIMEOUT", 0.3)
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        with pytest.raises(WorkerLost, match="does not answer"):
            asyncio.run(Worker.open(HOST, port, 30.0))


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_a_timeout_is_a_time(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_options(["--split", "local,some:1", "--split-timeout", seconds])
    assert caught.value.code == 2
    assert f"'{seconds}' is not a number of seconds" in capsys.readouterr().err
