"""Parsing a graph off the wire: references, order, extents."""

from __future__ import annotations

from contextlib import nullcontext as nothing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.builder.graph import GraphBuilder
from protocol.dialects import DIALECTS, Dialect
from protocol.ggml.ops import Op
from protocol.ggml.types import TYPE_INFO, GgmlType
from protocol.graph_payload import GraphPayload
from protocol.tensor import Tensor, place_views
from rpc_server.graph.errors import GraphError
from rpc_server.graph.parse import LinkedGraph, parse_graph
from tests.server.process import sources, tensor
from tools.wire import graph_of

NEWEST = DIALECTS[0]
HANDLE, BASE, SIZE, HOST = 5, 1 << 44, 4096, 0x7000_0000


@dataclass
class FakeBuffer:
    base: int = BASE
    size: int = SIZE
    address: int = HOST


def parse(
    nodes: list[dict[str, Any]], leaves: list[dict[str, Any]], dialect: Dialect = NEWEST
) -> LinkedGraph:
    buffers = {HANDLE: FakeBuffer()}
    return parse_graph(graph_of(nodes, leaves), dialect, buffers.get)


def leaf(id: int, ne: tuple[int, ...] = (8,), at: int = 0, **fields: Any) -> dict[str, Any]:
    return tensor(id, ne, HANDLE, BASE + at, **fields)


def node(id: int, op: Op, *src: int, dialect: Dialect = NEWEST, **fields: Any) -> dict[str, Any]:
    return leaf(id, op=dialect.op_number(op), src=sources(*src), **fields)


def test_links_and_addresses() -> None:
    view = node(3, Op.VIEW, 1, at=16, view_src=1, view_offs=16, ne=(4,))
    graph = parse([view, node(2, Op.ADD, 3, 3, at=64, ne=(4,))], [leaf(1)])
    added = graph.nodes[1]
    assert added.op is Op.ADD
    assert added.src[0] is added.src[1] is graph.nodes[0]
    assert added.src[2:] == (None,) * 8
    assert graph.nodes[0].address == HOST + 16
    assert graph.nodes[0].view_src is graph.nodes[0].src[0]
    assert added.address == HOST + 64
    assert (added.ne, added.nb) == ((4, 1, 1, 1), (4, 16, 16, 16))


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: d.name)
def test_ops_are_numbered_by_the_dialect(dialect: Dialect) -> None:
    late = node(2, dialect.ops[-1], 1, at=64, dialect=dialect)
    assert parse([late], [leaf(1)], dialect).nodes[0].op is dialect.ops[-1]
    with pytest.raises(GraphError, match=f"unknown op {len(dialect.ops)}"):
        parse([leaf(2, op=len(dialect.ops), src=sources(1))], [leaf(1)], dialect)


def test_nodes_without_the_compute_flag_are_skipped() -> None:
    graph = parse([node(2, Op.SQR, 1, flags=0), node(3, Op.SQR, 1)], [leaf(1)])
    assert [n.id for n in graph.nodes] == [3]


def test_clients_older_than_the_compute_flag_run_all_nodes() -> None:
    old = next(d for d in DIALECTS if d.version == (3, 6, 1))
    nodes = [node(2, Op.SQR, 1, flags=0, dialect=old), node(3, Op.SQR, 1, flags=0, dialect=old)]
    assert len(parse(nodes, [leaf(1)], old).nodes) == 2


def test_order_of_the_tensors_does_not_matter() -> None:
    graph = parse([node(3, Op.ADD, 2, 1, at=64)], [node(2, Op.SQR, 1, at=32), leaf(1)])
    assert graph.nodes[0].src[0] is not None
    assert graph.nodes[0].src[0].id == 2


def test_a_long_chain_is_no_recursion() -> None:
    """Written from its end, as no client does, so that the cycle search has to walk it."""
    chain = [node(i, Op.SQR, i - 1) for i in range(2, 5000)]
    graph = parse([chain[-1]], [*reversed(chain[:-1]), leaf(1)])
    assert len(graph.nodes) == 1


def test_a_cast_names_itself_as_its_destination() -> None:
    graph = parse([node(2, Op.CPY, 1, 2, at=64)], [leaf(1)])
    assert graph.nodes[0].src[1] is None


def test_nodes_out_of_order_are_refused() -> None:
    with pytest.raises(GraphError, match="source 't3' is computed after it"):
        parse([node(2, Op.SQR, 3, at=64), node(3, Op.SQR, 1, at=32)], [leaf(1)])


