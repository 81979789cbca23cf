"""Ops on sampled signals and pictures: pooling, resizing, mirrored ends, time steps."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.ops import checks
from rpc_server.ops.arrays import ArrayContext
from rpc_server.ops.checks import F32_ONLY
from rpc_server.ops.slices import tiles
from rpc_server.ops.sliding import Axis, each_tap
from rpc_server.ops.table import contract, reference, require, source

_HALVES = frozenset({GgmlType.F32, GgmlType.F16})

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


# -- POOL_1D, POOL_2D, POOL_2D_BACK ----------------------------------------------------------------


class Pool(enum.IntEnum):
    """op_params[0]."""

    MAX = 0
    AVG = 1


_LOWEST = float(np.finfo(np.float32).min)


def _windows(t: Tensor, x: Tensor, places: Tensor) -> list[Axis]:
    """The windows along dimension 0, and 1 if there is, of ``x``.

    There are as many places as ``places`` has, whatever the numbers say: ggml's constructors take
    fractions of paddings into account that the node then doesn't have.
    """
    p, n, axes = t.op_params, 1 if t.op is Op.POOL_1D else 2, []
    for i in range(n):
        width, stride = p[1 + i], p[1 + n + i]
        require(width > 0 and stride > 0, f"width, stride {(width, stride)}")
        axes.append(Axis(x.ne[i], width, places.ne[i], stride, p[1 + 2 * n + i]))
    return axes


@contract(Op.POOL_1D, Op.POOL_2D)
def _pool_contract(t: Tensor) -> None:
    s = checks.source(t, 0, _HALVES)
    checks.distinct(s, "source 0")
    checks.result(t, F32_ONLY)
    require(t.param_i32(0) in set(Pool), f"no pooling {t.param_i32(0)}")
    n = len(_windows(t, s, t))
    checks.shape(t, (*t.ne[:n], *s.ne[n:]), "the result")


def _few_places(axis: Axis) -> bool:
    """Return whether to go from place to place and not from one element of the window to the
    next.
    """
    return axis.places < axis.taps


def _pool_rows(xp: ModuleType, x: Any, axis: Axis, kind: Pool) -> Any:
    """Sums or maxima of the windows along the last axis; padding takes no part."""
    empty, whole, each = (0, xp.sum, xp.add) if kind is Pool.AVG else (_LOWEST, xp.max, xp.maximum)
    total: Any = xp.full((*x.shape[:-1], axis.places), empty, xp.float32)
    if _few_places(axis):
        for place in range(axis.places):
            values = x[..., axis.under(place)]
            if values.size:
                total[..., place] = each(total[..., place], whole(values, axis=-1))
    else:
        for _, (places,), (samples,) in each_tap([axis]):
            total[..., places] = each(total[..., places], x[..., samples])
    return total


def _planes_with_nan(xp: ModuleType, x: Any) -> list[tuple[int, int]]:
    if not x.size:
        return []
    i3, i2 = xp.nonzero(xp.isnan(x.max(axis=(-1, -2))))
    return list(zip(i3.tolist(), i2.tolist(), strict=True))


def _maxima_in_order(xp: ModuleType, plane: Any, axes: Sequence[Axis]) -> tuple[Any, Any]:
    """Windows' maxima and their elements' numbers (-1: none) in a plane that holds not-a-numbers.

    ggml looks at a window's elements row by row and keeps what isn't less or equal: nothing is that
    to a not-a-number, which so counts, and after it the next element anew. ``axes`` have the
    outer dimension first.
    """
    shape = tuple(axis.places for axis in axes)
    maxima: Any = xp.full(shape, _LOWEST, xp.float32)
    at: Any = xp.full(shape, -1, xp.int64)
    numbers = xp.arange(plane.size).reshape(plane.shape)
    if math.prod(shape) < math.prod(len(axis.reachable()) for axis in axes):
        for place in itertools.product(*map(range, shape)):
            under = tuple(axis.under(i) for axis, i in zip(axes, place, strict=True))
            values = plane[under].ravel()
            if values.size:
                maxima[place], first = _last_run_maximum(xp, values)
                at[place] = numbers[under].ravel()[first] if first >= 0 else -1
    else:
        for _, places, samples in each_tap(axes):
            more = ~(plane[samples] <= maxima[places])
            maxima[places] = xp.where(more, plane[samples], maxima[places])
            at[places] = xp.where(more, numbers[samples], at[places])
    return maxima, at


def _last_run_maximum(xp: ModuleType, values: Any) -> tuple[Any, int]:
    """The maximum behind the last not-a-number, or that itself if it is last, and its index."""
    nan = xp.flatnonzero(xp.isnan(values))
    start = 0 if not nan.size else min(int(nan[-1]) + 1, values.size - 1)
    first = start + int(values[start:].argmax())
    if not nan.size and values[first] <= _LOWEST:
        return _LOWEST, -1
    return values[first], first


@reference(Op.POOL_1D)
def _pool_1d(ctx: ArrayContext, t: Tensor) -> None:
    xp, kind, (axis,) = ctx.xp, Pool(t.param_i32(0)), _windows(t, source(t, 0), t)
    x = ctx.f32(source(t, 0))
    pooled = _pool_rows(xp, x, axis, kind)
    if kind is Pool.AVG:
        # The mean of what is there, unlike in two dimensions.
        counts = _pool_rows(xp, xp.ones(x.shape[-1], xp.float32), axis, kind)
        pooled = pooled / xp.maximum(counts, 1)
    else:
        rows = Axis(x.shape[-2], 1, x.shape[-2])
        for plane in _planes_with_nan(xp, x):
            pooled[plane] = _maxima_in_order(xp, x[plane], [rows, axis])[0]
    ctx.store(t, pooled)


@reference(Op.POOL_2D)
def _pool_2d(ctx: ArrayContext, t: Tensor) -> None:
    kind, axes = Pool(t.param_i32(0)), _windows(t, source(t, 0), t)
    rows, columns = (lambda x, axis=axis: _pool_rows(ctx.xp, x, axis, kind) for axis in axes)
    x = ctx.f32(source(t, 0))
    pooled = _both_axes(x, t.ne, rows, columns)
    if kind is Pool.AVG:
        pooled = pooled / np.float32(axes[0].taps * axes[1].taps)
    else:
        for plane in _planes_with_nan(ctx.xp, x):
            pooled[plane] = _maxima_in_order(ctx.xp, x[plane], axes[::-1])[0]
    ctx.store(t, pooled)


@contract(Op.POOL_2D_BACK)
def _pool_back_contract(t: Tensor) -> None:
    """src0 are gradients of POOL_2D's result, src1 what it pooled."""
    gradients, x = checks.source(t, 0, F32_ONLY), checks.source(t, 1, {t.type})
    for i, s in enumerate((gradients, x)):
        checks.distinct(s, f"source {i}")
    checks.result(t, _HALVES)
    require(t.param_i32(0) in set(Pool), f"no pooling {t.param_i32(0)}")
    _windows(t, t, gradients)
    checks.shape(x, t.ne, "source 1")
    checks.shape(gradients, (*gradients.ne[:2], *t.ne[2:]), "source 0")


