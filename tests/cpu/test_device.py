"""The CPU device and its clients: graphs by turns, each with scratch of its own, given back."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from protocol.dialects import DIALECTS
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.graph_payload import GraphPayload
from protocol.tensor import Tensor
from rpc_server.devices.cpu.device import CpuDevice, CpuQueue
from rpc_server.devices.cpu.plan import CpuPlan
from rpc_server.devices.cpu.scratch import IdleScratch, ScratchArena
from rpc_server.graph.errors import GraphError
from rpc_server.ops.table import OPS
from tests.ops.tensors import CONTEXT, node, tensor, values

_PATIENCE = 60.0


@pytest.fixture
def device() -> Iterator[CpuDevice]:
    made = CpuDevice(2)
    yield made
    made.close()


def product(k: int = 64, m: int = 8, n: int = 3) -> Tensor:
    rng = np.random.default_rng(1)
    weights = tensor(GgmlType.F32, (k, m), rng.standard_normal((m, k)))
    x = tensor(GgmlType.F32, (k, n), rng.standard_normal((n, k)))
    return node(Op.MUL_MAT, GgmlType.F32, (m, n), [weights, x])


def total() -> Tensor:
    x = tensor(GgmlType.F32, (8, 2), np.ones((2, 8)))
    return node(Op.ADD, GgmlType.F32, x.ne, [x, x])


def planned(queue: CpuQueue, *nodes: Tensor) -> CpuPlan:
    return queue.submit(lambda: queue.plan_items(list(nodes), DIALECTS[0])).result(_PATIENCE)


def planted(monkeypatch: pytest.MonkeyPatch, work: Callable[[Any], None]) -> Tensor:
    """A node whose reference does ``work`` with its context, and then what it is to do."""
    spec = OPS[Op.SIN]
    monkeypatch.setitem(OPS, Op.SIN, replace(spec, reference=lambda ctx, t: work(ctx)))
    monkeypatch.setattr("rpc_server.devices.cpu.plan.LOWERINGS", {})
    x = tensor(GgmlType.F32, (8, 2), np.ones((2, 8)))
    return node(Op.SIN, GgmlType.F32, x.ne, [x])


def test_a_graph_of_another_client_runs_within_a_long_one(
    device: CpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    long, short = device.queue(), device.queue()
    added = total()
    done, begun = threading.Event(), threading.Event()

    def work(ctx: Any) -> None:
        begun.set()
        # One that nobody could interrupt would never end.
        while not done.is_set():
            ctx.look()

    running = long.submit(planned(long, planted(monkeypatch, work)).run)
    assert begun.wait(_PATIENCE)
    short.submit(planned(short, added).run).result(_PATIENCE)
    assert (values(added) == 2).all()
    assert not running.done()
    done.set()
    running.result(_PATIENCE)


def test_programs_of_two_clients_take_turns(device: CpuDevice) -> None:
    """Each with its own scratch: results are as if it were alone."""
    queues = [device.queue() for _ in range(3)]
    graphs = [[product(256, 96, 40) for _ in range(20)] for _ in queues]
    plans = [planned(q, *g) for q, g in zip(queues, graphs, strict=True)]
    queues[0].submit(plans[0].run).result(_PATIENCE)
    expected = values(graphs[0][-1]).copy()

    def again(plan: CpuPlan) -> None:
        for _ in range(30):
            plan.run()

    running = [q.submit(functools.partial(again, p)) for q, p in zip(queues, plans, strict=True)]
    for one in running:
        one.result(_PATIENCE)
    for graph in graphs:
        for t in graph:
            np.testing.assert_array_equal(values(t), expected)


def test_a_stop_ends_a_reference_between_two_pieces(
    device: CpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, begun = device.queue(), threading.Event()

    def work(ctx: Any) -> None:
        begun.set()
        while True:
            ctx.look()

    plan = planned(queue, planted(monkeypatch, work))
    running = queue.submit(plan.run)
    assert begun.wait(_PATIENCE)
    plan.stop()
    with pytest.raises(GraphError, match="was stopped"):
        running.result(_PATIENCE)


def test_a_stopped_plan_stays_stopped_and_others_go_on(device: CpuDevice) -> None:
    queue = device.queue()
    stopped, other = planned(queue, product()), planned(queue, product())
    stopped.stop()
    with pytest.raises(GraphError, match="was stopped"):
        queue.submit(stopped.run).result(_PATIENCE)
    queue.submit(other.run).result(_PATIENCE)


def test_planning_keeps_nobody_from_the_device(
    device: CpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor anybody from planning: it uses nothing of the device but a core."""
    began, go_on = threading.Event(), threading.Event()

    def slow(*_: Any) -> Any:
        began.set()
        assert go_on.wait(_PATIENCE)
        raise GraphError("never mind")

    long, short = device.queue(), device.queue()
    known = planned(short, total())
    monkeypatch.setattr("rpc_server.devices.cpu.device.parse_graph", slow)
    payload = GraphPayload(0, np.zeros(0, np.uint64), np.zeros(0))  # type: ignore[arg-type]
    planning = long.submit(lambda: long.prepare(payload, DIALECTS[0], lambda _: None, None))
    assert began.wait(_PATIENCE)
    short.submit(known.run).result(_PATIENCE)
    planned(short, total())
    go_on.set()
    with pytest.raises(GraphError, match="never mind"):
        planning.result(_PATIENCE)
    long.submit(planned(long, total()).run).result(_PATIENCE)


