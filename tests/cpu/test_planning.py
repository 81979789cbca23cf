"""Plans: scratch that is reused, and what happens when a kernel can't be had."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import numpy as np
import pytest

from protocol.dialects import DIALECTS
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.devices.cpu import catalog, plan, planner
from rpc_server.devices.cpu.catalog import Kernel
from rpc_server.devices.cpu.device import CpuDevice
from rpc_server.devices.cpu.executor import Executor
from rpc_server.devices.cpu.kernels.interface.layout import activation_form
from rpc_server.devices.cpu.kernels.interface.planning import MOST_KEPT
from rpc_server.devices.cpu.plan import CpuPlanBuilder
from rpc_server.devices.cpu.scratch import ScratchArena
from rpc_server.graph.parse import LinkedGraph
from rpc_server.native.routine import CompileError, NoMemoryNowError
from tests.ops.harness import nmse, run
from tests.ops.tensors import node, tensor, values


@pytest.fixture
def executor() -> Iterator[Executor]:
    made = Executor(2)
    yield made
    made.close()


def matrix(k: int, rows: int, seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    return tensor(GgmlType.Q8_0, (k, rows), rng.standard_normal((rows, k)))


def activations(k: int, n: int) -> Tensor:
    return tensor(GgmlType.F32, (k, n), np.random.default_rng(0).standard_normal((n, k)))


def product(a: Tensor, b: Tensor) -> Tensor:
    return node(Op.MUL_MAT, GgmlType.F32, (a.ne[1], b.ne[1]), [a, b])


def chain(length: int) -> list[Tensor]:
    """Products of products; the first operand is used once more at the end."""
    x = activations(64, 32)
    nodes = [product(matrix(64, 64, 0), x)]
    for i in range(1, length):
        nodes.append(product(matrix(64, 64, i), nodes[-1]))
    nodes.append(product(matrix(64, 64, length), x))
    return nodes


def test_scratch_does_not_grow_with_the_graph(executor: Executor) -> None:
    """Converted rows are kept for as long as somebody reads what they were made of."""
    builder = CpuPlanBuilder(executor, ScratchArena())
    peaks = [builder.build(LinkedGraph(chain(n), DIALECTS[0])).scratch for n in (3, 20)]
    assert peaks[0] == peaks[1]


def test_scratch_of_all_threads_ends_where_that_of_one_begins() -> None:
    """Columns of a product lie in the latter, by their addresses."""
    arena = ScratchArena(1 << 24)
    made = planner.Planner(2, arena)
    start, _ = made.thread_scratch(64)
    first = made.scratch(1 << 22)
    assert first + (1 << 22) <= start
    last = made.scratch(1 << 22)
    assert last + (1 << 22) == start
    with pytest.raises(MemoryError, match="bytes of scratch, limit 8388608"):
        made.scratch(1)
    with pytest.raises(MemoryError, match="bytes of scratch, limit 8388608"):
        planner.Planner(2, arena).shared_scratch("key", [matrix(64, 64, 0)], (1 << 23) + 1)


def test_reused_scratch_changes_no_result() -> None:
    nodes = chain(6)
    run(nodes, kernels=True, n_threads=3)
    together = [values(t) for t in nodes]
    for t in nodes:
        run(t, kernels=True, n_threads=1)
    assert all((a == values(t)).all() for a, t in zip(together, nodes, strict=True))


class Without:
    """The library, but for some kernels."""

    def __init__(self, *missing: Kernel, error: CompileError | None = None) -> None:
        self._missing = missing
        self._error = error or CompileError("no")

    def addresses(self, kernels: Iterable[Kernel]) -> dict[Kernel, int | CompileError]:
        found = catalog.library().addresses(kernels)
        return {k: self._error if k in self._missing else v for k, v in found.items()}


def test_ops_whose_kernels_can_not_be_had_run_by_their_references(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = matrix(64, 8, 1), activations(64, 3)
    first = product(a, b)
    second = node(Op.ADD, GgmlType.F32, first.ne, [first, first])
    nodes = [first, second]
    run(nodes, kernels=True)
    expected = values(second)
    # The product's own kernel is there, but not the one that gets its activations ready.
    broken = Without(catalog.CONVERTERS[activation_form(a.type)])
    monkeypatch.setattr(plan, "library", lambda: broken)
    builder = CpuPlanBuilder(executor, ScratchArena())
    for _ in range(2):
        made = builder.build(LinkedGraph(nodes, DIALECTS[0]))
        assert made.interpreted == {Op.MUL_MAT: 1}
        made.run()
        assert nmse(expected, values(second)) < 1e-4


def test_a_kernel_that_found_no_memory_once_is_asked_for_again(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [product(matrix(64, 8, 1), activations(64, 3))]
    form = activation_form(GgmlType.Q8_0)
    broken = Without(catalog.CONVERTERS[form], error=NoMemoryNowError("no mapping"))
    builder = CpuPlanBuilder(executor, ScratchArena())
    with monkeypatch.context() as at_first:
        at_first.setattr(plan, "library", lambda: broken)
        assert builder.build(LinkedGraph(nodes, DIALECTS[0])).interpreted == {Op.MUL_MAT: 1}
    assert builder.build(LinkedGraph(nodes, DIALECTS[0])).interpreted == {}


def test_a_device_without_a_compiler_runs_all_by_references(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(self: Kernel) -> int:
        raise CompileError("no compiler")

    a = activations(8, 2)
    total = node(Op.ADD, GgmlType.F32, a.ne, [a, a])
    monkeypatch.setattr(Kernel, "address", property(fails))
    device = CpuDevice(2)
    with caplog.at_level(logging.ERROR):
        built = device.queue()._plans().build(LinkedGraph([total], DIALECTS[0]))
    assert "running without kernels, which is very slow: no compiler" in caplog.text
    assert built.interpreted == {Op.ADD: 1}
    built.run()
    assert (values(total) == 2 * values(a)).all()
    device.close()


def test_few_converted_rows_are_kept(executor: Executor) -> None:
    """A graph with more of them than are kept computes the same; its scratch is bounded."""
    weights = matrix(64, 8, 0)
    # Each is read again, when all others were read in between.
    inputs = [activations(64, 3) for _ in range(MOST_KEPT + 8)]
    nodes = [product(weights, x) for x in (*inputs, *inputs)]
    built = CpuPlanBuilder(executor, ScratchArena()).build(LinkedGraph(nodes, DIALECTS[0]))
    built.run()
    actual = [values(t) for t in nodes]
    few = CpuPlanBuilder(executor, ScratchArena()).build(LinkedGraph(nodes[:1], DIALECTS[0]))
    assert built.scratch <= MOST_KEPT * few.scratch
    for t, result in zip(nodes, actual, strict=True):
        run(t, kernels=False)
        assert nmse(values(t), result) < 1e-4
