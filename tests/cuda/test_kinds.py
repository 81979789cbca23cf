"""Launches by kinds: what is remembered of a pattern gives what each node gets by itself.

Random graphs are planned three ways: with a memory that has seen all graphs before, with a fresh
one, and node by node. All launches, and all words of their records, have to be equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

import rpc_server.devices.cuda.lower
import rpc_server.ops  # noqa: F401  (both fill their tables)
from protocol.dialects import DIALECTS
from protocol.ggml.ops import GluOp, Op
from protocol.ggml.types import GgmlType
from protocol.graph_payload import GraphPayload
from protocol.tensor import Tensor, contiguous_strides, place_views
from rpc_server.devices.cuda import kinds
from rpc_server.devices.cuda.kinds import LaunchMemory, NoPatternError, Placed
from rpc_server.devices.cuda.planner import (
    CudaPlanner,
    Launch,
    Product,
    lower_to_launches,
    place_scratch,
)
from rpc_server.devices.planning.nodes import lower_node
from rpc_server.graph.errors import GraphError
from rpc_server.graph.parse import LinkedGraph, Resolve, parse_graph
from rpc_server.graph.table import Ints
from rpc_server.ops.table import OpSpec
from tests.fuzz import seeds
from tests.fuzz.sketches import F16, F32, I32, Q4_0, Q8_0, Sketch, resolve
from tools.bench.launches import model_graph
from tools.gpu_check.llama import LLAMA_8B, SMALL, LlamaShape

_MULTIPROCESSORS = 8
_SCRATCH = 1 << 44


@dataclass
class _Expected:
    launches: list[Launch | Product]
    peak: int


def _one_by_one(graph: LinkedGraph, capability: int) -> _Expected:
    """As it is without a memory. Raises GraphError."""
    planner = CudaPlanner(graph.nodes, _MULTIPROCESSORS, capability)

    def decline(node: Tensor, spec: OpSpec) -> None:
        raise GraphError(f"{node.label}: no kernel")

    for node in graph.nodes:
        lower_node(node, planner, lambda t: lower_to_launches(t, planner), decline)
    launches = planner.take_launches()
    for launch in launches:
        place_scratch(launch, _SCRATCH)
    return _Expected(launches, planner.scratch_peak)


def _require_same(graph: LinkedGraph, memory: LaunchMemory, expected: _Expected) -> None:
    sizes: list[int] = []

    def scratch(size: int) -> int:
        sizes.append(size)
        return _SCRATCH

    made = memory.plan(graph, scratch)
    assert sizes == [expected.peak]
    records = 0
    assert len(made.launches) == len(expected.launches)
    for found, launch in zip(made.launches, expected.launches, strict=True):
        if isinstance(launch, Product):
            assert found == launch
            continue
        assert not isinstance(found, Product)
        where = f"record {records}, {launch.kernel.label} of {launch.node.label}"
        assert found.kernel == launch.kernel, where
        assert made.labels[records] == found.node.label == launch.node.label
        assert (found.grid, found.threads) == (launch.grid, launch.threads), where
        assert found.shared == launch.shared, where
        different = np.nonzero(found.words != launch.words)[0]
        assert not len(different), f"{where}: words {different.tolist()}"
        records += 1


def _hold(
    payload: GraphPayload, at: Resolve, remembered: LaunchMemory, capability: int = 61
) -> bool:
    """Plan a graph in all ways; False where it is refused, or has no kernel for a node."""
    graph = parse_graph(payload, DIALECTS[0], at)
    memories = (remembered, LaunchMemory(_MULTIPROCESSORS, capability))
    try:
        expected = _one_by_one(graph, capability)
    except GraphError:
        for memory in memories:
            with pytest.raises(NoPatternError):
                memory.plan(graph, lambda size: 0)
        return False
    for memory in memories:
        _require_same(graph, memory, expected)
    return True


class _Chains(Sketch):
    """Besides single nodes, those that are done together, in few places."""

    def dense(
        self,
        type_: GgmlType,
        ne: tuple[int, ...],
        op: Op = Op.NONE,
        src: tuple[int, ...] = (),
        params: tuple[int, ...] = (),
        over: int = 0,
    ) -> int:
        """As tensor; ``over``: where that one lies, else anywhere."""
        made = self.tensor(
            type_, ne, op, src, params, self.rows[over - 1]["data"] if over else None
        )
        row = self.rows[made - 1]
        row["nb"] = contiguous_strides(type_, row["ne"])
        return made

    def maybe(self, of: int) -> int:
        """``of``, or 0."""
        return of if self.choose.random() < 0.3 else 0

    def node(self) -> None:
        """Append a node, or a few."""
        pick = self.choose.choice
        kind = pick(("one", "norm", "turn", "gate", "attention"))
        n = pick((1, 1, 2))
        if kind == "one":
            super().node()
        elif kind == "norm":
            x = self.dense(F32, (64, n))
            if pick((True, False)):
                x = self.dense(
                    F32, (64, n), Op.ADD, (x, self.dense(F32, (64, n))), over=self.maybe(x)
                )
            x = self.dense(F32, (64, n), Op.RMS_NORM, (x,), over=self.maybe(x))
            x = self.dense(F32, (64, n), Op.MUL, (x, self.dense(F32, (64,))), over=self.maybe(x))
            self.product_of(x, n)
        elif kind == "turn":
            self.turn(n)
        elif kind == "gate":
            x = self.dense(F32, (64, n))
            type_ = pick((Q8_0, Q4_0, F16))
            products = [self.product_of(x, n, 64, type_) for _ in range(2)]
            over = self.maybe(pick((x, *products)))
            swiglu = (int(GluOp.SWIGLU),)
            glu = self.dense(F32, (64, n), Op.GLU, tuple(products), swiglu, over=over)
            self.product_of(glu, n)
        else:
            q, k, v = (
                self.dense(type_, (32, count, 2))
                for type_, count in ((F32, n), (F16, 300), (F16, 300))
            )
            scale = (int(np.float32(0.2).view(np.int32)),)
            out = self.dense(F32, (32, 2, n), Op.FLASH_ATTN_EXT, (q, k, v), scale)
            self.product_of(self.dense(F32, (64, n), Op.RESHAPE, (out,), over=out), n)

    def product_of(self, x: int, n: int, rows: int = 8, type_: GgmlType = Q8_0) -> int:
        """A product of ``n`` columns of 64."""
        weights = self.dense(type_, (64, rows))
        # How weights are loaded depends on where rows begin.
        self.rows[weights - 1]["data"] += self.choose.choice((0, 0, 8))
        return self.dense(F32, (rows, n), Op.MUL_MAT, (weights, x))

    def turn(self, n: int) -> None:
        """Queries, keys and values on their way into caches."""
        pick, words = self.choose.choice, [0, 32, 0, 0, 0]
        words += [int(np.float32(x).view(np.int32)) for x in (1e4, 1)]
        params, at = tuple(words), pick(self.positions(n))
        raw = [self.dense(F32, (32, 2, n)) for _ in range(2)]
        q = self.dense(F32, (32, 2, n), Op.ROPE, (raw[0], at), params, over=self.maybe(raw[0]))
        source = self.dense(F32, (64, n), over=self.maybe(pick((q, *raw))))
        v = self.dense(F32, (64, n), Op.SQR, (source,), over=self.maybe(pick((q, *raw, source))))
        k = self.dense(F32, (32, 2, n), Op.ROPE, (raw[1], at), params, over=self.maybe(raw[1]))
        rows = self.dense(F32, (64, n), Op.RESHAPE, (k,), over=k)
        for values in (rows, v):
            cache, ids = self.dense(pick((F16, F16, Q8_0)), (64, 7)), self.dense(I32, (n,))
            type_ = GgmlType(self.rows[cache - 1]["type"])
            self.dense(type_, (64, 7), Op.SET_ROWS, (values, ids, cache), over=cache)


def _hold_sketches(first: int, count: int, nodes: int = 25) -> int:
    """How many sketches are planned, and equally so in all ways."""
    remembered = LaunchMemory(_MULTIPROCESSORS, 61)
    planned = 0
    for seed in range(first, first + count):
        print("seed", seed)
        planned += _hold(_Chains(seed).payload(nodes), resolve, remembered)
    return planned


def test_nearly_alike_nodes_are_planned_as_each_by_itself(seed: int) -> None:
    assert _hold_sketches(seed, 20) > 10


@pytest.mark.nightly
def test_many_nearly_alike_nodes_are_planned_as_each_by_itself(seed: int) -> None:
    assert _hold_sketches(seed, 1000) > 500


@pytest.mark.slow
def test_graphs_of_all_ops_are_planned_as_node_by_node(seed: int) -> None:
    remembered, planned = LaunchMemory(_MULTIPROCESSORS, 61), 0
    for payload, at in seeds.newest_graphs(100, seed):
        planned += _hold(payload, at, remembered)
    assert planned > 30


def _move(sketch: Sketch, how: str) -> None:
    """Put tensors elsewhere: 'all' as far, some 'swapped' or 'nudged', or a 'few' anywhere."""
    choose, rows = sketch.choose, sketch.rows
    places = sorted({row["data"] for row in rows})
    if how == "all":
        to = {place: place + 4096 for place in places}
    elif how == "swapped":
        a, b = choose.sample(places, 2)
        to = {a: b, b: a}
    elif how == "nudged":
        to = {place: place + choose.choice((0, 8)) for place in places}
    else:
        to = {choose.choice(places): choose.choice(places) + choose.choice((0, 64))}
    for row in rows:
        row["data"] = to.get(row["data"], row["data"])


def _hold_moved(first: int, count: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Plan sketches whose memory moves; how many were planned, and for how many it was known."""
    planned = found_out = 0

    def plan(walk: kinds._Walk) -> kinds.PlannedGraph:
        nonlocal found_out
        found_out += walk._memory is remembered
        return made(walk)

    made = kinds._Walk.plan
    monkeypatch.setattr(kinds._Walk, "plan", plan)
    for seed in range(first, first + count):
        print("seed", seed)
        remembered = LaunchMemory(_MULTIPROCESSORS, 61)
        sketch = _Chains(seed)
        payload = sketch.payload(12)
        for how in ("all", "swapped", "nudged", "few", "nudged"):
            if not _hold(payload, resolve, remembered):
                break
            planned += 1
            _move(sketch, how)
            payload = sketch.payload(0)
    return planned, planned - found_out


