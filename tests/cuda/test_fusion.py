"""Nodes that are done by one launch together with those behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from protocol.ggml.ops import GluOp, Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.devices.cuda.planner import Launch
from rpc_server.ops.table import ContractError
from tests.cuda import harness as cuda
from tests.cuda.test_matmul import weights
from tests.ops import harness
from tests.ops.harness import nmse
from tests.ops.tensors import CONTEXT, node, noise, params, raw, tensor, view
from tests.ops.tensors import values as values_of

pytestmark = cuda.needs_compiler

F32, F16, I32, I64 = GgmlType.F32, GgmlType.F16, GgmlType.I32, GgmlType.I64
Q8_0 = GgmlType.Q8_0


# Ops that round what they multiply, and what is made of their results.
_ROUNDED = (Op.MUL_MAT, Op.MUL_MAT_ID, Op.FLASH_ATTN_EXT, Op.GLU)


def launched(nodes: Sequence[Tensor]) -> list[str]:
    """The names of the kernels that run."""
    launches, _ = cuda.plan(nodes)
    return [launch.kernel.name for launch in launches if isinstance(launch, Launch)]


def check(nodes: Sequence[Tensor]) -> None:
    """Every result is what the array references leave, one node after the other."""
    touched = {t.address: t for n in nodes for t in (n, *n.src) if t is not None}
    before = [(t, raw(t)) for t in touched.values()]
    for n in nodes:
        if n.op is not Op.VIEW:
            harness.run(n, kernels=False)
    expected = [values_of(n) for n in nodes]
    for t, content in before:
        CONTEXT.memory(t.address, t.nbytes)[...] = content
    cuda.run([n for n in nodes if n.op is not Op.VIEW])
    for n, values in zip(nodes, expected, strict=True):
        # A cache of halves may round the last bit of a sum the other way.
        bound = 5e-4 if n.op in _ROUNDED else 1e-7 if n.type is F32 else 1e-6
        assert nmse(values, values_of(n)) < bound, n.label


def f32(op: Op, *sources: Tensor, inplace: Tensor | None = None, **options: Any) -> Tensor:
    """A node of the shape of its first source."""
    return node(op, F32, sources[0].ne, list(sources), inplace=inplace, **options)


def norm(x: Tensor, inplace: Tensor | None = None) -> Tensor:
    return f32(Op.RMS_NORM, x, inplace=inplace, op_params=params(1e-5))


@pytest.mark.parametrize("op", [Op.RMS_NORM, Op.NORM, Op.L2_NORM])
def test_norms_of_long_rows(op: Op) -> None:
    """Partial sums are of few elements: what F32 loses of them is not seen."""
    x = noise((40005, 2))
    expected, actual = cuda.by_both(f32(op, x, op_params=params(1e-5)))
    assert nmse(expected, actual) < 1e-13


@pytest.mark.parametrize("rows", [1, 5])
def test_norm_and_weights(rows: int) -> None:
    x, w = noise((70, rows)), noise((70,), seed=1)
    first = norm(x)
    nodes = [first, f32(Op.MUL, first, w)]
    assert launched(nodes) == ["normalize"]
    check(nodes)


def test_norm_weights_and_bias() -> None:
    x, w, bias = noise((70, 3)), noise((70,), seed=1), noise((70,), seed=2)
    first = norm(x)
    second = f32(Op.MUL, first, w)
    nodes = [first, second, f32(Op.ADD, second, bias)]
    assert launched(nodes) == ["normalize"]
    check(nodes)


def test_in_place() -> None:
    """As ggml's allocator lays them out: each result where its source was."""
    x, w, residual = noise((70, 3)), noise((70,), seed=1), noise((70, 3), seed=2)
    first = norm(x)
    second = f32(Op.MUL, first, w, inplace=first)
    nodes = [first, second, f32(Op.ADD, second, residual, inplace=second)]
    assert launched(nodes) == ["normalize"]
    check(nodes)


def test_a_residual_before_the_norm() -> None:
    a, b, w = noise((70, 3)), noise((70, 3), seed=1), noise((70,), seed=2)
    added = f32(Op.ADD, a, b)
    first = norm(added)
    nodes = [added, first, f32(Op.MUL, first, w, inplace=first)]
    assert launched(nodes) == ["normalize"]
    check(nodes)
    # The sum over one of its addends.
    added = f32(Op.ADD, a, b, inplace=a)
    first = norm(added)
    nodes = [added, first, f32(Op.MUL, first, w)]
    assert launched(nodes) == ["normalize"]
    check(nodes)


