"""FLASH_ATTN_BACK: the gradients of queries, keys and values of attention.

ggml's constructor of the node has been switched off since attention got its present form, so only
clients that make nodes themselves send it. What it computes is what ggml's CPU backend does for it:
values come transposed, there is no mask but the causal one, and heads share keys in turns.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from protocol.ggml.ops import Op
from protocol.tensor import Tensor
from rpc_server.ops import checks
from rpc_server.ops.arrays import ArrayContext
from rpc_server.ops.checks import F32_ONLY
from rpc_server.ops.slices import rows_of, tiles
from rpc_server.ops.table import contract, reference, require, source

# In the result gradients start at multiples of this many elements (of ggml's 16 bytes).
_ALIGNMENT = 4


def _starts(t: Tensor) -> list[int]:
    """Elements at which the gradients of sources 0, 1, 2 start in the result, and its end."""
    starts = [0]
    for i in range(3):
        starts.append(starts[-1] + -(-source(t, i).nelements // _ALIGNMENT) * _ALIGNMENT)
    return starts


@contract(Op.FLASH_ATTN_BACK)
def _attention_back_contract(t: Tensor) -> None:
    """q (D, N, heads, batches), k (D, M, kv heads, batches), v (M, D, ...), the result's gradient.

    op_params[0]: causal; the N tokens are the last of the M positions. The result is the gradients
    of q, k and v one after the other, each padded to 16 bytes.
    """
    q, k, v = (checks.source(t, i, F32_ONLY) for i in range(3))
    gradient = checks.source(t, 3, F32_ONLY, dense=False)
    checks.result(t, F32_ONLY)
    checks.contiguous(t, "the result")
    size, n_tokens, n_heads, n_batches = q.ne
    n_kv, kv_heads = k.ne[1:3]
    require(not q.empty and not k.empty, "there are no queries or no keys")
    require(t.param_i32(0) in (0, 1), f"op_params[0] is {t.param_i32(0)}")
    require(n_tokens <= n_kv, f"{n_tokens} tokens among {n_kv} positions")
    checks.shape(k, (size, n_kv, kv_heads, n_batches), "source 1")
    checks.shape(v, (n_kv, size, kv_heads, n_batches), "source 2")
    checks.shape(gradient, q.ne, "source 3")
    checks.whole_copies(n_heads, kv_heads, "heads")
    # ggml places the gradients of later batches by the number of heads, outside of the result.
    require(n_heads == kv_heads or n_batches == 1, "no layout for batches of shared keys")
    for i in range(4):
        checks.distinct(source(t, i), f"source {i}")
    checks.shape(t, (_starts(t)[-1], 1, 1, 1), "the result")


@reference(Op.FLASH_ATTN_BACK)
def _attention_back(ctx: ArrayContext, t: Tensor) -> None:
    result = ctx.view(t)[0, 0, 0]
    sources = [source(t, i) for i in range(3)]
    # Sources may lie in the result's memory.
    total = ctx.xp.zeros(result.shape, ctx.xp.float32)
    dq, dk, dv = (
        total[start : start + s.nelements].reshape(s.ne[::-1])
        for start, s in zip(_starts(t)[:-1], sources, strict=True)
    )
    q, k = sources[:2]
    for batch in range(q.ne[3]):
        for head in range(q.ne[2]):
            shared = head % k.ne[2]
            for tokens in tiles(q.ne[1], k.ne[1]):
                at = slice(tokens.start, tokens.stop)
                parts = dq[batch, head, at], dk[batch, shared], dv[batch, shared]
                _add_gradients(ctx, t, (batch, head, tokens), parts)
    result[...] = total


def _add_gradients(
    ctx: ArrayContext, t: Tensor, at: tuple[int, int, range], into: tuple[Any, Any, Any]
) -> None:
    """Add what the ``tokens`` of a batch and head contribute to the three gradients."""
    xp, (batch, head, tokens) = ctx.xp, at
    k, v = source(t, 1), source(t, 2)
    shared = head % k.ne[2]
    scale = np.float32(1 / math.sqrt(k.ne[0]))
    queries = ctx.f32(rows_of(source(t, 0), batch, head, tokens))[0, 0]
    outputs = ctx.f32(rows_of(source(t, 3), batch, head, tokens))[0, 0]
    keys = ctx.f32(rows_of(k, batch, shared, range(k.ne[1])))[0, 0]
    values = ctx.f32(rows_of(v, batch, shared, range(v.ne[1])))[0, 0]
    scores = xp.matmul(queries, keys.T) * scale
    if t.param_i32(0):
        # The first token is as many positions in as there are more positions than tokens.
        last = k.ne[1] - source(t, 0).ne[1] + xp.arange(tokens.start, tokens.stop)
        scores[xp.arange(k.ne[1]) > last[:, None]] = -np.inf
    weights = xp.exp(scores - scores.max(axis=1, keepdims=True))
    weights *= (1 / weights.sum(axis=1, keepdims=True, dtype=xp.float64)).astype(xp.float32)
    difference = xp.matmul(outputs, values)
    difference -= (weights * difference).sum(axis=1, keepdims=True)
    difference *= weights * scale
    dq, dk, dv = into
    dq += xp.matmul(difference, keys)
    dk += xp.matmul(difference.T, queries)
    dv += xp.matmul(outputs.T, weights)
