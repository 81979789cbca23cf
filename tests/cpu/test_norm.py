"""Kernels of normalisations against their array references."""

from __future__ import annotations

import numpy as np
import pytest

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor, contiguous_strides
from tests.ops.harness import by_both, nmse
from tests.ops.tensors import four, node, params, tensor

F32 = GgmlType.F32
NORMS = [Op.RMS_NORM, Op.NORM, Op.L2_NORM]

rng = np.random.default_rng(20261124)


def rows(ne: tuple[int, ...], *, padding: int = 0) -> Tensor:
    nb = contiguous_strides(F32, four((ne[0] + padding, *ne[1:])))
    return tensor(F32, ne, rng.normal(0.5, 2, ne[::-1]), nb=nb)


def assert_close(t: Tensor, n_threads: int = 2) -> None:
    expected, actual = by_both(t, n_threads)
    assert nmse(expected, actual) < 1e-12


@pytest.mark.parametrize("op", NORMS)
def test_norms_of_any_width(op: Op) -> None:
    for width in (1, 7, 16, 31, 33, 576, 1000):
        for n_threads in (1, 2, 3):
            assert_close(node(op, F32, (width, 3), [rows((width, 3))], params(1e-5)), n_threads)


@pytest.mark.parametrize("op", NORMS)
def test_padded_rows_and_in_place(op: Op) -> None:
    x = rows((65, 4, 2, 2), padding=9)
    assert_close(node(op, F32, x.ne, [x], params(1e-6)))
    assert_close(node(op, F32, x.ne, [x], params(1e-6), inplace=x))


@pytest.mark.parametrize("op", NORMS)
def test_zero_rows_and_eps(op: Op) -> None:
    for eps in (1e-5, 0.0):
        x = tensor(F32, (48, 2), 0.0)
        assert_close(node(op, F32, x.ne, [x], params(eps)))


def test_nan_and_infinity_stay_in_their_row() -> None:
    content = rng.normal(0, 1, (4, 40))
    content[1, 3], content[2, 20] = np.nan, np.inf
    for op in NORMS:
        assert_close(node(op, F32, (40, 4), [tensor(F32, (40, 4), content)], params(1e-5)))


def test_large_mean() -> None:
    """The variance must not be computed by a difference of large sums."""
    x = tensor(F32, (576,), 1000 + rng.normal(0, 0.01, 576))
    expected, actual = by_both(node(Op.NORM, F32, x.ne, [x], params(1e-6)))
    # The mean is good to a few float32 units of 1000, which is what the deviations are made of.
    assert np.abs(expected - actual).max() < 0.05


@pytest.mark.parametrize("groups", [1, 2, 3, 6, 8])
def test_group_norm(groups: int) -> None:
    x = rows((7, 5, 6, 2))
    assert_close(node(Op.GROUP_NORM, F32, x.ne, [x], params(groups, 1e-6)), 3)
