"""Planning by kinds: what is remembered of a kind gives the records that each node gets by itself.

Random graphs are planned three ways: with a memory of kinds that has seen all graphs before, with a
fresh one, and node by node, each lowered at its own addresses. All words have to be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from protocol.dialects import DIALECTS
from protocol.ggml.ops import Op
from protocol.graph_payload import GraphPayload
from protocol.tensor import Tensor
from rpc_server.devices.cpu.assembly import RecordTable
from rpc_server.devices.cpu.catalog import Kernel
from rpc_server.devices.cpu.executor import Executor
from rpc_server.devices.cpu.kernels.interface.abi import EXTRA_WORD
from rpc_server.devices.cpu.kernels.interface.planning import NOTHING, PLACE_WORDS, KindWord
from rpc_server.devices.cpu.kinds import CpuKind, KindMaker, MadeUp
from rpc_server.devices.cpu.plan import CpuPlanBuilder, StepContext, is_long
from rpc_server.devices.cpu.planner import LOWERINGS, Emitted, Planner
from rpc_server.devices.cpu.scratch import ScratchArena
from rpc_server.devices.planning import kinds
from rpc_server.devices.planning.kinds import KindMemory
from rpc_server.devices.planning.shapes import touched_elements
from rpc_server.graph import parse, table
from rpc_server.graph.errors import GraphError
from rpc_server.graph.parse import LinkedGraph, Resolve, parse_graph
from rpc_server.graph.table import NB, SHAPE_WORDS, Ints, group_rows
from rpc_server.ops.table import ContractError, check
from tests.fuzz import seeds
from tests.fuzz.sketches import F32, Sketch, resolve


class _Threads(Executor):
    """Threads that are never started."""

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads


class _Builder(CpuPlanBuilder):
    """Keeps the records of what it plans last, and asks for no kernel."""

    def __init__(self, arena: ScratchArena) -> None:
        super().__init__(_Threads(3), arena)
        self.runs: list[RecordTable] = []

    def _addresses(self, users: Iterable[Kernel]) -> dict[Kernel, int]:
        return dict.fromkeys(users, 0)

    def _program_step(self, records: RecordTable, common: StepContext) -> Callable[[], None]:
        self.runs.append(records)
        return super()._program_step(records, common)

    def planned(self, graph: LinkedGraph) -> tuple[list[RecordTable], int]:
        """The runs of records, and bytes of scratch."""
        self.runs = []
        scratch = self.build(graph).scratch
        return self.runs, scratch


def _one_by_one(graph: LinkedGraph, arena: ScratchArena) -> tuple[list[list[Emitted]], int]:
    """Runs of records, each node lowered as it is; the most bytes that any of them takes."""
    planner = Planner(3, arena, graph.nodes)
    runs: list[list[Emitted]] = []
    copies = 0
    for node in graph.nodes:
        planner.begin(node)
        spec = check(node)
        if spec.is_view or node.empty:
            continue
        if node.op not in LOWERINGS or is_long(node) or not LOWERINGS[node.op](node, planner):
            runs.append(planner.take())
            copies = max(copies, 4 * touched_elements(node))
        for written in spec.written(node):
            planner.finish(written)
    peak = max(planner.scratch_peak + planner.thread_bytes, copies)
    return [run for run in [*runs, planner.take()] if run], peak


def _spans(record: Emitted) -> set[tuple[int, int, int]]:
    # How far a reader of shared scratch looks is rounded up for kinds.
    up = [(a, a + -(-(b - a) // 64) * 64, 0) for a, b in record.reads]
    return {*up, *((a, a + -(-(b - a) // 64) * 64, 1) for a, b in record.writes)}


def _require_same(runs: list[RecordTable], expected: list[list[Emitted]]) -> None:
    assert [len(run) for run in runs] == [len(run) for run in expected]
    for run, records in zip(runs, expected, strict=True):
        for i, record in enumerate(records):
            where = f"record {i}, {record.kernel.label} of {record.node.label}"
            assert run.kernels[run.numbers[i]] == record.kernel, where
            different = np.nonzero(run.words[i] != record.words)[0]
            assert not len(different), f"{where}: words {different.tolist()}"
            assert run.work[i] == record.work, where
            assert (run.private[i], run.parts[i]) == (record.private, record.parts), where
            touched = run.spans[run.first[i] : run.first[i + 1]].tolist()
            spans = {(a, a + -(-(b - a) // 64) * 64, w) for a, b, w in touched}
            assert spans == _spans(record), where


def _hold(
    payload: GraphPayload, resolve: Resolve, remembered: _Builder, arena: ScratchArena
) -> bool:
    """Plan a graph in all ways; False where it is refused, by all."""
    graph = parse_graph(payload, DIALECTS[0], resolve)
    broken = ""
    try:
        expected, scratch = _one_by_one(graph, arena)
    except ContractError as error:
        broken = str(error)
    if broken:
        for builder in (remembered, _Builder(arena)):
            with pytest.raises(GraphError) as refused:
                builder.build(graph)
            assert str(refused.value) == broken
        return False
    for builder in (remembered, _Builder(arena)):
        runs, used = builder.planned(graph)
        _require_same(runs, expected)
        assert used == scratch
    return True


# -- graphs that are much alike --------------------------------------------------------------------


def _hold_sketches(first: int, count: int, nodes: int = 25) -> int:
    """How many sketches are planned, and equally so in all ways."""
    arena = ScratchArena()
    remembered = _Builder(arena)
    planned = 0
    for seed in range(first, first + count):
        print("seed", seed)
        planned += _hold(Sketch(seed).payload(nodes), resolve, remembered, arena)
    return planned


def test_nearly_alike_nodes_are_planned_as_each_by_itself(seed: int) -> None:
    assert _hold_sketches(seed, 40) > 20


@pytest.mark.nightly
def test_many_nearly_alike_nodes_are_planned_as_each_by_itself(seed: int) -> None:
    assert _hold_sketches(seed, 2000) > 1000


@pytest.mark.slow
def test_graphs_of_all_ops_are_planned_as_node_by_node(seed: int) -> None:
    arena = ScratchArena()
    remembered, planned = _Builder(arena), 0
    for payload, at in seeds.newest_graphs(150, seed):
        planned += _hold(payload, at, remembered, arena)
    assert planned > 60


@pytest.mark.parametrize("column", range(NB, SHAPE_WORDS))
def test_a_signature_that_leaves_out_a_stride_is_found(
    column: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stride of sources; that of the node itself is in its description."""

    def blind(rows: Ints) -> tuple[Ints, Ints]:
        if rows.shape[1] != SHAPE_WORDS:
            return group_rows(rows)
        rows = rows.copy()
        rows[:, column] = 0
        return group_rows(rows)

    monkeypatch.setattr(kinds, "group_rows", blind)
    _hold_blind(column == NB)


