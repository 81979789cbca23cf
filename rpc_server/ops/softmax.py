"""SOFT_MAX along rows of attention scores, and its gradient."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.ops import checks
from rpc_server.ops.arrays import ArrayContext
from rpc_server.ops.checks import F32_ONLY
from rpc_server.ops.masks import alibi_slopes, require_mask, require_sinks
from rpc_server.ops.table import contract, reference, require, source

_MASKS = frozenset({GgmlType.F32, GgmlType.F16})


@contract(Op.SOFT_MAX)
def _soft_max_contract(t: Tensor) -> None:
    """op_params: scale, max_bias. src1: mask. src2: sinks."""
    checks.result(t, F32_ONLY)
    checks.shape(checks.source(t, 0, F32_ONLY), t.ne, "source 0")
    require_mask(t, 1, _MASKS, t.ne)
    require_sinks(t, 2, t.ne[2])


@reference(Op.SOFT_MAX)
def _soft_max(ctx: ArrayContext, t: Tensor) -> None:
    xp, mask, sinks = ctx.xp, t.src[1], t.src[2]
    scores = ctx.f32(source(t, 0)) * np.float32(t.param_f32(0))
    if mask is not None:
        slopes = xp.asarray(alibi_slopes(t.ne[2], t.param_f32(1)))
        # It may have any number of rows more than the scores have tokens.
        used = dataclasses.replace(mask, ne=(t.ne[0], t.ne[1], *mask.ne[2:]))
        scores += slopes[:, None, None] * _over_heads(xp, ctx.f32(used), t)
    top = scores.max(axis=3, keepdims=True)
    total: Any = 0
    if sinks is not None:
        # A sink is a position that takes its share and gives nothing.
        sink = ctx.f32(sinks)[0, 0, 0][:, None, None]
        top = xp.maximum(top, sink)
        total = xp.exp(sink - top)
    weights = xp.exp(scores - top)
    total = total + weights.sum(axis=3, keepdims=True, dtype=xp.float64)
    ctx.store(t, weights * (1 / total).astype(xp.float32))


def _over_heads(xp: Any, values: Any, t: Tensor) -> Any:
    """Mask ``values`` for each head and batch of ``t``: they take turns."""
    batches = xp.arange(t.ne[3]) % values.shape[0]
    heads = xp.arange(t.ne[2]) % values.shape[1]
    return values[batches[:, None], heads]


@contract(Op.SOFT_MAX_BACK)
def _soft_max_back_contract(t: Tensor) -> None:
    """op_params: scale, max_bias, which has no gradient and must be 0."""
    checks.result(t, F32_ONLY)
    checks.contiguous(t, "the result")
    for i in (0, 1):
        s = checks.source(t, i, F32_ONLY)
        checks.shape(s, t.ne, f"source {i}")
        checks.contiguous(s, f"source {i}")
    require(t.param_f32(1) == 0, "no gradient with max_bias")


@reference(Op.SOFT_MAX_BACK)
def _soft_max_back(ctx: ArrayContext, t: Tensor) -> None:
    """Gradient of SOFT_MAX's source, given its result's (src0) and its result (src1)."""
    gradient, y = ctx.f32(source(t, 0)), ctx.f32(source(t, 1))
    along = (gradient * y).sum(axis=3, keepdims=True, dtype=ctx.xp.float64)
    difference = gradient - along.astype(ctx.xp.float32)
    ctx.store(t, np.float32(t.param_f32(0)) * difference * y)
