"""Normalisations of rows, or of groups of channels: all of F32."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from protocol.ggml.ops import Op
from protocol.tensor import Tensor
from rpc_server.ops import checks
from rpc_server.ops.arrays import ArrayContext
from rpc_server.ops.checks import F32_ONLY
from rpc_server.ops.shards import shard_by_rows
from rpc_server.ops.table import contract, reference, require, source


def _require_same_shape(t: Tensor, sources: int, *, dense: bool) -> None:
    checks.result(t, F32_ONLY, dense=dense)
    for i in range(sources):
        checks.shape(checks.source(t, i, F32_ONLY, dense=dense), t.ne, f"source {i}")


def _require_eps(t: Tensor, word: int) -> None:
    # NaN fails, too.
    require(t.param_f32(word) >= 0, f"eps is {t.param_f32(word)}")


@contract(Op.NORM, Op.RMS_NORM, Op.L2_NORM, shard_rule=shard_by_rows)
def _norm_contract(t: Tensor) -> None:
    _require_same_shape(t, 1, dense=t.op is Op.RMS_NORM)
    _require_eps(t, 0)


def _mean(xp: ModuleType, x: Any, axes: int | tuple[int, ...]) -> Any:
    """Sums are made in double precision, as ggml does, and means are float32."""
    return x.mean(axis=axes, keepdims=True, dtype=xp.float64).astype(xp.float32)


def _normalized(xp: ModuleType, x: Any, axes: int | tuple[int, ...], eps: np.float32) -> Any:
    """``x`` with mean 0 and variance 1 along ``axes``."""
    centred = x - _mean(xp, x, axes)
    return centred * (1 / xp.sqrt(_mean(xp, centred * centred, axes) + eps))


@reference(Op.NORM)
def _norm(ctx: ArrayContext, t: Tensor) -> None:
    ctx.store(t, _normalized(ctx.xp, ctx.f32(source(t, 0)), 3, np.float32(t.param_f32(0))))


@reference(Op.RMS_NORM)
def _rms_norm(ctx: ArrayContext, t: Tensor) -> None:
    x, eps = ctx.f32(source(t, 0)), np.float32(t.param_f32(0))
    ctx.store(t, x * (1 / ctx.xp.sqrt(_mean(ctx.xp, x * x, 3) + eps)))


@reference(Op.L2_NORM)
def _l2_norm(ctx: ArrayContext, t: Tensor) -> None:
    """Rows divided by their length, but never by less than eps."""
    x, eps, xp = ctx.f32(source(t, 0)), np.float32(t.param_f32(0)), ctx.xp
    length = xp.sqrt((x * x).sum(axis=3, keepdims=True, dtype=xp.float64)).astype(xp.float32)
    ctx.store(t, x * (1 / xp.fmax(length, eps)))


@contract(Op.GROUP_NORM)
def _group_norm_contract(t: Tensor) -> None:
    """op_params: groups that dimension 2 is cut into, the last ones smaller or empty; eps."""
    _require_same_shape(t, 1, dense=True)
    require(t.param_i32(0) >= 1, f"{t.param_i32(0)} groups")
    _require_eps(t, 1)


@reference(Op.GROUP_NORM)
def _group_norm(ctx: ArrayContext, t: Tensor) -> None:
    x, target, eps = ctx.f32(source(t, 0)), ctx.view(t), np.float32(t.param_f32(1))
    step = -(-t.ne[2] // t.param_i32(0))
    for first in range(0, t.ne[2], step):
        ctx.look()
        group = slice(first, first + step)
        target[:, group] = _normalized(ctx.xp, x[:, group], (1, 2, 3), eps)


@contract(Op.RMS_NORM_BACK)
def _rms_norm_back_contract(t: Tensor) -> None:
    _require_same_shape(t, 2, dense=True)
    _require_eps(t, 0)


@reference(Op.RMS_NORM_BACK)
def _rms_norm_back(ctx: ArrayContext, t: Tensor) -> None:
    """Gradient of RMS_NORM's source, given its result's (src0) and that source (src1).

    Of a row of one element next to nothing is left; what is, are ggml's roundings. Where it adds a
    product, it rounds once.
    """
    gradient, x, xp = ctx.f32(source(t, 0)), ctx.f32(source(t, 1)), ctx.xp
    eps, n = np.float32(t.param_f32(0)), np.float32(t.ne[0])

    def total(values: Any) -> Any:
        return values.sum(axis=3, keepdims=True, dtype=xp.float64).astype(xp.float32)

    power = total(x * x)
    scaled = (power + np.float64(eps) * np.float64(n)).astype(xp.float32)
    along = (-total(x * gradient) / scaled).astype(xp.float64)
    across = (gradient + x * along).astype(xp.float32)
    ctx.store(t, across * (1 / xp.sqrt(power / n + eps)))