def _spread_rows(xp: ModuleType, gradients: Any, axis: Axis) -> Any:
    """To each sample the sum of the gradients of all windows that it is in, along the last axis."""
    total: Any = xp.zeros((*gradients.shape[:-1], axis.samples), xp.float32)
    if _few_places(axis):
        for place in range(axis.places):
            total[..., axis.under(place)] += gradients[..., place : place + 1]
    else:
        for _, (places,), (samples,) in each_tap([axis]):
            total[..., samples] += gradients[..., places]
    return total


def _first_maxima(xp: ModuleType, x: Any, axis: Axis) -> tuple[Any, Any]:
    """Each window's maximum along the last axis, and where it is first.

    That is -1 where nothing is greater than the lowest number.
    """
    shape = (*x.shape[:-1], axis.places)
    maxima: Any = xp.full(shape, _LOWEST, xp.float32)
    at: Any = xp.full(shape, -1, xp.int64)

    def update(places: slice, values: Any, indices: Any) -> None:
        more = values > maxima[..., places]
        maxima[..., places] = xp.where(more, values, maxima[..., places])
        at[..., places] = xp.where(more, indices, at[..., places])

    if _few_places(axis):
        for place in range(axis.places):
            under = axis.under(place)
            values = x[..., under]
            if values.size:
                first = values.argmax(axis=-1)[..., None]
                found = xp.take_along_axis(values, first, axis=-1)
                update(slice(place, place + 1), found, first + under.start)
    else:
        numbers = xp.arange(axis.samples)
        for _, (places,), (samples,) in each_tap([axis]):
            update(places, x[..., samples], numbers[samples])
    return maxima, at


