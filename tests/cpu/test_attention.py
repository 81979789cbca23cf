"""Kernels of FLASH_ATTN_EXT against the array reference."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from tests.ops.harness import by_both, nmse, rounded, run
from tests.ops.tensors import CONTEXT, node, params, permuted, raw, tensor, values
from tests.parameters import mostly_slow

F32, F16 = GgmlType.F32, GgmlType.F16

rng = np.random.default_rng(20261124)


def cache(type_: GgmlType, width: int, n_kv: int, n_heads: int, n_batches: int = 1) -> Tensor:
    """Keys or values as llama.cpp keeps them: heads of a position next to each other."""
    content = rng.normal(0, 1, (n_batches, n_kv, n_heads, width))
    return permuted(tensor(type_, (width, n_heads, n_kv, n_batches), content), (0, 2, 1, 3))


def causal_mask(n_kv: int, n_tokens: int) -> np.ndarray:
    hidden = np.arange(n_kv) > np.arange(n_tokens)[:, None] + max(0, n_kv - n_tokens) // 2
    return np.where(hidden, -np.inf, 0.0)


def attention(
    *,
    tokens: int,
    heads: int,
    kv_heads: int,
    n_kv: int,
    dk: int = 64,
    dv: int = 64,
    types: tuple[GgmlType, GgmlType] = (F16, F16),
    batches: int = 1,
    max_bias: float = 0.0,
    softcap: float = 0.0,
    with_sinks: bool = False,
    mask: np.ndarray | None = None,
    exact_queries: bool = True,
) -> Tensor:
    """``exact_queries``: such that the kernel's rounding of them changes nothing."""
    q_values = rng.normal(0, 1, (batches, tokens, heads, dk)).astype(np.float32)
    if exact_queries:
        q_values = rounded(q_values, types[0])
    q = permuted(tensor(F32, (dk, heads, tokens, batches), q_values), (0, 2, 1, 3))
    k, v = (cache(t, d, n_kv, kv_heads, batches) for t, d in zip(types, (dk, dv), strict=True))
    m = None if mask is None else tensor(F16, mask.shape[::-1], mask)
    sinks = tensor(F32, (heads,), rng.normal(0, 1, heads)) if with_sinks else None
    words = params(dk**-0.5, max_bias, softcap)
    ne = (dv, heads, tokens, batches)
    return node(Op.FLASH_ATTN_EXT, F32, ne, [q, k, v, m, sinks], words)


def assert_close(t: Tensor, n_threads: int = 2) -> None:
    expected, actual = by_both(t, n_threads)
    assert nmse(expected, actual) < 1e-10


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "n_kv"),
    [
        (1, 9, 3, 256),
        (1, 9, 3, 1),
        (1, 4, 4, 1000),
        (1, 8, 1, 65),
        (5, 9, 3, 77),
        (70, 9, 3, 130),
        (200, 2, 2, 200),
    ],
)
def test_shapes(tokens: int, heads: int, kv_heads: int, n_kv: int, n_threads: int) -> None:
    t = attention(
        tokens=tokens,
        heads=heads,
        kv_heads=kv_heads,
        n_kv=n_kv,
        mask=causal_mask(n_kv, tokens + 3),
    )
    assert_close(t, n_threads)


@pytest.mark.parametrize(("dk", "dv"), [(64, 64), (40, 24), (128, 128), (192, 128), (7, 5)])
def test_head_widths(dk: int, dv: int) -> None:
    for tokens in (1, 33):
        t = attention(tokens=tokens, heads=4, kv_heads=2, n_kv=90, dk=dk, dv=dv, types=(F32, F32))
        assert_close(t, 3)


@pytest.mark.parametrize(
    ("keys", "values"),
    mostly_slow(
        [
            (GgmlType.Q8_0, GgmlType.Q5_1),
            (GgmlType.BF16, F16),
            (GgmlType.Q8_0, GgmlType.Q8_0),
            (GgmlType.Q4_0, GgmlType.Q4_0),
            (GgmlType.IQ4_NL, F32),
        ],
        quick=2,
    ),
)
def test_types_of_keys_and_values(keys: GgmlType, values: GgmlType) -> None:
    for tokens in (1, 20):
        t = attention(
            tokens=tokens,
            heads=6,
            kv_heads=2,
            n_kv=150,
            types=(keys, values),
            mask=causal_mask(150, tokens),
        )
        assert_close(t)


@pytest.mark.parametrize("heads", [4, 6])
@pytest.mark.parametrize("tokens", [1, 9])
def test_alibi_softcap_and_sinks(heads: int, tokens: int) -> None:
    distance = np.arange(100) - np.arange(tokens)[:, None] - 60.0
    mask = np.where(distance > 0, -np.inf, distance)
    of_size = functools.partial(attention, tokens=tokens, heads=heads, kv_heads=2, n_kv=100)
    assert_close(of_size(max_bias=8.0, mask=mask))
    assert_close(of_size(softcap=5.0, mask=mask))
    assert_close(of_size(with_sinks=True, mask=mask), 3)
    assert_close(of_size(with_sinks=True, batches=2), 1)


def test_masks_of_heads_and_batches() -> None:
    mask = np.where(rng.random((2, 2, 7, 100)) < 0.5, -np.inf, 0.0)
    t = attention(tokens=7, heads=4, kv_heads=2, n_kv=100, batches=2, mask=mask)
    assert_close(t)


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_hidden_positions_may_hold_anything(tokens: int, with_sinks: bool) -> None:
    """Also rows that attend to nothing at all: zeros."""
    mask = causal_mask(300, tokens)
    mask[:, 200:] = -np.inf
    mask[-1] = -np.inf
    t = attention(tokens=tokens, heads=4, kv_heads=2, n_kv=300, mask=mask, with_sinks=with_sinks)
    for s in t.src[1:3]:
        assert s is not None
        CONTEXT.view(s)[:, :, 200:] = np.nan
    expected, actual = by_both(t, 3)
    assert np.isfinite(actual).all()
    assert nmse(expected, actual) < 1e-10
    assert not actual[0, -1].any()


def test_large_scores() -> None:
    t = attention(tokens=3, heads=2, kv_heads=1, n_kv=128, types=(F32, F32))
    q = t.src[0]
    assert q is not None
    CONTEXT.f32(q)[...] *= 100
    assert_close(t)


@pytest.mark.parametrize(
    "keys", mostly_slow([F16, GgmlType.BF16, GgmlType.Q8_0, GgmlType.Q4_0], quick=2)
)
def test_queries_are_rounded_as_ggml_rounds_them(keys: GgmlType) -> None:
    """As for a product with the keys: the result is that of the rounded ones."""
    t = attention(tokens=3, heads=4, kv_heads=2, n_kv=70, types=(keys, F16), exact_queries=False)
    run(t, kernels=True)
    q = t.src[0]
    assert q is not None
    unrounded, given = values(t), raw(q)
    CONTEXT.store(q, rounded(values(q), keys))
    assert (raw(q) != given).any()
    run(t, kernels=True)
    # Coded forms: the test's encoder rounds halves the other way.
    assert nmse(values(t), unrounded) < (1e-6 if keys in (GgmlType.Q8_0, GgmlType.Q4_0) else 1e-12)
