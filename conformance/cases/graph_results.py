"""5: graphs: results of the ops that models are made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from conformance.cases.groups import GRAPHS
from conformance.suite import Context
from conformance.suite.arrays import PLAIN_TYPES, PRODUCT_BOUND, Bench, close, same, values, weights
from protocol.ggml.types import GgmlType

F32, F16 = GgmlType.F32, GgmlType.F16

_QUANTIZED = (
    GgmlType.Q8_0, GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q5_0, GgmlType.Q5_1, GgmlType.Q4_K,
    GgmlType.Q5_K, GgmlType.Q6_K, GgmlType.Q2_K, GgmlType.Q3_K, GgmlType.IQ4_NL, GgmlType.IQ4_XS,
)  # fmt: skip


@GRAPHS.case(20, source="ggml.c ggml_mul_mat, test-backend-ops.cpp test_mul_mat")
def products_of_plain_types(c: Context) -> None:
    """Nearly all of the time of a model is spent here.

    Sends: MUL_MAT with weights of F32, F16 and BF16, for one and for several tokens
    Expects: the products, within the bound of test-backend-ops (5e-4)
    """
    _products(c, PLAIN_TYPES)


@GRAPHS.case(
    21,
    source="ggml.c ggml_mul_mat, ggml-common.h, test-backend-ops.cpp test_mul_mat",
    deadline=120.0,
)
def products_of_quantized_types(c: Context) -> None:
    """The blocks of a type have one meaning, to the bit; only activations may be rounded.

    Sends: MUL_MAT with weights of the quantized types that models come in
    Expects: the products, within the bound of test-backend-ops (5e-4)
    """
    _products(c, _QUANTIZED)


def _products(c: Context, types: Sequence[GgmlType]) -> None:
    for type in types:
        for tokens in (1, 3):
            b = Bench(c.connect())
            raw, numbers = weights(type, 256, 40, seed=31)
            x = values(tokens, 256, seed=32)
            w = b.leaf(raw, type, (256, 40))
            (result,) = b.compute(b.g.mul_mat(w, b.leaf(x, ne=(256, tokens))))
            expected = x.astype(np.float64) @ numbers.T.astype(np.float64)
            close(c, result, expected, f"{type.name}, {tokens} tokens", PRODUCT_BOUND)
            b.peer.close()


@GRAPHS.case(22, source="ggml.c ggml_get_rows")
def rows_are_taken(c: Context) -> None:
    """Token embeddings.

    Sends: GET_ROWS of F32, F16 and Q8_0 tables, with an index that occurs twice
    Expects: those rows as F32
    """
    indices = np.array([3, 0, 7, 3], np.int32)
    for type in (F32, F16, GgmlType.Q8_0):
        b = Bench(c.connect())
        raw, numbers = weights(type, 64, 8, seed=33)
        table, ids = b.leaf(raw, type, (64, 8)), b.leaf(indices, GgmlType.I32)
        (result,) = b.compute(b.g.get_rows(table, ids))
        close(c, result, numbers[indices], f"rows of {type.name}")
        b.peer.close()


@GRAPHS.case(23, source="ggml.c ggml_set_rows")
def rows_are_set(c: Context) -> None:
    """How a KV cache is filled since llama.cpp has unified caches.

    Sends: SET_ROWS into an F16 cache, indices of 64 bits
    Expects: those rows written, the others as they were
    """
    b = Bench(c.connect())
    cache, rows = values(9, 16, seed=34).astype(np.float16), values(3, 16, seed=35)
    indices = np.array([8, 0, 4], np.int64)
    into = b.leaf(cache, F16)
    b.compute(b.g.set_rows(into, b.leaf(rows), b.leaf(indices, GgmlType.I64)))
    expected = cache.copy()
    expected[indices] = rows.astype(np.float16)
    same(c, b.get(into), expected, "the cache")


@GRAPHS.case(24, source="llama-graph.cpp build_attn_mha without flash attention")
def attention(c: Context) -> None:
    """Products of results, broadcast over heads, a causal mask, views of a cache.

    Sends: attention written out: MUL_MAT, SOFT_MAX with a mask, MUL_MAT with a transposed view
    Expects: what attention is
    """
    b = Bench(c.connect())
    heads, tokens, width = 4, 5, 32
    q, k, v = (values(heads, tokens, width, seed=36 + i) for i in range(3))
    mask = np.where(np.tri(tokens), np.float32(0), -np.inf).astype(np.float32)
    g = b.g
    scores = g.mul_mat(b.leaf(k), b.leaf(q))
    weights_ = g.soft_max_ext(scores, b.leaf(mask), width**-0.5, 0.0)
    (result,) = b.compute(g.mul_mat(g.cont(g.transpose(b.leaf(v))), weights_))
    s = (q.astype(np.float64) @ k.swapaxes(1, 2)) * width**-0.5 + mask
    p = np.exp(s - s.max(-1, keepdims=True))
    close(c, result, p / p.sum(-1, keepdims=True) @ v, "attention", PRODUCT_BOUND)


@GRAPHS.case(25, source="ggml-cpu ops.cpp ggml_compute_forward_rope")
def rotation(c: Context) -> None:
    """Positions come as a tensor of I32, the base as a float of op_params.

    Sends: ROPE of two heads at five positions
    Expects: pairs of elements rotated by position and dimension
    """
    b = Bench(c.connect())
    x = values(5, 2, 16, seed=39)
    positions = np.array([0, 1, 2, 9, 100], np.int32)
    (result,) = b.compute(b.g.rope(b.leaf(x), b.leaf(positions, GgmlType.I32), 16))
    angles = positions[:, None] * 10000.0 ** (-np.arange(8) / 8)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    even, odd = x[..., 0::2].astype(np.float64), x[..., 1::2].astype(np.float64)
    expected = np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)
    close(c, result, expected, "ROPE")
