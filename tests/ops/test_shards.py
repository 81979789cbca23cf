"""What parts can compute by themselves: the rules in the rows of ops."""

from __future__ import annotations

import pytest

from client.split.partition import Rows
from protocol.ggml.ops import GluOp, Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.ops.shards import Shard, Slice
from rpc_server.ops.table import OPS, propagate
from tests.ops.tensors import node, params, tensor

F32, F16, I32, I64 = GgmlType.F32, GgmlType.F16, GgmlType.I32, GgmlType.I64


def cut(dim: int, *edges: int) -> Shard:
    """Along ``dim`` from 0 to the first edge, from there to the next, ..."""
    bounds = tuple(Rows(a, b) for a, b in zip((0, *edges), edges, strict=False))
    return Shard(dim, bounds)


def carried(t: Tensor, *shards: Shard | None) -> tuple[Shard, tuple[Slice, ...]] | None:
    found = propagate(t, [*shards, *(None,) * (10 - len(shards))])
    return None if found is None else (found.shard, found.needs)


# -- rules


def test_units_of_a_cut() -> None:
    assert cut(0, 64, 192).scaled(1, 1, 64) == cut(1, 1, 3)
    assert cut(1, 1, 3).scaled(0, 64, 1) == cut(0, 64, 192)
    assert cut(0, 96, 192).scaled(1, 1, 64) is None


def test_elements_go_with_elements() -> None:
    a, b = tensor(F32, (64, 3)), tensor(F32, (64, 3))
    both = node(Op.MUL, F32, (64, 3), [a, b])
    shard = cut(0, 32, 64)
    assert carried(both, shard, shard) == (shard, ())
    assert carried(both, shard, cut(0, 48, 64)) is None
    # What is whole is cut for the parts, or sent whole where it is repeated along the cut.
    assert carried(both, shard) == (shard, (Slice(1, shard),))
    scaled = node(Op.MUL, F32, (64, 3), [a, tensor(F32, (1, 3))])
    assert carried(scaled, shard) == (shard, (Slice(1),))


def test_halves_of_one_row_are_not_cut() -> None:
    halves = node(Op.GLU, F32, (32, 3), [tensor(F32, (64, 3))], params(GluOp.SWIGLU))
    assert carried(halves, cut(0, 32, 64)) is None
    split = node(Op.GLU, F32, (64, 3), [tensor(F32, (64, 3)), tensor(F32, (64, 3))])
    assert carried(split, cut(0, 32, 64), cut(0, 32, 64)) == (cut(0, 32, 64), ())


@pytest.mark.parametrize("op", [Op.RMS_NORM, Op.NORM, Op.L2_NORM])
def test_norms_need_whole_rows(op: Op) -> None:
    t = node(op, F32, (32, 4, 3), [tensor(F32, (32, 4, 3))], params(1e-6))
    assert carried(t, cut(1, 2, 4)) == (cut(1, 2, 4), ())
    assert carried(t, cut(0, 16, 32)) is None


def test_rotation_of_heads() -> None:
    positions = tensor(I32, (3,))
    t = node(Op.ROPE, F32, (32, 4, 3), [tensor(F32, (32, 4, 3)), positions])
    assert carried(t, cut(1, 2, 4)) == (cut(1, 2, 4), (Slice(1),))
    assert carried(t, cut(2, 1, 3)) is None


def attention(heads: int, kv_heads: int, *, max_bias: float = 0.0) -> Tensor:
    q, k = tensor(F32, (32, 3, heads)), tensor(F16, (32, 16, kv_heads))
    v, mask = tensor(F16, (32, 16, kv_heads)), tensor(F16, (16, 3))
    words = params(0.1, max_bias, 0.0)
    return node(Op.FLASH_ATTN_EXT, F32, (32, heads, 3), [q, k, v, mask], words)


def test_attention_by_groups_of_heads() -> None:
    t = attention(8, 4)
    kv = cut(2, 1, 4)
    assert carried(t, cut(2, 2, 8), kv, kv) == (cut(1, 2, 8), (Slice(3),))
    # A part whose queries want other keys than it has.
    assert carried(t, cut(2, 4, 8), kv, kv) is None
    assert carried(t, cut(2, 2, 8), kv, cut(2, 2, 4)) is None
    assert carried(attention(8, 4, max_bias=8.0), cut(2, 2, 8), kv, kv) is None


def test_functions_of_one_element_go_with_any_cut() -> None:
    for op in (Op.SQR, Op.LOG, Op.SCALE, Op.LEAKY_RELU):
        t = node(op, F32, (64, 3), [tensor(F32, (64, 3))])
        assert carried(t, cut(0, 32, 64)) == (cut(0, 32, 64), ())


def test_an_op_without_a_rule_needs_its_sources_whole() -> None:
    assert OPS[Op.SUM].shard_rule is None
    assert carried(node(Op.SUM, F32, (1,), [tensor(F32, (64, 3))]), cut(0, 32, 64)) is None
