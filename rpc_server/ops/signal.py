"""Ops on sampled signals and pictures: convolution's IM2COL, pooling, resizing, time steps."""

from __future__ import annotations

import enum
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from protocol.ggml_ops import Op
from protocol.ggml_types import GgmlType
from rpc_server.graph.tensor import Tensor
from rpc_server.ops.arrays import ArrayContext
from rpc_server.ops.checks import (
    F32_ONLY,
    FLOATS,
    require_contiguous,
    require_distinct,
    require_result,
    require_shape,
    require_source,
    source,
)
from rpc_server.ops.table import contract, reference, require

_SAMPLES = frozenset({GgmlType.F32, GgmlType.F16})

# What works on the last axis of an array.
Pass = Callable[[Any], Any]


def _both_axes(x: Any, ne: tuple[int, ...], rows: Pass, columns: Pass) -> Any:
    """``rows`` along the last axis and ``columns`` along the one before, to ne[0] and ne[1].

    Whichever leaves less goes first: what lies between them is then no larger than the larger
    of source and result.
    """

    def down(values: Any) -> Any:
        return columns(values.swapaxes(-1, -2)).swapaxes(-1, -2)

    if x.shape[-2] * ne[0] <= x.shape[-1] * ne[1]:
        return down(rows(x))
    return rows(down(x))


# -- IM2COL ----------------------------------------------------------------------------------------


def _axes_of_im2col(t: Tensor) -> list[tuple[int, ...]]:
    """(samples, kernel, results, stride, padding, dilation) of dimension 0, and 1 if there is."""
    kernel, x, p = source(t, 0), source(t, 1), t.op_params
    return [(x.ne[i], kernel.ne[i], t.ne[i + 1], *p[i:6:2]) for i in range(1 + (p[6] == 1))]


@contract(Op.IM2COL, sources=2)
def _im2col_contract(t: Tensor) -> None:
    """src0, the kernel, only lends its sizes; src1 (width, [height,] channels, pictures).

    The result is a row for each place of the kernel: its elements of all channels.
    """
    kernel, x = require_source(t, 0, FLOATS, dense=False), require_source(t, 1, _SAMPLES)
    require_result(t, {x.type, GgmlType.F16})
    require_contiguous(t, "the result")
    n = 1 + (t.param_i32(6) == 1)
    require(kernel.ne[n] == x.ne[n], f"{x.ne[n]} channels for a kernel of {kernel.ne[n]}")
    size = kernel.ne[0] * kernel.ne[1] * (kernel.ne[2] if n == 2 else 1)
    require_shape(x, (*x.ne[: n + 2], 1)[:4], "source 1")
    require_shape(t, (size, *t.ne[1 : n + 1], x.ne[n + 1], 1)[:4], "the result")
    require(t.empty or not x.empty, "source 1 is empty")
    for samples, width, results, stride, padding, dilation in _axes_of_im2col(t):
        steps = (stride, padding, dilation)
        require(stride > 0 and padding >= 0 and dilation > 0, f"stride, padding, dilation {steps}")
        places = (samples + 2 * padding - dilation * (width - 1) - 1) // stride + 1
        require(results == places, f"{results} results for {places} places of the kernel")


@reference(Op.IM2COL)
def _im2col(ctx: ArrayContext, t: Tensor) -> None:
    xp, x = ctx.xp, ctx.view(source(t, 1))
    axes = _axes_of_im2col(t)
    if len(axes) == 1:
        # One line of each channel is a picture of height 1.
        x = x[0][:, :, None]
        axes.append((1, 1, 1, 1, 0, 1))
    _, width, n_columns, *_ = axes[0]
    _, height, n_rows, *_ = axes[1]
    shape = (x.shape[0], n_rows, n_columns, x.shape[1], height, width)
    target = ctx.view(t).reshape(shape)
    for i1 in range(height):
        for i0 in range(width):
            (at0, inside0), (at1, inside1) = (
                _places(xp, axis, i) for axis, i in zip(axes, (i0, i1), strict=True)
            )
            values = x[:, :, at1[:, None], at0] * (inside1[:, None] & inside0)
            target[..., i1, i0] = xp.moveaxis(values, 1, 3)


def _places(xp: ModuleType, axis: tuple[int, ...], i: int) -> tuple[Any, Any]:
    """The sample under element ``i`` of each place of the kernel, and whether there is one."""
    samples, _, results, stride, padding, dilation = axis
    at = xp.arange(results) * stride + i * dilation - padding
    return xp.clip(at, 0, samples - 1), (at >= 0) & (at < samples)


# -- POOL_1D, POOL_2D ------------------------------------------------------------------------------


class Pool(enum.IntEnum):
    """op_params[0]."""

    MAX = 0
    AVG = 1