def test_weights_first() -> None:
    """A product's operands may come either way round; one that repeats is the second."""
    x, w = noise((70, 3)), noise((70, 3), seed=1)
    first = norm(x)
    nodes = [first, f32(Op.MUL, w, first)]
    assert launched(nodes) == ["normalize"]
    check(nodes)


def test_what_is_not_fused() -> None:
    """A norm times itself; a product of something else; sums that repeat."""
    x, w = noise((70, 3)), noise((70,), seed=1)
    first = norm(x)
    assert launched([first, f32(Op.MUL, first, first)]) == ["normalize", "binary"]
    assert launched([first, f32(Op.MUL, x, w)]) == ["normalize", "binary"]
    added = f32(Op.ADD, x, w)
    second = norm(added)
    assert launched([added, second, f32(Op.MUL, second, w)]) == ["binary", "normalize"]


def test_memory_that_overlaps_is_not_fused() -> None:
    """A result a row further on would be written before that row is read."""
    memory, w = noise((64, 4)), noise((64,), seed=1)
    x = view(memory, (64, 3), memory.nb)
    first = norm(x)
    onto = view(memory, (64, 3), memory.nb, memory.nb[1])
    second = f32(Op.MUL, first, w, inplace=onto)
    nodes = [first, second]
    assert launched(nodes) == ["normalize", "binary"]
    check(nodes)
    # Weights that the norm's own result lies over.
    first = norm(noise((64, 3)))
    over = view(first, (64,), first.nb)
    nodes = [first, f32(Op.MUL, first, over)]
    assert launched(nodes) == ["normalize", "binary"]
    check(nodes)


@pytest.mark.parametrize("type_", [Q8_0, GgmlType.Q4_1, GgmlType.Q6_K], ids=lambda t: t.name)
@pytest.mark.parametrize("columns", [1, 3])
def test_columns_of_products_come_with_the_norm(type_: GgmlType, columns: int) -> None:
    """As each type of weights has them; in place, as ggml's allocator lays results out."""
    x, w = noise((512, columns)), noise((512,), seed=1)
    first = norm(x)
    last = f32(Op.MUL, first, w, inplace=first)
    nodes = [
        first,
        last,
        product_of(last, 7, type_),
        f32(Op.SQR, last),
        product_of(last, 5, type_, 2),
    ]
    names = launched(nodes)
    assert names[0] == "normalize"
    assert "quantize_columns" not in names
    check(nodes)


def test_columns_of_another_content_are_not_taken() -> None:
    """The same memory, normalised again: what was kept of the first is no longer good."""
    x, w = noise((64,)), noise((64,), seed=1)
    first = norm(x)
    second = f32(Op.MUL, first, w, inplace=first)
    again = norm(second, inplace=second)
    last = f32(Op.MUL, again, noise((64,), seed=3), inplace=second)
    nodes = [first, second, product_of(second, 5), again, last, product_of(last, 5)]
    assert launched(nodes) == ["normalize", "multiply_1", "normalize", "multiply_1"]
    check(nodes)
    # Written by something else in between.
    between = f32(Op.SQR, second, inplace=second)
    nodes = [first, second, product_of(second, 5), between, product_of(between, 5)]
    assert launched(nodes)[2:] == ["unary", "quantize_columns", "multiply_1"]
    check(nodes)


# -- ROPE and SET_ROWS -----------------------------------------------------------------------------


def turn(n_dims: int, mode: int = 0) -> tuple[int, ...]:
    """op_params of ROPE."""
    return params(0, n_dims, mode, 0, 0, 10000.0, 1.0, 0.0, 1.0, 0.0, 0.0)


def into_cache(
    type_: GgmlType, ids: Sequence[int], *, mode: int = 0, n_dims: int = 8, index: GgmlType = I64
) -> list[Tensor]:
    """Keys of three heads of 8, turned and put into a cache of 7 rows."""
    tokens = len(ids)
    keys = noise((8, 3, tokens))
    positions = tensor(I32, (tokens,), np.arange(5, 5 + tokens))
    turned = node(Op.ROPE, F32, keys.ne, [keys, positions], turn(n_dims, mode))
    rows = view(turned, (24, tokens), (4, 96, 96 * tokens, 96 * tokens))
    cache = tensor(type_, (24, 7), 0)
    where = tensor(index, (tokens,), np.array(ids))
    return [turned, node(Op.SET_ROWS, type_, cache.ne, [rows, where, cache], inplace=cache)]


