"""References of SOFT_MAX and its gradient against plain loops, and what their contracts refuse."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.ops.masks import alibi_slopes
from rpc_server.ops.table import check
from tests.ops.harness import guards_intact, refused, run
from tests.ops.tensors import node, params, permuted, tensor, values

F32, F16, BF16 = GgmlType.F32, GgmlType.F16, GgmlType.BF16
NE = (9, 4, 6, 2)
Array = np.ndarray[Any, Any]


def noise(ne: tuple[int, ...] = NE, type_: GgmlType = F32, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return tensor(type_, ne, rng.standard_normal(tensor(F32, ne).ne[::-1]) * 3)


def causal_mask(type_: GgmlType, ne: tuple[int, ...], seed: int = 1) -> Tensor:
    """Distances that grow to the left, and nothing to be seen right of the diagonal."""
    mask = values(noise(ne, F32, seed))
    rows, columns = np.indices(mask.shape[2:])
    return tensor(type_, ne, np.where(columns > rows + 1, -np.inf, mask))


def soft_max(
    x: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None, *words: float
) -> Tensor:
    return node(Op.SOFT_MAX, F32, x.ne, [x, mask, sinks], params(*(words or (1.0, 0.0))))


def slope(head: int, n_heads: int, max_bias: float) -> float:
    """The slopes of the paper: a geometric sequence, and every other one of a finer sequence."""
    if max_bias == 0:
        return 1.0
    power = 2 ** math.floor(math.log2(n_heads))
    first: list[float] = [2 ** (-max_bias * (i + 1) / power) for i in range(power)]
    fine: list[float] = [2 ** (-max_bias * (i + 1) / (2 * power)) for i in range(2 * power)]
    return [*first, *fine[::2]][head]


def expected_soft_max(t: Tensor) -> Array:
    x, mask, sinks = t.src[0], t.src[1], t.src[2]
    assert x is not None
    scale, max_bias = t.param_f32(0), t.param_f32(1)
    result = values(x).astype(np.float64)
    m = None if mask is None else values(mask).astype(np.float64)
    for i3, i2, i1 in np.ndindex(*result.shape[:3]):
        row = result[i3, i2, i1]
        row *= scale
        if m is not None:
            weight = slope(i2, result.shape[1], max_bias)
            row += weight * m[i3 % m.shape[0], i2 % m.shape[1], i1]
        terms = [math.exp(v) for v in row]
        total = sum(terms)
        if sinks is not None:
            total += math.exp(values(sinks)[0, 0, 0, i2])
        row[:] = np.array(terms) / total
    return result


def check_values(t: Tensor) -> None:
    expected = expected_soft_max(t)
    run(t, kernels=False)
    np.testing.assert_allclose(values(t), expected, rtol=3e-6, atol=1e-7)
    assert guards_intact(t)


def test_plain_and_scaled() -> None:
    check_values(soft_max(noise()))
    check_values(soft_max(noise(), None, None, 0.3, 0.0))
    check_values(soft_max(permuted(noise(), (0, 2, 1, 3))))


@pytest.mark.parametrize("type_", [F32, F16])
@pytest.mark.parametrize("tokens", [4, 7])
@pytest.mark.parametrize(("heads", "batches"), [(1, 1), (2, 1), (3, 2), (6, 2)])
def test_masks_repeat(type_: GgmlType, tokens: int, heads: int, batches: int) -> None:
    mask = causal_mask(type_, (9, tokens, heads, batches))
    check_values(soft_max(noise(), mask, None, 0.5, 0.0))


@pytest.mark.parametrize("max_bias", [8.0, 3.0])
@pytest.mark.parametrize("n_heads", [1, 2, 3, 6, 8])
def test_alibi(max_bias: float, n_heads: int) -> None:
    mask = causal_mask(F16, (9, 4))
    check_values(soft_max(noise((9, 4, n_heads)), mask, None, 0.5, max_bias))


def test_slopes_of_the_paper() -> None:
    np.testing.assert_array_equal(alibi_slopes(8, 8.0), [2.0**-i for i in range(1, 9)])
    np.testing.assert_array_equal(alibi_slopes(3, 0.0), [1, 1, 1])


@pytest.mark.parametrize("masked", [False, True])
def test_sinks(masked: bool) -> None:
    sinks = tensor(F32, (6,), [-30, -1, 0, 1, 2, 30])
    check_values(soft_max(noise(), causal_mask(F16, NE) if masked else None, sinks))


def test_in_place() -> None:
    x = noise()
    t = node(Op.SOFT_MAX, F32, NE, [x], params(0.5, 0.0), inplace=x)
    expected = expected_soft_max(t)
    run(t, kernels=False)
    np.testing.assert_allclose(values(x), expected, rtol=3e-6, atol=1e-7)


def test_large_scores() -> None:
    x = tensor(F32, (3,), [1e30, -1e30, 1e30])
    t = soft_max(x)
    run(t, kernels=False)
    np.testing.assert_array_equal(values(t)[0, 0, 0], [0.5, 0, 0.5])


def test_gradient() -> None:
    flow, x = noise(seed=3), noise(seed=4)
    scale, step = 0.5, 1e-6
    y = soft_max(x, None, None, scale, 0.0)
    run(y, kernels=False)
    t = node(Op.SOFT_MAX_BACK, F32, NE, [flow, y], params(scale, 0.0))
    run(t, kernels=False)

    def total(x: Array) -> Array:
        terms = np.exp(scale * x)
        y = terms / terms.sum(axis=3, keepdims=True)
        return np.asarray((y * values(flow)).sum(axis=3))

    expected = np.zeros(NE[::-1])
    for i in range(NE[0]):
        change = np.zeros(NE[0])
        change[i] = step
        x64 = values(x).astype(np.float64)
        expected[..., i] = (total(x64 + change) - total(x64 - change)) / (2 * step)
    np.testing.assert_allclose(values(t), expected, atol=2e-6)


def test_contract() -> None:
    x, mask, sinks = noise(), causal_mask(F16, NE), noise((6,))
    check(soft_max(x, mask, sinks, 1.0, 8.0))
    refused(soft_max(noise(type_=F16)), "source 0 must not be F16")
    refused(node(Op.SOFT_MAX, F32, (9, 4, 6, 1), [x], params(1.0)), "source 0 must be 9x4x6x1")
    refused(soft_max(permuted(x, (1, 0, 2, 3))), "source 0 must have dense rows")
    for ne, message in (
        ((8, 4), "mask of 8 positions"),
        ((10, 4), "mask of 10 positions"),
        ((9, 3), "mask of 3 tokens for 4"),
        ((9, 4, 4), "6 is not a multiple of 4"),
        ((9, 4, 0), "6 is not a multiple of 0"),
        ((9, 4, 1, 3), "2 is not a multiple of 3"),
    ):
        refused(soft_max(x, tensor(F16, ne, 0)), message)
    refused(soft_max(x, causal_mask(BF16, NE)), "source 1 must not be BF16")
    refused(soft_max(x, permuted(tensor(F32, (4, 9), 0), (1, 0, 2, 3))), "dense rows")
    refused(soft_max(x, None, None, 1.0, 8.0), "max_bias without a mask")
    refused(soft_max(x, mask, noise((5,))), "source 2 must be 6x1x1x1")
    refused(soft_max(x, mask, noise((6, 2))), "source 2 must be")
    refused(soft_max(x, mask, tensor(F32, (6, 0))), "source 2 must be")
    refused(soft_max(x, mask, noise((6,), F16)), "source 2 must not be F16")


def test_a_mask_of_more_rows_than_memory() -> None:
    # Rows may lie on one another; only those that are used may be touched, or converted.
    mask = tensor(F16, (9, 1 << 40), nb=(2, 0, 0, 0))
    mask_row = tensor(F16, (9,), np.arange(9))
    mask.address = mask_row.address
    check_values_of_row(soft_max(noise(), mask), values(mask_row)[0, 0, 0])


def check_values_of_row(t: Tensor, mask: Array) -> None:
    run(t, kernels=False)
    assert t.src[0] is not None
    terms = np.exp(values(t.src[0]).astype(np.float64) + mask)
    expected = terms / terms.sum(axis=3, keepdims=True)
    np.testing.assert_allclose(values(t), expected, rtol=3e-6, atol=1e-7)


def test_contract_of_the_gradient() -> None:
    def back(flow: Tensor, y: Tensor, max_bias: float = 0.0) -> Tensor:
        return node(Op.SOFT_MAX_BACK, F32, NE, [flow, y], params(1.0, max_bias))

    check(back(noise(), noise()))
    refused(back(noise(), noise(), 8.0), "no gradient with max_bias")
    refused(back(noise(), noise(), math.nan), "no gradient with max_bias")
    refused(back(noise((9, 4, 6)), noise()), "source 0 must be")
    refused(back(noise(), noise((9, 4, 6))), "source 1 must be")
    refused(back(noise(), permuted(noise((9, 6, 4, 2)), (0, 2, 1, 3))), "must be contiguous")
