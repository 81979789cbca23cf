"""FLASH_ATTN_EXT: softmax(q k^T) v without the scores ever being a tensor."""

from __future__ import annotations

from typing import Any

import numpy as np

from protocol.ggml.ops import Op
from protocol.ggml.types import DECODABLE, GgmlType
from protocol.tensor import Tensor
from rpc_server.ops import checks
from rpc_server.ops.arrays import ArrayContext
from rpc_server.ops.checks import F32_ONLY
from rpc_server.ops.masks import alibi_slopes, require_mask, require_sinks
from rpc_server.ops.rounding import rounded_activations
from rpc_server.ops.shards import Propagated, Shard, Shards, Slice
from rpc_server.ops.slices import rows_of, tiles
from rpc_server.ops.table import contract, reference, require, source


def _flash_attention_shard(node: Tensor, shards: Shards) -> Propagated | None:
    q, k, v, mask, sinks = node.src[:5]
    if q is None or k is None or v is None or any(s is None or s.dim != 2 for s in shards[:3]):
        return None
    heads, kv = shards[0], shards[1]
    assert heads is not None
    assert kv is not None
    # With ALiBi what a head computes depends on its number.
    if shards[2] != kv or node.param_f32(1) != 0.0 or kv.scaled(2, q.ne[2], k.ne[2]) != heads:
        return None
    needs = []
    if mask is not None:
        if shards[3] is not None or mask.ne[2] != 1:
            return None
        needs.append(Slice(3))
    if sinks is not None:
        if shards[4] is not None:
            return None
        needs.append(Slice(4, Shard(0, heads.bounds)))
    return Propagated(Shard(1, heads.bounds), tuple(needs))


@contract(Op.FLASH_ATTN_EXT, shard_rule=_flash_attention_shard)
def _attention_contract(t: Tensor) -> None:
    """Queries (DK, tokens, heads, batches), keys (DK, positions, ...), values (DV, positions, ...).

    Heads and batches of keys and values are shared by as many of the queries' as they divide.
    src3: mask, F16. src4: sinks. op_params: scale, max_bias, softcap of the scores (0: none),
    precision (float32 is used whatever it says). The result is (DV, heads, tokens, batches).
    """
    q = checks.source(t, 0, F32_ONLY)
    k, v = checks.source(t, 1, DECODABLE), checks.source(t, 2, DECODABLE)
    checks.result(t, F32_ONLY)
    n_kv = k.ne[1]
    require(t.empty or k.ne[0] > 0, "keys have no elements")
    checks.shape(k, (q.ne[0], *k.ne[1:]), "source 1")
    checks.shape(v, (v.ne[0], n_kv, *v.ne[2:]), "source 2")
    checks.shape(t, (v.ne[0], q.ne[2], q.ne[1], q.ne[3]), "the result")
    for i, s in ((1, k), (2, v)):
        checks.distinct(s, f"source {i}")
        for dim in (2, 3):
            checks.whole_copies(q.ne[dim], s.ne[dim], f"dimension {dim} over source {i}")
    require_mask(t, 3, {GgmlType.F16}, (n_kv, *q.ne[1:]))
    require_sinks(t, 4, q.ne[2])


@reference(Op.FLASH_ATTN_EXT)
def _attention(ctx: ArrayContext, t: Tensor) -> None:
    q, n_kv = source(t, 0), source(t, 1).ne[1]
    target = ctx.view(t)
    if not n_kv:
        # Nothing to attend to.
        target[...] = 0
        return
    slopes = alibi_slopes(q.ne[2], t.param_f32(1))
    decoded = _Decoded(ctx)
    for batch in range(q.ne[3]):
        for head in range(q.ne[2]):
            for tokens in tiles(q.ne[1], n_kv):
                scores = _scores(ctx, t, batch, head, tokens, decoded)
                if t.src[3] is not None:
                    _add_mask(ctx, t, scores, (batch, head, tokens), slopes[head])
                weights = _weights(ctx, t.src[4], scores, head)
                out = _weighted_values(ctx, t, weights, batch, head, decoded)
                target[batch, tokens.start : tokens.stop, head] = out