def test_nodes_in_another_order_than_their_tensors_are_refused() -> None:
    """Tensors come after what they read, and yet one is to be computed before it."""
    tensors = [leaf(1), node(2, Op.SQR, 1, at=32), node(3, Op.SQR, 2, at=64)]
    array = graph_of(tensors[1:], tensors[:1]).tensors
    for ids, refused in (([2, 3], False), ([3, 2], True)):
        payload = GraphPayload(0, np.array(ids, "<u8"), array)
        with pytest.raises(GraphError, match="'t2' is computed after it") if refused else nothing():
            assert len(parse_graph(payload, NEWEST, {HANDLE: FakeBuffer()}.get).nodes) == 2


def test_absent_data_has_no_address() -> None:
    elsewhere = {**leaf(1), "buffer": 77, "data": 0x1234}
    nowhere = {**leaf(4), "buffer": 0, "data": 0}
    graph = parse([node(2, Op.ADD, 1, 4, at=64)], [elsewhere, nowhere])
    assert [s.address for s in graph.nodes[0].src if s] == [0, 0]


@given(
    ne=st.lists(st.integers(0, 0xFFFFFFFF), min_size=4, max_size=4),
    nb=st.lists(st.integers(0, 0xFFFFFFFF), min_size=4, max_size=4),
    data=st.integers(0, (1 << 64) - 1) | st.integers(BASE - 64, BASE + SIZE + 64),
)
def test_what_has_an_address_lies_inside(ne: list[int], nb: list[int], data: int) -> None:
    wire = {**leaf(1), "ne": ne, "nb": nb, "data": data}
    try:
        graph = parse([node(2, Op.SQR, 1, at=64)], [wire])
    except GraphError:
        return
    source = graph.nodes[0].src[0]
    assert source is not None
    if source.address:
        last = sum((n - 1) * b for n, b in zip(ne, nb, strict=True)) + 4 if 0 not in ne else 0
        assert source.address >= HOST
        assert source.address + last <= HOST + SIZE


ELSEWHERE: dict[str, dict[str, Any]] = {
    "before": {"data": BASE - 64},
    "behind": {"data": BASE + SIZE - 28},
    "wraps": {"data": (1 << 64) - 16},
    "many": {"ne": [0xFFFFFFFF, 1, 1, 1]},
    "all": {"ne": [0xFFFFFFFF] * 4, "nb": [0xFFFFFFFC] * 4},
    "rows": {"ne": [1, 1 << 31, 1, 1], "nb": [4, 0xFFFFFFFC, 4, 4]},
    "last row": {"ne": [8, 2, 1, 1], "nb": [4, SIZE, SIZE, SIZE]},
}


@pytest.mark.parametrize("role", ["leaf", "node"])
@pytest.mark.parametrize("where", ELSEWHERE)
def test_what_lies_outside_is_refused(where: str, role: str) -> None:
    """What a graph reads and writes is found by numbers that the client computed."""
    wrong = {role: ELSEWHERE[where]}
    source = {**leaf(1), **wrong.get("leaf", {})}
    with pytest.raises(GraphError, match=r"outside its buffer|bytes of elements lie in"):
        parse([{**node(2, Op.SQR, 1, at=64), **wrong.get("node", {})}], [source])


def test_rows_are_whole_blocks() -> None:
    part = {**leaf(1), "type": int(GgmlType.Q4_0), "ne": [33, 1, 1, 1]}
    with pytest.raises(GraphError, match="not whole blocks"):
        parse([node(2, Op.SQR, 1, at=64)], [part])


@pytest.mark.parametrize("number", [4, 5, 31, 36, 43, 255, 1 << 16, 0x7FFF_FFFF, 0xFFFF_FFFF])
def test_types_that_are_none_are_refused(number: int) -> None:
    """Types that ggml has removed have blocks of no elements."""
    with pytest.raises(GraphError, match=f"unknown type {number}"):
        parse([node(2, Op.SQR, 1, at=64)], [{**leaf(1), "type": number}])


def test_there_is_no_node_0() -> None:
    """0 stands for no source; a node that is none would be followed to nowhere."""
    with pytest.raises(GraphError, match="a tensor has id 0"):
        parse([{**node(2, Op.SQR, 1, at=64), "id": 2}, {**leaf(0), "id": 0}], [leaf(1)])


