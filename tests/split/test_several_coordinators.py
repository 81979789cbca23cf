"""Coordinators that don't know each other over the same workers, and parts that can't be parts.

A program holds a worker until its last step. Whoever needs several workers at once must not keep
one while it waits for another: whatever the order in which they are named, nobody waits for a
timeout, everybody gets right numbers, and everybody gets on.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Sequence

import numpy as np
import pytest

from client.backend import Backend
from client.connection import Connection, connect
from client.errors import ConnectionLost
from client.split.address import ServerAddress
from client.split.steps import Step, encode_steps
from protocol.commands import Command
from protocol.ggml.types import GgmlType
from protocol.split import caps_version, split_caps
from rpc_server.devices.split.holding import Holding
from rpc_server.devices.split.worker import Worker
from rpc_server.options import parse_options
from tests.split.cluster import HOST, Coordinator, WorkerProcess, backend
from tests.split.relay import Relay
from tests.split.weights import nmse, values, weight
from tools.serving.ports import free_port
from tools.serving.processes import (
    Process,
    listens,
    own_command,
    upstream_command,
)

F32 = GgmlType.F32
PATIENCE = 30.0
# Far above what any of these graphs takes, and waited for only by what is stuck.
TIMEOUT = ("--split-timeout", "20")
GRAPHS = 10
TOKENS = 2
# From a coordinator to the part that it names last: others come first there.
FAR = 0.05


async def computing(
    coordinator: WorkerProcess,
    seed: int,
    graphs: int = GRAPHS,
    start: asyncio.Barrier | None = None,
) -> None:
    """Chains of products, each several exchanges, with new input every time; all are right.

    With ``start`` each begins together with those of others.
    """
    shape = (256, 256)
    data = values(*shape, seed=seed) / 16
    async with backend(coordinator) as b:
        w = await weight(b, F32, shape, data.tobytes())
        x = await b.tensor(F32, (256, TOKENS))
        y = x
        for _ in range(4):
            y = b.graph.mul_mat(w, b.graph.scale(y, 1.5))
        plan = await b.prepare(y)
        for i in range(graphs):
            new = values(TOKENS, 256, seed=1000 * seed + i)
            await b.upload(x, new)
            if start is not None:
                await start.wait()
            await plan.run()
            expected = new
            for _ in range(4):
                expected = (expected * np.float32(1.5)) @ data.T
            got = (await b.download(y)).reshape(TOKENS, 256)
            assert nmse(got, expected) < 1e-9, f"graph {i} of client {seed}"


def check(*servers: WorkerProcess) -> None:
    for server in servers:
        assert server.alive, server.log
        for trouble in ("ERROR", "Traceback", "did not answer", "never retrieved"):
            assert trouble not in server.log, server.log


@pytest.fixture
def pair() -> Iterator[list[WorkerProcess]]:
    with WorkerProcess() as first, WorkerProcess() as second:
        yield [first, second]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["row", "tensor"])
async def test_two_over_the_same_workers_in_opposite_orders(
    mode: str, pair: list[WorkerProcess]
) -> None:
    options = (*TIMEOUT, "--split-mode", mode)
    first, second = pair
    with contextlib.ExitStack() as stack:
        far = [Relay(w.port, FAR) for w in pair]
        for relay in far:
            stack.callback(relay.close)
        one = stack.enter_context(Coordinator([first, far[1].address], *options))
        two = stack.enter_context(Coordinator([second, far[0].address], *options))
        together = asyncio.Barrier(4)
        clients = [
            computing(c, seed, start=together) for seed, c in enumerate((one, two, one, two))
        ]
        await asyncio.wait_for(asyncio.gather(*clients), 4 * PATIENCE)
        check(one, two, *pair)


@pytest.mark.slow
async def test_three_that_share_a_worker_with_each_of_the_others() -> None:
    """Philosophers at a table."""
    with contextlib.ExitStack() as stack:
        w = [stack.enter_context(WorkerProcess()) for _ in range(3)]
        parts = ((w[0], w[1]), (w[1], w[2]), (w[2], w[0], "local"))
        coordinators = [stack.enter_context(Coordinator(p, *TIMEOUT)) for p in parts]
        await asyncio.wait_for(
            asyncio.gather(*(computing(c, seed) for seed, c in enumerate(coordinators))),
            4 * PATIENCE,
        )
        check(*coordinators, *w)


@pytest.mark.slow
async def test_one_is_not_kept_off_by_another_that_never_pauses(pair: list[WorkerProcess]) -> None:
    """Graph after graph of one coordinator, and the other still gets its turn each time."""
    with Coordinator(pair, *TIMEOUT) as busy, Coordinator(pair[::-1], *TIMEOUT) as other:
        endless = [asyncio.ensure_future(computing(busy, s, 1_000_000)) for s in (1, 2)]
        await asyncio.wait_for(computing(other, 3, 20), 2 * PATIENCE)
        for task in endless:
            assert not task.done(), task
            task.cancel()
        await asyncio.gather(*endless, return_exceptions=True)
        assert busy.alive
        assert other.alive


@pytest.mark.slow
async def test_coordinators_of_coordinators(pair: list[WorkerProcess]) -> None:
    """A coordinator is leased with all that it runs on, or the two at the top could get stuck."""
    a, b = pair
    with (
        Coordinator([a], *TIMEOUT) as over_a,
        Coordinator([b], *TIMEOUT) as over_b,
        Coordinator([over_a, b], *TIMEOUT) as one,
        Coordinator([over_b, a], *TIMEOUT) as two,
    ):
        servers = (one, two, over_a, over_b)
        await asyncio.wait_for(
            asyncio.gather(*(computing(c, seed, 30) for seed, c in enumerate(servers))),
            4 * PATIENCE,
        )
        check(*servers, a, b)


async def test_whoever_asks_for_a_coordinator_that_waits_is_told_in_time(
    pair: list[WorkerProcess],
) -> None:
    """Its own graph waits for a worker that the one who asks has."""
    a, _ = pair
    with Coordinator([a], *TIMEOUT) as over_a:
        async with backend(a) as holder, backend(over_a) as asking:
            assert await acquire(holder.connection) == (True, "")
            graph = asyncio.ensure_future(computing(over_a, 1, 1))
            async with asyncio.timeout(PATIENCE):
                # Until that graph waits.
                while "waiting for it" not in over_a.log:
                    await asyncio.sleep(0.01)
                for patience in (0.0, 0.2):
                    granted, who = await asyncio.wait_for(acquire(asking.connection, patience), 5.0)
                    assert not granted
                    assert who == "a graph of its own that waits"
                assert not graph.done()
                await release(holder.connection)
                await graph
                assert await acquire(asking.connection, 10.0) == (True, "")
        check(over_a, a)


@pytest.mark.slow
async def test_a_coordinator_that_dies_gives_its_workers_back(pair: list[WorkerProcess]) -> None:
    with Coordinator(pair, *TIMEOUT) as doomed, Coordinator(pair[::-1], *TIMEOUT) as other:
        task = asyncio.ensure_future(computing(doomed, 1, 1_000_000))
        await computing(other, 2, 5)
        doomed.kill()
        with pytest.raises(ConnectionLost):
            await task
        await asyncio.wait_for(computing(other, 3, 20), PATIENCE)
        check(other)


@pytest.mark.slow
async def test_a_coordinator_that_stalls_is_waited_for_up_to_a_limit() -> None:
    """It is not the worker that is blamed, and the one who waits is served in the end."""
    with contextlib.ExitStack() as stack:
        pair = [stack.enter_context(WorkerProcess("--peer-timeout", "8")) for _ in range(2)]
        stalled = stack.enter_context(Coordinator(pair, *TIMEOUT))
        other = stack.enter_context(Coordinator(pair[::-1], *TIMEOUT))
        await computing(other, 1, 1)
        task = asyncio.ensure_future(computing(stalled, 2, 1_000_000))
        async with backend(other) as b:
            # Until it is caught with the workers in its hands.
            for _ in range(200):
                await asyncio.sleep(0.05)
                stalled.child.send_signal(signal.SIGSTOP)
                if await is_held(pair[0]):
                    break
                stalled.child.send_signal(signal.SIGCONT)
            else:
                pytest.fail("the coordinator was never stopped with a lease")
            await b.connection.get_alignment()
        try:
            await asyncio.wait_for(computing(other, 3, 5), PATIENCE)
        finally:
            stalled.child.send_signal(signal.SIGCONT)
        with pytest.raises(ConnectionLost):
            await task
        assert re.search(
            r"worker \S+ is in use by another: client \d+ \(127[^\n]*; waiting", other.log
        )
        assert any("--peer-timeout" in w.log for w in pair)
        check(other)


async def is_held(worker: WorkerProcess) -> bool:
    """Whether some client has the lease of a worker."""
    async with await connect(HOST, worker.port, split=True) as c:
        answer = await c.request(Command.SPLIT_ACQUIRE, device=0, patience_ms=0)
    return not answer.granted


# -- how often leases are offered


class Leased(Worker):
    """A worker without a connection, which notes what it is asked; ``wanted`` by somebody else."""

    has_leases = True
    identity = 1

    def __init__(self) -> None:
        self.name = "worker"
        self.leased = self.wanted = False
        self.asked: list[str] = []

    async def acquire_lease(self, seconds: float) -> str:
        self.asked.append("acquire")
        self.leased = True
        return ""

    async def release_lease(self, *, keep: bool = False) -> bool:
        self.asked.append("offer" if keep else "release")
        self.leased = keep and not self.wanted
        return self.leased


async def graphs_of(holding: Holding, tasks: list[asyncio.Task[None]], worker: Worker) -> None:
    """Run a few graphs that follow one another."""
    for _ in range(5):
        await holding.begin([worker])
        holding.end()
        await asyncio.gather(*tasks)


async def test_leases_are_offered_every_few_graphs_unless_others_want_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("_OFFER_SECONDS", "_SHARED_SECONDS", "_IDLE_SECONDS"):
        monkeypatch.setattr(f"rpc_server.devices.split.holding.{name}", 1000.0)
    worker, tasks = Leased(), list[asyncio.Task[None]]()
    holding = Holding(lambda: [worker], lambda work: tasks.append(asyncio.ensure_future(work)))
    await graphs_of(holding, tasks, worker)
    assert worker.asked == ["acquire", "offer"]
    # The time has come for the next offer, and somebody waits by then.
    monkeypatch.setattr("rpc_server.devices.split.holding._OFFER_SECONDS", 0.0)
    worker.asked, worker.wanted = [], True
    await holding.begin([worker])
    holding.end()
    await asyncio.gather(*tasks)
    assert worker.asked == ["offer"]
    assert not worker.leased
    # Others take turns with this one now.
    monkeypatch.setattr("rpc_server.devices.split.holding._OFFER_SECONDS", 1000.0)
    worker.asked, worker.wanted = [], False
    await graphs_of(holding, tasks, worker)
    assert worker.asked == ["acquire", *["offer"] * 5]
    # Nobody has come for long.
    monkeypatch.setattr("rpc_server.devices.split.holding._SHARED_SECONDS", 0.0)
    worker.asked = []
    await graphs_of(holding, tasks, worker)
    assert worker.asked == []
    # And none of it is kept when no graph follows, although it was not offered.
    monkeypatch.setattr("rpc_server.devices.split.holding._IDLE_SECONDS", 0.0)
    await graphs_of(holding, tasks, worker)
    async with asyncio.timeout(PATIENCE):
        while worker.leased:
            await asyncio.sleep(0)
    assert worker.asked[-1] == "release"
    assert "offer" not in worker.asked


# -- the worker's side


async def acquire(c: Connection, patience: float = 0.0) -> tuple[bool, str]:
    answer = await c.request(Command.SPLIT_ACQUIRE, device=0, patience_ms=int(patience * 1000))
    return bool(answer.granted), bytes(answer.holder).rstrip(b"\0").decode()


async def release(c: Connection, *, keep: bool = False) -> bool:
    answer = await c.request(Command.SPLIT_RELEASE, device=0, keep=int(keep))
    return bool(answer.kept)


async def test_a_lease_is_one_clients(whole: WorkerProcess) -> None:
    async with backend(whole) as a, backend(whole) as b, backend(whole) as c:
        one, two, three = (n.connection for n in (a, b, c))
        assert await acquire(one) == (True, "")
        assert await acquire(one) == (True, "")
        granted, holder = await acquire(two)
        assert not granted
        port = one._transport.get_extra_info("sockname")[1]
        assert re.fullmatch(rf"client \d+ \(127\.0\.0\.1:{port}\)", holder)
        granted, holder = await acquire(two, 0.1)
        assert not granted
        assert str(port) in holder
        # Nobody waits any more.
        assert await release(one, keep=True)
        # In the order in which they came.
        second = asyncio.ensure_future(acquire(two, 20.0))
        await asyncio.sleep(0.1)
        third = asyncio.ensure_future(acquire(three, 20.0))
        await asyncio.sleep(0.1)
        assert not await release(one, keep=True)
        assert (await second)[0]
        assert not third.done()
        assert not await release(two)
        assert (await third)[0]
        assert not await release(one)
        assert not (await acquire(one))[0]


async def test_a_lease_goes_on_when_its_holder_leaves(whole: WorkerProcess) -> None:
    async with backend(whole) as b:
        async with backend(whole) as a, backend(whole) as gone:
            assert (await acquire(a.connection))[0]
            await gone.connection.start(Command.SPLIT_ACQUIRE, device=0, patience_ms=60000)
            waiting = asyncio.ensure_future(acquire(b.connection, 20.0))
            await asyncio.sleep(0.1)
            gone.connection.abort()
        # The one before it in the queue is gone as well.
        assert (await asyncio.wait_for(waiting, PATIENCE))[0]
        await release(b.connection)


async def test_a_program_without_a_lease_waits_for_one(whole: WorkerProcess) -> None:
    """Clients of the first version, and those that need one server only."""
    async with backend(whole) as a, old_client(whole) as b:
        x = b.graph.new_tensor(F32, (64,), "x")
        y = b.graph.scale(x, 2.0)
        await b.allocate([x, y])
        step = Step((x,), b.graph.build([y]), (y,))
        data = encode_steps(b.connection, [step])
        await b.connection.request(Command.SPLIT_PROGRAM, data=data, device=0, program=0)
        assert (await acquire(a.connection))[0]
        given = values(64)
        message = b.connection.message(Command.SPLIT_RUN, device=0, program=0) + given.tobytes()
        got = np.empty(64, np.float32)
        (answer,) = await b.connection.exchange(
            [message], [(Command.SPLIT_RUN, got.data.cast("B"))], framed=False
        )
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(answer), 0.3)
        assert not await release(a.connection, keep=True)
        await asyncio.wait_for(answer, PATIENCE)
        assert np.array_equal(got, given * 2)
        # It had it for that run.
        assert (await acquire(a.connection, 5.0))[0]
        await release(a.connection)


@contextlib.asynccontextmanager
async def old_client(server: WorkerProcess) -> AsyncIterator[Backend]:
    """One that speaks version 1 of the extension."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("client.connection.split_caps", lambda: split_caps(1))
        connection = await connect(HOST, server.port, split=True)
    assert caps_version(connection.server_caps) > 1
    assert connection.split_version == 1
    assert Command.SPLIT_ACQUIRE not in connection.dialect.commands
    async with connection:
        yield await Backend.open(connection)


