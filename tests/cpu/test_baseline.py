"""Graphs whose kernels are still being compiled: answered at once, and by kernels once they can."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import pytest

from protocol.dialects import DIALECTS
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.devices.base import NotReadyError
from rpc_server.devices.cpu import baseline, catalog, plan
from rpc_server.devices.cpu.baseline import LaterKernels, seconds_without
from rpc_server.devices.cpu.catalog import Kernel, baseline_of, few_columns_kernel, product_of
from rpc_server.devices.cpu.executor import Executor
from rpc_server.devices.cpu.instruction_sets import chosen_isa
from rpc_server.devices.cpu.kernels.interface.codes import Binary
from rpc_server.devices.cpu.plan import CpuPlan, CpuPlanBuilder
from rpc_server.devices.cpu.scratch import ScratchArena
from rpc_server.graph.errors import GraphError
from rpc_server.graph.parse import LinkedGraph
from rpc_server.native.routine import CompileError
from tests.ops.harness import nmse, run
from tests.ops.tensors import CONTEXT, node, params, tensor, values

R = TypeVar("R", bound=Kernel)

# With these weights array code takes more than a millisecond, for the sums less.
K, ROWS = 512, 256
ADD, SUB, MUL = (catalog.binary_kernel(b, True) for b in (Binary.ADD, Binary.SUB, Binary.MUL))


class Compiling:
    """The library, some of whose kernels are still being compiled, and some can't be."""

    def __init__(self) -> None:
        self.absent: set[Kernel] = set()
        self.bad: set[Kernel] = set()
        # Those that were asked for already have code, or are about to.
        self.without_code: set[Kernel] = set()
        self.asked: list[tuple[Kernel, bool]] = []
        self.waited_for: list[Kernel] = []

    def pending(self, kernels: Iterable[R], *, urgent: bool) -> list[R]:
        kernels = list(kernels)
        self.asked += [(kernel, urgent) for kernel in kernels]
        catalog.library().addresses(kernels)
        return [kernel for kernel in kernels if kernel in self.absent]

    def missing(self, kernels: Iterable[R]) -> list[R]:
        return [kernel for kernel in kernels if kernel in self.without_code]

    def has(self, kernel: Kernel) -> bool:
        return kernel not in self.absent | self.bad

    def failed(self, kernel: Kernel) -> bool:
        return kernel in self.bad and kernel not in self.absent

    def addresses(self, kernels: Iterable[R]) -> dict[R, int | CompileError]:
        found = catalog.library().addresses(kernels)
        self.waited_for += self.absent & found.keys()
        self.absent -= found.keys()
        return {k: CompileError("no") if k in self.bad else at for k, at in found.items()}


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Compiling:
    made = Compiling()
    for module in (plan, baseline):
        monkeypatch.setattr(module, "library", lambda: made)
    monkeypatch.setattr(baseline, "_WORTH_WAITING", 1e-3)
    return made


@pytest.fixture
def builder() -> Iterator[CpuPlanBuilder]:
    executor = Executor(2)
    yield CpuPlanBuilder(executor, ScratchArena(), baseline=True)
    executor.close()


@pytest.fixture(scope="module")
def weights() -> Tensor:
    rng = np.random.default_rng(1)
    row = rng.standard_normal(K).astype(np.float32)
    return tensor(GgmlType.Q8_0, (K, ROWS), row * np.linspace(0.1, 2, ROWS)[:, None])


def graph(weights: Tensor, columns: int) -> list[Tensor]:
    """A product that is worth waiting for, and two sums that are not."""
    rng = np.random.default_rng(2)
    x = tensor(GgmlType.F32, (K, columns), rng.standard_normal((columns, K)))
    doubled = node(Op.ADD, GgmlType.F32, x.ne, [x, x])
    product = node(Op.MUL_MAT, GgmlType.F32, (weights.ne[1], columns), [weights, doubled])
    return [doubled, product, node(Op.ADD, GgmlType.F32, product.ne, [product, product])]


def built(builder: CpuPlanBuilder, nodes: list[Tensor]) -> CpuPlan:
    return builder.build(LinkedGraph(nodes, DIALECTS[0]), wait=False)


def by_kernels(nodes: list[Tensor]) -> list[np.ndarray]:  # type: ignore[type-arg]
    run(nodes, kernels=True)
    return [values(t).copy() for t in nodes]


@pytest.fixture
def product_kernel(weights: Tensor) -> Kernel:
    return product_of(weights.type, chosen_isa())


