"""Reductions, running sums and sorting against plain Python."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from tests.ops import harness
from tests.ops.harness import refused
from tests.ops.tensors import CONTEXT, four, node, params, permuted, tensor, values

F32, F16, BF16, I32, I64 = (
    GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.I32, GgmlType.I64,
)  # fmt: skip
RNG = np.random.default_rng(5)


def random(*ne: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(four(ne)[::-1]).astype(np.float32)


def ran(t: Tensor) -> np.ndarray[Any, Any]:
    """The result in its own type."""
    harness.run(t, kernels=False)
    assert harness.guards_intact(t)
    return np.array(CONTEXT.view(t))


def integers(content: Any, *ne: int) -> Tensor:
    t = tensor(I32, ne)
    CONTEXT.view(t)[...] = np.reshape(content, four(ne)[::-1])
    return t


def in_planes(x: np.ndarray[Any, Any]) -> Tensor:
    """A tensor of values ``x`` whose planes lie in another order than its rows."""
    base = tensor(F32, [x.shape[3], x.shape[1], x.shape[2], x.shape[0]], x.swapaxes(1, 2))
    return permuted(base, (0, 2, 1, 3))


# -- sums ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_", [F32, F16, BF16])
def test_sum(type_: GgmlType) -> None:
    t = tensor(type_, (7, 3, 2, 2), random(7, 3, 2, 2))
    total = tensor(type_, (1,), math.fsum(values(t).ravel()))
    node_ = node(Op.SUM, type_, (1,), [t])
    harness.run(node_, kernels=False)
    assert values(node_) == values(total)


def test_sum_does_not_lose_small_terms() -> None:
    x = np.full((1, 1, 1, 4097), 1e-4, np.float32)
    x[..., 0] = 1e4
    t = node(Op.SUM, F32, (1,), [tensor(F32, (4097,), x)])
    assert ran(t) == np.float32(math.fsum(x.ravel()))


@pytest.mark.parametrize(("op", "divisor"), [(Op.SUM_ROWS, 1), (Op.MEAN, 9)])
def test_row_sums(op: Op, divisor: int) -> None:
    x = random(9, 3, 2, 2)
    result = ran(node(op, F32, (1, 3, 2, 2), [in_planes(x)]))
    for index in np.ndindex(2, 2, 3):
        expected = np.float32(math.fsum(x[index])) / np.float32(divisor)
        np.testing.assert_allclose(result[(*index, 0)], expected, rtol=2e-7)


def test_sums_of_nothing() -> None:
    empty = tensor(F32, (0, 2))
    assert ran(node(Op.SUM, F32, (1,), [empty])).ravel().tolist() == [0]
    assert ran(node(Op.SUM_ROWS, F32, (1, 2), [empty])).ravel().tolist() == [0, 0]
    assert np.isnan(ran(node(Op.MEAN, F32, (1, 2), [empty]))).all()
    assert ran(node(Op.ARGMAX, I32, (2,), [empty])).ravel().tolist() == [0, 0]


@pytest.mark.parametrize("inplace", [False, True])
def test_cumsum(inplace: bool) -> None:
    x = random(6, 2, 3)
    a = tensor(F32, (6, 2, 3), x)
    t = node(Op.CUMSUM, F32, (6, 2, 3), [a], inplace=a if inplace else None)
    harness.run(t, kernels=False)
    total: Any = np.float32(0)
    for index in np.ndindex(x.shape):
        total = x[index] if index[3] == 0 else total + x[index]
        assert values(t)[index] == total


def test_count_equal() -> None:
    a, b = RNG.integers(0, 3, (2, 4, 5)), RNG.integers(0, 3, (2, 4, 5))
    expected = sum(int(x == y) for x, y in zip(a.ravel(), b.ravel(), strict=True))
    sources = [integers(a, 5, 4, 2), integers(b, 5, 4, 2)]
    assert ran(node(Op.COUNT_EQUAL, I64, (1,), sources)).ravel().tolist() == [expected]


def test_count_equal_of_columns() -> None:
    a, b = RNG.integers(0, 3, (4, 5)), RNG.integers(0, 3, (5, 4))
    columns = permuted(integers(b, 4, 5), (1, 0, 2, 3))
    t = node(Op.COUNT_EQUAL, I64, (1,), [integers(a, 5, 4), columns])
    assert ran(t).ravel().tolist() == [int((a == b.T).sum())]


# -- order -----------------------------------------------------------------------------------------


def test_argmax_takes_the_last_of_equals() -> None:
    rows: list[list[float]] = [[1, 5, 2, 5], [-3, -1, -2, -9], [0, 0, 0, 0], [-math.inf] * 4]
    t = node(Op.ARGMAX, I32, (4,), [tensor(F32, (4, 4), np.reshape(rows, (1, 1, 4, 4)))])
    assert ran(t).ravel().tolist() == [3, 1, 3, 3]


def test_argmax_starts_anew_after_nan() -> None:
    nan = math.nan
    rows = [[9, nan, 1, 2], [9, 8, nan, nan], [nan, 3, nan, -math.inf], [nan] * 4, [1, nan, 5, nan]]
    t = node(Op.ARGMAX, I32, (5,), [tensor(F32, (4, 5), np.reshape(rows, (1, 1, 5, 4)))])
    assert ran(t).ravel().tolist() == [3, 0, 3, 0, 2]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=12), st.integers(0, 1))
def test_argsort_sorts(row: list[float], order: int) -> None:
    x = np.array([row, row[::-1]], np.float32).reshape(1, 1, 2, -1)
    n = x.shape[3]
    result = ran(node(Op.ARGSORT, I32, (n, 2), [tensor(F32, (n, 2), x)], params(order)))
    for indices, entries in zip(result[0, 0], x[0, 0], strict=True):
        assert sorted(indices) == list(range(n))
        assert [entries[i] for i in indices] == sorted(entries, reverse=bool(order))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=12), st.data())
def test_top_k_finds_the_largest(row: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(row)))
    x = np.array(row, np.float32)
    result = ran(node(Op.TOP_K, I32, (k,), [tensor(F32, (len(row),), x)])).ravel()
    assert len(set(result.tolist())) == k
    assert sorted(x[result], reverse=True) == sorted(x, reverse=True)[:k]
    if k > 1:
        assert x[result[1]] == x.max()


def test_rows_of_planes_in_another_order() -> None:
    x = random(5, 3, 2)
    expected = np.argsort(x, axis=-1)
    t = node(Op.ARGSORT, I32, (5, 3, 2), [in_planes(x)], params(0))
    np.testing.assert_array_equal(ran(t), expected)
    top = node(Op.TOP_K, I32, (1, 3, 2), [in_planes(x)])
    np.testing.assert_array_equal(ran(top), expected[..., -1:])


# -- contracts -------------------------------------------------------------------------------------


def test_contracts() -> None:
    a = tensor(F32, (4, 3))
    for op in (Op.SUM_ROWS, Op.MEAN):
        refused(node(op, F32, (1, 2), [a]), "result must be 1x3")
        refused(node(op, F16, (1, 3), [a]), "F16")
        refused(node(op, F32, (1, 3), [tensor(F16, (4, 3))]), "F16")
    refused(node(Op.SUM, F32, (2,), [a]), "result must be 1x1")
    refused(node(Op.SUM, F16, (1,), [a]), "F16")
    refused(node(Op.SUM, I32, (1,), [tensor(I32, (4,))]), "I32")
    refused(node(Op.CUMSUM, F32, (4, 2), [a]), "source 0 must be 4x2")
    refused(node(Op.ARGMAX, I32, (4,), [a]), "result must be 3x1")
    refused(node(Op.ARGMAX, I32, (3,), [tensor(F32, (4, 3, 2))]), "source 0 must be 4x3x1")
    refused(node(Op.ARGMAX, F32, (3,), [a]), "result must not be F32")
    refused(node(Op.ARGSORT, I32, (4, 3), [a], params(2)), "no sort order 2")
    refused(node(Op.ARGSORT, I32, (3, 4), [a]), "source 0 must be 3x4")
    refused(node(Op.ARGSORT, I64, (4, 3), [a]), "I64")
    refused(node(Op.TOP_K, I32, (5, 3), [a]), "no 5 largest of 4")
    refused(node(Op.TOP_K, I32, (2, 2), [a]), "result must be 2x3")
    b = tensor(I32, (4, 3))
    refused(node(Op.COUNT_EQUAL, I64, (1,), [b, tensor(I32, (4, 2))]), "source 1 must be 4x3")
    refused(node(Op.COUNT_EQUAL, I64, (2,), [b, b]), "result must be 1x1")
    refused(node(Op.COUNT_EQUAL, I32, (1,), [b, b]), "I32")


@pytest.mark.parametrize("op", [Op.SUM, Op.SUM_ROWS, Op.MEAN, Op.ARGMAX, Op.CUMSUM, Op.ARGSORT])
def test_sources_of_no_dense_rows(op: Op) -> None:
    columns = permuted(tensor(F32, (3, 4)), (1, 0, 2, 3))
    shape = {Op.SUM: (1,), Op.SUM_ROWS: (1, 3), Op.MEAN: (1, 3), Op.ARGMAX: (3,)}.get(op, (4, 3))
    type_ = I32 if op in (Op.ARGMAX, Op.ARGSORT) else F32
    refused(node(op, type_, shape, [columns]), "source 0 must have dense rows")


def test_work_is_bounded_by_memory() -> None:
    # A row repeated a billion times by a stride of 0.
    endless = tensor(F32, (4,))
    endless.ne, endless.nb = (4, 1 << 30, 1, 1), (4, 0, 0, 0)
    refused(node(Op.SUM, F32, (1,), [endless]), "overlap")
    endless.ne = (4, 1 << 31, 1 << 31, 1 << 31)
    refused(node(Op.SUM, F32, (1,), [endless]), "too many elements")
