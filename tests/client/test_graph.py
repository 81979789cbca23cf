"""Graphs without a server: shapes, parameters, order, and what the constructors refuse."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

from client.builder.graph import GraphBuilder
from client.builder.products import ROPE_MROPE, ROPE_NEOX
from client.tensors import ShapeError, encode_params
from protocol.dialects import DIALECTS, find_dialects
from protocol.ggml.ops import GluOp, Op, TensorFlag, UnaryOp
from protocol.ggml.types import GgmlType
from protocol.graph_payload import decode_graph
from protocol.tensor import Tensor, padded_sources

F32, F16, I32, Q4_0 = GgmlType.F32, GgmlType.F16, GgmlType.I32, GgmlType.Q4_0


def bits(x: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", x))[0])


@pytest.fixture
def g() -> GraphBuilder:
    return GraphBuilder()


class TestViews:
    def test_new_tensors_are_dense(self, g: GraphBuilder) -> None:
        assert g.new_tensor_4d(F32, 3, 4, 5, 6).nb == (4, 12, 48, 240)
        assert g.new_tensor_2d(Q4_0, 64, 3).nb == (18, 36, 108, 108)
        assert g.new_tensor_1d(F16, 7).ne == (7, 1, 1, 1)

    def test_rows_are_whole_blocks(self, g: GraphBuilder) -> None:
        with pytest.raises(ShapeError, match="whole blocks of 32"):
            g.new_tensor_1d(Q4_0, 48)

    def test_view_strides(self, g: GraphBuilder) -> None:
        a = g.new_tensor_3d(F32, 8, 6, 4)
        assert g.view_1d(a, 5, 4).nb == (4, 20, 20, 20)
        assert g.view_2d(a, 4, 3, a.nb[1], 16).nb == (4, 32, 96, 96)
        assert g.view_3d(a, 4, 3, 2, 32, a.nb[2]).nb == (4, 32, 192, 384)
        assert g.view_4d(a, 2, 3, 2, 1, 32, 192, 768).nb == (4, 32, 192, 768)

    def test_view_of_a_view_is_of_the_root(self, g: GraphBuilder) -> None:
        a = g.new_tensor_2d(F32, 8, 6)
        first = g.view_2d(a, 8, 4, a.nb[1], 32)
        second = g.view_1d(first, 8, 64)
        assert second.src == padded_sources([first])
        assert second.view_src is a
        assert second.view_offs == 96
        # The parameter is the offset within what was viewed, 64 bits.
        assert second.op_params[:2] == (64, 0)
        a.place(1, 1000)
        assert second.location == (1, 1096)

    def test_view_beyond_the_end(self, g: GraphBuilder) -> None:
        a = g.new_tensor_1d(F32, 8)
        assert g.view_1d(a, 4, 16).nbytes == 16
        with pytest.raises(ShapeError, match="do not lie in"):
            g.view_1d(a, 4, 17)
        with pytest.raises(ShapeError, match="negative offset"):
            g.view_1d(a, 4, -4)

    def test_reshape(self, g: GraphBuilder) -> None:
        a = g.new_tensor_2d(F32, 8, 6)
        assert g.reshape(a, 4, 2, 6).ne == (4, 2, 6, 1)
        with pytest.raises(ShapeError, match="48 elements"):
            g.reshape(a, 7, 7)
        with pytest.raises(ShapeError, match="not contiguous"):
            g.reshape(g.transpose(a), 48)

    def test_permute_and_transpose(self, g: GraphBuilder) -> None:
        a = g.new_tensor_4d(F32, 2, 3, 4, 5)
        p = g.permute(a, 0, 2, 1, 3)
        assert (p.ne, p.nb) == ((2, 4, 3, 5), (4, 24, 8, 96))
        assert p.op_params[:4] == (0, 2, 1, 3)
        # Dimension i goes to axis i, which a cycle of three tells from its inverse.
        assert g.permute(a, 1, 2, 0, 3).ne == (4, 2, 3, 5)
        t = g.transpose(a)
        assert (t.ne, t.nb) == ((3, 2, 4, 5), (8, 4, 24, 96))
        with pytest.raises(ShapeError, match="no permutation"):
            g.permute(a, 0, 1, 1, 3)


# Op, shape, type and leading parameters of a result, from constructors in ggml.c.
Case = tuple[Callable[[GraphBuilder], Tensor], Op, tuple[int, ...], GgmlType, tuple[int, ...]]
CASES: dict[str, Case] = {
    "add": (lambda g: g.add(t(g, 4, 3), t(g, 4)), Op.ADD, (4, 3, 1, 1), F32, (0,)),
    "add of f16": (lambda g: g.add(t(g, 4, type=F16), t(g, 4)), Op.ADD, (4, 1, 1, 1), F16, ()),
    "scale": (lambda g: g.scale(t(g, 4), 2), Op.SCALE, (4, 1, 1, 1), F32, (bits(2), 0)),
    "silu": (lambda g: g.silu(t(g, 4)), Op.UNARY, (4, 1, 1, 1), F32, (UnaryOp.SILU,)),
    "swiglu": (lambda g: g.swiglu(t(g, 8, 3)), Op.GLU, (4, 3, 1, 1), F32, (GluOp.SWIGLU, 0)),
    "geglu swapped": (
        lambda g: g.geglu_swapped(t(g, 8)), Op.GLU, (4, 1, 1, 1), F32, (GluOp.GEGLU, 1),
    ),
    "swiglu_split": (
        lambda g: g.swiglu_split(t(g, 8), t(g, 8)), Op.GLU, (8, 1, 1, 1), F32, (GluOp.SWIGLU, 0),
    ),
    "swiglu_oai": (
        lambda g: g.swiglu_oai(t(g, 8), t(g, 8), 1.5, 7),
        Op.GLU, (8, 1, 1, 1), F32, (GluOp.SWIGLU_OAI, 0, bits(1.5), bits(7)),
    ),
    "rms_norm": (
        lambda g: g.rms_norm(t(g, 4), 1e-5), Op.RMS_NORM, (4, 1, 1, 1), F32, (bits(1e-5), 0),
    ),
    "group_norm": (
        lambda g: g.group_norm(t(g, 4, 4, 8), 2, 1), Op.GROUP_NORM, (4, 4, 8, 1), F32, (2, bits(1)),
    ),
    "soft_max": (
        lambda g: g.soft_max(t(g, 4)), Op.SOFT_MAX, (4, 1, 1, 1), F32, (bits(1), 0),
    ),
    "mul_mat": (
        lambda g: g.mul_mat(t(g, 32, 5, 2, type=Q4_0), t(g, 32, 3, 4)),
        Op.MUL_MAT, (5, 3, 4, 1), F32, (0,),
    ),
    "mul_mat_id": (
        lambda g: g.mul_mat_id(t(g, 8, 5, 4), t(g, 8, 1, 6), t(g, 2, 6, type=I32)),
        Op.MUL_MAT_ID, (5, 2, 6, 1), F32, (0,),
    ),
    "get_rows": (
        lambda g: g.get_rows(t(g, 32, 9, type=Q4_0), t(g, 4, type=I32)),
        Op.GET_ROWS, (32, 4, 1, 1), F32, (),
    ),
    "set_rows": (
        lambda g: g.set_rows(t(g, 8, 9, type=F16), t(g, 8, 2), t(g, 2, type=GgmlType.I64)),
        Op.SET_ROWS, (8, 9, 1, 1), F16, (),
    ),
    "cast": (lambda g: g.cast(t(g, 8), F16), Op.CPY, (8, 1, 1, 1), F16, ()),
    "cpy": (lambda g: g.cpy(t(g, 8), t(g, 2, 4, type=F16)), Op.CPY, (2, 4, 1, 1), F16, ()),
    "cont": (lambda g: g.cont(g.transpose(t(g, 2, 3))), Op.CONT, (3, 2, 1, 1), F32, ()),
    "cont to a shape": (lambda g: g.cont(t(g, 2, 6), 4, 3), Op.CONT, (4, 3, 1, 1), F32, ()),
    "repeat": (lambda g: g.repeat(t(g, 2, 3), 4, 3, 2), Op.REPEAT, (4, 3, 2, 1), F32, ()),
    "concat": (lambda g: g.concat(t(g, 2, 3), t(g, 2, 4), 1), Op.CONCAT, (2, 7, 1, 1), F32, (1,)),
    "pad": (
        lambda g: g.pad(t(g, 2, 3), 1, 2), Op.PAD, (3, 5, 1, 1), F32, (0, 1, 0, 2, 0, 0, 0, 0, 0),
    ),
    "clamp": (
        lambda g: g.clamp(t(g, 2), -1, 1), Op.CLAMP, (2, 1, 1, 1), F32, (bits(-1), bits(1)),
    ),
    "argsort": (lambda g: g.argsort(t(g, 9, 2), True), Op.ARGSORT, (9, 2, 1, 1), I32, (1,)),
    "top_k": (lambda g: g.top_k(t(g, 9, 2), 3), Op.TOP_K, (3, 2, 1, 1), I32, ()),
    "sum_rows": (lambda g: g.sum_rows(t(g, 9, 2)), Op.SUM_ROWS, (1, 2, 1, 1), F32, ()),
    "add_id": (
        lambda g: g.add_id(t(g, 4, 2, 3), t(g, 4, 8), t(g, 2, 3, type=I32)),
        Op.ADD_ID, (4, 2, 3, 1), F32, (),
    ),
    "rope": (
        lambda g: g.rope_ext(t(g, 8, 2, 3), t(g, 3, type=I32), None, 6, ROPE_NEOX, 4096, 5e5),
        Op.ROPE, (8, 2, 3, 1), F32,
        (0, 6, 2, 0, 4096, bits(5e5), bits(1), 0, bits(1), 0, 0, 0, 0, 0, 0, 0),
    ),
    "rope of sections": (
        lambda g: g.rope_ext(
            t(g, 8, 2, 3), t(g, 12, type=I32), None, 8, ROPE_MROPE, sections=(1, 2, 1, 0)
        ),
        Op.ROPE, (8, 2, 3, 1), F32,
        (0, 8, 8, 0, 0, bits(1e4), bits(1), 0, bits(1), 0, 0, 1, 2, 1, 0, 0),
    ),
    "flash_attn_ext": (
        lambda g: g.flash_attn_ext(
            t(g, 8, 3, 4), t(g, 8, 7, 2, type=F16), t(g, 16, 7, 2, type=F16), None, 0.5
        ),
        Op.FLASH_ATTN_EXT, (16, 4, 3, 1), F32, (bits(0.5), 0, 0, 0),
    ),
    "im2col": (
        lambda g: g.im2col(t(g, 3, 3, 2, 4), t(g, 10, 8, 2, 5), (2, 1), (1, 0), (1, 2)),
        Op.IM2COL, (18, 5, 4, 5), F16, (2, 1, 1, 0, 1, 2, 1),
    ),
    "im2col of lines": (
        lambda g: g.im2col(t(g, 3, 2, 4), t(g, 10, 2, 5), (1, 0), (0, 0), (1, 0), is_2d=False),
        Op.IM2COL, (6, 8, 5, 1), F16, (1, 0, 0, 0, 1, 0, 0),
    ),
}  # fmt: skip


def t(g: GraphBuilder, *ne: int, type: GgmlType = F32) -> Tensor:
    return g.new_tensor(type, ne)


@pytest.mark.parametrize("name", CASES)
def test_results(g: GraphBuilder, name: str) -> None:
    make, op, ne, type, params = CASES[name]
    result = make(g)
    assert (result.op, result.ne, result.type) == (op, ne, type)
    assert result.op_params[: len(params)] == params
    assert not any(result.op_params[len(params) :])


REFUSED: dict[str, Callable[[GraphBuilder], Any]] = {
    "add": lambda g: g.add(t(g, 4), t(g, 4, 3)),
    "mul_mat columns": lambda g: g.mul_mat(t(g, 4, 3), t(g, 5, 3)),
    "mul_mat heads": lambda g: g.mul_mat(t(g, 4, 3, 2), t(g, 4, 3, 3)),
    "mul_mat transposed": lambda g: g.mul_mat(g.transpose(t(g, 4, 3)), t(g, 3, 3)),
    "mul_mat_id ids": lambda g: g.mul_mat_id(t(g, 8, 5, 4), t(g, 8, 1, 6), t(g, 2, 6)),
    "mul_mat_id used": lambda g: g.mul_mat_id(t(g, 8, 5), t(g, 8, 3), t(g, 2, 1, type=I32)),
    "get_rows type": lambda g: g.get_rows(t(g, 8, 5), t(g, 2)),
    "get_rows heads": lambda g: g.get_rows(t(g, 8, 5, 2), t(g, 2, type=I32)),
    "set_rows": lambda g: g.set_rows(t(g, 8, 5), t(g, 8, 2), t(g, 3, type=I32)),
    "reshape": lambda g: g.reshape(t(g, 8, 5), 39),
    "soft_max mask": lambda g: g.soft_max_ext(t(g, 8, 5), t(g, 8, 4), 1, 0),
    "soft_max bias": lambda g: g.soft_max_ext(t(g, 8, 5), None, 1, 8),
    "rope positions": lambda g: g.rope(t(g, 8, 2, 3), t(g, 4, type=I32), 8),
    "rope mode": lambda g: g.rope(t(g, 8, 2, 3), t(g, 3, type=I32), 8, 1),
    "flash_attn_ext mask": lambda g: g.flash_attn_ext(
        t(g, 8, 3), t(g, 8, 7), t(g, 8, 7), t(g, 7, 3), 1
    ),
    "glu": lambda g: g.swiglu_split(t(g, 8), t(g, 4)),
    "silu": lambda g: g.silu(g.transpose(t(g, 8, 2))),
    "concat": lambda g: g.concat(t(g, 8, 2), t(g, 7, 2), 1),
    "repeat": lambda g: g.repeat(t(g, 3), 4),
    "top_k": lambda g: g.top_k(t(g, 3), 4),
    "cpy": lambda g: g.cpy(t(g, 3), t(g, 4)),
    "im2col": lambda g: g.im2col(t(g, 3, 3, 1), t(g, 2, 2, 1), (1, 1), (0, 0), (1, 1)),
    "cumsum": lambda g: g.cumsum(t(g, 3, type=F16)),
    "params": lambda g: g.op(Op.CUSTOM, F32, (1,), params=range(17)),
    "sources": lambda g: g.op(Op.CUSTOM, F32, (1,), [t(g, 1)] * 11),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_ggml_asserts_is_refused(g: GraphBuilder, name: str) -> None:
    with pytest.raises(ShapeError):
        REFUSED[name](g)


def test_params_are_words() -> None:
    words = encode_params((-1, 0xFFFFFFFF, 1.5, float("-inf"), 1e300))
    assert words[:5] == (-1, -1, bits(1.5), bits(float("-inf")), bits(float("inf")))
    assert len(words) == 16


def test_in_place(g: GraphBuilder) -> None:
    a = t(g, 4)
    result = g.add_inplace(a, a)
    assert result.view_src is a
    assert g.scale(a, 2, inplace=True).view_src is a
    assert g.add(a, a).view_src is None


def test_order_is_sources_first_left_to_right(g: GraphBuilder) -> None:
    a, b, c = t(g, 4), t(g, 4), t(g, 4)
    left = g.mul(a, b)
    right = g.sqr(c)
    total = g.add(left, right)
    unused = g.sub(a, b)
    graph = g.build(total)
    assert graph.nodes == (left, right, total)
    assert graph.tensors == (a, b, left, c, right, total)
    assert graph.leaves == [a, b, c]
    assert unused not in graph.tensors
    assert all(n.flags & TensorFlag.COMPUTE for n in graph.nodes)
    assert not any(n.flags & TensorFlag.COMPUTE for n in graph.leaves)
    assert [n.name for n in graph.nodes] == ["node_0", "node_1", "node_2"]
    assert [n.name for n in graph.leaves] == ["leaf_0", "leaf_1", "leaf_2"]


def test_uses_are_counted_over_the_graph(g: GraphBuilder) -> None:
    a = t(g, 4)
    s = g.sqr(a)
    graph = g.build([g.add(s, s), g.mul(s, a)])
    uses = dict(zip(graph.tensors, graph.use_counts, strict=True))
    assert uses[s] == 3
    assert uses[a] == 2
    assert sorted(graph.use_counts) == [0, 0, 2, 3]


def test_a_shared_node_is_computed_once(g: GraphBuilder) -> None:
    node = t(g, 4)
    for _ in range(40):
        node = g.add(node, node)
    assert len(g.build(node).nodes) == 40


def test_a_view_brings_what_it_views(g: GraphBuilder) -> None:
    cache, row, at = t(g, 8, 9, type=F16), t(g, 8, 1), t(g, 1, type=I32)
    written = g.set_rows(cache, row, at)
    # Not a source of the outer view, but sent: the server needs its place.
    node = g.view_1d(written, 8)
    graph = g.build(node)
    assert graph.nodes == (written, node)
    assert cache in graph.roots
    assert graph.roots == [row, at, cache]


def test_a_cast_is_its_own_second_source(g: GraphBuilder) -> None:
    node = g.cast(t(g, 4), F16)
    graph = g.build(node)
    assert node.src[1] is node
    assert graph.nodes == (node,)


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: d.name)
def test_encoding(g: GraphBuilder, dialect: Any) -> None:
    a = g.new_tensor_2d(F32, 4, 3, "weights")
    a.place(11, 2000)
    view = g.view_1d(a, 4, 16)
    node = g.unary(view, UnaryOp.GELU)
    graph = g.build(node)
    payload = decode_graph(graph.encode(dialect), dialect)
    assert payload.device == 0
    assert payload.nodes.tolist() == [view.id, node.id]
    assert payload.tensors["id"].tolist() == [a.id, view.id, node.id]
    assert [dialect.ops[n] for n in payload.tensors["op"]] == [Op.NONE, Op.VIEW, Op.UNARY]
    assert payload.tensors["name"][0] == b"weights"
    assert payload.tensors["data"].tolist() == [2000, 2016, 0]
    assert payload.tensors["buffer"].tolist() == [11, 11, 0]
    assert payload.tensors["view_src"].tolist() == [0, a.id, 0]
    assert payload.tensors["src"][1:, 0].tolist() == [a.id, view.id]
    assert payload.tensors["nb"][0].tolist() == [4, 16, 48, 48]
    # Padding before 5.1.
    uses = [1, 1, 0] if dialect.version >= (5, 1, 0) else [0, 0, 0]
    assert payload.tensors["use_count"].tolist() == uses


def test_an_op_that_the_version_lacks(g: GraphBuilder) -> None:
    graph = g.build(g.op(Op.LIGHTNING_INDEXER, F32, (1,)))
    with pytest.raises(ValueError, match="no op LIGHTNING_INDEXER"):
        graph.encode(find_dialects("4.0.1")[0])


def test_a_deep_graph_needs_no_deep_stack(g: GraphBuilder) -> None:
    node = t(g, 1)
    for _ in range(5000):
        node = g.neg(node)
    assert len(g.build(node).encode(DIALECTS[0])) == 12 + 8 * 5000 + 296 * 5001