# Of three columns the kernel makes no tiles: it is the same code as what stands in for it.
@pytest.mark.parametrize(("columns", "bound"), [(3, 0.0), (9, 1e-11)])
def test_a_graph_is_answered_before_its_kernels_are_compiled(
    compiling: Compiling,
    builder: CpuPlanBuilder,
    weights: Tensor,
    product_kernel: Kernel,
    columns: int,
    bound: float,
) -> None:
    nodes = graph(weights, columns)
    expected = by_kernels(nodes)
    compiling.absent |= {ADD, product_kernel}
    made = built(builder, nodes)
    assert made.interpreted == {Op.ADD: 2}
    for _ in range(2):
        made.run()
        for t, right in zip(nodes, expected, strict=True):
            assert nmse(right, values(t)) <= bound
    # Some of what it lacks is no reason to plan it again.
    compiling.absent -= {ADD}
    made.run()
    assert made.interpreted == {Op.ADD: 2}
    compiling.absent.clear()
    made.run()
    assert made.interpreted == {}
    assert all((a == values(t)).all() for a, t in zip(expected, nodes, strict=True))
    assert compiling.waited_for == []


@pytest.mark.parametrize("loop", [catalog.place_scratch, catalog.schedule_records])
def test_a_graph_is_planned_before_the_loops_for_that_are_compiled(
    compiling: Compiling, builder: CpuPlanBuilder, weights: Tensor, loop: Kernel
) -> None:
    rows = tensor(GgmlType.I32, (4,), np.arange(4))
    nodes = graph(weights, 9)
    nodes += [*graph(weights, 9), node(Op.ARGSORT, GgmlType.I32, nodes[2].ne, [nodes[2]])]
    nodes.append(node(Op.GET_ROWS, GgmlType.F32, (nodes[2].ne[0], 4), [nodes[2], rows]))
    expected = by_kernels(nodes)
    whole = built(builder, nodes)
    compiling.absent.add(loop)
    made = built(builder, nodes)
    assert made.interpreted == {}
    assert made.scratch >= whole.scratch
    steps = made.steps
    for _ in range(3):
        for t in nodes:
            CONTEXT.memory(t.address, t.nbytes)[...] = 0xFF
        made.run()
        assert all((a == values(t)).all() for a, t in zip(expected, nodes, strict=True))
        compiling.absent.clear()
    assert made.steps is not steps


def test_a_node_that_needs_too_much_scratch_is_named_without_the_loop_too(
    compiling: Compiling, builder: CpuPlanBuilder, weights: Tensor
) -> None:
    nodes = graph(weights, 9)
    small = CpuPlanBuilder(builder._executor, ScratchArena(1 << 13), baseline=True)
    told = []
    for absent in ((), (catalog.place_scratch,)):
        compiling.absent |= set(absent)
        with pytest.raises(GraphError, match="of scratch") as error:
            built(small, nodes)
        told.append(str(error.value))
    assert told[0] == told[1]


def test_what_takes_long_without_a_kernel_waits_for_what_stands_in_for_it(
    compiling: Compiling, builder: CpuPlanBuilder, weights: Tensor, product_kernel: Kernel
) -> None:
    stand_in = baseline_of(product_kernel)
    assert stand_in == few_columns_kernel(*product_kernel.constants)
    assert stand_in is not None
    nodes = graph(weights, 3)
    expected = by_kernels(nodes)
    compiling.absent |= {ADD, product_kernel, stand_in}
    with pytest.raises(NotReadyError) as error:
        built(builder, nodes)
    error.value.wait()
    assert compiling.waited_for == [stand_in]
    built(builder, nodes).run()
    assert (expected[-1] == values(nodes[-1])).all()


def test_one_that_can_not_be_compiled_leaves_what_stands_in_for_it(
    compiling: Compiling, builder: CpuPlanBuilder, weights: Tensor, product_kernel: Kernel
) -> None:
    nodes = graph(weights, 3)
    expected = by_kernels(nodes)
    compiling.absent |= {ADD, product_kernel}
    made = built(builder, nodes)
    compiling.bad.add(ADD)
    compiling.absent.clear()
    made.run()
    assert made.interpreted == {Op.ADD: 2}
    assert (expected[-1] == values(nodes[-1])).all()


def test_a_kernel_whose_stand_in_can_not_be_compiled_is_waited_for(
    compiling: Compiling, builder: CpuPlanBuilder, weights: Tensor, product_kernel: Kernel
) -> None:
    stand_in = baseline_of(product_kernel)
    assert stand_in is not None
    compiling.absent.add(product_kernel)
    compiling.bad.add(stand_in)
    nodes = graph(weights, 3)
    with pytest.raises(NotReadyError) as error:
        built(builder, nodes)
    error.value.wait()
    assert compiling.waited_for == [product_kernel]
    assert built(builder, nodes).interpreted == {}


def test_what_it_is_to_become_is_counted_from_the_start(
    compiling: Compiling, builder: CpuPlanBuilder, weights: Tensor, product_kernel: Kernel
) -> None:
    nodes = graph(weights, 9)
    whole = built(builder, nodes)
    compiling.absent |= {ADD, product_kernel}
    made = built(CpuPlanBuilder(builder._executor, ScratchArena(), baseline=True), nodes)
    assert made.scratch >= whole.scratch
    assert made.nbytes >= whole.nbytes
    assert not made.brief