def test_graphs_whose_memory_moves_are_planned_as_node_by_node(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, known = _hold_moved(seed, 12, monkeypatch)
    assert planned > 20
    assert 0 < known < planned


@pytest.mark.parametrize("what", ["low", "order"])
def test_a_graph_that_does_not_look_where_memory_is_is_found(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the order of memory; at what addresses are multiples of."""
    look = kinds._Walk.memory_order

    def blind(walk: kinds._Walk, extents: Ints) -> tuple[Ints, Ints]:
        low, order = look(walk, extents)
        return (0 * low, order) if what == "low" else (low, 0 * order)

    monkeypatch.setattr(kinds._Walk, "memory_order", blind)
    with pytest.raises(AssertionError):
        _hold_moved(1, 60, monkeypatch)


def _model(shape: LlamaShape, tokens: int, before: int, begin: int = 0) -> LinkedGraph:
    graph = model_graph(shape, tokens, before, begin)
    place_views(graph.tensors)
    return LinkedGraph(graph.nodes, DIALECTS[0])


@pytest.mark.parametrize(("tokens", "capability"), [(1, 86), (3, 60), (512, 86), (512, 80)])
def test_a_model_is_planned_as_node_by_node(tokens: int, capability: int) -> None:
    """Layers are alike; where cuBLAS multiplies, too."""
    memory = LaunchMemory(_MULTIPROCESSORS, capability)
    made = 0
    for begin in (0, 1 << 20):
        graph = _model(LLAMA_8B, tokens, 512, begin)
        _require_same(graph, memory, _one_by_one(graph, capability))
        made = made or memory._made
        assert memory._made == made < 60
        # Its memory lies in the same order.
        assert len(memory._graphs) == 1


@pytest.mark.parametrize("what", ["_relation", "_LOW_BITS"])
def test_a_pattern_that_does_not_look_is_found(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At how memory is related; at what addresses are multiples of."""
    monkeypatch.setattr(kinds, what, 0 if what == "_LOW_BITS" else lambda a, *others: 0 * a)
    with pytest.raises(AssertionError):
        _hold_sketches(1, 60)


def test_addresses_know_what_they_count_from() -> None:
    x = Placed.at(1000, 3)
    y = 24 + (x + 16) - 8
    assert isinstance(y, Placed)
    assert (int(y), y.origin, y.offset) == (1032, 3, 32)
    assert x + 16 == 1016
    assert not isinstance(x - x, Placed)
    assert not isinstance(x % 16, Placed)


def test_an_address_that_lost_its_origin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = _model(SMALL, 1, 0)
    memory = LaunchMemory(_MULTIPROCESSORS, 61)
    monkeypatch.setattr(Placed, "__add__", int.__add__)
    monkeypatch.setattr(
        "rpc_server.devices.planning.records._NO_TENSOR", (kinds._SHIFT + 1, *[0] * 9)
    )
    with pytest.raises(NoPatternError, match="address"):
        memory.plan(graph, lambda size: 0)


def test_a_node_out_of_contract_is_left_to_who_tells_of_it() -> None:
    sketch = Sketch(1)
    x, y = sketch.tensor(F32, (32, 2)), sketch.tensor(F32, (32, 3))
    sketch.tensor(F32, (32, 2), Op.ADD, (x, y))
    graph = parse_graph(sketch.payload(0), DIALECTS[0], resolve)
    memory = LaunchMemory(_MULTIPROCESSORS, 61)
    for _ in range(2):
        with pytest.raises(NoPatternError, match="can't be repeated"):
            memory.plan(graph, lambda size: 0)
    assert memory._kinds.nbytes == 0


def test_more_kinds_than_any_model_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "_MOST_KINDS", 3)
    sketch = Sketch(1)
    for width in range(1, 6):
        x = sketch.tensor(F32, (width,))
        sketch.tensor(F32, (width,), Op.ADD, (x, x))
    graph = parse_graph(sketch.payload(0), DIALECTS[0], resolve)
    with pytest.raises(GraphError, match="5 kinds of nodes"):
        LaunchMemory(_MULTIPROCESSORS, 61).plan(graph, lambda size: 0)


def test_the_memory_of_patterns_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts anew when it is full; of patterns of the same kinds the newest stay."""
    monkeypatch.setattr(kinds, "_MOST_REMEMBERED", 50)
    monkeypatch.setattr(kinds, "_MOST_GRAPHS", 4)
    memory = LaunchMemory(_MULTIPROCESSORS, 61)
    for seed in range(10):
        _hold(_Chains(seed).payload(25), resolve, memory)
        assert all(len(alike) <= kinds._MOST_ALIKE for alike in memory.patterns.values())
        assert 0 < len(memory._graphs) <= 4
    # By what they take, too: none is kept that is too large by itself.
    monkeypatch.setattr(kinds, "_MOST_GROUPS", 3)
    _hold(_Chains(0).payload(25), resolve, memory)
    assert not memory._graphs
    assert memory._made < 50 + 200
