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
        bound = 5e-4 if n.op in (Op.MUL_MAT, Op.GLU) else 1e-7 if n.type is F32 else 1e-6
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