def test_what_a_client_had_is_given_back(device: CpuDevice) -> None:
    queue = device.queue()
    queue.submit(planned(queue, product()).run).result(_PATIENCE)
    scratch = queue._scratch
    assert scratch is not None
    gone = weakref.ref(scratch)
    threads = [t for t in threading.enumerate() if t.name.startswith("cpu-0")]
    del scratch
    queue.leave()
    for thread in threads:
        thread.join(_PATIENCE)
    assert gone() is None
    assert device.idle_scratch.nbytes == 0


def test_scratch_of_a_graph_that_fails_is_given_back(
    device: CpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(ctx: Any) -> None:
        raise MemoryError

    queue = device.queue()
    plan = planned(queue, planted(monkeypatch, fails))
    plan._touches = 1 << 30
    with pytest.raises(GraphError):
        queue.submit(plan.run).result(_PATIENCE)
    assert queue._scratch is not None
    assert queue._scratch.touched <= 64 << 20


def test_scratch_of_clients_that_compute_nothing_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trimmed: list[ScratchArena] = []
    monkeypatch.setattr(ScratchArena, "trim", lambda self, keep: trimmed.append(self))
    idle = IdleScratch(100)
    arenas = [ScratchArena(1 << 16) for _ in range(4)]
    for arena in arenas:
        arena.touched = 40
        idle.enter(arena)
    # Those that computed longest ago.
    assert trimmed == arenas[:2]
    assert idle.nbytes == 80
    # What computes is not in the way, and not given back.
    idle.leave(arenas[2])
    idle.enter(arenas[0])
    assert trimmed == arenas[:2]
    idle.enter(arenas[2])
    assert trimmed == [*arenas[:2], arenas[3]]


def test_a_device_keeps_no_client_that_left() -> None:
    made = CpuDevice(1)
    gone = weakref.ref(made.queue())
    assert gone() is None
    made.close()


def test_array_code_that_nothing_can_interrupt_does_not_keep_the_device(
    device: CpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    long, short = device.queue(), device.queue()
    done, begun = threading.Event(), threading.Event()

    def work(ctx: Any) -> None:
        begun.set()
        assert done.wait(_PATIENCE)

    monkeypatch.setattr("rpc_server.devices.cpu.plan._FEW_ELEMENTS", 1)
    running = long.submit(planned(long, planted(monkeypatch, work)).run)
    assert begun.wait(_PATIENCE)
    added = total()
    short.submit(planned(short, added).run).result(_PATIENCE)
    assert (values(added) == 2).all()
    assert not running.done()
    done.set()
    running.result(_PATIENCE)
    # It is no free work.
    assert long.share.used > short.share.used


def test_rows_that_a_kernel_would_be_long_at_run_by_array_code(device: CpuDevice) -> None:
    queue = device.queue()
    x = tensor(GgmlType.F32, (600_000, 1), np.arange(600_000, dtype=np.float32)[None])
    order = node(Op.ARGSORT, GgmlType.I32, x.ne, [x], (1, *(0,) * 15))
    few = tensor(GgmlType.F32, (600, 1000), np.ones((1000, 600)))
    orders = node(Op.ARGSORT, GgmlType.I32, few.ne, [few])
    assert planned(queue, order).interpreted == {Op.ARGSORT: 1}
    assert planned(queue, orders).interpreted == {}
    queue.submit(planned(queue, order).run).result(_PATIENCE)
    assert (np.array(CONTEXT.view(order))[0, 0, 0] == np.arange(600_000)[::-1]).all()


def test_a_client_without_a_thread_is_told(
    device: CpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    queue = device.queue()
    with monkeypatch.context() as at_first:
        at_first.setattr(threading.Thread, "start", fails)
        with pytest.raises(MemoryError, match="no thread"):
            queue.submit(lambda: None)
    assert queue.submit(lambda: 1).result(_PATIENCE) == 1


def test_what_is_brief_runs_on_the_calling_thread(
    device: CpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, long = device.queue(), device.queue()
    added = total()
    plan = planned(queue, added)
    assert plan.brief
    values(added)[:] = 0
    threads: list[threading.Thread] = []

    def run() -> None:
        threads.append(threading.current_thread())
        plan.run()

    noted: Any = SimpleNamespace(run=run, scratch=0)
    assert queue.at_once(noted)
    assert (values(added) == 2).all()
    assert threads == [threading.current_thread()]
    # Not while another client has the device.
    done, begun = threading.Event(), threading.Event()

    def work(ctx: Any) -> None:
        begun.set()
        assert done.wait(_PATIENCE)

    running = long.submit(planned(long, planted(monkeypatch, work)).run)
    assert begun.wait(_PATIENCE)
    assert not queue.at_once(noted)
    done.set()
    running.result(_PATIENCE)
    assert len(threads) == 1
    assert queue.at_once(noted)


def test_scratch_of_what_runs_at_once_is_not_idle(device: CpuDevice) -> None:
    queue = device.queue()
    x = tensor(GgmlType.F32, (8, 2), np.ones((2, 8)))
    plan = planned(queue, node(Op.ARGSORT, GgmlType.I32, x.ne, [x]))
    assert plan.brief
    assert plan.scratch
    queue.submit(plan.run).result(_PATIENCE)
    assert device.idle_scratch.nbytes
    idle: list[int] = []

    def run() -> None:
        idle.append(device.idle_scratch.nbytes)
        plan.run()

    noted: Any = SimpleNamespace(run=run, scratch=plan.scratch)
    assert queue.at_once(noted)
    assert idle == [0]
    assert device.idle_scratch.nbytes


def test_what_takes_long_is_not_brief(device: CpuDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = device.queue()
    # Many nodes, much memory, work for several threads, array code.
    assert not planned(queue, *(total() for _ in range(40))).brief
    wide = tensor(GgmlType.F32, (1 << 14, 2))
    assert not planned(queue, node(Op.ADD, GgmlType.F32, wide.ne, [wide, wide])).brief
    assert not planned(queue, product(512, 96, 40)).brief
    assert not planned(queue, planted(monkeypatch, lambda ctx: None)).brief
