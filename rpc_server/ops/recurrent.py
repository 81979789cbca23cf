"""Ops that carry a state from token to token: Mamba's, RWKV's, gated linear attentions.

Their results are the tokens' outputs, and behind them the states to go on from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from protocol.ggml.ops import Op
from protocol.tensor import Tensor
from rpc_server.ops import checks
from rpc_server.ops.arrays import ArrayContext
from rpc_server.ops.checks import F32_ONLY, I32_ONLY
from rpc_server.ops.rows import checked_indices
from rpc_server.ops.table import contract, reference, require, source


class _States:
    """States (sequences, heads, rows, columns), changed in place.

    They are by far the most memory that a token's step touches.
    """

    def __init__(self, xp: ModuleType, values: Any) -> None:
        self.xp = xp
        self.values = xp.array(values)
        self._change = xp.empty_like(self.values)

    def scale(self, factors: Any) -> None:
        self.values *= factors

    def add_outer(self, a: Any, b: Any) -> None:
        """Add the products of elements of ``a``, the rows, and ``b``, the columns."""
        self.xp.multiply(a[..., :, None], b[..., None, :], out=self._change)
        self.values += self._change

    def of_rows(self, x: Any) -> Any:
        """Sums of rows with the weights ``x``."""
        return self.xp.matmul(x[..., None, :], self.values)[..., 0, :]

    def of_columns(self, x: Any) -> Any:
        """Sums of columns with the weights ``x``."""
        return self.xp.matmul(self.values, x[..., None])[..., 0]


# -- SSM_CONV, SSM_SCAN ----------------------------------------------------------------------------


@contract(Op.SSM_CONV)
def _ssm_conv_contract(t: Tensor) -> None:
    """src0 (window - 1 + tokens, channels, sequences), src1 (window, channels)."""
    x, weights = checks.source(t, 0, F32_ONLY), checks.source(t, 1, F32_ONLY)
    checks.result(t, F32_ONLY)
    window, channels = weights.ne[:2]
    require(window > 0, "the window is empty")
    checks.shape(weights, (window, channels, 1, 1), "source 1")
    checks.shape(t, (channels, t.ne[1], x.ne[2], 1), "the result")
    checks.shape(x, (window - 1 + t.ne[1], channels, x.ne[2], 1), "source 0")


@reference(Op.SSM_CONV)
def _ssm_conv(ctx: ArrayContext, t: Tensor) -> None:
    x, weights = ctx.f32(source(t, 0))[0], ctx.f32(source(t, 1))[0, 0]
    total: Any = ctx.xp.zeros((t.ne[2], t.ne[0], t.ne[1]), ctx.xp.float32)
    for i in range(weights.shape[1]):
        total += x[..., i : i + t.ne[1]] * weights[:, i, None]
    ctx.store(t, total.swapaxes(1, 2)[None])


def _snapshots(t: Tensor) -> int:
    """Return how many of the last states are kept: one for older clients, which say nothing."""
    return t.param_i32(0) or 1


@contract(Op.SSM_SCAN)
def _ssm_scan_contract(t: Tensor) -> None:
    """States, inputs x, time steps dt, decays A, input and output weights B and C, states' ids.

    The shapes, with S elements of state for each of D elements of N heads: states (S, D, N, any),
    x (D, N, tokens, sequences), dt (N, tokens, sequences), A (S or 1, N), B and C (S, groups,
    tokens, sequences) with groups of heads, ids (sequences). The result is x's shape and then
    (S, D, N, sequences, snapshots), in one dimension.
    """
    states, x, dt, decays, b, c = (checks.source(t, i, F32_ONLY) for i in range(6))
    ids = checks.source(t, 6, I32_ONLY)
    n_state, (dim, n_heads, n_tokens, n_sequences) = states.ne[0], x.ne
    checks.shape(states, (n_state, dim, n_heads, states.ne[3]), "source 0")
    checks.shape(dt, (n_heads, n_tokens, n_sequences, 1), "source 2")
    require(decays.ne[0] in (1, n_state), f"{decays.ne[0]} decays for {n_state} elements of state")
    checks.shape(decays, (decays.ne[0], n_heads, 1, 1), "source 3")
    for i, s in ((4, b), (5, c)):
        checks.shape(s, (n_state, b.ne[1], n_tokens, n_sequences), f"source {i}")
    checks.whole_copies(n_heads, b.ne[1], "heads")
    checks.shape(ids, (n_sequences, 1, 1, 1), "source 6")
    for i in (0, 2, 3):
        checks.contiguous(source(t, i), f"source {i}")
    kept = _snapshots(t)
    require(kept >= 1 and (kept == 1 or decays.ne[0] == 1), f"{kept} snapshots of states")
    require(t.empty or n_tokens > 0, "there are no tokens")
    checks.result(t, F32_ONLY)
    checks.contiguous(t, "the result")
    size = x.nelements + kept * n_state * dim * n_heads * n_sequences
    checks.shape(t, (size, 1, 1, 1), "the result")


def _softplus(xp: ModuleType, x: Any) -> Any:
    # As ggml rounds it: where log1p would keep a small step, this has none.
    return xp.where(x > 20, x, xp.log(1 + xp.exp(x)))


@reference(Op.SSM_SCAN)
def _ssm_scan(ctx: ArrayContext, t: Tensor) -> None:
    xp, x = ctx.xp, ctx.f32(source(t, 1))
    dt, decays = ctx.f32(source(t, 2))[0], ctx.f32(source(t, 3))[0, 0]
    b, c = (ctx.f32(source(t, i)) for i in (4, 5))
    ids = checked_indices(ctx, source(t, 6), source(t, 0).ne[3])[0, 0, 0]
    state = _States(xp, ctx.f32(source(t, 0))[ids])
    n_tokens, n_heads = x.shape[1:3]
    groups = xp.arange(n_heads) // (n_heads // b.shape[2])
    result = ctx.view(t)[0, 0, 0]
    outputs = result[: x.size].reshape(x.shape)
    kept = result[x.size :].reshape(_snapshots(t), *state.values.shape)
    for token in range(n_tokens):
        ctx.look()
        step = _softplus(xp, dt[:, token])[..., None]
        state.scale(xp.exp(step * decays)[:, :, None])
        state.add_outer(x[:, token] * step, b[:, token][:, groups])
        outputs[:, token] = state.of_columns(c[:, token][:, groups])
        # Counted from the last one, which is the first that is kept.
        age = n_tokens - 1 - token
        if age < len(kept):
            kept[age] = state.values


# -- RWKV_WKV6, RWKV_WKV7, GATED_LINEAR_ATTN -------------------------------------------------------


# One token's step: (node, states, the sources' rows) to outputs. Rows are (sequences, heads, S),
# each head on its own.
Step = Callable[[Tensor, _States, Sequence[Any]], Any]


def _wkv6(t: Tensor, states: _States, rows: Sequence[Any]) -> Any:
    k, v, r, first, decay = rows
    # What the token adds is seen with another weight than the states': a number for each head.
    own = (r * first * k).sum(axis=-1, keepdims=True) * v
    output = states.of_rows(r) + own
    states.scale(decay[..., None])
    states.add_outer(k, v)
    return output


def _wkv7(t: Tensor, states: _States, rows: Sequence[Any]) -> Any:
    r, w, k, v, a, b = rows
    removed = states.of_columns(a)
    states.scale(w[..., None, :])
    states.add_outer(v, k)
    states.add_outer(removed, b)
    return states.of_columns(r)


def _gated_linear(t: Tensor, states: _States, rows: Sequence[Any]) -> Any:
    k, v, q, gate = rows
    states.scale(gate[..., None])
    states.add_outer(k, v)
    return states.of_rows(q * np.float32(t.param_f32(0)))


# op: its step, how many sources a token has, and which of them (if any) all tokens share.
_STEPS: dict[Op, tuple[Step, int, int | None]] = {
    Op.RWKV_WKV6: (_wkv6, 5, 3),
    Op.RWKV_WKV7: (_wkv7, 6, None),
    Op.GATED_LINEAR_ATTN: (_gated_linear, 4, None),
}


@contract(*_STEPS)
def _linear_contract(t: Tensor) -> None:
    """Rows of (S, heads, tokens) each; last, states of S * S * heads for each sequence.

    Sequences have equally many tokens. The result is (S * heads, tokens + S * sequences).
    """
    _, n_rows, shared = _STEPS[t.op]
    size, n_heads, n_tokens = checks.source(t, 0, F32_ONLY).ne[:3]
    for i in range(n_rows):
        rows = checks.source(t, i, F32_ONLY)
        checks.contiguous(rows, f"source {i}")
        if i == shared:
            require(rows.nelements == size * n_heads, f"source {i} has {rows.nelements} elements")
        else:
            checks.shape(rows, (size, n_heads, n_tokens, 1), f"source {i}")
    states = checks.source(t, n_rows, F32_ONLY)
    checks.contiguous(states, f"source {n_rows}")
    n_sequences = states.ne[1]
    expected = size * size * n_heads * n_sequences
    require(states.nelements == expected, f"states of {states.nelements} elements, not {expected}")
    checks.whole_copies(n_tokens, n_sequences, "tokens")
    require(t.empty or n_tokens > 0, "there are no tokens")
    checks.result(t, F32_ONLY)
    checks.contiguous(t, "the result")
    checks.shape(t, (size * n_heads, n_tokens + size * n_sequences, 1, 1), "the result")


@reference(*_STEPS)
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
    state = _States(ctx.xp, ctx.f32(states).reshape(n_sequences, n_heads, size, size))
    result = ctx.view(t)[0, 0]
    outputs = result[:n_tokens].reshape(shape)
    for token in range(shape[1]):
        ctx.look()
        now = [r[:, 0 if i == shared else token] for i, r in enumerate(rows)]
        outputs[:, token] = step(t, state, now)
    result[n_tokens:].reshape(state.values.shape)[...] = state.values


# -- GATED_DELTA_NET -------------------------------------------------------------------------------


@contract(Op.GATED_DELTA_NET)
def _delta_net_contract(t: Tensor) -> None:
    """Queries, keys, values, gates, rates and the states, one of S * S for each head and sequence.

    Values are (S, heads, tokens, sequences). Queries and keys may have other numbers of heads,
    which take turns, and of sequences, which are repeated. Gates are one for a head or for each of
    its S elements. The result is (S * heads, tokens * sequences + S * sequences * snapshots): the
    outputs, and behind them the states after the last tokens, the latest first.
    """
    v = checks.source(t, 2, F32_ONLY)
    size, n_heads, n_tokens, n_sequences = v.ne
    for i in (0, 1):
        s = checks.source(t, i, F32_ONLY)
        checks.shape(s, (size, s.ne[1], n_tokens, s.ne[3]), f"source {i}")
        require(t.empty or s.ne[1] > 0, f"source {i} has no heads")
        checks.whole_copies(n_sequences, s.ne[3], f"sequences over source {i}")
    gates, rates, states = (checks.source(t, i, F32_ONLY) for i in (3, 4, 5))
    require(gates.ne[0] in (1, size), f"{gates.ne[0]} gates for {size} elements")
    checks.shape(gates, (gates.ne[0], *v.ne[1:]), "source 3")
    checks.shape(rates, (1, *v.ne[1:]), "source 4")
    expected = size * size * n_heads * n_sequences
    require(states.nelements == expected, f"states of {states.nelements} elements, not {expected}")
    checks.contiguous(states, "source 5")
    kept = _snapshots(t)
    require(kept >= 1, f"{kept} snapshots of states")
    checks.result(t, F32_ONLY)
    checks.contiguous(t, "the result")
    n_rows = n_tokens * n_sequences + kept * size * n_sequences
    checks.shape(t, (size * n_heads, n_rows, 1, 1), "the result")


@reference(Op.GATED_DELTA_NET)
def _delta_net(ctx: ArrayContext, t: Tensor) -> None:
    """Replace what a state holds at a key by the value, as far as the rate says."""
    xp, v = ctx.xp, ctx.f32(source(t, 2))
    n_sequences, n_tokens, n_heads, size = v.shape
    q, k = (_over_heads(ctx, source(t, i), n_sequences, n_heads) for i in (0, 1))
    gates, rates = (ctx.f32(source(t, i)) for i in (3, 4))
    # The last two axes are those of values and of keys.
    shape = n_sequences, n_heads, size, size
    state = _States(xp, ctx.f32(source(t, 5)).reshape(shape))
    result = ctx.view(t).reshape(-1)
    outputs = result[: v.size].reshape(v.shape)
    # Of fewer tokens than snapshots the older ones stay as they are, the client's own.
    kept = result[v.size :].reshape(_snapshots(t), *shape)
    scale = np.float32(1 / math.sqrt(size))
    for token in range(n_tokens):
        ctx.look()
        key = k(token)
        state.scale(xp.exp(gates[:, token])[:, :, None])
        difference = v[:, token] - state.of_columns(key)
        state.add_outer(difference * rates[:, token], key)
        outputs[:, token] = state.of_columns(q(token)) * scale
        age = n_tokens - 1 - token
        if age < len(kept):
            kept[age] = state.values
    if not n_tokens and len(kept) == 1:
        kept[0] = state.values


def _over_heads(
    ctx: ArrayContext, s: Tensor, n_sequences: int, n_heads: int
) -> Callable[[int], Any]:
    """Rows of ``s`` at a token, (sequences, heads, S): heads in turns, sequences repeated."""
    values, xp = ctx.f32(s), ctx.xp
    sequences = xp.arange(n_sequences) // (n_sequences // s.ne[3])
    heads = xp.arange(n_heads) % s.ne[1]
    return lambda token: values[sequences[:, None], token, heads]