def _windows(t: Tensor) -> list[tuple[int, int, int]]:
    """(width, stride, padding) of the windows along each pooled dimension."""
    p, n = t.op_params, 1 if t.op is Op.POOL_1D else 2
    return [(p[1 + i], p[1 + n + i], p[1 + 2 * n + i]) for i in range(n)]


def _pool_contract(t: Tensor) -> None:
    s = require_source(t, 0, _SAMPLES)
    require_distinct(s, "source 0")
    require_result(t, F32_ONLY)
    require(t.param_i32(0) in set(Pool), f"no pooling {t.param_i32(0)}")
    ne = list(s.ne)
    for i, (width, stride, padding) in enumerate(_windows(t)):
        steps = (width, stride, padding)
        require(width > 0 and stride > 0 and padding >= 0, f"width, stride, padding {steps}")
        # Wide padding would make wide windows, and long work, of few samples.
        require(padding <= s.ne[i], f"{s.ne[i]} elements with a padding of {padding}")
        ne[i] = (s.ne[i] + 2 * padding - width) // stride + 1
    require_shape(t, ne, "the result")


for _op in (Op.POOL_1D, Op.POOL_2D):
    contract(_op, sources=1)(_pool_contract)


def _pool_rows(xp: ModuleType, x: Any, n: int, window: tuple[int, int, int], kind: Pool) -> Any:
    """Sums or maxima of ``n`` windows along the last axis; padding takes no part."""
    width, stride, padding = window
    samples = x.shape[-1]
    empty = 0 if kind is Pool.AVG else -np.finfo(np.float32).max
    total: Any = xp.full((*x.shape[:-1], n), empty, xp.float32)
    starts = xp.arange(n) * stride - padding
    # Elements of the window that lie in the padding wherever it is are left out from the start.
    for i in range(max(0, padding - (n - 1) * stride), min(width, samples + padding)):
        inside = (starts + i >= 0) & (starts + i < samples)
        values = x[..., starts[inside] + i]
        if kind is Pool.AVG:
            total[..., inside] += values
        else:
            total[..., inside] = xp.maximum(total[..., inside], values)
    return total


@reference(Op.POOL_1D)
def _pool_1d(ctx: ArrayContext, t: Tensor) -> None:
    xp, kind, (window,) = ctx.xp, Pool(t.param_i32(0)), _windows(t)
    x, n = ctx.f32(source(t, 0)), t.ne[0]
    pooled = _pool_rows(xp, x, n, window, kind)
    if kind is Pool.AVG:
        # The mean of what is there, unlike in two dimensions.
        counts = _pool_rows(xp, xp.ones(x.shape[-1], xp.float32), n, window, kind)
        pooled = pooled / xp.maximum(counts, 1)
    ctx.store(t, pooled)


@reference(Op.POOL_2D)
def _pool_2d(ctx: ArrayContext, t: Tensor) -> None:
    kind, windows = Pool(t.param_i32(0)), _windows(t)
    rows, columns = (
        lambda x, i=i: _pool_rows(ctx.xp, x, t.ne[i], windows[i], kind) for i in (0, 1)
    )
    pooled = _both_axes(ctx.f32(source(t, 0)), t.ne, rows, columns)
    if kind is Pool.AVG:
        pooled = pooled / np.float32(windows[0][0] * windows[1][0])
    ctx.store(t, pooled)


# -- UPSCALE ---------------------------------------------------------------------------------------


class Scale(enum.IntEnum):
    """Low byte of op_params[0]; what it leaves are the two flags below."""

    NEAREST = 0
    BILINEAR = 1
    BICUBIC = 2


_ALIGN_CORNERS = 1 << 8
_ANTIALIAS = 1 << 9


@contract(Op.UPSCALE, sources=1)
def _upscale_contract(t: Tensor) -> None:
    """Any size to any size; dimensions 2 and 3 take the nearest, whatever the mode."""
    s = require_source(t, 0, F32_ONLY, dense=False)
    require_distinct(s, "source 0")
    require_result(t, F32_ONLY)
    require(t.empty or not s.empty, "source 0 is empty")
    mode, flags = t.param_i32(0) & 0xFF, t.param_i32(0) & ~0xFF
    require(mode in set(Scale), f"no mode {mode}")
    require(flags & ~(_ALIGN_CORNERS | _ANTIALIAS) == 0, f"no flags {flags:#x}")
    smooth = mode == Scale.BILINEAR
    require(smooth or not flags & _ANTIALIAS, f"no antialiasing in mode {mode}")


def _nearest(n_in: int, n_out: int, ratio: np.float32) -> Any:
    at = (np.arange(n_out, dtype=np.float32) / ratio).astype(np.int64)
    return np.clip(at, 0, n_in - 1)