@pytest.mark.parametrize("type_", [F32, F16, GgmlType.BF16], ids=lambda t: t.name)
@pytest.mark.parametrize("mode", [0, 2])
@pytest.mark.parametrize("n_dims", [8, 4])
def test_keys_into_a_cache(type_: GgmlType, mode: int, n_dims: int) -> None:
    nodes = into_cache(type_, [6, 0, 3], mode=mode, n_dims=n_dims)
    assert launched(nodes) == ["rope"]
    check(nodes)


def test_indices_of_32_bits() -> None:
    nodes = into_cache(F16, [2], index=I32)
    assert launched(nodes) == ["rope"]
    check(nodes)


@pytest.mark.parametrize("bad", [-1, 7, 2**40])
def test_an_index_out_of_range(bad: int) -> None:
    """The graph fails, and nothing beside the cache is written."""
    with pytest.raises(ContractError):
        cuda.run(into_cache(F16, [1, bad]))


def test_a_cache_of_blocks_is_written_by_itself() -> None:
    wide = noise((32, 1, 1))
    turned = node(Op.ROPE, F32, wide.ne, [wide, tensor(I32, (1,), 3)], turn(32))
    rows = view(turned, (32, 1), (4, 128, 128, 128))
    cache = tensor(Q8_0, (32, 7), 0)
    where = tensor(I64, (1,), 2)
    kept = node(Op.SET_ROWS, Q8_0, cache.ne, [rows, where, cache], inplace=cache)
    assert launched([turned, kept]) == ["rope", "set_rows_encoded"]


def test_other_rows_are_written_by_themselves() -> None:
    """Rows that are only a part of what was turned, or something else."""
    turned, kept = into_cache(F16, [1, 2])
    other = noise((24, 2))
    kept.src = (other, *kept.src[1:])
    assert launched([turned, kept]) == ["rope", "set_rows"]


def turned_and_kept(tokens: int = 3) -> list[Tensor]:
    """Queries, keys and values of heads of 8 on their way into caches, in llama.cpp's order.

    ROPE of queries; what values are made by; ROPE of keys; both SET_ROWS.
    """
    positions = tensor(I32, (tokens,), np.arange(5, 5 + tokens))
    queries, keys = noise((8, 6, tokens)), noise((8, 5, tokens), seed=1)
    q = node(Op.ROPE, F32, queries.ne, [queries, positions], turn(8))
    v = f32(Op.SQR, noise((40, tokens), seed=2))
    k = node(Op.ROPE, F32, keys.ne, [keys, positions], turn(8))
    rows = view(k, (40, tokens), (4, 160, 160 * tokens, 160 * tokens))
    nodes = [q, v, k]
    for values in (rows, v):
        cache, where = tensor(F16, (40, 7), 0), tensor(I64, (tokens,), np.arange(tokens) * 2)
        kept = node(Op.SET_ROWS, F16, cache.ne, [values, where, cache], inplace=cache)
        nodes.append(kept)
    return nodes


@pytest.mark.parametrize("tokens", [1, 3])
def test_queries_wait_for_keys_and_values(tokens: int) -> None:
    """All that rows are turned for, and both caches, by one launch."""
    nodes = turned_and_kept(tokens)
    assert launched(nodes) == ["unary", "rope"]
    check(nodes)
    # Keys whose cache is written by itself; queries without keys behind them.
    q, v, k, kept, _ = turned_and_kept(tokens)
    kept.src = (noise((40, tokens)), *kept.src[1:])
    assert launched([q, v, k, kept]) == ["unary", "rope", "set_rows"]
    check([q, v, k, kept])
    assert launched([q, v]) == ["rope", "unary"]


def test_queries_turned_where_they_lie() -> None:
    """As ggml's allocator has it: each result over its source."""
    nodes = turned_and_kept()
    q, _, k, *_ = nodes
    for t in (q, k):
        assert t.src[0] is not None
        t.address, t.view_src = t.src[0].address, t.src[0]
    rows = nodes[3].src[0]
    assert rows is not None
    rows.address = k.address
    assert launched(nodes) == ["unary", "rope"]
    check(nodes)