def test_without_it_graphs_wait_for_all_of_their_kernels(
    compiling: Compiling, builder: CpuPlanBuilder
) -> None:
    x = tensor(GgmlType.F32, (8,), np.ones(8))
    nodes = [node(Op.ADD, GgmlType.F32, x.ne, [x, x])]
    compiling.absent.add(ADD)
    patient = CpuPlanBuilder(builder._executor, ScratchArena())
    with pytest.raises(NotReadyError) as error:
        built(patient, nodes)
    error.value.wait()
    assert compiling.waited_for == [ADD]
    assert built(patient, nodes).interpreted == {}


def test_what_array_code_takes() -> None:
    table = tensor(GgmlType.F32, (64, 100_000))
    ids = tensor(GgmlType.I32, (2,), np.zeros(2))
    assert seconds_without(node(Op.GET_ROWS, GgmlType.F32, (64, 2), [table, ids])) < 1e-3
    x = tensor(GgmlType.F32, (64, 2), np.zeros((2, 64)))
    assert seconds_without(node(Op.MUL_MAT, GgmlType.F32, (100_000, 2), [table, x])) > 0.05

    def attention(tokens: int) -> Tensor:
        q = tensor(GgmlType.F32, (64, tokens, 9))
        k, v = (tensor(GgmlType.F16, (64, 256, 3)) for _ in range(2))
        scale = params(0.125, 0.0, 0.0)
        return node(Op.FLASH_ATTN_EXT, GgmlType.F32, (64, 9, tokens), [q, k, v], op_params=scale)

    assert seconds_without(attention(1)) < 5e-3
    assert seconds_without(attention(512)) > 0.05


class Clock:
    """Timers that are over when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._now = 0.0
        self._timers: list[tuple[float, Callable[[], None]]] = []
        monkeypatch.setattr(baseline, "time", self)
        monkeypatch.setattr(baseline, "threading", self)
        self.Lock = threading.Lock

    def monotonic(self) -> float:
        return self._now

    def Timer(
        self, seconds: float, function: Callable[..., None], arguments: tuple[Any, ...]
    ) -> threading.Timer:
        self._timers.append((self._now + seconds, functools.partial(function, *arguments)))
        # The one that is started does nothing.
        return threading.Timer(0, lambda: None)

    def pass_by(self, seconds: float) -> None:
        self._now += seconds
        due = [call for at, call in self._timers if at <= self._now]
        self._timers = [(at, call) for at, call in self._timers if at > self._now]
        for call in due:
            call()


def test_compilers_begin_a_moment_later_with_what_nobody_waits_for(
    compiling: Compiling, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, later = Clock(monkeypatch), LaterKernels()
    compiling.absent |= {ADD, MUL}
    compiling.without_code |= {ADD, MUL}
    # What is there or on disk is loaded at once.
    assert later.absent([ADD, SUB, ADD]) == [ADD]
    assert compiling.asked == [(SUB, True)]
    clock.pass_by(baseline._LATER / 2)
    assert later.absent([ADD, MUL], urgent=False) == [ADD, MUL]
    assert compiling.asked == [(SUB, True)]
    # The first request says when.
    clock.pass_by(baseline._LATER / 2)
    assert compiling.asked == [(SUB, True), (ADD, True)]
    clock.pass_by(baseline._LATER / 2)
    assert compiling.asked == [(SUB, True), (ADD, True), (MUL, False)]
    # Who asks again may be in more of a hurry, or the first one to notice that it has to be anew.
    assert later.absent([MUL]) == [MUL]
    assert compiling.asked[3:] == [(MUL, True)]
    compiling.absent.clear()
    assert later.absent([ADD, MUL]) == []


def test_what_can_not_be_compiled_is_not_absent(
    compiling: Compiling, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, later = Clock(monkeypatch), LaterKernels()
    compiling.bad.add(ADD)
    compiling.without_code.add(ADD)
    assert later.absent([ADD]) == []
    clock.pass_by(2 * baseline._LATER)
    assert compiling.asked == [(ADD, True)]


def test_a_graph_asks_compilers_for_nothing_at_once_but_what_it_waits_for(
    compiling: Compiling,
    builder: CpuPlanBuilder,
    weights: Tensor,
    product_kernel: Kernel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "later_kernels", LaterKernels())
    clock = Clock(monkeypatch)
    nodes = graph(weights, 9)
    built(builder, nodes)
    lacking = {ADD, product_kernel}
    compiling.absent |= lacking
    compiling.without_code |= lacking
    compiling.asked.clear()
    made = built(CpuPlanBuilder(builder._executor, ScratchArena(), baseline=True), nodes)
    made.run()
    assert lacking.isdisjoint(kernel for kernel, _ in compiling.asked)
    clock.pass_by(baseline._LATER)
    assert lacking <= {kernel for kernel, urgent in compiling.asked if urgent}
