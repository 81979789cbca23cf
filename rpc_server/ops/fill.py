"""Ops that fill a tensor by rule: padding, rolling, constants, ranges, diagonals and triangles."""

from __future__ import annotations

import math

import numpy as np

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.ops import checks
from rpc_server.ops.arrays import ArrayContext
from rpc_server.ops.checks import F32_ONLY
from rpc_server.ops.sliding import Axis
from rpc_server.ops.table import contract, reference, refuse, require, source


def _f32_of_same_shape(t: Tensor) -> None:
    checks.result(t, F32_ONLY)
    checks.shape(checks.source(t, 0, F32_ONLY), t.ne, "source 0")


# -- PAD, ROLL -------------------------------------------------------------------------------------


@contract(Op.PAD)
def _pad_contract(t: Tensor) -> None:
    s = checks.source(t, 0, F32_ONLY, dense=False)
    checks.result(t, F32_ONLY)
    checks.contiguous(t, "the result")
    pads = t.op_params[:8]
    checks.shape(
        t,
        [n + left + right for n, left, right in zip(s.ne, pads[::2], pads[1::2], strict=True)],
        "the result",
    )
    require(t.empty or not s.empty or not t.param_i32(8), "nothing to repeat around in source 0")


@reference(Op.PAD)
def _pad(ctx: ArrayContext, t: Tensor) -> None:
    """Zeros around source 0, or with op_params[8] its own elements, as on a torus.

    Negative numbers cut off what is there.
    """
    s, xp = source(t, 0), ctx.xp
    values, left = ctx.f32(s), t.op_params[6::-2]
    if t.param_i32(8):
        around = [
            (xp.arange(n) - before) % m
            for n, before, m in zip(t.ne[::-1], left, s.ne[::-1], strict=True)
        ]
        ctx.view(t)[...] = values[xp.ix_(*around)]
    else:
        padded = xp.zeros(t.ne[::-1], xp.float32)
        axes = (
            Axis(m, 1, n, padding=before)
            for n, before, m in zip(t.ne[::-1], left, s.ne[::-1], strict=True)
        )
        places, samples = zip(*(axis.seen(0) for axis in axes), strict=True)
        padded[places] = values[samples]
        ctx.view(t)[...] = padded


@contract(Op.ROLL)
def _roll_contract(t: Tensor) -> None:
    _f32_of_same_shape(t)
    for shift, n in zip(t.op_params[:4], t.ne, strict=True):
        require(t.empty or abs(shift) < n, f"roll by {shift} of {n}")


@reference(Op.ROLL)
def _roll(ctx: ArrayContext, t: Tensor) -> None:
    shifts = t.op_params[3::-1]
    ctx.view(t)[...] = ctx.xp.roll(ctx.f32(source(t, 0)), shifts, axis=(0, 1, 2, 3))


# -- FILL, ARANGE ----------------------------------------------------------------------------------


@contract(Op.FILL)
def _fill_contract(t: Tensor) -> None:
    checks.result(t, {GgmlType.F32, GgmlType.F16})
    checks.shape(checks.source(t, 0, {t.type}), t.ne, "source 0")


@reference(Op.FILL)
def _fill(ctx: ArrayContext, t: Tensor) -> None:
    ctx.view(t)[...] = t.param_f32(0)


@contract(Op.ARANGE)
def _arange_contract(t: Tensor) -> None:
    checks.result(t, F32_ONLY)
    checks.contiguous(t, "the result")
    start, stop, step = (np.float32(t.param_f32(i)) for i in range(3))
    with np.errstate(all="ignore"):
        steps = float(np.ceil((stop - start) / step))
    if not math.isfinite(steps) or t.nelements != int(steps):
        refuse(f"{start} to {stop} by {step} are not {t.nelements} values")


@reference(Op.ARANGE)
def _arange(ctx: ArrayContext, t: Tensor) -> None:
    start, step = (np.float32(t.param_f32(i)) for i in (0, 2))
    count = ctx.xp.arange(t.nelements).astype(ctx.xp.float32)
    ctx.view(t)[...] = (start + step * count).reshape(t.ne[::-1])


# -- DIAG, TRI, DIAG_MASK_* ------------------------------------------------------------------------


@contract(Op.DIAG)
def _diag_contract(t: Tensor) -> None:
    s = checks.source(t, 0, F32_ONLY)
    checks.result(t, F32_ONLY)
    checks.shape(s, (s.ne[0], 1, *s.ne[2:]), "source 0")
    checks.shape(t, (s.ne[0], s.ne[0], *s.ne[2:]), "the result")


@reference(Op.DIAG)
def _diag(ctx: ArrayContext, t: Tensor) -> None:
    eye = ctx.xp.eye(t.ne[0], dtype=bool)
    ctx.view(t)[...] = ctx.xp.where(eye, ctx.f32(source(t, 0)), 0)


# enum ggml_tri_type: which part stays, by the column's distance from the row.
_TRIANGLES = (
    lambda distance: distance >= 0,  # upper with diagonal
    lambda distance: distance > 0,  # upper
    lambda distance: distance <= 0,  # lower with diagonal
    lambda distance: distance < 0,  # lower
)


@contract(Op.TRI)
def _tri_contract(t: Tensor) -> None:
    _f32_of_same_shape(t)
    require(t.ne[0] == t.ne[1], "the matrices must be square")
    require(0 <= t.param_i32(0) < len(_TRIANGLES), f"no triangle {t.param_i32(0)}")


@reference(Op.TRI)
def _tri(ctx: ArrayContext, t: Tensor) -> None:
    n = ctx.xp.arange(t.ne[0])
    stays = _TRIANGLES[t.param_i32(0)](n - n[:, None])
    ctx.view(t)[...] = ctx.xp.where(stays, ctx.f32(source(t, 0)), 0)


@contract(Op.DIAG_MASK_INF, Op.DIAG_MASK_ZERO)
def _mask_contract(t: Tensor) -> None:
    _f32_of_same_shape(t)
    require(t.param_i32(0) >= 0, f"n_past is {t.param_i32(0)}")


def _mask(ctx: ArrayContext, t: Tensor, value: float) -> None:
    """``value`` where a column is more than n_past (op_params[0]) right of the diagonal."""
    xp = ctx.xp
    distance = xp.arange(t.ne[0]) - xp.arange(t.ne[1])[:, None]
    masked = xp.where(distance > t.param_i32(0), xp.float32(value), ctx.f32(source(t, 0)))
    ctx.view(t)[...] = masked


@reference(Op.DIAG_MASK_INF)
def _mask_inf(ctx: ArrayContext, t: Tensor) -> None:
    _mask(ctx, t, -math.inf)


@reference(Op.DIAG_MASK_ZERO)
def _mask_zero(ctx: ArrayContext, t: Tensor) -> None:
    _mask(ctx, t, 0.0)
