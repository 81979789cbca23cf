"""Ops of image encoders that attend within windows, and to relative positions (SAM's)."""

from __future__ import annotations

import math

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.ops import checks
from rpc_server.ops.arrays import ArrayContext
from rpc_server.ops.checks import F32_ONLY
from rpc_server.ops.table import contract, reference, require, source

_HALVES = frozenset({GgmlType.F16, GgmlType.BF16})


# -- WIN_PART, WIN_UNPART --------------------------------------------------------------------------


def _windows_over(n: int, width: int) -> int:
    """Return how many windows of ``width`` it takes to cover ``n`` pixels."""
    return -(-n // width)


@contract(Op.WIN_PART)
def _win_part_contract(t: Tensor) -> None:
    """src0 (C, W, H) to (C, w, w, windows); op_params: windows across, windows down, w."""
    across, down, width = t.op_params[:3]
    image = checks.source(t, 0, F32_ONLY)
    checks.result(t, F32_ONLY)
    require(width > 0, f"windows of width {width}")
    checks.shape(image, (*image.ne[:3], 1), "source 0")
    w, h = _windows_over(image.ne[1], width), _windows_over(image.ne[2], width)
    require((across, down) == (w, h), f"{across}x{down} windows, it takes {w}x{h}")
    checks.shape(t, (image.ne[0], width, width, across * down), "the result")


@reference(Op.WIN_PART)
def _win_part(ctx: ArrayContext, t: Tensor) -> None:
    """Windows row by row over the image; what lies outside of it is zeros."""
    across, down, width = t.op_params[:3]
    image = source(t, 0)
    padded = ctx.xp.zeros((down * width, across * width, image.ne[0]), ctx.xp.float32)
    padded[: image.ne[2], : image.ne[1]] = ctx.view(image)[0]
    windows = padded.reshape(down, width, across, width, image.ne[0]).swapaxes(1, 2)
    ctx.view(t)[...] = windows.reshape(t.ne[::-1])


@contract(Op.WIN_UNPART)
def _win_unpart_contract(t: Tensor) -> None:
    """src0 (C, w, w, windows) to (C, W, H): what WIN_PART undoes; op_params: w."""
    width = t.param_i32(0)
    windows = checks.source(t, 0, F32_ONLY)
    checks.result(t, F32_ONLY)
    require(width > 0, f"windows of width {width}")
    checks.distinct(windows, "source 0")
    checks.shape(windows, (t.ne[0], width, width, windows.ne[3]), "source 0")
    checks.shape(t, (*t.ne[:3], 1), "the result")
    needed = _windows_over(t.ne[1], width) * _windows_over(t.ne[2], width)
    require(windows.ne[3] >= needed, f"{windows.ne[3]} windows, it takes {needed}")


@reference(Op.WIN_UNPART)
def _win_unpart(ctx: ArrayContext, t: Tensor) -> None:
    channels, width = t.ne[0], t.param_i32(0)
    across, down = _windows_over(t.ne[1], width), _windows_over(t.ne[2], width)
    windows = ctx.view(source(t, 0))[: across * down]
    rows = windows.reshape(down, across, width, width, channels).swapaxes(1, 2)
    image = rows.reshape(down * width, across * width, channels)
    ctx.view(t)[...] = image[: t.ne[2], : t.ne[1]]


# -- GET_REL_POS, ADD_REL_POS ----------------------------------------------------------------------


@contract(Op.GET_REL_POS)
def _get_rel_pos_contract(t: Tensor) -> None:
    """src0 (C, 2n - 1) to (C, n, n). ggml's node is F16 whatever 16-bit type the source has."""
    table = checks.source(t, 0, _HALVES)
    checks.result(t, _HALVES)
    n = t.ne[1]
    checks.shape(t, (table.ne[0], n, n, 1), "the result")
    # Of more than one table the first counts.
    checks.shape(table, (table.ne[0], 2 * n - 1, *table.ne[2:]), "source 0")
    require(t.empty or not table.empty, "source 0 has no table")


@reference(Op.GET_REL_POS)
def _get_rel_pos(ctx: ArrayContext, t: Tensor) -> None:
    """Row (query, key) is the table's row for their distance; bits are copied as they are."""
    xp, n = ctx.xp, t.ne[1]
    distance = xp.arange(n)[:, None] + (n - 1 - xp.arange(n))
    table = ctx.view(source(t, 0))[0, 0].view(xp.uint16)
    ctx.view(t)[0].view(xp.uint16)[...] = table[distance]


@contract(Op.ADD_REL_POS)
def _add_rel_pos_contract(t: Tensor) -> None:
    """src0 (n * n, rows, batches), src1 (along the width) and src2 (along the height): (n, ...).

    The sources of positions are (n, a, b, batches) with a * b rows. op_params[0]: the result
    already holds source 0.
    """
    scores = checks.source(t, 0, F32_ONLY)
    width, height = checks.source(t, 1, F32_ONLY), checks.source(t, 2, F32_ONLY)
    checks.result(t, F32_ONLY)
    checks.shape(scores, t.ne, "source 0")
    checks.shape(height, width.ne, "source 2")
    n, a, b, batches = width.ne
    checks.shape(scores, (n * n, a * b, batches, scores.ne[3]), "source 0")
    for s, what in ((t, "the result"), *((source(t, i), f"source {i}") for i in range(3))):
        checks.contiguous(s, what)


@reference(Op.ADD_REL_POS)
def _add_rel_pos(ctx: ArrayContext, t: Tensor) -> None:
    """Each row of source 0 is a picture of n by n; of further dimensions 3 it has no positions."""
    width, height = (ctx.f32(source(t, i)) for i in (1, 2))
    if not t.param_i32(0):
        ctx.view(t)[...] = ctx.view(source(t, 0))
    n = width.shape[3]
    pictures = ctx.view(t)[0].reshape(math.prod(width.shape[:3]), n, n)
    pictures += height.reshape(-1, n, 1)
    pictures += width.reshape(-1, 1, n)
