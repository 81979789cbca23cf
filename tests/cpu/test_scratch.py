"""Where scratch of a plan lies: what a node has for itself, and what later nodes find again."""

from __future__ import annotations

import pytest

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.devices.cpu.kernels.interface.planning import MOST_KEPT
from rpc_server.devices.planning.scratch import ScratchPlanner
from tests.ops.tensors import node, tensor

F32 = GgmlType.F32
BASE = 1 << 20


class FakeArena:
    """Addresses without memory."""

    def __init__(self, size: int = 1 << 16) -> None:
        self.size = size

    def address(self, offset: int, size: int) -> int:
        assert offset >= 0
        assert offset + size <= self.size
        return BASE + offset


def a_node(planner: ScratchPlanner) -> Tensor:
    t = tensor(F32, (16,))
    planner.begin(t)
    return t


def test_scratch_of_a_node_is_aligned_apart_and_given_back() -> None:
    planner = ScratchPlanner(FakeArena())
    a_node(planner)
    first, second = planner.scratch(100), planner.scratch(1)
    assert (first, second) == (BASE, BASE + 128)
    assert planner.scratch_peak == 192
    a_node(planner)
    assert planner.scratch(64) == BASE
    assert planner.scratch_peak == 192


def test_more_scratch_than_there_is_is_refused() -> None:
    planner = ScratchPlanner(FakeArena(256))
    a_node(planner)
    planner.scratch(192)
    with pytest.raises(MemoryError, match="320 bytes of scratch, limit 256"):
        planner.scratch(65)


def test_what_was_made_of_a_source_is_found_until_that_is_written() -> None:
    planner = ScratchPlanner(FakeArena())
    source = tensor(F32, (16,))
    a_node(planner)
    address, fresh = planner.shared_scratch("rounded", [source], 100)
    assert fresh
    other = a_node(planner)
    assert planner.shared_scratch("rounded", [source], 100) == (address, False)
    assert planner.scratch(64) == address + 128, "a node's own lies behind what is kept"
    planner.finish(other)
    a_node(planner)
    assert planner.shared_scratch("rounded", [source], 100) == (address, False)
    planner.finish(source)
    a_node(planner)
    assert planner.shared_scratch("rounded", [source], 100)[1], "its source has other values"


def test_of_another_source_or_another_kind_nothing_is_found() -> None:
    planner = ScratchPlanner(FakeArena())
    one, two = tensor(F32, (16,)), tensor(F32, (16,))
    a_node(planner)
    places = {
        planner.shared_scratch(key, [source], 64)
        for key in ("rounded", "transposed")
        for source in (one, two)
    }
    assert len(places) == 4
    assert all(fresh for _, fresh in places)


def test_what_nobody_reads_any_more_makes_place() -> None:
    source = tensor(F32, (16,))
    items = [node_of(source), node_of(source), node_of(tensor(F32, (16,)))]
    planner = ScratchPlanner(FakeArena(), items)
    planner.begin(items[0])
    address, _ = planner.shared_scratch("rounded", [source], 64)
    planner.begin(items[1])
    assert planner.shared_scratch("rounded", [source], 64) == (address, False)
    planner.begin(items[2])
    assert planner.scratch(64) == address


def node_of(source: Tensor) -> Tensor:
    return node(Op.SQR, F32, source.ne, [source])


def test_shared_scratch_comes_before_a_nodes_own() -> None:
    planner = ScratchPlanner(FakeArena())
    a_node(planner)
    planner.scratch(64)
    with pytest.raises(RuntimeError, match="after scratch"):
        planner.shared_scratch("rounded", [tensor(F32, (16,))], 64)


def test_only_so_many_are_kept() -> None:
    planner = ScratchPlanner(FakeArena(1 << 30))
    sources = [tensor(F32, (4,)) for _ in range(MOST_KEPT + 1)]
    for source in sources:
        a_node(planner)
        assert planner.shared_scratch("rounded", [source], 64)[1]
    a_node(planner)
    assert not planner.shared_scratch("rounded", [sources[-1]], 64)[1]
    assert planner.shared_scratch("rounded", [sources[0]], 64)[1], "used longest ago"