def _to_maxima(xp: ModuleType, gradients: Any, x: Any, axes: list[Axis]) -> Any:
    """Each gradient added to the first maximum, row by row, of the window it comes from."""
    across, down = axes
    total: Any = xp.zeros(x.shape, xp.float32)
    planes = x.shape[0] * x.shape[1]
    for part in tiles(across.places, planes * (down.samples + down.places)):
        some = gradients[..., part.start : part.stop]
        in_rows, column = _first_maxima(xp, x, across.part(part))
        _, row = _first_maxima(xp, in_rows.swapaxes(-1, -2), down)
        row = row.swapaxes(-1, -2)
        column = xp.take_along_axis(column, xp.maximum(row, 0), axis=-2)
        i3, i2, *place = xp.nonzero(row >= 0)
        at = (i3, i2, *place)
        xp.add.at(total, (i3, i2, row[at], column[at]), some[at])
    for plane in _planes_with_nan(xp, x):
        _, at = _maxima_in_order(xp, x[plane], axes[::-1])
        total[plane] = 0
        xp.add.at(total[plane].reshape(-1), at[at >= 0], gradients[plane][at >= 0])
    return total


@reference(Op.POOL_2D_BACK)
def _pool_2d_back(ctx: ArrayContext, t: Tensor) -> None:
    xp, gradients = ctx.xp, ctx.f32(source(t, 0))
    axes = _windows(t, t, source(t, 0))
    if t.param_i32(0) == Pool.MAX:
        ctx.store(t, _to_maxima(xp, gradients, ctx.f32(source(t, 1)), axes))
        return
    rows, columns = (lambda x, axis=axis: _spread_rows(xp, x, axis) for axis in axes)
    area = np.float32(axes[0].taps * axes[1].taps)
    ctx.store(t, _both_axes(gradients / area, t.ne, rows, columns))


# -- UPSCALE ---------------------------------------------------------------------------------------


class Scale(enum.IntEnum):
    """Low byte of op_params[0]; what it leaves are the two flags below."""

    NEAREST = 0
    BILINEAR = 1
    BICUBIC = 2


_ALIGN_CORNERS = 1 << 8
_ANTIALIAS = 1 << 9


@contract(Op.UPSCALE)
def _upscale_contract(t: Tensor) -> None:
    """Any size to any size; dimensions 2 and 3 take the nearest, whatever the mode."""
    s = checks.source(t, 0, F32_ONLY, dense=False)
    checks.distinct(s, "source 0")
    checks.result(t, F32_ONLY)
    require(t.empty or not s.empty, "source 0 is empty")
    mode, flags = t.param_i32(0) & 0xFF, t.param_i32(0) & ~0xFF
    require(mode in set(Scale), f"no mode {mode}")
    require(flags & ~(_ALIGN_CORNERS | _ANTIALIAS) == 0, f"no flags {flags:#x}")
    smooth = mode == Scale.BILINEAR
    require(smooth or not flags & _ANTIALIAS, f"no antialiasing in mode {mode}")


