"""The reference of FLASH_ATTN_EXT against plain loops, and what its contract refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.ops import slices
from rpc_server.ops.masks import alibi_slopes
from rpc_server.ops.table import check
from tests.ops.harness import guards_intact, nmse, refused, rounded_source, run
from tests.ops.tensors import CONTEXT, node, params, permuted, tensor, values, view

F32, F16, BF16, Q4_0, Q8_0 = (
    GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.Q4_0, GgmlType.Q8_0,
)  # fmt: skip
# The reference works on decoded values in float32: only its rounding is allowed.
LIMIT = 1e-11
DK, DV, N_KV, TOKENS, HEADS, BATCHES = 32, 64, 11, 3, 4, 2


@pytest.fixture(params=[1, 16 << 20], ids=["row by row", "at once"], autouse=True)
def bytes_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of single rows, and tiles larger than anything here."""
    monkeypatch.setattr(slices, "_BYTES_AT_ONCE", request.param)


def noise(type_: GgmlType, ne: tuple[int, ...], seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return tensor(type_, ne, rng.standard_normal(tensor(F32, ne).ne[::-1]).astype(np.float32))


def causal_mask(heads: int = 1, batches: int = 1, tokens: int = TOKENS) -> Tensor:
    """Random numbers, and -inf for the positions after each token."""
    mask = values(noise(F32, (N_KV, tokens, heads, batches), 9))
    rows, columns = np.indices(mask.shape[2:])
    return tensor(F16, (N_KV, tokens, heads, batches), np.where(columns > rows + 5, -np.inf, mask))


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None,
    scale: float = 0.2, max_bias: float = 0.0, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    ne = (v.ne[0], q.ne[2], q.ne[1], q.ne[3])
    sources = [q, k, v, mask, sinks]
    return node(Op.FLASH_ATTN_EXT, F32, ne, sources, params(scale, max_bias, softcap, 10))


def heads(
    type_k: GgmlType = F16, type_v: GgmlType = F16, kv_heads: int = HEADS, kv_batches: int = BATCHES
) -> tuple[Tensor, Tensor, Tensor]:
    q = noise(F32, (DK, TOKENS, HEADS, BATCHES), 1)
    k = noise(type_k, (DK, N_KV, kv_heads, kv_batches), 2)
    v = noise(type_v, (DV, N_KV, kv_heads, kv_batches), 3)
    return q, k, v


def expected_attention(t: Tensor) -> np.ndarray[Any, Any]:
    q, k, v, mask, sinks = (None if s is None else values(s).astype(np.float64) for s in t.src[:5])
    assert q is not None
    assert k is not None
    assert v is not None
    assert t.src[0] is not None
    assert t.src[1] is not None
    q = rounded_source(t.src[0], t.src[1].type)
    scale, max_bias, softcap = (t.param_f32(i) for i in range(3))
    slopes = alibi_slopes(q.shape[1], max_bias)
    result = np.zeros(t.ne[::-1])
    for batch, head, token in np.ndindex(*q.shape[:3]):
        kb, kh = batch * k.shape[0] // q.shape[0], head * k.shape[1] // q.shape[1]
        vb, vh = batch * v.shape[0] // q.shape[0], head * v.shape[1] // q.shape[1]
        total = math.exp(sinks[0, 0, 0, head]) if sinks is not None else 0.0
        out = np.zeros(v.shape[3])
        for position in range(k.shape[2]):
            score = sum(q[batch, head, token] * k[kb, kh, position]) * scale
            if softcap:
                score = softcap * math.tanh(score / softcap)
            if mask is not None:
                m = mask[batch % mask.shape[0], head % mask.shape[1], token, position]
                if m == -np.inf:
                    continue
                score += slopes[head] * m
            total += math.exp(score)
            out += math.exp(score) * v[vb, vh, position]
        if total:
            result[batch, token, head] = out / total
    return result


def check_values(t: Tensor) -> None:
    expected = expected_attention(t)
    run(t, kernels=False)
    assert nmse(expected, values(t)) < LIMIT
    assert guards_intact(t)


@pytest.mark.parametrize(
    ("type_k", "type_v"),
    [(F32, F32), (F16, F16), (BF16, BF16), (Q8_0, Q8_0), (Q4_0, F16), (F16, Q4_0)],
)
def test_types(type_k: GgmlType, type_v: GgmlType) -> None:
    check_values(attention(*heads(type_k, type_v)))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kv_batches", [1, 2])
def test_shared_keys_and_values(kv_heads: int, kv_batches: int) -> None:
    check_values(attention(*heads(kv_heads=kv_heads, kv_batches=kv_batches)))


@pytest.mark.parametrize(("n_heads", "batches"), [(1, 1), (2, 1), (4, 2)])
@pytest.mark.parametrize("tokens", [TOKENS, 8])
@pytest.mark.parametrize("max_bias", [0.0, 8.0])
def test_masks(n_heads: int, batches: int, tokens: int, max_bias: float) -> None:
    mask = causal_mask(n_heads, batches, tokens)
    check_values(attention(*heads(kv_heads=2), mask, max_bias=max_bias))


def test_softcap() -> None:
    check_values(attention(*heads(), causal_mask(), scale=1.0, softcap=2.5))


@pytest.mark.parametrize("masked", [False, True])
def test_sinks(masked: bool) -> None:
    sinks = tensor(F32, (HEADS,), [-30, 0, 2, 30])
    check_values(attention(*heads(), causal_mask() if masked else None, sinks))


def test_caches_as_llama_cpp_lays_them_out() -> None:
    # Heads side by side in each row, and more rows than are used.
    _, k, v = heads()
    cells = 16
    cached: list[Tensor] = []
    for s in (k, v):
        cache = tensor(F16, (s.ne[0], HEADS, cells, BATCHES), np.nan)
        CONTEXT.view(cache)[:, :N_KV] = CONTEXT.view(s).swapaxes(1, 2)
        part = view(cache, (s.ne[0], HEADS, N_KV, BATCHES), cache.nb)
        cached.append(permuted(part, (0, 2, 1, 3)))
    rows = permuted(noise(F32, (DK, HEADS, TOKENS, BATCHES), 1), (0, 2, 1, 3))
    check_values(attention(rows, cached[0], cached[1], causal_mask()))


def test_values_that_are_a_part_of_the_keys() -> None:
    q = noise(F32, (64, TOKENS, HEADS), 1)
    k = noise(F16, (64, N_KV, 1), 2)
    check_values(attention(q, k, view(k, (48, N_KV, 1, 1), k.nb), causal_mask()))


def test_what_is_masked_is_not_seen() -> None:
    q, k, v = heads()
    mask = causal_mask()
    clean = attention(q, k, v, mask)
    run(clean, kernels=False)
    # The last position that any token sees is 7.
    for s in (k, v):
        CONTEXT.view(s)[:, :, 8:] = np.nan
    dirty = attention(q, k, v, mask)
    run(dirty, kernels=False)
    np.testing.assert_allclose(values(dirty), values(clean), rtol=1e-6, atol=1e-7)


def test_a_token_that_sees_nothing_gets_zeros() -> None:
    mask = causal_mask()
    CONTEXT.view(mask)[:, :, 1] = -np.inf
    t = attention(*heads(), mask)
    check_values(t)
    assert (values(t)[:, 1] == 0).all()
    assert (values(t)[:, 0] != 0).all()
    sinks = tensor(F32, (HEADS,), 0)
    check_values(attention(*heads(), mask, sinks))


def test_without_keys_the_result_is_zeros() -> None:
    q, _, _ = heads()
    none = tensor(F16, (DK, 0, HEADS, BATCHES)), tensor(F16, (DV, 0, HEADS, BATCHES))
    t = attention(q, *none)
    run(t, kernels=True)
    assert not values(t).any()
    assert guards_intact(t)


def test_contract() -> None:
    q, k, v = heads()
    mask, sinks = causal_mask(), tensor(F32, (HEADS,), 0)
    check(attention(q, k, v, mask, sinks, max_bias=8.0))
    refused(attention(noise(F16, q.ne), k, v), "source 0 must not be F16")
    refused(attention(q, tensor(GgmlType.I16, k.ne), v), "source 1 must not be I16")
    refused(attention(q, k, tensor(GgmlType.I16, v.ne)), "source 2 must not be I16")
    refused(attention(q, noise(F16, (16, N_KV, HEADS, BATCHES)), v), "source 1 must be 32x")
    refused(attention(q, k, noise(F16, (DV, N_KV + 1, HEADS, BATCHES))), "source 2 must be 64x11")
    refused(attention(q, noise(F16, (DK, N_KV, 3, BATCHES)), v), "4 is not a multiple of 3")
    refused(attention(q, k, noise(F16, (DV, N_KV, 3, BATCHES))), "4 is not a multiple of 3")
    refused(attention(q, k, noise(F16, (DV, N_KV, HEADS, 4))), "2 is not a multiple of 4")
    refused(attention(q, tensor(F16, (DK, N_KV, 0, 2)), v), "4 is not a multiple of 0")
    for ne, message in (
        ((N_KV - 1, TOKENS), "mask of 10 positions"),
        ((N_KV, TOKENS - 1), "mask of 2 tokens for 3"),
        ((N_KV, TOKENS, 3), "4 is not a multiple of 3"),
        ((N_KV, TOKENS, 1, 4), "2 is not a multiple of 4"),
        ((N_KV, TOKENS, 0), "4 is not a multiple of 0"),
    ):
        refused(attention(q, k, v, tensor(F16, ne, 0)), message)
    refused(attention(q, k, v, tensor(F32, (N_KV, TOKENS), 0)), "source 3 must not be F32")
    refused(attention(q, k, v, max_bias=8.0), "max_bias without a mask")
    refused(attention(q, k, v, mask, tensor(F32, (3,), 0)), "source 4 must be 4x1x1x1")
    refused(attention(q, k, v, mask, tensor(F16, (HEADS,), 0)), "source 4 must not be F16")
    for i, s in enumerate((q, k, v)):
        columns = permuted(noise(s.type, (s.ne[1], s.ne[0], *s.ne[2:])), (1, 0, 2, 3))
        sources = [q, k, v]
        sources[i] = columns
        refused(attention(sources[0], sources[1], sources[2]), f"source {i} must have dense rows")
    t = attention(q, k, v)
    t.ne = (DV, TOKENS, HEADS, BATCHES)
    refused(t, "the result must be 64x4x3x2")
    endless = [tensor(F16, (s.ne[0], 1 << 36, 1, 1), nb=(2, 0, 0, 0)) for s in (k, v)]
    refused(attention(q, endless[0], endless[1]), "elements of source 1 overlap")