def test_queries_that_can_not_wait() -> None:
    """What comes in between reads them, or writes over what they are made of, or over them."""
    nodes = turned_and_kept()
    q, v, *_ = nodes
    v.src = (view(q, (40, 3), (4, 160, 480, 480)), *v.src[1:])
    assert launched(nodes) == ["rope", "unary", "rope"]
    check(nodes)
    for over in (0, 1):
        nodes = turned_and_kept()
        q, v, *_ = nodes
        under = (q, q.src[0])[over]
        assert under is not None
        v.address, v.view_src = under.address, under
        assert launched(nodes) == ["rope", "unary", "rope"]
        check(nodes)


def test_turned_rows_that_stay_apart() -> None:
    """Other positions; queries over the keys; values into the cache of keys."""
    nodes = turned_and_kept()
    _, _, k, *_ = nodes
    k.src = (k.src[0], tensor(I32, (3,), np.arange(3)), *k.src[2:])
    assert launched(nodes) == ["rope", "unary", "rope"]
    check(nodes)
    nodes = turned_and_kept()
    q, _, k, *_ = nodes
    # Queries that wait find that keys are read where they are to be written.
    assert k.src[0] is not None
    q.ne, q.nb = k.src[0].ne, k.src[0].nb
    q.src = (noise(q.ne, seed=4), *q.src[1:])
    q.address, q.view_src = k.src[0].address, k.src[0]
    assert launched(nodes) == ["unary", "rope", "rope"]
    check(nodes)
    nodes = turned_and_kept()
    *_, kept, values = nodes
    values.address, values.view_src = kept.address, kept
    values.src = (*values.src[:2], kept.src[2], *values.src[3:])
    assert launched(nodes) == ["unary", "rope", "set_rows"]
    check(nodes)


def test_products_are_not_moved_over_a_node_that_waits() -> None:
    """A product behind keys that reads the queries' memory is made after they are turned."""
    nodes = turned_and_kept(1)
    q, _, *others = nodes
    x = noise((64,), seed=3)
    v, last = product_of(x, 40), product_of(x, 48, seed=4)
    # It writes over what queries are made of: only behind them.
    assert q.src[0] is not None
    last.address, last.view_src = q.src[0].address, q.src[0]
    others[2].src = (v, *others[2].src[1:])
    nodes = [q, v, *others, last]
    assert launched(nodes)[1:] == ["multiply_1", "rope", "multiply_1"]
    check(nodes)


@pytest.mark.parametrize("bad", [0, 1])
def test_an_index_of_either_cache(bad: int) -> None:
    nodes = turned_and_kept()
    nodes[3 + bad].src = (
        nodes[3 + bad].src[0],
        tensor(I64, (3,), np.array([1, 7, 2])),
        *nodes[3 + bad].src[2:],
    )
    assert launched(nodes) == ["unary", "rope"]
    with pytest.raises(ContractError):
        cuda.run(nodes)


# -- products of one column ------------------------------------------------------------------------


def product_of(x: Tensor, rows: int, type_: GgmlType = Q8_0, seed: int = 1) -> Tensor:
    return node(Op.MUL_MAT, F32, (rows, x.ne[1]), [weights(type_, x.ne[0], rows, seed=seed), x])


def glu(a: Tensor, b: Tensor, kind: GluOp = GluOp.SWIGLU, **options: Any) -> Tensor:
    return node(Op.GLU, F32, a.ne, [a, b], params(kind), **options)


@pytest.mark.parametrize("type_", [Q8_0, F16, GgmlType.Q4_K], ids=lambda t: t.name)
def test_queries_keys_and_values(type_: GgmlType) -> None:
    """In llama.cpp's order, with queries turned in between."""
    x = noise((256,))
    q, k, v = (product_of(x, rows, type_, rows) for rows in (24, 9, 7))
    turned = node(
        Op.ROPE, F32, (8, 3), [view(q, (8, 3), (4, 32, 96, 96)), tensor(I32, (1,), 5)], turn(8)
    )
    nodes = [q, turned, v, k]
    assert launched(nodes)[1:] == ["multiply_joint", "rope"]
    check(nodes)
    # As ggml's allocator may have it: values lie where queries were before they were turned. So
    # only keys can be made ahead, and they are made once.
    q, k, v = (product_of(x, rows, type_, rows) for rows in (24, 9, 24))
    queries = view(q, (8, 3), (4, 32, 96, 96))
    turned = node(Op.ROPE, F32, (8, 3), [queries, tensor(I32, (1,), 5)], turn(8))
    v.address, v.view_src = q.address, q
    nodes = [q, turned, v, k]
    assert launched(nodes)[1:] == ["multiply_joint", "rope", "multiply_1"]
    check(nodes)


