"""What parts can compute by themselves of small graphs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from client.split.partition import Rows
from protocol.ggml.ops import GluOp, Op, TensorFlag
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor, padded_sources
from rpc_server.devices.split.sharded import ShardedWeight
from rpc_server.devices.split.subgraphs import (
    Partitioning,
    Subgraph,
    WeightIndex,
    find_subgraphs,
)
from tests.ops.tensors import node, params, tensor, view
from tests.ops.test_shards import cut

F32, F16, I32, I64 = GgmlType.F32, GgmlType.F16, GgmlType.I32, GgmlType.I64


# -- subgraphs


def split_weight(ne: tuple[int, int], axis: int, middle: int) -> ShardedWeight:
    t = tensor(F32, ne)
    cuts = [Rows(0, middle), Rows(middle, ne[axis])]
    return ShardedWeight(t, 0, axis, cuts, [None, None], None, t.address)


def subgraphs(
    nodes: list[Tensor],
    weights: list[ShardedWeight],
    *,
    chain: bool = False,
    counted: bool = True,
    linked: bool = False,
) -> Partitioning:
    used: dict[int, int] = {}
    for t in nodes:
        for s in t.src:
            if s is not None:
                used[id(s)] = used.get(id(s), 0) + 1
    for t in nodes:
        t.use_count = used.get(id(t), 0)
    storage: Any = SimpleNamespace(address=0, size=0, weights=weights)
    index = WeightIndex([storage])
    return find_subgraphs(nodes, index, chain=chain, counted=counted, linked=linked)


def product(w: ShardedWeight, x: Tensor) -> Tensor:
    return node(Op.MUL_MAT, F32, (w.tensor.ne[1], *x.ne[1:]), [w.tensor, x])


def names(found: Partitioning, nodes: list[Tensor]) -> list[list[int]]:
    return [[nodes.index(t) for t in s.nodes] for s in found.subgraphs]


def outputs(s: Subgraph, nodes: list[Tensor]) -> list[int]:
    return [nodes.index(t) for t in s.outputs]


def test_products_of_one_input_share_a_segment() -> None:
    x = tensor(F32, (64, 2))
    q, k = split_weight((64, 64), 1, 32), split_weight((64, 64), 1, 32)
    first = product(q, x)
    nodes = [first, node(Op.SCALE, F32, (64, 2), [first], params(2.0)), product(k, x)]
    found = subgraphs(nodes, [q, k])
    assert names(found, nodes) == [[0, 2]]
    assert [list(s.inputs) for s in found.subgraphs] == [[(id(x), None)]]
    assert outputs(found.subgraphs[0], nodes) == [0, 2]


def test_another_input_is_another_segment() -> None:
    x, y = tensor(F32, (64, 2)), tensor(F32, (64, 2))
    w = split_weight((64, 64), 1, 32)
    nodes = [product(w, x), product(w, y), product(w, x)]
    assert names(subgraphs(nodes, [w]), nodes) == [[0], [1], [2]]


def test_an_input_that_is_changed_in_place_is_another_one() -> None:
    x = tensor(F32, (64, 2))
    w = split_weight((64, 64), 1, 32)
    changed = node(Op.SCALE, F32, (64, 2), [x], params(2.0), inplace=x)
    nodes = [product(w, x), changed, product(w, x)]
    assert names(subgraphs(nodes, [w]), nodes) == [[0], [2]]


def feed_forward() -> tuple[list[Tensor], list[ShardedWeight]]:
    x = tensor(F32, (64, 2))
    gate, up = split_weight((64, 128), 1, 64), split_weight((64, 128), 1, 64)
    down = split_weight((128, 64), 0, 64)
    g, u = product(gate, x), product(up, x)
    h = node(Op.GLU, F32, (128, 2), [g, u], params(GluOp.SWIGLU))
    return [g, u, h, product(down, h)], [gate, up, down]


def test_a_feed_forward_block_is_one_segment_and_gives_sums() -> None:
    nodes, weights = feed_forward()
    found = subgraphs(nodes, weights, chain=True)
    assert names(found, nodes) == [[0, 1, 2, 3]]
    assert outputs(found.subgraphs[0], nodes) == [3]
    assert found.partial == {id(nodes[3])}


def test_rows_alone_bring_everything_back() -> None:
    nodes, weights = feed_forward()
    found = subgraphs(nodes, weights, chain=False)
    assert names(found, nodes) == [[0, 1], [3]]
    assert outputs(found.subgraphs[0], nodes) == [0, 1]


def two_blocks(middle: int = 64) -> tuple[list[Tensor], list[ShardedWeight]]:
    """Feed-forward, residual and norm, and a product of that."""
    x = tensor(F32, (64, 2))
    up, down = split_weight((64, 128), 1, middle), split_weight((128, 64), 0, middle)
    u = product(up, x)
    d = product(down, u)
    r = node(Op.ADD, F32, (64, 2), [d, x])
    n = node(Op.RMS_NORM, F32, (64, 2), [r], params(1e-6))
    return [u, d, r, n, product(up, n)], [up, down]


def test_linked_parts_add_up_and_go_on() -> None:
    nodes, weights = two_blocks()
    found = subgraphs(nodes, weights, chain=True, linked=True)
    assert names(found, nodes) == [[0, 1, 2, 3, 4]]
    assert found.summed == {id(nodes[1])}
    assert found.everywhere == {id(nodes[2]), id(nodes[3])}
    assert outputs(found.subgraphs[0], nodes) == [4]
    (x,) = found.subgraphs[0].inputs.values()
    assert x.exact


@pytest.mark.parametrize("why", ["not linked", "uncounted", "a part without columns"])
def test_sums_that_parts_can_not_make(why: str) -> None:
    nodes, weights = two_blocks(128 if why == "a part without columns" else 64)
    found = subgraphs(
        nodes, weights, chain=True, linked=why != "not linked", counted=why != "uncounted"
    )
    assert names(found, nodes) == [[0, 1], [4]]
    assert not found.summed | found.everywhere


def test_what_no_product_needs_is_computed_here() -> None:
    """A residual after the last block: to add it up on the parts would take longer."""
    nodes, weights = two_blocks()
    found = subgraphs(nodes[:4], weights, chain=True, linked=True)
    assert names(found, nodes) == [[0, 1]]
    assert not found.summed | found.everywhere
    assert outputs(found.subgraphs[0], nodes) == [1]
    assert len(found.subgraphs[0].inputs) == 1


def test_what_is_everywhere_stays_there() -> None:
    """A residual that a later subgraph adds to: between them something is computed here."""
    nodes, weights = two_blocks()
    up, down = weights
    here = node(Op.SUM_ROWS, F32, (1, 2), [nodes[4]])
    wide = node(Op.REPEAT, F32, (64, 2), [here])
    u = product(up, wide)
    d = product(down, u)
    r = node(Op.ADD, F32, (64, 2), [d, nodes[2]])
    nodes += [here, wide, u, d, r, product(up, r)]
    found = subgraphs(nodes, weights, chain=True, linked=True)
    assert names(found, nodes) == [[0, 1, 2, 3, 4], [7, 8, 9, 10]]
    assert [i.tensor for i in found.subgraphs[1].inputs.values()] == [wide]
    assert outputs(found.subgraphs[0], nodes) == [4]
    assert outputs(found.subgraphs[1], nodes) == [10]


def test_what_is_everywhere_and_read_here_comes_back_too() -> None:
    nodes, weights = two_blocks()
    nodes.append(node(Op.SUM_ROWS, F32, (1, 2), [nodes[2]]))
    found = subgraphs(nodes, weights, chain=True, linked=True)
    assert outputs(found.subgraphs[0], nodes) == [2, 4]


def test_columns_of_what_is_everywhere_come_by_this_server() -> None:
    nodes, weights = two_blocks()
    narrow = split_weight((64, 64), 0, 32)
    nodes.append(product(narrow, nodes[3]))
    found = subgraphs(nodes, [*weights, narrow], chain=True, linked=True)
    assert names(found, nodes) == [[0, 1, 2, 3, 4], [5]]
    assert outputs(found.subgraphs[0], nodes) == [3, 4]
    assert [i.shard for i in found.subgraphs[1].inputs.values()] == [cut(0, 32, 64)]


def test_what_others_read_is_brought_back() -> None:
    nodes, weights = feed_forward()
    nodes.append(node(Op.SUM_ROWS, F32, (1, 2), [nodes[2]]))
    found = subgraphs(nodes, weights, chain=True)
    assert names(found, nodes) == [[0, 1, 2, 3]]
    assert outputs(found.subgraphs[0], nodes) == [2, 3]


@pytest.mark.parametrize("how", ["flag", "uncounted"])
def test_what_something_outside_may_read_is_brought_back(how: str) -> None:
    nodes, weights = feed_forward()
    if how == "flag":
        nodes[2].flags |= TensorFlag.OUTPUT
    found = subgraphs(nodes, weights, chain=True, counted=how == "flag")
    expected = [2, 3] if how == "flag" else [0, 1, 2, 3]
    assert outputs(found.subgraphs[0], nodes) == expected


def test_columns_of_a_whole_input_are_sent_as_slices() -> None:
    x = tensor(F32, (128, 2))
    down = split_weight((128, 64), 0, 96)
    nodes = [product(down, x)]
    found = subgraphs(nodes, [down], chain=True)
    assert [i.shard for i in found.subgraphs[0].inputs.values()] == [cut(0, 96, 128)]
    assert found.partial == {id(nodes[0])}


def test_a_weight_that_rows_are_taken_of_is_needed_whole() -> None:
    w = split_weight((64, 64), 1, 32)
    taken = node(Op.GET_ROWS, F32, (64, 3), [w.tensor, tensor(I32, (3,))])
    found = subgraphs([taken], [w])
    assert not found.subgraphs
    assert [entry[1] for entry in found.whole] == [w]


def test_a_weight_that_a_graph_writes_comes_home() -> None:
    w = split_weight((64, 64), 1, 32)
    written = node(Op.SCALE, F32, (64, 64), [w.tensor], params(2.0), inplace=w.tensor)
    assert [entry[1] for entry in subgraphs([written], [w]).written] == [w]


# -- what works in place


def test_what_changes_after_a_segment_began_is_no_input_of_it() -> None:
    x, t = tensor(F32, (64, 2)), tensor(F32, (64, 2))
    w = split_weight((64, 64), 1, 32)
    first = product(w, x)
    changed = node(Op.SCALE, F32, (64, 2), [t], params(2.0), inplace=t)
    nodes = [first, changed, node(Op.MUL, F32, (64, 2), [first, t])]
    assert names(subgraphs(nodes, [w], chain=True), nodes) == [[0]]
    # Before it began there is nothing wrong with that.
    nodes = [changed, first, node(Op.MUL, F32, (64, 2), [first, t])]
    assert names(subgraphs(nodes, [w], chain=True), nodes) == [[1, 2]]


def test_a_result_of_the_parts_that_is_changed_here_is_read_here() -> None:
    w = split_weight((64, 64), 1, 32)
    first = product(w, tensor(F32, (64, 2)))
    changed = node(Op.SCALE, F32, (64, 2), [first], params(2.0), inplace=first)
    nodes = [first, changed, node(Op.SQR, F32, (64, 2), [first])]
    found = subgraphs(nodes, [w], chain=True)
    assert names(found, nodes) == [[0]]
    assert outputs(found.subgraphs[0], nodes) == [0]


@pytest.mark.parametrize(("at", "kept"), [(0, True), (2, False)])
def test_an_input_is_sent_once_unless_it_changes(at: int, kept: bool) -> None:
    x, y, t = tensor(F32, (64, 2)), tensor(F32, (64, 2)), tensor(F32, (64, 2))
    w = split_weight((64, 64), 1, 32)
    nodes = []
    for source in (x, y):
        nodes.append(product(w, source))
        nodes.append(node(Op.MUL, F32, (64, 2), [nodes[-1], t]))
    nodes.insert(at, node(Op.SCALE, F32, (64, 2), [t], params(2.0), inplace=t))
    found = subgraphs(nodes, [w], chain=True)
    assert len(found.subgraphs) == 2
    assert [i.kept for i in found.subgraphs[1].inputs.values() if i.tensor is t] == [kept]


def test_a_view_through_others_is_one_of_its_root() -> None:
    """Seen as something without slices, and as what it was again."""
    w = split_weight((64, 128), 1, 64)
    first = product(w, tensor(F32, (64, 2)))
    flat = view(first, (256, 1), (4, 1024, 1024, 1024))
    again = view(first, (32, 4, 2), (4, 128, 512, 1024))
    again.src = padded_sources([flat])
    nodes = [first, flat, again, node(Op.SQR, F32, (32, 4, 2), [again])]
    found = subgraphs(nodes, [w], chain=True)
    assert names(found, nodes) == [[0, 3]]
    assert found.shards[id(nodes[3])] == cut(1, 2, 4)
