"""Ops that carry a state from token to token: Mamba's, RWKV's, and gated linear attention.

Their results are the tokens' outputs, and behind them the states to go on from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from protocol.ggml_ops import Op
from rpc_server.graph.tensor import Tensor
from rpc_server.ops.arrays import ArrayContext
from rpc_server.ops.checks import (
    F32_ONLY,
    I32_ONLY,
    require_contiguous,
    require_result,
    require_shape,
    require_source,
    require_whole_copies,
    source,
)
from rpc_server.ops.rows import checked_indices
from rpc_server.ops.table import contract, reference, require

# -- SSM_CONV, SSM_SCAN ----------------------------------------------------------------------------


@contract(Op.SSM_CONV, sources=2)
def _ssm_conv_contract(t: Tensor) -> None:
    """src0 (window - 1 + tokens, channels, sequences), src1 (window, channels)."""
    x, weights = require_source(t, 0, F32_ONLY), require_source(t, 1, F32_ONLY)
    require_result(t, F32_ONLY)
    window, channels = weights.ne[:2]
    require(window > 0, "the window is empty")
    require_shape(weights, (window, channels, 1, 1), "source 1")
    require_shape(t, (channels, t.ne[1], x.ne[2], 1), "the result")
    require_shape(x, (window - 1 + t.ne[1], channels, x.ne[2], 1), "source 0")


@reference(Op.SSM_CONV)
def _ssm_conv(ctx: ArrayContext, t: Tensor) -> None:
    x, weights = ctx.f32(source(t, 0))[0], ctx.f32(source(t, 1))[0, 0]
    total: Any = ctx.xp.zeros((t.ne[2], t.ne[0], t.ne[1]), ctx.xp.float32)
    for i in range(weights.shape[1]):
        total += x[..., i : i + t.ne[1]] * weights[:, i, None]
    ctx.store(t, total.swapaxes(1, 2)[None])


def _snapshots(t: Tensor) -> int:
    """How many of the last states are kept: one for older clients, which say nothing."""
    return t.param_i32(0) or 1


@contract(Op.SSM_SCAN, sources=7)
def _ssm_scan_contract(t: Tensor) -> None:
    """States, inputs x, time steps dt, decays A, input and output weights B and C, states' ids.

    The shapes, with S elements of state for each of D elements of N heads: states (S, D, N, any),
    x (D, N, tokens, sequences), dt (N, tokens, sequences), A (S or 1, N), B and C (S, groups,
    tokens, sequences) with groups of heads, ids (sequences). The result is x's shape and then
    (S, D, N, sequences, snapshots), in one dimension.
    """
    states, x, dt, decays, b, c = (require_source(t, i, F32_ONLY) for i in range(6))
    ids = require_source(t, 6, I32_ONLY)
    n_state, (dim, n_heads, n_tokens, n_sequences) = states.ne[0], x.ne
    require_shape(states, (n_state, dim, n_heads, states.ne[3]), "source 0")
    require_shape(dt, (n_heads, n_tokens, n_sequences, 1), "source 2")
    require(decays.ne[0] in (1, n_state), f"{decays.ne[0]} decays for {n_state} elements of state")
    require_shape(decays, (decays.ne[0], n_heads, 1, 1), "source 3")
    for i, s in ((4, b), (5, c)):
        require_shape(s, (n_state, b.ne[1], n_tokens, n_sequences), f"source {i}")
    require_whole_copies(n_heads, b.ne[1], "heads")
    require_shape(ids, (n_sequences, 1, 1, 1), "source 6")
    for i in (0, 2, 3):
        require_contiguous(source(t, i), f"source {i}")
    kept = _snapshots(t)
    require(kept >= 1 and (kept == 1 or decays.ne[0] == 1), f"{kept} snapshots of states")
    require(t.empty or n_tokens > 0, "there are no tokens")
    require_result(t, F32_ONLY)
    require_contiguous(t, "the result")
    size = x.nelements + kept * n_state * dim * n_heads * n_sequences
    require_shape(t, (size, 1, 1, 1), "the result")


def _softplus(xp: ModuleType, x: Any) -> Any:
    return xp.where(x > 20, x, xp.log1p(xp.exp(x)))


@reference(Op.SSM_SCAN)
def _ssm_scan(ctx: ArrayContext, t: Tensor) -> None:
    xp, x = ctx.xp, ctx.f32(source(t, 1))
    dt, decays = ctx.f32(source(t, 2))[0], ctx.f32(source(t, 3))[0, 0]
    b, c = (ctx.f32(source(t, i)) for i in (4, 5))
    ids = checked_indices(ctx, source(t, 6), source(t, 0).ne[3])[0, 0, 0]
    state = ctx.f32(source(t, 0))[ids]
    n_tokens, n_heads = x.shape[1:3]
    groups = xp.arange(n_heads) // (n_heads // b.shape[2])
    result = ctx.view(t)[0, 0, 0]
    outputs = result[: x.size].reshape(x.shape)
    kept = result[x.size :].reshape(_snapshots(t), *state.shape)
    for token in range(n_tokens):
        step = _softplus(xp, dt[:, token])[..., None]
        decay = xp.exp(step * decays)[:, :, None]
        inputs = (x[:, token] * step)[..., None]
        state = state * decay + inputs * b[:, token][:, groups, None]
        outputs[:, token] = (state * c[:, token][:, groups, None]).sum(axis=3)
        # Counted from the last one, which is the first that is kept.
        age = n_tokens - 1 - token
        if age < len(kept):
            kept[age] = state


# -- RWKV_WKV6, RWKV_WKV7, GATED_LINEAR_ATTN -------------------------------------------------------

# One token's step: (xp, node, state, the sources' rows) to (state, outputs). States are (sequences,
# heads, S, S), rows (sequences, heads, S), each head on its own.
Step = Callable[[ModuleType, Tensor, Any, Sequence[Any]], tuple[Any, Any]]


def _outer(a: Any, b: Any) -> Any:
    return a[..., :, None] * b[..., None, :]


def _wkv6(xp: ModuleType, t: Tensor, state: Any, rows: Sequence[Any]) -> tuple[Any, Any]:
    k, v, r, first, decay = rows
    kv = _outer(k, v)
    output = ((kv * first[..., None] + state) * r[..., None]).sum(axis=2)
    return state * decay[..., None] + kv, output


def _wkv7(xp: ModuleType, t: Tensor, state: Any, rows: Sequence[Any]) -> tuple[Any, Any]:
    r, w, k, v, a, b = rows
    removed = (state * a[..., None, :]).sum(axis=3)
    state = state * w[..., None, :] + _outer(v, k) + _outer(removed, b)
    return state, (state * r[..., None, :]).sum(axis=3)


def _gated_linear(xp: ModuleType, t: Tensor, state: Any, rows: Sequence[Any]) -> tuple[Any, Any]:
    k, v, q, gate = rows
    state = state * gate[..., None] + _outer(k, v)
    return state, (state * (q * np.float32(t.param_f32(0)))[..., None]).sum(axis=2)


# op: its step, how many sources a token has, and which of them (if any) all tokens share.
_STEPS: dict[Op, tuple[Step, int, int | None]] = {
    Op.RWKV_WKV6: (_wkv6, 5, 3),
    Op.RWKV_WKV7: (_wkv7, 6, None),
    Op.GATED_LINEAR_ATTN: (_gated_linear, 4, None),
}


def _linear_contract(t: Tensor) -> None:
    """Rows of (S, heads, tokens) each; last, states of S * S * heads for each sequence.

    Sequences have equally many tokens. The result is (S * heads, tokens + S * sequences).
    """
    _, n_rows, shared = _STEPS[t.op]
    size, n_heads, n_tokens = require_source(t, 0, F32_ONLY).ne[:3]
    for i in range(n_rows):
        rows = require_source(t, i, F32_ONLY)
        require_contiguous(rows, f"source {i}")
        if i == shared:
            require(rows.nelements == size * n_heads, f"source {i} has {rows.nelements} elements")
        else:
            require_shape(rows, (size, n_heads, n_tokens, 1), f"source {i}")
    states = require_source(t, n_rows, F32_ONLY)
    require_contiguous(states, f"source {n_rows}")
    n_sequences = states.ne[1]
    expected = size * size * n_heads * n_sequences
    require(states.nelements == expected, f"states of {states.nelements} elements, not {expected}")
    require_whole_copies(n_tokens, n_sequences, "tokens")
    require(t.empty or n_tokens > 0, "there are no tokens")
    require_result(t, F32_ONLY)
    require_contiguous(t, "the result")
    require_shape(t, (size * n_heads, n_tokens + size * n_sequences, 1, 1), "the result")


def _linear(ctx: ArrayContext, t: Tensor) -> None:
    step, n_rows, shared = _STEPS[t.op]
    size, n_heads, n_tokens, _ = source(t, 0).ne
    states = source(t, n_rows)
    n_sequences = states.ne[1]
    shape = (n_sequences, n_tokens // n_sequences, n_heads, size)
    rows = [
        ctx.f32(source(t, i)).reshape((1, 1, n_heads, size) if i == shared else shape)
        for i in range(n_rows)
    ]
    state = ctx.f32(states).reshape(n_sequences, n_heads, size, size)
    result = ctx.view(t)[0, 0]
    outputs = result[:n_tokens].reshape(shape)
    for token in range(shape[1]):
        now = [r[:, 0 if i == shared else token] for i, r in enumerate(rows)]
        state, outputs[:, token] = step(ctx.xp, t, state, now)
    result[n_tokens:].reshape(state.shape)[...] = state


for _op in _STEPS:
    contract(_op, sources=_STEPS[_op][1] + 1)(_linear_contract)
    reference(_op)(_linear)
