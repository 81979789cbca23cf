"""Kernels that sum, search and sort along rows, and those that repeat and pad."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor, contiguous_strides
from rpc_server.graph.errors import GraphError
from tests.ops.harness import by_both, nmse, run
from tests.ops.tensors import four, node, params, permuted, tensor

F32, F16, I32 = GgmlType.F32, GgmlType.F16, GgmlType.I32

rng = np.random.default_rng(20261124)


def numbers(ne: tuple[int, ...]) -> Tensor:
    return tensor(F32, ne, rng.normal(0, 1, ne[::-1]))


def padded_rows(ne: tuple[int, ...], content: np.ndarray) -> Tensor:
    return tensor(F32, ne, content, nb=contiguous_strides(F32, four((ne[0] + 5, *ne[1:]))))


@pytest.mark.parametrize("op", [Op.SUM_ROWS, Op.MEAN])
def test_row_sums(op: Op) -> None:
    for ne in ((1, 4), (16, 3), (77, 5, 2), (1000,)):
        for source in (numbers(ne), padded_rows(ne, rng.normal(2, 1, ne[::-1]))):
            expected, actual = by_both(node(op, F32, (1, *ne[1:]), [source]), 3)
            assert nmse(expected, actual) < 1e-11


def test_sum_and_cumsum() -> None:
    source = padded_rows((77, 5, 2), rng.normal(2, 1, (2, 5, 77)))
    expected, actual = by_both(node(Op.SUM, F32, (1,), [source]), 3)
    assert nmse(expected, actual) < 1e-11
    expected, actual = by_both(node(Op.CUMSUM, F32, (77, 5, 2), [source]), 3)
    assert nmse(expected, actual) < 1e-11


def test_argmax_takes_the_last_of_equals() -> None:
    content = rng.integers(0, 4, (9, 30)).astype(np.float32)
    content[3] = -np.inf
    expected, actual = by_both(node(Op.ARGMAX, I32, (9,), [tensor(F32, (30, 9), content)]), 3)
    assert np.array_equal(expected, actual)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, np.inf, -np.inf, np.nan, 1e-3]),
        min_size=1,
        max_size=70,
    ),
    st.booleans(),
)
def test_argsort_is_stable_with_nans_last(content: list[float], descending: bool) -> None:
    source = tensor(F32, (len(content), 2), [content, content[::-1]])
    t = node(Op.ARGSORT, I32, source.ne, [source], params(int(descending)))
    expected, actual = by_both(t)
    assert np.array_equal(expected, actual)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (8, 2), (100, 7), (500, 64), (500, 65), (300, 300)])
def test_top_k(n: int, k: int) -> None:
    content = rng.integers(0, n, (5, n)).astype(np.float32)
    content[1, n // 2] = np.nan
    source = padded_rows((n, 5), content)
    expected, actual = by_both(node(Op.TOP_K, I32, (k, 5), [source]), 3)
    assert np.array_equal(expected, actual)


def test_add_id() -> None:
    a, b = numbers((40, 3, 5)), numbers((40, 7))
    ids = tensor(I32, (3, 5), rng.integers(0, 7, (5, 3)))
    expected, actual = by_both(node(Op.ADD_ID, F32, (40, 3, 5), [a, b, ids]), 3)
    assert np.array_equal(expected, actual)
    for index in (-1, 7):
        wrong = tensor(I32, (3, 5), np.full((5, 3), index))
        with pytest.raises(GraphError, match="out of range"):
            run(node(Op.ADD_ID, F32, (40, 3, 5), [a, b, wrong]), kernels=True)


@pytest.mark.parametrize("type_", [F32, F16, GgmlType.I8])
@pytest.mark.parametrize("dim", range(4))
def test_concat(type_: GgmlType, dim: int) -> None:
    ne = (6, 5, 4, 3)
    longer = [*ne]
    longer[dim] = 2
    whole = [*ne]
    whole[dim] += 2
    content = rng.integers(-100, 100, (3, 4, 5, 6)), rng.integers(-100, 100, longer[::-1])
    a, b = tensor(type_, ne, content[0]), tensor(type_, longer, content[1])
    t = node(Op.CONCAT, type_, whole, [a, b], params(dim))
    expected, actual = by_both(t, 3)
    assert np.array_equal(expected, actual)
    turned = permuted(tensor(type_, (5, 6, 4, 3), content[0].transpose(0, 1, 3, 2)), (1, 0, 2, 3))
    expected, actual = by_both(node(Op.CONCAT, type_, whole, [turned, b], params(dim)))
    assert np.array_equal(expected, actual)


def test_concat_of_blocks() -> None:
    for dim, ne in ((0, (96, 3)), (1, (64, 4))):
        a, b = numbers((64, 3)), numbers((32, 3) if dim == 0 else (64, 1))
        made = [tensor(GgmlType.Q8_0, x.ne, rng.normal(0, 1, x.ne[::-1])) for x in (a, b)]
        expected, actual = by_both(node(Op.CONCAT, GgmlType.Q8_0, ne, made, params(dim)))
        assert np.array_equal(expected, actual)


@pytest.mark.parametrize("type_", [F32, F16, GgmlType.I8, GgmlType.I64])
def test_repeat(type_: GgmlType) -> None:
    ne = (6, 4, 6, 2)
    for small in (ne, (1, 4, 6, 2), (3, 2, 1, 1), (1,), (6,)):
        source = tensor(type_, small, rng.integers(-100, 100, four(small)[::-1]))
        expected, actual = by_both(node(Op.REPEAT, type_, ne, [source]), 3)
        assert np.array_equal(expected, actual)
    turned = permuted(tensor(type_, (2, 3), rng.integers(-100, 100, (3, 2))), (1, 0, 2, 3))
    expected, actual = by_both(node(Op.REPEAT, type_, (6, 4, 2), [turned]))
    assert np.array_equal(expected, actual)


@pytest.mark.parametrize("around", [0, 1])
def test_pad(around: int) -> None:
    source = permuted(numbers((5, 7, 3, 2)), (1, 0, 2, 3))
    pads = (2, 3, 1, 0, 0, 9, 1, 1)
    ne = [n + pads[2 * i] + pads[2 * i + 1] for i, n in enumerate(source.ne)]
    expected, actual = by_both(node(Op.PAD, F32, ne, [source], params(*pads, around)), 3)
    assert np.array_equal(expected, actual)
