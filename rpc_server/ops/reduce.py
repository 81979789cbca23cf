"""Ops that reduce, accumulate or sort along rows."""

from __future__ import annotations

from typing import Any

from protocol.ggml.ops import Op
from protocol.ggml.types import FLOATS, GgmlType
from protocol.tensor import Tensor
from rpc_server.ops import checks
from rpc_server.ops.arrays import ArrayContext
from rpc_server.ops.checks import F32_ONLY, I32_ONLY
from rpc_server.ops.table import contract, reference, require, source

_MAX_INDEX = (1 << 31) - 1


def _rows_to_reduce(
    t: Tensor, types: frozenset[GgmlType] = F32_ONLY, *, dense: bool = True
) -> Tensor:
    """Source 0; its elements must not overlap, as no large result bounds their number."""
    s = checks.source(t, 0, types, dense=dense)
    checks.distinct(s, "source 0")
    return s


# -- SUM, SUM_ROWS, MEAN, CUMSUM, COUNT_EQUAL ------------------------------------------------------


@contract(Op.SUM)
def _sum_contract(t: Tensor) -> None:
    s = _rows_to_reduce(t, FLOATS)
    checks.result(t, {s.type})
    checks.shape(t, (1, 1, 1, 1), "the result")


@reference(Op.SUM)
def _sum(ctx: ArrayContext, t: Tensor) -> None:
    ctx.store(t, ctx.f32(source(t, 0)).sum(dtype=ctx.xp.float64).astype(ctx.xp.float32))


@contract(Op.SUM_ROWS, Op.MEAN)
def _row_sums_contract(t: Tensor) -> None:
    s = _rows_to_reduce(t)
    checks.result(t, F32_ONLY)
    checks.shape(t, (1, *s.ne[1:]), "the result")


def _row_sums(ctx: ArrayContext, t: Tensor) -> Any:
    # ggml sums in double precision, too.
    values = ctx.f32(source(t, 0))
    return values.sum(axis=3, keepdims=True, dtype=ctx.xp.float64).astype(ctx.xp.float32)


@reference(Op.SUM_ROWS)
def _sum_rows(ctx: ArrayContext, t: Tensor) -> None:
    ctx.store(t, _row_sums(ctx, t))


@reference(Op.MEAN)
def _mean(ctx: ArrayContext, t: Tensor) -> None:
    ctx.store(t, _row_sums(ctx, t) / ctx.xp.float32(source(t, 0).ne[0]))


@contract(Op.CUMSUM)
def _cumsum_contract(t: Tensor) -> None:
    checks.result(t, F32_ONLY)
    checks.shape(checks.source(t, 0, F32_ONLY), t.ne, "source 0")


@reference(Op.CUMSUM)
def _cumsum(ctx: ArrayContext, t: Tensor) -> None:
    ctx.store(t, ctx.accumulate(ctx.xp.add, ctx.f32(source(t, 0))))


@contract(Op.COUNT_EQUAL)
def _count_equal_contract(t: Tensor) -> None:
    s = _rows_to_reduce(t, I32_ONLY, dense=False)
    checks.shape(checks.source(t, 1, I32_ONLY, dense=False), s.ne, "source 1")
    checks.result(t, {GgmlType.I64})
    checks.shape(t, (1, 1, 1, 1), "the result")


@reference(Op.COUNT_EQUAL)
def _count_equal(ctx: ArrayContext, t: Tensor) -> None:
    a, b = (ctx.view(source(t, i)) for i in (0, 1))
    ctx.view(t)[...] = (a == b).sum(dtype=ctx.xp.int64)


# -- ARGMAX, ARGSORT, TOP_K ------------------------------------------------------------------------


@contract(Op.ARGMAX)
def _argmax_contract(t: Tensor) -> None:
    s = _rows_to_reduce(t)
    checks.result(t, I32_ONLY)
    checks.shape(s, (*s.ne[:2], 1, 1), "source 0")
    checks.shape(t, (s.ne[1], 1, 1, 1), "the result")
    require(s.ne[0] <= _MAX_INDEX, "rows are too long for 32-bit indices")


@reference(Op.ARGMAX)
def _argmax(ctx: ArrayContext, t: Tensor) -> None:
    rows, xp = ctx.f32(source(t, 0))[0, 0], ctx.xp
    if not rows.shape[1]:
        ctx.view(t)[0, 0, 0] = 0
        return
    # A NaN starts ggml's search anew, so what counts are the numbers behind the last but those that
    # end the row. Of equals it is the last; without numbers, 0.
    at = xp.arange(rows.shape[1])
    nan = rows != rows
    end = xp.where(nan, -1, at).max(axis=1, keepdims=True)
    start = xp.where(nan & (at < end), at, -1).max(axis=1, keepdims=True)
    counts = (at > start) & (at <= end)
    best = xp.where(counts, rows, -xp.inf).max(axis=1, keepdims=True)
    ctx.view(t)[0, 0, 0] = xp.where(counts & (rows == best), at, 0).max(axis=1)


@contract(Op.ARGSORT)
def _argsort_contract(t: Tensor) -> None:
    require(t.param_i32(0) in (0, 1), f"no sort order {t.param_i32(0)}")
    checks.result(t, I32_ONLY)
    checks.shape(checks.source(t, 0, F32_ONLY), t.ne, "source 0")
    require(t.ne[0] <= _MAX_INDEX, "rows are too long for 32-bit indices")


def _sorted_indices(ctx: ArrayContext, s: Tensor, *, descending: bool) -> Any:
    values = ctx.f32(s)
    return ctx.xp.argsort(-values if descending else values, axis=3, kind="stable")


@reference(Op.ARGSORT)
def _argsort(ctx: ArrayContext, t: Tensor) -> None:
    """op_params[0]: 0 ascending, 1 descending; equals stay in their order."""
    descending = t.param_i32(0) == 1
    ctx.view(t)[...] = _sorted_indices(ctx, source(t, 0), descending=descending)


@contract(Op.TOP_K)
def _top_k_contract(t: Tensor) -> None:
    s = _rows_to_reduce(t)
    checks.result(t, I32_ONLY)
    require(t.ne[0] <= s.ne[0] <= _MAX_INDEX, f"no {t.ne[0]} largest of {s.ne[0]}")
    checks.shape(t, (t.ne[0], *s.ne[1:]), "the result")


@reference(Op.TOP_K)
def _top_k(ctx: ArrayContext, t: Tensor) -> None:
    indices = _sorted_indices(ctx, source(t, 0), descending=True)[..., : t.ne[0]]
    # The op promises no order. ggml's CPU swaps the first two, and sums downstream follow it.
    if t.ne[0] > 1:
        indices[..., [0, 1]] = indices[..., [1, 0]]
    ctx.view(t)[...] = indices