@pytest.mark.parametrize("type_", [Q8_0, F16, F32], ids=lambda t: t.name)
@pytest.mark.parametrize("kind", list(GluOp))
@pytest.mark.parametrize("gate_first", [True, False])
def test_gate_and_up(type_: GgmlType, kind: GluOp, gate_first: bool) -> None:
    x = noise((64,))
    gate, up = product_of(x, 37, type_), product_of(x, 37, type_, 2)
    nodes = [gate, up, glu(*((gate, up) if gate_first else (up, gate)), kind)]
    assert launched(nodes)[1:] == ["multiply_gated"]
    check(nodes)


def test_a_gate_over_its_sources() -> None:
    """GLU's result may lie where a product was, or what both products were made of."""
    x = noise((64,))
    gate, up = product_of(x, 64), product_of(x, 64, seed=2)
    nodes = [gate, up, glu(gate, up, inplace=gate)]
    assert launched(nodes)[1:] == ["multiply_gated"]
    check(nodes)
    nodes = [gate, up, glu(gate, up, inplace=x)]
    assert launched(nodes)[1:] == ["multiply_gated"]
    check(nodes)


def test_products_that_stay_apart() -> None:
    """Other columns, other types, several columns; a result that is needed in between."""
    x, y = noise((64,)), noise((64,), seed=1)
    assert "multiply_joint" not in launched([product_of(x, 5), product_of(y, 5)])
    assert "multiply_joint" not in launched([product_of(x, 5), product_of(x, 5, GgmlType.Q4_0)])
    two = noise((64, 2))
    assert "multiply_joint" not in launched([product_of(two, 5), product_of(two, 5)])
    first, second = product_of(x, 64), product_of(x, 64, seed=2)
    third = f32(Op.SQR, first)
    second.address, second.view_src = first.address, first
    nodes = [first, third, second]
    assert "multiply_joint" not in launched(nodes)
    check(nodes)
    # The column itself is written over before the second product reads it.
    first, second = product_of(x, 64), product_of(x, 64, seed=2)
    nodes = [first, f32(Op.SQR, first, inplace=x), second]
    assert "multiply_joint" not in launched(nodes)
    check(nodes)


# -- what is rounded with what makes it ------------------------------------------------------------


def check_rounded(nodes: Sequence[Tensor], names: Sequence[str]) -> None:
    """The last node, a product, has what it has of columns that are rounded by themselves."""
    assert launched(nodes) == names
    check(nodes)
    together = values_of(nodes[-1]).copy()
    assert launched(nodes[-1:])[0] == "quantize_columns"
    cuda.run(nodes[-1:])
    np.testing.assert_array_equal(values_of(nodes[-1]), together)


