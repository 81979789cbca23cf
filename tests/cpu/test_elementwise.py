"""Kernels of elementwise ops against their array references."""

from __future__ import annotations

import numpy as np
import pytest

from protocol.ggml.ops import GluOp, Op, UnaryOp
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor, contiguous_strides
from tests.ops.harness import by_both, nmse
from tests.ops.tensors import four, node, params, tensor, values

F32, F16, BF16 = GgmlType.F32, GgmlType.F16, GgmlType.BF16
# Relative rounding of a result: squared, and with room for a rounding decided the other way.
BOUND = {F32: 1e-12, F16: 1e-6, BF16: 1e-4}
SPECIAL = [np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-40, 90.0, -90.0, 20.0, 0.5, -0.5, 1.5]

rng = np.random.default_rng(20261124)


def numbers(*shape: int) -> np.ndarray:
    return rng.normal(0, 3, shape).astype(np.float32)


def padded_rows(type_: GgmlType, ne: tuple[int, ...], content: np.ndarray) -> Tensor:
    """A tensor whose rows are dense but not next to each other."""
    nb = contiguous_strides(type_, four((ne[0] + 8, *ne[1:])))
    return tensor(type_, ne, content, nb=nb)


def assert_same(t: Tensor, bound: float | None = None, n_threads: int = 2) -> None:
    expected, actual = by_both(t, n_threads)
    assert nmse(expected, actual) <= (BOUND[t.type] if bound is None else bound)


@pytest.mark.parametrize("kind", list(UnaryOp))
def test_unary(kind: UnaryOp) -> None:
    x = numbers(3, 50)
    x[0, : len(SPECIAL)] = SPECIAL
    t = node(
        Op.UNARY, F32, (50, 3), [tensor(F32, (50, 3), x)], params(int(kind), 0.8, 0.7, 0.5, -0.1)
    )
    assert_same(t)


@pytest.mark.parametrize("kind", [UnaryOp.SILU, UnaryOp.NEG])
@pytest.mark.parametrize("type_", [F16, BF16])
def test_unary_of_small_floats_and_padded_rows(kind: UnaryOp, type_: GgmlType) -> None:
    for ne in ((1,), (15,), (16,), (33, 5, 2)):
        x = padded_rows(type_, ne, numbers(*ne[::-1]))
        assert_same(node(Op.UNARY, type_, ne, [x], params(int(kind))), n_threads=3)
        assert_same(node(Op.UNARY, F32, ne, [x], params(int(kind))), n_threads=1)


@pytest.mark.parametrize(
    ("op", "op_params"),
    [
        (Op.SCALE, params(0.37, 0.0)),
        (Op.SCALE, params(0.37, -2.5)),
        (Op.CLAMP, params(-1.5, 2.0)),
        (Op.LEAKY_RELU, params(0.1)),
        (Op.SQR, params()),
        (Op.SQRT, params()),
        (Op.LOG, params()),
        (Op.SIN, params()),
        (Op.COS, params()),
    ],
)
def test_functions(op: Op, op_params: tuple[int, ...]) -> None:
    x = numbers(7, 61)
    x[0, : len(SPECIAL)] = SPECIAL
    assert_same(node(op, F32, (61, 7), [tensor(F32, (61, 7), x)], op_params))


def test_long_rows_are_shared_among_threads() -> None:
    for n in (4095, 10007):
        x = tensor(F32, (n,), numbers(n))
        assert_same(node(Op.SCALE, F32, (n,), [x], params(3.0)), n_threads=3)
        assert_same(node(Op.UNARY, F32, (n,), [x], params(int(UnaryOp.SILU))), n_threads=2)


# ne of source 1 for a result of (48, 6, 4, 2): same, rows, single columns, one value, repeats.
REPEATS = [(48, 6, 4, 2), (48,), (48, 1, 4), (1, 6, 4, 2), (1,), (16, 3, 2, 1), (1, 1, 4, 1)]


@pytest.mark.parametrize("op", [Op.ADD, Op.SUB, Op.MUL, Op.DIV])
@pytest.mark.parametrize("ne1", REPEATS)
def test_binary_repeats_source_1(op: Op, ne1: tuple[int, ...]) -> None:
    ne = (48, 6, 4, 2)
    x, y = tensor(F32, ne, numbers(*ne[::-1])), tensor(F32, ne1, numbers(*ne1[::-1]))
    for n_threads in (1, 3):
        assert_same(node(op, F32, ne, [x, y]), 0, n_threads)


@pytest.mark.parametrize(
    "types", [(F16, F32, F16), (F16, F32, F32), (F16, F16, F16), (BF16, F32, BF16)]
)
def test_binary_of_mixed_types(types: tuple[GgmlType, GgmlType, GgmlType]) -> None:
    for ne in ((33, 3), (7,)):
        x, y = (padded_rows(type_, ne, numbers(*ne[::-1])) for type_ in types[:2])
        assert_same(node(Op.ADD, types[2], ne, [x, y]), 0)
        assert_same(node(Op.MUL, types[2], ne, [x, tensor(types[1], (1,), 1.25)]), 0)


def test_strided_source_1() -> None:
    y = tensor(F32, (20, 4), numbers(4, 20), nb=(12, 400, 1600, 1600))
    x = tensor(F32, (20, 4), numbers(4, 20))
    assert_same(node(Op.MUL, F32, (20, 4), [x, y]), 0)


def test_in_place() -> None:
    for n in (576, 5000):
        x, y = tensor(F32, (n,), numbers(n)), tensor(F32, (n,), numbers(n))
        assert_same(node(Op.ADD, F32, (n,), [x, y], inplace=x), 0)
        assert_same(node(Op.MUL, F32, (n,), [x, y], inplace=y), 0)
        assert_same(node(Op.UNARY, F32, (n,), [x], params(int(UnaryOp.GELU)), inplace=x))


def test_add1() -> None:
    x = tensor(F32, (37, 3), numbers(3, 37))
    assert_same(node(Op.ADD1, F32, (37, 3), [x, tensor(F32, (1,), 4.5)]), 0)


@pytest.mark.parametrize("kind", list(GluOp))
@pytest.mark.parametrize("type_", [F32, F16])
def test_glu(kind: GluOp, type_: GgmlType) -> None:
    words = (1.702, 2.0)
    x, g = (tensor(type_, (50, 3), numbers(3, 50)) for _ in range(2))
    assert_same(node(Op.GLU, type_, (50, 3), [x, g], params(int(kind), 0, *words)))
    for swapped in (0, 1):
        t = node(Op.GLU, type_, (25, 3), [x], params(int(kind), swapped, *words))
        assert_same(t, n_threads=3)


def test_glu_of_infinities() -> None:
    x = tensor(F32, (len(SPECIAL),), SPECIAL)
    g = tensor(F32, (len(SPECIAL),), SPECIAL[::-1])
    for kind in GluOp:
        t = node(Op.GLU, F32, (len(SPECIAL),), [x, g], params(int(kind), 0, 1.702, 7.0))
        assert_same(t)


def test_sources_stay_as_they_are() -> None:
    x, y = tensor(F32, (40,), numbers(40)), tensor(F32, (40,), numbers(40))
    before = values(x), values(y)
    by_both(node(Op.SUB, F32, (40,), [x, y]))
    assert np.array_equal(values(x), before[0])
    assert np.array_equal(values(y), before[1])