def _nearest(n_in: int, n_out: int, ratio: np.float32) -> Any:
    at = (np.arange(n_out, dtype=np.float32) / ratio).astype(np.int64)
    return np.clip(at, 0, n_in - 1)


def _taps(n_in: int, n_out: int, mode: int) -> Taps:
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


@dataclasses.dataclass(frozen=True, slots=True)
class _Windows:
    """For each result element the consecutive source elements it is a sum of, and their weights.

    For windows that are wider than the result: their elements one by one are too many to go over.
    """

    parts: list[tuple[slice, Any]]


Taps = list[tuple[Any, Any]] | _Windows


def _triangle_taps(n_in: int, centre: Any, half: np.float32, support: np.float32) -> Taps:
    """Weights that fall off linearly over ``support`` elements to either side, summing to 1."""
    first = np.maximum((centre - support + half).astype(np.int64), 0)
    end = np.minimum((centre + support + half).astype(np.int64), n_in)

    def weigh(at: Any, centre: Any, end: Any) -> Any:
        distance = (at - centre + half).astype(np.float32) / support
        return np.where(at < end, np.maximum(1 - abs(distance), 0), 0).astype(np.float32)

    width = int((end - first).max(initial=0))
    if width > len(centre):
        parts = []
        for place, (low, high) in enumerate(zip(first.tolist(), end.tolist(), strict=True)):
            weights = weigh(np.arange(low, high), centre[place], high)
            parts.append((slice(low, high), weights / (weights.sum() or np.float32(1))))
        return _Windows(parts)
    taps = [(np.clip(first + i, 0, n_in - 1), weigh(first + i, centre, end)) for i in range(width)]
    total = sum(weights for _, weights in taps)
    return [(at, weights / np.where(total > 0, total, 1)) for at, weights in taps]


def _resized(xp: ModuleType, x: Any, taps: Taps) -> Any:
    """The last axis resized."""
    if isinstance(taps, _Windows):
        parts = [xp.matmul(x[..., at], xp.asarray(weights)) for at, weights in taps.parts]
        return xp.stack(parts, axis=-1)
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


# -- PAD_REFLECT_1D --------------------------------------------------------------------------------


@contract(Op.PAD_REFLECT_1D)
def _reflect_contract(t: Tensor) -> None:
    """op_params: elements before and behind each row, mirrored at its ends."""
    s, pads = checks.source(t, 0, F32_ONLY), t.op_params[:2]
    checks.result(t, F32_ONLY)
    require(min(pads) >= 0 and max(pads) < s.ne[0], f"pads of {pads} for rows of {s.ne[0]}")
    checks.shape(t, (s.ne[0] + sum(pads), *s.ne[1:]), "the result")


@reference(Op.PAD_REFLECT_1D)
def _reflect(ctx: ArrayContext, t: Tensor) -> None:
    s, xp = source(t, 0), ctx.xp
    last, (before, behind) = s.ne[0] - 1, t.op_params[:2]
    at = last - abs(last - abs(xp.arange(-before, s.ne[0] + behind)))
    ctx.view(t)[...] = ctx.f32(s)[..., at]


# -- TIMESTEP_EMBEDDING ----------------------------------------------------------------------------


@contract(Op.TIMESTEP_EMBEDDING)
def _timestep_contract(t: Tensor) -> None:
    """op_params: elements of an embedding, longest period. Odd numbers may be rounded up."""
    steps = checks.source(t, 0, F32_ONLY)
    checks.result(t, F32_ONLY)
    dim, period = t.op_params[:2]
    require(dim >= 0 and t.ne[0] in (dim, dim + dim % 2), f"{t.ne[0]} elements for {dim}")
    require(period > 0, f"periods up to {period}")
    # As in ggml, what follows the first row is left out.
    require(t.empty or not steps.empty, "source 0 is empty")
    checks.shape(t, (t.ne[0], steps.ne[0], 1, 1), "the result")


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
