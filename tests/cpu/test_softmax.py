"""Kernels of SOFT_MAX and of diagonal masks against their array references."""

from __future__ import annotations

import numpy as np
import pytest

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor, contiguous_strides
from tests.ops.harness import by_both, nmse
from tests.ops.tensors import node, params, tensor

F32, F16 = GgmlType.F32, GgmlType.F16

rng = np.random.default_rng(20261124)


def scores(ne: tuple[int, int, int, int]) -> Tensor:
    nb = contiguous_strides(F32, (ne[0] + 3, *ne[1:]))
    return tensor(F32, ne, rng.normal(0, 3, ne[::-1]), nb=nb)


def mask_values(n_kv: int, n_tokens: int) -> np.ndarray:
    causal = np.arange(n_kv) > np.arange(n_tokens)[:, None] + n_kv // 2
    return np.where(causal, -np.inf, rng.integers(-8, 1, (n_tokens, n_kv)) / 4)


def assert_close(t: Tensor, n_threads: int = 2) -> None:
    expected, actual = by_both(t, n_threads)
    assert nmse(expected, actual) < 1e-11


@pytest.mark.parametrize("width", [1, 5, 16, 33, 256, 500])
def test_plain(width: int) -> None:
    x = scores((width, 3, 2, 2))
    for n_threads in (1, 2, 3):
        assert_close(node(Op.SOFT_MAX, F32, x.ne, [x], params(0.125, 0.0)), n_threads)
    assert_close(node(Op.SOFT_MAX, F32, x.ne, [x], params(1.0, 0.0), inplace=x))


@pytest.mark.parametrize("mask_type", [F32, F16])
@pytest.mark.parametrize("max_bias", [0.0, 8.0])
@pytest.mark.parametrize("n_heads", [4, 6])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_mask_alibi_and_sinks(
    mask_type: GgmlType, max_bias: float, n_heads: int, with_sinks: bool
) -> None:
    x = scores((77, 5, n_heads, 2))
    # More rows than tokens, as llama.cpp pads its masks.
    mask = tensor(mask_type, (77, 64), mask_values(77, 64))
    sinks = tensor(F32, (n_heads,), rng.normal(0, 1, n_heads)) if with_sinks else None
    assert_close(node(Op.SOFT_MAX, F32, x.ne, [x, mask, sinks], params(0.3, max_bias)), 3)


def test_mask_for_each_head_and_batch() -> None:
    x = scores((40, 3, 6, 4))
    mask = tensor(F16, (40, 3, 2, 2), rng.integers(-4, 1, (2, 2, 3, 40)))
    assert_close(node(Op.SOFT_MAX, F32, x.ne, [x, mask], params(1.0, 0.0)))


def test_masked_and_infinite_scores() -> None:
    content = rng.normal(0, 1, (4, 40))
    content[0, 5:] = -np.inf
    content[1] = -np.inf
    content[2, 7] = np.nan
    content[3] = 1e30
    x = tensor(F32, (40, 4), content)
    assert_close(node(Op.SOFT_MAX, F32, x.ne, [x], params(1.0, 0.0)))


@pytest.mark.parametrize("op", [Op.DIAG_MASK_INF, Op.DIAG_MASK_ZERO])
@pytest.mark.parametrize("past", [0, 1, 15, 16, 40, 100])
def test_diagonal_masks(op: Op, past: int) -> None:
    x = scores((51, 20, 2, 1))
    expected, actual = by_both(node(op, F32, x.ne, [x], params(past)), 3)
    assert np.array_equal(expected, actual)
    expected, actual = by_both(node(op, F32, x.ne, [x], params(past), inplace=x))
    assert np.array_equal(expected, actual)