@pytest.mark.parametrize("stride", [0, 4])
def test_few_bytes_are_not_read_as_any_number_of_elements(stride: int) -> None:
    stretched = {**leaf(1), "ne": (8, 1 << 31, 1, 1), "nb": (4, stride, 0, 0)}
    with pytest.raises(GraphError, match=r"bytes of elements lie in|outside"):
        parse([node(2, Op.SQR, 1, at=64)], [stretched])


def test_rows_may_repeat_and_overlap() -> None:
    windows = {**leaf(1), "ne": (64, 32, 16, 1), "nb": (4, 4, 0, 0)}
    graph = parse([node(2, Op.SQR, 1, at=64)], [windows])
    source = graph.nodes[0].src[0]
    assert source is not None
    assert source.address == HOST


# Blocks that begin at any address, and those that ggml's own layout puts on multiples of 2 only.
_AT_ANY, _AT_2 = {"MXFP4"}, {"Q8_0", "Q4_0", "Q6_K", "IQ2_XXS", "TQ1_0"}


def test_blocks_are_aligned_to_what_their_size_is_a_multiple_of() -> None:
    alignments = {t.name: TYPE_INFO[t].alignment for t in GgmlType}
    assert all(TYPE_INFO[t].type_size % TYPE_INFO[t].alignment == 0 for t in GgmlType)
    assert {name for name, n in alignments.items() if n == 1} == {"I8", *_AT_ANY}
    assert {alignments[name] for name in _AT_2} == {2}
    assert {alignments[name] for name in ("Q4_1", "Q8_1", "Q2_K", "Q4_K", "Q8_K", "F32")} == {4}
    assert (alignments["I64"], alignments["F64"]) == (8, 8)


@pytest.mark.parametrize("type_", [t for t in GgmlType if TYPE_INFO[t].alignment > 1])
@pytest.mark.parametrize("place", ["data", 1, 2, 3])
def test_what_is_not_aligned_is_refused(type_: GgmlType, place: str | int) -> None:
    """Of quantized types, too: a misaligned load would end a GPU's work for all clients."""
    info = TYPE_INFO[type_]
    size = info.type_size

    def source(off: int) -> dict[str, Any]:
        nb = [size, 2 * size, 4 * size, 8 * size]
        if isinstance(place, int):
            nb[place] += off
        ne = (info.block_size, *(2 if i == place else 1 for i in (1, 2, 3)))
        return {**leaf(1, at=off if place == "data" else 0), "type": type_, "ne": ne, "nb": nb}

    for off in range(1, 2 * info.alignment + 1):
        nodes = [node(2, Op.CPY, 1, at=64)]
        if off % info.alignment == 0:
            parse(nodes, [source(off)])
            continue
        with pytest.raises(GraphError, match=f"'t1': {type_.name} that is not aligned"):
            parse(nodes, [source(off)])


def test_strides_that_nobody_walks_are_not_looked_at() -> None:
    wire = {**leaf(1), "type": GgmlType.Q8_0, "ne": (32, 2, 1, 1), "nb": (34, 34, 33, 1)}
    assert parse([node(2, Op.CPY, 1, at=128)], [wire]).nodes


def test_what_a_client_builds_is_what_the_server_reads() -> None:
    """One class, and of each tensor the same fields; addresses are the host's."""
    g = GraphBuilder()
    x, scale = g.new_tensor_2d(GgmlType.F32, 8, 4, "x"), g.new_tensor_1d(GgmlType.F32, 4, "scale")
    built = g.build(g.cast(g.mul(g.view_2d(x, 4, 4, x.nb[1], 16), scale), GgmlType.F16))
    at = 0
    for root in built.roots:
        root.place(HANDLE, BASE + at)
        at += -(-root.nbytes // 32) * 32
    payload = built.payload(NEWEST)
    read = parse_graph(payload, NEWEST, {HANDLE: FakeBuffer()}.get).nodes

    def of(t: Tensor | None) -> Any:
        if t is None:
            return None
        return (t.id, t.name, t.type, t.op, t.ne, t.nb, t.op_params, t.flags)

    place_views(built.tensors)
    assert [of(t) for t in read] == [of(t) for t in built.nodes]
    for ours, theirs in zip(read, built.nodes, strict=True):
        # A cast's second source is itself on the wire: no tensor on the server.
        sources = [None if s is theirs else of(s) for s in theirs.src]
        assert [of(s) for s in ours.src] == sources
        assert of(ours.view_src) == of(theirs.view_src)
        assert ours.address == theirs.address - BASE + HOST