@pytest.mark.parametrize("dim", range(4))
def test_a_description_that_leaves_out_a_stride_is_found(
    dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blind(rows: Ints) -> tuple[Ints, Ints]:
        said = rows.copy()
        said.view(np.uint32)[:, 5 + dim] = 0
        return group_rows(said)

    monkeypatch.setattr(parse, "group_rows", blind)
    _hold_blind(dim == 0)


def _hold_blind(told_by_others: bool) -> None:
    """Expect what is planned without looking at a stride to be found.

    The first stride is told by the types and lengths of the sketches.
    """
    if told_by_others:
        _hold_sketches(1, 10)
        return
    with pytest.raises(AssertionError):
        _hold_sketches(1, 10, nodes=400)


def test_rows_whose_sums_are_equal_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.array([[1, 2], [3, 0], [1, 2], [0, 3]], np.int64)
    monkeypatch.setattr(table, "_FACTORS", np.ones(2, np.uint64))
    first, which = group_rows(rows)
    assert (first.tolist(), which.tolist()) == ([0, 1, 3], [0, 1, 0, 2])


def test_groups_are_in_the_order_of_their_first_rows() -> None:
    rows = np.array([[5, 1], [2, 2], [5, 1], [9, 0], [2, 2], [2, 3]], np.int64)
    first, which = group_rows(rows)
    assert (first.tolist(), which.tolist()) == ([0, 1, 3, 5], [0, 1, 0, 2, 1, 3])
    assert [len(x) for x in group_rows(rows[:0])] == [0, 0]


def test_a_plan_of_items_alone_has_no_kinds() -> None:
    """As a coordinator has that keeps no part of a weight itself."""
    nothing, _ = table.table_of([])
    found, first, which = kinds.signatures(nothing, kinds.slot_rows(nothing, nothing.view_src))
    assert not found
    assert len(first) == len(which) == 0


# -- what is remembered ----------------------------------------------------------------------------


def test_the_memory_of_kinds_is_bounded_and_keeps_the_newest() -> None:
    @dataclass
    class Made:
        nbytes: int = 100

    made: list[bytes] = []

    def make(signature: bytes) -> Made:
        made.append(signature)
        return Made()

    memory: KindMemory[Made] = KindMemory(350)
    for name in (b"a", b"b", b"c", b"a", b"d", b"a", b"b"):
        memory.find(name, make)
        assert memory.nbytes <= 350
    # "b" had gone for "d"; "a" had been used since.
    assert made == [b"a", b"b", b"c", b"d", b"b"]


def test_what_is_refused_is_not_remembered() -> None:
    arena = ScratchArena()
    builder = _Builder(arena)
    sketch = Sketch(1)
    x, y = sketch.tensor(F32, (32, 2)), sketch.tensor(F32, (32, 3))
    sketch.tensor(F32, (32, 2), Op.ADD, (x, y))
    graph = parse_graph(sketch.payload(0), DIALECTS[0], resolve)
    for _ in range(2):
        with pytest.raises(GraphError, match=r"ADD 't2'.*source 1 can't be repeated"):
            builder.build(graph)
    assert builder._memory.nbytes == 0


def test_more_kinds_than_any_model_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpc_server.devices.cpu.plan._MOST_KINDS", 3)
    sketch = Sketch(1)
    for width in range(1, 6):
        x = sketch.tensor(F32, (width,))
        sketch.tensor(F32, (width,), Op.ADD, (x, x))
    graph = parse_graph(sketch.payload(0), DIALECTS[0], resolve)
    with pytest.raises(GraphError, match="5 kinds of nodes"):
        _Builder(ScratchArena()).build(graph)
    # Before their signatures are made, which take a kilobyte each.
    monkeypatch.setattr(kinds, "_WORDS", None)
    rows = kinds.slot_rows(graph.table, graph.order)
    with pytest.raises(kinds.TooManyKindsError) as told:
        kinds.signatures(graph.table, rows, 3)
    assert told.value.count == 5


def test_planning_ends_when_it_is_told_to() -> None:
    graph = parse_graph(Sketch(1).payload(5), DIALECTS[0], resolve)
    with pytest.raises(GraphError, match="was stopped"):
        _Builder(ScratchArena()).build(graph, stop=np.ones(1, np.int64))


# -- lowerings that break the rules ----------------------------------------------------------------


def _kind_by(lower: Callable[[Tensor, Planner], bool]) -> CpuKind:
    sketch = Sketch(1)
    x = sketch.tensor(F32, (32, 2))
    sketch.tensor(F32, (32, 2), Op.SCALE, (x,))
    graph = parse_graph(sketch.payload(0), DIALECTS[0], resolve)
    signatures, _, _ = kinds.signatures(graph.table, kinds.slot_rows(graph.table, graph.order))
    return KindMaker(2, 1 << 30, lower)(signatures[0])


_KERNEL = Kernel("none", "none")


def test_addresses_may_be_anywhere_with_any_offset() -> None:
    def lower(t: Tensor, planner: Planner) -> bool:
        assert t.src[0] is not None
        planner.emit(_KERNEL, t, extra=(t.src[0].address + 12, 7, planner.scratch(100) + 64))
        return True

    kind = _kind_by(lower)
    rows = kind.table[kind.table[KindWord.PLACES_AT] : kind.table[KindWord.SPANS_AT]]
    places = [rows[i : i + PLACE_WORDS] for i in range(0, len(rows), PLACE_WORDS)]
    assert [(w, o) for w, _, o in places if w >= EXTRA_WORD] == [(128, 12), (130, 64)]
    assert kind.table[KindWord.LOCAL] == 128


@pytest.mark.parametrize(
    "word",
    [
        lambda t: t.address * 2,
        lambda t: t.address - t.src[0].address,
        lambda t: t.address + t.src[0].address,
        lambda t: 0 - t.address,
        lambda t: t.address % 64,
        lambda t: t.address // 64 * 64,
        lambda t: t.address & -64,
        lambda t: min(t.address, t.src[0].address),
        lambda t: int(t.address < t.src[0].address),
        lambda t: int(t.address),
        lambda t: np.array([t.address])[0],
    ],
)
def test_a_lowering_may_not_compute_with_addresses(word: Callable[[Any], int]) -> None:
    def lower(t: Tensor, planner: Planner) -> bool:
        planner.emit(_KERNEL, t, extra=(word(t),))
        return True

    with pytest.raises(RuntimeError, match="computes with addresses"):
        _kind_by(lower)


def test_a_lowering_may_ask_which_addresses_are_equal() -> None:
    def lower(t: Tensor, planner: Planner) -> bool:
        planner.emit(_KERNEL, t, extra=(t.address == t.address + 4, t.address != 0))
        return True

    made = _kind_by(lower).table
    extra = made[KindWord.WORDS_AT] + EXTRA_WORD
    assert made[extra : extra + 2].tolist() == [0, 1]


@pytest.mark.parametrize("size", [(1 << 30) + 1, 1 << 62])
def test_a_kind_that_needs_more_scratch_than_there_are_addresses_is_refused(size: int) -> None:
    """Where scratch is placed, a sum of such sizes might wrap."""

    def lower(t: Tensor, planner: Planner) -> bool:
        planner.emit(_KERNEL, t, extra=(planner.scratch(64), planner.scratch(size)))
        return True

    with pytest.raises(MemoryError, match=f"needs {64 + -(-size // 64) * 64} bytes of scratch"):
        _kind_by(lower)


@pytest.mark.parametrize("base", range(NOTHING))
@pytest.mark.parametrize("offset", [0, 1, 4096, -64, (1 << 48) + 12])
def test_made_up_addresses_tell_what_they_are_counted_from(base: int, offset: int) -> None:
    address = MadeUp.of(base) + offset
    assert address.counted() == (base, offset)
    assert (offset + MadeUp.of(base)).counted() == (base, offset)
    assert address == MadeUp.of(base) - -offset
