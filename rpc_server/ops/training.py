"""Losses of training and the steps of its optimizers; gradients of other ops are beside these."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from protocol.ggml.ops import Op
from protocol.tensor import Tensor
from rpc_server.ops import checks
from rpc_server.ops.arrays import ArrayContext
from rpc_server.ops.checks import F32_ONLY
from rpc_server.ops.table import contract, reference, require, source

_SCALAR = (1, 1, 1, 1)


# -- CROSS_ENTROPY_LOSS, CROSS_ENTROPY_LOSS_BACK ---------------------------------------------------


def _require_predictions(t: Tensor, first: int) -> tuple[int, ...]:
    """Logits (source ``first``) and labels behind them: their shape."""
    logits, labels = (checks.source(t, first + i, F32_ONLY) for i in (0, 1))
    checks.shape(labels, logits.ne, f"source {first + 1}")
    for i, s in ((first, logits), (first + 1, labels)):
        checks.distinct(s, f"source {i}")
    return logits.ne


@contract(Op.CROSS_ENTROPY_LOSS)
def _loss_contract(t: Tensor) -> None:
    """Rows of logits and of labels, which are probabilities, to one number."""
    _require_predictions(t, 0)
    checks.result(t, F32_ONLY)
    checks.shape(t, _SCALAR, "the result")


def _shifted(logits: Any) -> Any:
    """``logits`` less their rows' maxima, so that no exponential of them overflows."""
    return logits - logits.max(axis=3, keepdims=True)


@reference(Op.CROSS_ENTROPY_LOSS)
def _loss(ctx: ArrayContext, t: Tensor) -> None:
    """Of rows without logits there is no loss; of no rows there is no mean."""
    if source(t, 0).empty:
        ctx.view(t)[...] = 0 if source(t, 0).nrows else math.nan
        return
    xp, logits = ctx.xp, _shifted(ctx.f32(source(t, 0)))
    totals = xp.exp(logits).sum(axis=3, keepdims=True, dtype=xp.float64)
    logits -= xp.log(totals).astype(xp.float32)
    total = (logits * ctx.f32(source(t, 1))).sum(dtype=xp.float64)
    ctx.view(t)[...] = -total / source(t, 0).nrows


@contract(Op.CROSS_ENTROPY_LOSS_BACK)
def _loss_back_contract(t: Tensor) -> None:
    """Gradient of the logits, given the loss's (src0, one number), the logits and the labels."""
    gradient = checks.source(t, 0, F32_ONLY)
    checks.shape(gradient, _SCALAR, "source 0")
    checks.result(t, F32_ONLY)
    checks.shape(t, _require_predictions(t, 1), "the result")


@reference(Op.CROSS_ENTROPY_LOSS_BACK)
def _loss_back(ctx: ArrayContext, t: Tensor) -> None:
    if t.empty:
        return
    xp, labels = ctx.xp, ctx.f32(source(t, 2))
    share = ctx.f32(source(t, 0))[0, 0, 0, 0] / np.float32(t.nrows)
    weights = xp.exp(_shifted(ctx.f32(source(t, 1))))
    totals = weights.sum(axis=3, keepdims=True, dtype=xp.float64)
    weights *= (1 / totals).astype(xp.float32)
    ctx.view(t)[...] = (weights - labels) * share


# -- OPT_STEP_ADAMW, OPT_STEP_SGD ------------------------------------------------------------------


def _step_contract(t: Tensor, n_states: int, n_params: int) -> None:
    """Weights, their gradient, the optimizer's states, and its parameters in one row.

    The node is a view of the weights, which are changed in place as the states are.
    """
    weights = checks.source(t, 0, F32_ONLY)
    checks.result(t, F32_ONLY)
    here = (t.address, t.ne, t.nb) == (weights.address, weights.ne, weights.nb)
    require(here, "the result must be source 0")
    checks.shape(checks.source(t, 1, F32_ONLY), t.ne, "source 1")
    for i in range(2, 2 + n_states):
        state = checks.source(t, i, F32_ONLY)
        checks.shape(state, t.ne, f"source {i}")
        checks.distinct(state, f"source {i}")
    last = 2 + n_states
    settings = checks.source(t, last, F32_ONLY)
    require(settings.nelements == n_params, f"{settings.nelements} parameters, not {n_params}")
    checks.contiguous(settings, f"source {last}")


def _settings(ctx: ArrayContext, s: Tensor) -> list[np.float32]:
    return [np.float32(value) for value in ctx.f32(s).ravel()]


@contract(Op.OPT_STEP_ADAMW, writes=(2, 3))
def _adamw_contract(t: Tensor) -> None:
    _step_contract(t, n_states=2, n_params=7)


@reference(Op.OPT_STEP_ADAMW)
def _adamw(ctx: ArrayContext, t: Tensor) -> None:
    """Parameters: alpha, beta1, beta2, eps, weight decay, corrections of both means' bias."""
    one = np.float32(1)
    alpha, beta1, beta2, eps, decay, correct1, correct2 = _settings(ctx, source(t, 4))
    weights, gradient, mean, square = (ctx.view(source(t, i)) for i in range(4))
    mean[...] = mean * beta1 + gradient * (one - beta1)
    square[...] = square * beta2 + gradient * gradient * (one - beta2)
    step = alpha * (mean * correct1) / (ctx.xp.sqrt(square * correct2) + eps)
    # Decay is of the weights themselves; added to the loss it would go through both means.
    weights[...] = weights * (one - alpha * decay) - step


@contract(Op.OPT_STEP_SGD)
def _sgd_contract(t: Tensor) -> None:
    _step_contract(t, n_states=0, n_params=2)


@reference(Op.OPT_STEP_SGD)
def _sgd(ctx: ArrayContext, t: Tensor) -> None:
    """Parameters: alpha, weight decay."""
    alpha, decay = _settings(ctx, source(t, 2))
    weights, gradient = (ctx.view(source(t, i)) for i in (0, 1))
    weights[...] = weights * (np.float32(1) - alpha * decay) - alpha * gradient
