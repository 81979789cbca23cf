"""DSV4_HC_*: DeepSeek V4's hyper connections, several residual streams that layers mix.

A layer reads one row made of all streams (PRE), and its output goes back to all of them, which are
mixed by a matrix that is made nearly doubly stochastic (COMB, POST). All of F32, with any strides.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from protocol.ggml.ops import Op
from protocol.tensor import Tensor
from rpc_server.ops import checks
from rpc_server.ops.arrays import ArrayContext
from rpc_server.ops.checks import F32_ONLY
from rpc_server.ops.table import contract, reference, require, source

# COMB is made for this many streams. Its source has weights for PRE and for POST, one a stream
# each, before those of the matrix.
_STREAMS = 4
_MIXES = (2 + _STREAMS) * _STREAMS
_FIRST = 2 * _STREAMS
# Models run 20 rounds. The bound is there so that no client can keep the server busy for nothing.
_MAX_ROUNDS = 1 << 16


def _any_strides(t: Tensor, i: int) -> Tensor:
    s = checks.source(t, i, F32_ONLY, dense=False)
    # The sizes of sources that are summed over must be bounded by memory, too.
    checks.distinct(s, f"source {i}")
    return s


@contract(Op.DSV4_HC_COMB)
def _comb_contract(t: Tensor) -> None:
    """src0 (24, tokens), src1 scales (the third is used), src2 base (24) to (4, 4, tokens).

    op_params: eps, rounds.
    """
    mixes, scale, base = (_any_strides(t, i) for i in range(3))
    checks.result(t, F32_ONLY, dense=False)
    checks.shape(mixes, (_MIXES, mixes.ne[1], 1, 1), "source 0")
    require(scale.ne[0] >= 3, f"{scale.ne[0]} scales")
    checks.shape(scale, (scale.ne[0], 1, 1, 1), "source 1")
    checks.shape(base, (_MIXES, 1, 1, 1), "source 2")
    checks.shape(t, (_STREAMS, _STREAMS, mixes.ne[1], 1), "the result")
    require(0 < t.param_i32(1) <= _MAX_ROUNDS, f"{t.param_i32(1)} rounds")


@reference(Op.DSV4_HC_COMB)
def _comb(ctx: ArrayContext, t: Tensor) -> None:
    """Softmax over destinations, then sums over sources and destinations made 1 in turn."""
    xp, eps = ctx.xp, np.float32(t.param_f32(0))
    mixes, scale, base = (ctx.view(source(t, i))[0, 0] for i in range(3))
    matrix = mixes[:, _FIRST:] * scale[0, 2] + base[0, _FIRST:]
    # Axes: tokens, sources, destinations.
    matrix = matrix.reshape(-1, _STREAMS, _STREAMS)
    matrix = xp.exp(matrix - matrix.max(axis=2, keepdims=True))
    matrix = matrix / matrix.sum(axis=2, keepdims=True) + eps

    def normalize(axis: int) -> None:
        matrix[...] *= 1 / (matrix.sum(axis=axis, keepdims=True) + eps)

    normalize(1)
    for _ in range(t.param_i32(1) - 1):
        normalize(2)
        normalize(1)
    ctx.view(t)[0] = matrix


@contract(Op.DSV4_HC_PRE)
def _pre_contract(t: Tensor) -> None:
    """src0 (E, streams, tokens) and src1, the streams' weights, to (E, tokens).

    op_params: a scale of the result, and whether src1 has a gate for each element of src0 instead
    of one weight a stream.
    """
    x, weights = _any_strides(t, 0), _any_strides(t, 1)
    checks.result(t, F32_ONLY, dense=False)
    size, n_streams, n_tokens, _ = x.ne
    require(t.empty or n_streams > 0, "there are no streams")
    checks.shape(x, (size, n_streams, n_tokens, 1), "source 0")
    ungated = (n_streams, n_tokens, 1, 1)
    checks.shape(weights, x.ne if t.param_i32(1) else ungated, "source 1")
    checks.shape(t, (size, n_tokens, 1, 1), "the result")


@reference(Op.DSV4_HC_PRE)
def _pre(ctx: ArrayContext, t: Tensor) -> None:
    xp, x, weights = ctx.xp, ctx.view(source(t, 0))[0], ctx.view(source(t, 1))[0]
    total: Any
    if t.param_i32(1):
        total = (x / (1 + xp.exp(-weights))).sum(axis=1)
    else:
        total = xp.matmul(weights[0, :, None], x)[:, 0]
    ctx.view(t)[0, 0] = np.float32(t.param_f32(0)) * total


@contract(Op.DSV4_HC_POST)
def _post_contract(t: Tensor) -> None:
    """src0 (E, tokens), src1 residuals (E, streams, tokens), src2 (streams, tokens) to src1's.

    src3: (destinations, sources, tokens); where it's missing each stream keeps its residual.
    """
    x, residual, post = (_any_strides(t, i) for i in range(3))
    checks.result(t, F32_ONLY, dense=False)
    size, n_streams, n_tokens, _ = t.ne
    checks.shape(t, (size, n_streams, n_tokens, 1), "the result")
    checks.shape(x, (size, n_tokens, 1, 1), "source 0")
    checks.shape(residual, t.ne, "source 1")
    checks.shape(post, (n_streams, n_tokens, 1, 1), "source 2")
    if t.src[3] is not None:
        checks.shape(_any_strides(t, 3), (n_streams, n_streams, n_tokens, 1), "source 3")


@reference(Op.DSV4_HC_POST)
def _post(ctx: ArrayContext, t: Tensor) -> None:
    x, residual, post = (ctx.view(source(t, i))[0] for i in range(3))
    if t.src[3] is not None:
        residual = ctx.xp.matmul(ctx.view(t.src[3])[0].swapaxes(1, 2), residual)
    ctx.view(t)[0] = x[0, :, None] * post[0, :, :, None] + residual