def _taps(n_in: int, n_out: int, mode: int) -> list[tuple[Any, Any]]:
    """(indices, weights) of the source elements that each result element is a sum of."""
    kind, ratio, half = mode & 0xFF, np.float32(n_out / n_in), np.float32(0.5)
    if mode & _ALIGN_CORNERS:
        half = np.float32(0)
        if n_in > 1 and n_out > 1:
            ratio = np.float32((n_out - 1) / (n_in - 1))
    if kind == Scale.NEAREST:
        return [(_nearest(n_in, n_out, ratio), np.ones(n_out, np.float32))]
    centre = (np.arange(n_out, dtype=np.float32) + half) / ratio
    if mode & _ANTIALIAS:
        return _triangle_taps(n_in, centre, half, np.maximum(np.float32(1), 1 / ratio))
    centre -= half
    first = np.floor(centre).astype(np.int64)
    x = centre - first.astype(np.float32)
    if kind == Scale.BILINEAR:
        x = np.clip(centre - np.clip(first, 0, n_in - 1), 0, 1).astype(np.float32)
        weights, offsets = [1 - x, x], range(2)
    else:
        weights, offsets = _cubic_weights(x), range(-1, 3)
    indices = [np.clip(first + i, 0, n_in - 1) for i in offsets]
    return list(zip(indices, weights, strict=True))


def _cubic_weights(x: Any) -> list[Any]:
    """Keys' convolution of four elements, with a = -0.75."""
    a = np.float32(-0.75)

    def near(d: Any) -> Any:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d: Any) -> Any:
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    return [far(x + 1), near(x), near(1 - x), far(2 - x)]


def _triangle_taps(
    n_in: int, centre: Any, half: np.float32, support: np.float32
) -> list[tuple[Any, Any]]:
    """Weights that fall off linearly over ``support`` elements to either side, summing to 1."""
    first = np.maximum((centre - support + half).astype(np.int64), 0)
    end = np.minimum((centre + support + half).astype(np.int64), n_in)
    taps = []
    for i in range(int((end - first).max(initial=0))):
        at = first + i
        distance = (at - centre + half).astype(np.float32) / support
        weights = np.where(at < end, np.maximum(1 - abs(distance), 0), 0)
        taps.append((np.clip(at, 0, n_in - 1), weights.astype(np.float32)))
    total = sum(weights for _, weights in taps)
    return [(at, weights / np.where(total > 0, total, 1)) for at, weights in taps]


def _resized(xp: ModuleType, x: Any, taps: list[tuple[Any, Any]]) -> Any:
    """The last axis resized."""
    return sum(x[..., xp.asarray(at)] * xp.asarray(weights) for at, weights in taps)


@reference(Op.UPSCALE)
def _upscale(ctx: ArrayContext, t: Tensor) -> None:
    s, xp, mode = source(t, 0), ctx.xp, t.param_i32(0)
    x, target = ctx.f32(s), ctx.view(t)
    taps = [_taps(s.ne[i], t.ne[i], mode) for i in (0, 1)]
    rows, columns = (lambda x, of=of: _resized(xp, x, of) for of in taps)
    i2, i3 = (_nearest(s.ne[i], t.ne[i], np.float32(t.ne[i] / s.ne[i])) for i in (2, 3))
    for to3, from3 in enumerate(i3):
        for to2, from2 in enumerate(i2):
            target[to3, to2] = _both_axes(x[from3, from2], t.ne, rows, columns)


# -- TIMESTEP_EMBEDDING ----------------------------------------------------------------------------


@contract(Op.TIMESTEP_EMBEDDING, sources=1)
def _timestep_contract(t: Tensor) -> None:
    """op_params: elements of an embedding, longest period. Odd numbers may be rounded up."""
    steps = require_source(t, 0, F32_ONLY)
    require_result(t, F32_ONLY)
    dim, period = t.op_params[:2]
    require(dim >= 0 and t.ne[0] in (dim, dim + dim % 2), f"{t.ne[0]} elements for {dim}")
    require(period > 0, f"periods up to {period}")
    require_shape(steps, (steps.ne[0], 1, 1, 1), "source 0")
    require_shape(t, (t.ne[0], steps.ne[0], 1, 1), "the result")


@reference(Op.TIMESTEP_EMBEDDING)
def _timestep_embedding(ctx: ArrayContext, t: Tensor) -> None:
    """Cosines, then sines, of the steps at frequencies that fall geometrically, then zeros."""
    xp, (dim, period) = ctx.xp, t.op_params[:2]
    half = dim // 2
    exponents = -xp.log(xp.float32(period)) * xp.arange(half, dtype=xp.float32) / max(half, 1)
    angles = ctx.f32(source(t, 0))[0, 0, 0][:, None] * xp.exp(exponents)
    target = ctx.view(t)[0, 0]
    target[:, :half], target[:, half : 2 * half] = xp.cos(angles), xp.sin(angles)
    target[:, 2 * half :] = 0