@pytest.mark.slow
async def test_a_holder_that_does_nothing_is_let_go() -> None:
    with WorkerProcess("--peer-timeout", "1") as worker:
        async with backend(worker) as a, backend(worker) as b:
            assert (await acquire(a.connection))[0]
            # As long as nobody waits it may have it.
            await asyncio.sleep(1.5)
            assert await release(a.connection, keep=True)
            assert (await acquire(b.connection, 20.0))[0]
            with pytest.raises(ConnectionLost):
                await a.connection.get_alignment()
        assert re.search(r"ERROR +client [^\n]*has the device's lease for 1 s, runs nothing and "
                         r"others wait \(--peer-timeout\)", worker.log)  # fmt: skip


async def test_coordinators_of_the_first_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that don't know leases are used without."""
    monkeypatch.setattr("client.connection.split_caps", lambda: split_caps(1))
    with WorkerProcess() as worker:
        link = await Worker.open(HOST, worker.port, 20.0)
        assert link.extended
        assert not link.has_leases
        assert link.members == ()
        assert link.speaks == "split extension without leases"
        link.close()


# -- what can't be a part


def refused(parts: Sequence[str], *options: str, port: int = 0) -> str:
    """The line with which a coordinator doesn't start."""
    done = subprocess.run(
        own_command(port, "--split", ",".join(parts), *options),
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_the_same_address_twice() -> None:
    assert "127.0.0.1:1234 twice" in refused(["127.0.0.1:1234", "127.0.0.1:1234"])


@pytest.mark.slow
def test_the_same_worker_under_two_names(pair: list[WorkerProcess]) -> None:
    first, second = pair
    names = [first.address, f"localhost:{first.port}", second.address]
    line = refused(names)
    assert re.search(rf"error: worker (\S+:{first.port}) is the same server as (\S+:{first.port}): "
                     "name each once", line), line  # fmt: skip
    check(first, second)


@pytest.mark.slow
def test_its_own_address() -> None:
    port = free_port()
    line = refused([f"{HOST}:{port}", "local"], port=port)
    assert f"worker {HOST}:{port} is this server itself; its own share is called 'local'" in line
    with WorkerProcess() as worker:
        line = refused([worker.address, f"localhost:{port}"], "--host", "0.0.0.0", port=port)
        assert f"worker localhost:{port} is this server itself" in line


@pytest.mark.slow
def test_a_part_that_is_behind_another_part(pair: list[WorkerProcess]) -> None:
    first, second = pair
    with Coordinator(pair) as over_both, Coordinator([first, "local"]) as over_first:
        line = refused([over_both.address, second.address])
        assert f"worker {over_both.address} splits over {second.address}, which is a part" in line
        line = refused([over_both.address, over_first.address])
        assert "split over the same server" in line
        with Coordinator([over_first, second]) as sound:
            check(sound)


@pytest.mark.slow
def test_no_circle_comes_about_later() -> None:
    """A worker ends, and in its place would come a coordinator over the one who looks for it."""
    with WorkerProcess() as worker, Coordinator([worker]) as coordinator:
        port = worker.port
        worker.stop()
        coordinator.wait_for("was lost; trying")
        # Without its worker it has no memory to offer, so nobody starts over it.
        assert "has no memory free" in refused([coordinator.address], port=port)
        assert coordinator.alive


@pytest.mark.upstream
@pytest.mark.slow
def test_an_upstream_worker_twice_or_taken(tmp_path: object) -> None:
    """It serves one client at a time, and the next gets no answer until that leaves."""
    port = free_port()
    command = upstream_command(port, "-t", "1")
    if command is None:
        pytest.skip("no ggml-rpc-server: run python -m tools.upstream")
    with Process(command) as server:
        server.wait_until(lambda: listens(port), PATIENCE, "listening socket")
        line = refused([f"{HOST}:{port}", f"localhost:{port}"])
        assert "is the same server as" in line
        with Coordinator([f"{HOST}:{port}"]):
            line = refused([f"{HOST}:{port}"])
        assert "another client or coordinator has it" in line
        assert "serves one at a time" in line


@pytest.mark.slow
def test_a_worker_that_nobody_answers_for_is_not_taken_for_its_neighbour() -> None:
    with WorkerProcess() as worker, socket.socket() as silent:
        silent.bind((HOST, 0))
        silent.listen(5)
        started = time.monotonic()
        line = refused([worker.address, f"{HOST}:{silent.getsockname()[1]}"])
        assert "accepts but does not answer" in line
        assert "same server" not in line
        assert time.monotonic() - started < PATIENCE


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("http://box:50052", "'http://box:50052' is a URL; write box:50052, without 'http://'"),
        ("local,https://box/", "is a URL; write box, without 'https://'"),
        ("tls://http://box", "is a URL"),
        ("box:port", "'port' is not a port"),
        ("fe80::1:8080", "write [fe80::1:8080] or [fe80::1]:8080"),
        ("box,box:50052", "names box:50052 twice"),
        ("[::1],::1:50052", "names [::1]:50052 twice"),
    ],
)
def test_addresses_that_are_none(text: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_options(["--split", text])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_addresses_of_parts() -> None:
    options = parse_options(["--split", "a,[::1]:5,local,tls://b:7,fe80::2,c"])
    assert options.split == (
        ServerAddress("a"), ServerAddress("::1", 5), None, ServerAddress("b", 7, tls=True),
        ServerAddress("fe80::2"), ServerAddress("c"),
    )  # fmt: skip