class _Decoded:
    """The last tile of keys and of values, decoded: heads of a group share them."""

    def __init__(self, ctx: ArrayContext) -> None:
        self._ctx = ctx
        self._last: dict[int, tuple[tuple[int, int, int], Any]] = {}

    def rows(self, s: Tensor, i3: int, i2: int, rows: range) -> Any:
        """float32 (rows, elements) of one matrix of keys or values ``s``."""
        key = (i3, i2, rows.start)
        last = self._last.get(id(s))
        if last is None or last[0] != key:
            last = self._last[id(s)] = key, self._ctx.f32(rows_of(s, i3, i2, rows))[0, 0]
        return last[1]


def _shared(t: Tensor, s: Tensor, batch: int, head: int) -> tuple[int, int]:
    """Batch and head of keys or values ``s`` that a batch and head of the queries uses."""
    q = source(t, 0)
    return batch // (q.ne[3] // s.ne[3]), head // (q.ne[2] // s.ne[2])


def _scores(
    ctx: ArrayContext, t: Tensor, batch: int, head: int, tokens: range, decoded: _Decoded
) -> Any:
    """float32 (tokens, positions): scaled and capped products of queries and keys."""
    q, k, xp = source(t, 0), source(t, 1), ctx.xp
    scale, softcap = np.float32(t.param_f32(0)), np.float32(t.param_f32(2))
    if softcap:
        scale /= softcap
    queries = ctx.f32(rows_of(q, batch, head, tokens))[0, 0]
    queries = rounded_activations(queries, q.type, k.type, xp)
    i3, i2 = _shared(t, k, batch, head)
    scores = xp.empty((len(tokens), k.ne[1]), xp.float32)
    for rows in tiles(k.ne[1], k.ne[0]):
        keys = decoded.rows(k, i3, i2, rows)
        scores[:, rows.start : rows.stop] = xp.matmul(queries, keys.T) * scale
    return softcap * xp.tanh(scores) if softcap else scores


def _add_mask(
    ctx: ArrayContext, t: Tensor, scores: Any, at: tuple[int, int, range], slope: np.float32
) -> None:
    """Add the mask for a batch, head and tokens; a masked position is out whatever its key."""
    mask = t.src[3]
    assert mask is not None
    batch, head, tokens = at
    values = ctx.f32(rows_of(mask, batch % mask.ne[3], head % mask.ne[2], tokens))[0, 0]
    values = slope * values
    scores += values
    scores[ctx.xp.isneginf(values)] = -np.inf


def _weights(ctx: ArrayContext, sinks: Tensor | None, scores: Any, head: int) -> Any:
    """Softmax of ``scores``; zeros where all positions are masked."""
    xp = ctx.xp
    top = scores.max(axis=1, keepdims=True)
    total: Any = 0
    if sinks is not None:
        sink = ctx.f32(sinks)[0, 0, 0, head]
        top = xp.maximum(top, sink)
    top = xp.where(xp.isneginf(top), xp.float32(0), top)
    if sinks is not None:
        total = xp.exp(sink - top)
    weights = xp.exp(scores - top)
    total = total + weights.sum(axis=1, keepdims=True, dtype=xp.float64)
    return weights * xp.where(total == 0, 0, 1 / total).astype(xp.float32)


def _weighted_values(
    ctx: ArrayContext, t: Tensor, weights: Any, batch: int, head: int, decoded: _Decoded
) -> Any:
    v, xp = source(t, 2), ctx.xp
    i3, i2 = _shared(t, v, batch, head)
    total: Any = xp.zeros((len(weights), v.ne[0]), xp.float32)
    for rows in tiles(v.ne[1], v.ne[0]):
        part = weights[:, rows.start : rows.stop]
        # What no token attends to may be anything, NaN included.
        used = (part != 0).any(axis=0)
        values = decoded.rows(v, i3, i2, rows)
        total += xp.matmul(part[:, used], values[used])
    return total