@pytest.mark.parametrize("type_", [Q8_0, GgmlType.Q4_1, GgmlType.Q4_K], ids=lambda t: t.name)
@pytest.mark.parametrize("rows", [256, 800, 64])
def test_a_gate_is_rounded_for_the_next_product(type_: GgmlType, rows: int) -> None:
    """By the last block of each 256 rows; what is left behind whole ones, too."""
    x = noise((64,))
    if type_ is GgmlType.Q4_K:
        rows = -(-rows // 256) * 256
    gate, up = product_of(x, rows), product_of(x, rows, seed=2)
    gated = glu(gate, up)
    nodes = [gate, up, gated, product_of(gated, 5, type_)]
    check_rounded(nodes, ["quantize_columns", "multiply_gated", "multiply_1"])


def test_a_gate_over_the_column_is_rounded_by_itself() -> None:
    """Where its columns go might be where the column is read."""
    x = noise((64,))
    gate, up = product_of(x, 64), product_of(x, 64, seed=2)
    gated = glu(gate, up, inplace=x)
    nodes = [gate, up, gated, product_of(gated, 5)]
    names = launched(nodes)
    assert names == ["quantize_columns", "multiply_gated", "quantize_columns", "multiply_1"]
    check(nodes)


def by_experts(x: Tensor, ids: Tensor, rows: int, type_: GgmlType = Q8_0, seed: int = 1) -> Tensor:
    """Products by four experts; ``x`` is (K, 1 or used, tokens)."""
    ne = (rows, ids.ne[0], ids.ne[1])
    return node(Op.MUL_MAT_ID, F32, ne, [weights(type_, x.ne[0], rows, 4, seed=seed), x, ids])


@pytest.mark.parametrize("type_", [Q8_0, F16, GgmlType.Q4_K], ids=lambda t: t.name)
@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("inputs", [1, 2])
def test_gate_and_up_of_experts(type_: GgmlType, gate_first: bool, inputs: int) -> None:
    x = noise((256, inputs, 3))
    ids = tensor(I32, (2, 3), np.array([[0, 3], [2, 2], [1, 0]]))
    gate, up = by_experts(x, ids, 37, type_), by_experts(x, ids, 37, type_, 2)
    nodes = [gate, up, glu(*((gate, up) if gate_first else (up, gate)))]
    assert launched(nodes)[1:] == ["multiply_routed_gated"]
    check(nodes)


@pytest.mark.parametrize("rows", [256, 320])
def test_a_gate_of_experts_is_rounded_for_the_next_product(rows: int) -> None:
    """By the experts behind it, whose columns are all pairs of expert and token."""
    x = noise((64, 1, 3))
    ids = tensor(I32, (2, 3), np.array([[0, 3], [2, 2], [1, 0]]))
    gate, up = by_experts(x, ids, rows), by_experts(x, ids, rows, seed=2)
    gated = glu(gate, up)
    nodes = [gate, up, gated, by_experts(gated, ids, 5, seed=3)]
    check_rounded(nodes, ["quantize_columns", "multiply_routed_gated", "multiply_routed"])


def test_experts_that_stay_apart() -> None:
    """Of other experts, of another type, of many tokens."""
    x = noise((256, 1, 1))
    ids, others = tensor(I32, (2, 1), np.array([[0, 3]])), tensor(I32, (2, 1), np.array([[1, 2]]))
    first = by_experts(x, ids, 9)
    for second in (by_experts(x, others, 9), by_experts(x, ids, 9, GgmlType.Q4_0)):
        assert "multiply_routed_gated" not in launched([first, second, glu(first, second)])
    x = noise((256, 1, 8))
    ids = tensor(I32, (2, 8), np.array([[0, 3]] * 8))
    first, second = by_experts(x, ids, 9), by_experts(x, ids, 9, seed=2)
    assert "multiply_routed_gated" not in launched([first, second, glu(first, second)])


@pytest.mark.parametrize("bad", [-1, 4])
def test_gates_of_an_expert_that_does_not_exist(bad: int) -> None:
    x, ids = noise((64, 1, 1)), tensor(I32, (2, 1), np.array([[0, bad]]))
    gate, up = by_experts(x, ids, 256), by_experts(x, ids, 256, seed=2)
    gated = glu(gate, up)
    with pytest.raises(ContractError):
        cuda.run([gate, up, gated, by_experts(gated, ids, 5)])


@pytest.mark.parametrize("type_", [Q8_0, GgmlType.Q4_1, GgmlType.Q4_K], ids=lambda t: t.name)
@pytest.mark.parametrize("positions", [40, 300])
@pytest.mark.parametrize("tokens", [1, 2])
def test_attention_is_rounded_for_the_next_product(
    type_: GgmlType, positions: int, tokens: int
) -> None:
    """By the last of the blocks that share the positions of a group of heads."""
    k, v = noise((64, positions, 2), F16), noise((64, positions, 2), F16, 1)
    q = noise((64, tokens, 8), seed=2)
    p = params(0.125)
    attended = node(Op.FLASH_ATTN_EXT, F32, (64, 8, tokens), [q, k, v], p)
    columns = view(attended, (512, tokens), (4, 2048, 2048 * tokens, 2048 * tokens))
    check_rounded([attended, product_of(columns, 5, type_)], ["attention_few", _OF[tokens]])


_OF = {1: "multiply_1", 2: "multiply_2"}


def test_attention_that_is_rounded_by_itself() -> None:
    """Heads of a group in several blocks; elements of a group that are no whole blocks."""
    for size, heads, tokens, type_ in ((64, 3, 3, Q8_0), (64, 1, 1, GgmlType.Q4_K)):
        k, v = noise((size, 40, 4), F16), noise((size, 40, 4), F16, 1)
        q = noise((size, tokens, 4 * heads), seed=2)
        width = 4 * heads * size
        attended = node(Op.FLASH_ATTN_EXT, F32, (size, 4 * heads, tokens), [q, k, v], params(0.125))
        nb = (4, 4 * width, 4 * width * tokens, 4 * width * tokens)
        nodes = [attended, product_of(view(attended, (width, tokens), nb), 5, type_)]
        assert "quantize_columns" in launched(nodes)
        check(nodes)
