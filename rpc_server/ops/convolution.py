"""Convolutions of lines, pictures and volumes, whole or as columns for a matrix product.

Numbers of stride, padding and dilation come innermost dimension first, as sizes do; arrays and
lists of axes have the outermost first. The kernel of F16 convolutions meets inputs rounded to F16,
as in ggml's CPU backend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from protocol.ggml.ops import Op
from protocol.ggml.types import FLOATS, GgmlType
from protocol.tensor import Tensor
from rpc_server.ops import checks
from rpc_server.ops.arrays import ArrayContext
from rpc_server.ops.checks import F32_ONLY
from rpc_server.ops.sliding import Axis, Tap, boxes, each_tap, gather, scatter
from rpc_server.ops.table import contract, reference, require, source

_HALVES = frozenset({GgmlType.F32, GgmlType.F16})


def _axis(samples: int, taps: int, stride: int, padding: int, dilation: int) -> Axis:
    """An axis with as many places as ggml makes of these numbers (ContractError for a stride).

    ggml divides towards zero: a window that is larger than the padded samples by less than the
    stride has a place.
    """
    require(stride > 0, f"stride {stride}")
    room = samples + 2 * padding - dilation * (taps - 1) - 1
    steps = room // stride if room >= 0 else -(-room // stride)
    return Axis(samples, taps, steps + 1, stride, padding, dilation)


def _axes(t: Tensor, kernel: Tensor, x: Tensor, n: int, layout: int | None = None) -> list[Axis]:
    """The first ``n`` dimensions of ``x``; op_params have strides, paddings, dilations.

    These are ``layout`` numbers each, ``n`` unless said otherwise.
    """
    layout = layout or n
    return [
        _axis(x.ne[i], kernel.ne[i], *t.op_params[i : 3 * layout : layout])
        for i in reversed(range(n))
    ]


def _taps(axes: Sequence[Axis]) -> list[int]:
    return [axis.taps for axis in axes]


def _places(axes: Sequence[Axis]) -> list[int]:
    return [axis.places for axis in axes]


def _channels_first(columns: Any) -> Any:
    """(N, *places, C, *taps), which IM2COL stores, as (N, C, *taps, *places)."""
    n = columns.ndim // 2
    return columns.transpose(0, *range(n, 2 * n), *range(1, n))


# -- IM2COL, IM2COL_3D, IM2COL_BACK ----------------------------------------------------------------


def _line_or_picture(t: Tensor) -> int:
    """IM2COL's number of dimensions. Of two, lines have the first words of op_params only."""
    return 2 if t.param_i32(6) == 1 else 1


@contract(Op.IM2COL)
def _im2col_contract(t: Tensor) -> None:
    """src0, the kernel, only lends its sizes; src1 (width, [height,] channels, pictures).

    The result is a row for each place of the kernel: its elements of all channels.
    """
    kernel, x, n = source(t, 0), checks.source(t, 1, _HALVES), _line_or_picture(t)
    checks.result(t, {x.type, GgmlType.F16})
    checks.contiguous(t, "the result")
    checks.shape(x, (*x.ne[: n + 2], 1)[:4], "source 1")
    require(kernel.ne[n] == x.ne[n], f"{x.ne[n]} channels for a kernel of {kernel.ne[n]}")
    axes = _axes(t, kernel, x, n, 2)
    row = x.ne[n] * math.prod(_taps(axes))
    checks.shape(t, (row, *_places(axes)[::-1], x.ne[n + 1], 1)[:4], "the result")


@reference(Op.IM2COL)
def _im2col(ctx: ArrayContext, t: Tensor) -> None:
    kernel, x, n = source(t, 0), ctx.view(source(t, 1)), _line_or_picture(t)
    axes = _axes(t, kernel, source(t, 1), n, 2)
    x = x if n == 2 else x[0]
    columns = ctx.view(t).reshape(x.shape[0], *_places(axes), x.shape[1], *_taps(axes))
    gather(x, axes, _channels_first(columns))


def _volumes(t: Tensor) -> tuple[int, int]:
    """(volumes, channels), which are one dimension of IM2COL_3D's source 1."""
    channels = t.param_i32(9)
    require(channels > 0, f"{channels} channels")
    return source(t, 1).ne[3] // channels, channels


@contract(Op.IM2COL_3D)
def _im2col_3d_contract(t: Tensor) -> None:
    """src1 (width, height, depth, channels * volumes); the result as IM2COL's, depth in the last.

    Channels that don't make up a volume are left out.
    """
    kernel, x = source(t, 0), checks.source(t, 1, F32_ONLY)
    checks.result(t, _HALVES)
    checks.contiguous(t, "the result")
    n, channels = _volumes(t)
    axes = _axes(t, kernel, x, 3)
    depth, height, width = _places(axes)
    row = channels * math.prod(_taps(axes))
    checks.shape(t, (row, width, height, depth * n), "the result")


@reference(Op.IM2COL_3D)
def _im2col_3d(ctx: ArrayContext, t: Tensor) -> None:
    n, channels = _volumes(t)
    axes = _axes(t, source(t, 0), source(t, 1), 3)
    x = ctx.view(source(t, 1))[: n * channels]
    columns = ctx.view(t).reshape(n, *_places(axes), channels, *_taps(axes))
    gather(x.reshape(n, channels, *x.shape[1:]), axes, _channels_first(columns))


def _axes_back(t: Tensor) -> list[Axis]:
    """Of IM2COL_BACK, where the places are as many as the gradients have."""
    gradients, kernel = source(t, 0), source(t, 1)
    axes = []
    for i in reversed(range(_line_or_picture(t))):
        stride, padding, dilation = t.op_params[i:6:2]
        require(stride > 0, f"stride {stride}")
        axes.append(Axis(t.ne[i], kernel.ne[i], gradients.ne[i + 1], stride, padding, dilation))
    return axes


@contract(Op.IM2COL_BACK)
def _im2col_back_contract(t: Tensor) -> None:
    """src0 are gradients of IM2COL's result; src1, the kernel, only lends its sizes."""
    gradients, _ = checks.source(t, 0, F32_ONLY), checks.source(t, 1, _HALVES, dense=False)
    checks.contiguous(gradients, "source 0")
    checks.result(t, F32_ONLY)
    n, axes = _line_or_picture(t), _axes_back(t)
    checks.shape(t, (*t.ne[: n + 2], 1)[:4], "the result")
    row = t.ne[n] * math.prod(_taps(axes))
    checks.shape(gradients, (row, *_places(axes)[::-1], t.ne[n + 1], 1)[:4], "source 0")


@reference(Op.IM2COL_BACK)
def _im2col_back(ctx: ArrayContext, t: Tensor) -> None:
    axes, target = _axes_back(t), ctx.view(t)
    target = target if len(axes) == 2 else target[0]
    gradients = ctx.view(source(t, 0))
    columns = gradients.reshape(target.shape[0], *_places(axes), target.shape[1], *_taps(axes))
    columns = _channels_first(columns)
    scatter(lambda tap: columns[(slice(None), slice(None), *tap)], axes, target)


# -- COL2IM_1D -------------------------------------------------------------------------------------


def _axis_of_col2im(t: Tensor) -> Axis:
    columns, (stride, channels, padding) = source(t, 0), t.op_params[:3]
    require(stride > 0 and channels > 0, f"stride {stride}, {channels} channels")
    require(columns.ne[0] % channels == 0, f"{columns.ne[0]} elements for {channels} channels")
    return Axis(t.ne[0], columns.ne[0] // channels, columns.ne[1], stride, padding)


@contract(Op.COL2IM_1D)
def _col2im_contract(t: Tensor) -> None:
    """src0 (taps * channels, places) adds up to (samples, channels), less padding at both ends."""
    columns = checks.source(t, 0, FLOATS)
    checks.distinct(columns, "source 0")
    checks.result(t, {columns.type})
    axis = _axis_of_col2im(t)
    checks.shape(columns, (*columns.ne[:2], 1, 1), "source 0")
    samples = (axis.places - 1) * axis.stride + axis.taps - 2 * axis.padding
    checks.shape(t, (samples, t.param_i32(1), 1, 1), "the result")


@reference(Op.COL2IM_1D)
def _col2im(ctx: ArrayContext, t: Tensor) -> None:
    xp, axis, channels = ctx.xp, _axis_of_col2im(t), t.param_i32(1)
    columns = ctx.f32(source(t, 0))[0].reshape(1, axis.places, channels, axis.taps)
    total = xp.empty((1, channels, axis.samples), xp.float32)
    scatter(lambda tap: columns[..., tap[0]].swapaxes(1, 2), [axis], total)
    ctx.store(t, total)


# -- CONV_2D, CONV_3D ------------------------------------------------------------------------------


def _require_convolution(t: Tensor) -> tuple[Tensor, Tensor]:
    """Kernel and input of a node that computes with both: each element in memory of its own."""
    kernel = checks.source(t, 0, _HALVES, dense=False)
    x = checks.source(t, 1, F32_ONLY, dense=False)
    for i, s in enumerate((kernel, x)):
        checks.distinct(s, f"source {i}")
    checks.result(t, F32_ONLY, dense=False)
    return kernel, x


def _inputs(ctx: ArrayContext, kernel: Tensor, x: Tensor) -> Any:
    """``x`` as precise as products with the kernel take it."""
    values = ctx.f32(x)
    if kernel.type is GgmlType.F16:
        return values.astype(ctx.xp.float16).astype(ctx.xp.float32)
    return values


def _convolve(ctx: ArrayContext, kernel: Any, x: Any, axes: Sequence[Axis], target: Any) -> None:
    """``kernel`` (OC, C, *taps) at all places of ``x`` (N, C, *samples): (N, OC, *places).

    A matrix product with columns of the input, of as many places at a time as fit in little memory.
    """
    n, outputs = target.shape[:2]
    width = x.shape[1] * math.prod(_taps(axes))
    if width == 0:
        target[...] = 0
        return
    weights = ctx.xp.ascontiguousarray(kernel.reshape(outputs, width))
    for batch, *places in boxes((n, *_places(axes)), width):
        ctx.look()
        parts = [axis.part(some) for axis, some in zip(axes, places, strict=True)]
        sizes = _places(parts)
        columns = ctx.xp.empty((len(batch), x.shape[1], *_taps(axes), *sizes), ctx.xp.float32)
        gather(x[batch.start : batch.stop], parts, columns)
        product = weights @ columns.reshape(len(batch), width, math.prod(sizes))
        at = (slice(some.start, some.stop) for some in places)
        target[(slice(batch.start, batch.stop), slice(None), *at)] = product.reshape(
            len(batch), outputs, *sizes
        )


@contract(Op.CONV_2D)
def _conv_2d_contract(t: Tensor) -> None:
    """src0 (width, height, channels, results), src1 (width, height, channels, pictures)."""
    kernel, x = _require_convolution(t)
    require(kernel.ne[2] == x.ne[2], f"{x.ne[2]} channels for a kernel of {kernel.ne[2]}")
    height, width = _places(_axes(t, kernel, x, 2))
    checks.shape(t, (width, height, kernel.ne[3], x.ne[3]), "the result")


@reference(Op.CONV_2D)
def _conv_2d(ctx: ArrayContext, t: Tensor) -> None:
    kernel, x = source(t, 0), source(t, 1)
    axes = _axes(t, kernel, x, 2)
    _convolve(ctx, ctx.f32(kernel), _inputs(ctx, kernel, x), axes, ctx.view(t))


def _volumes_of_conv_3d(t: Tensor) -> tuple[int, int, int]:
    """(channels, volumes, results): factors of the last dimensions of sources and result."""
    channels, n, outputs = t.op_params[9:12]
    return channels, n, outputs


@contract(Op.CONV_3D)
def _conv_3d_contract(t: Tensor) -> None:
    """src0 (width, height, depth, channels * results), src1 (..., channels * volumes)."""
    kernel, x = _require_convolution(t)
    channels, n, outputs = sizes = _volumes_of_conv_3d(t)
    require(min(sizes) >= 0, f"channels, volumes, results {sizes}")
    checks.shape(kernel, (*kernel.ne[:3], channels * outputs), "source 0")
    checks.shape(x, (*x.ne[:3], channels * n), "source 1")
    depth, height, width = _places(_axes(t, kernel, x, 3))
    checks.shape(t, (width, height, depth, outputs * n), "the result")


@reference(Op.CONV_3D)
def _conv_3d(ctx: ArrayContext, t: Tensor) -> None:
    kernel, x = source(t, 0), source(t, 1)
    channels, n, outputs = _volumes_of_conv_3d(t)
    axes = _axes(t, kernel, x, 3)
    weights, values, target = ctx.f32(kernel), _inputs(ctx, kernel, x), ctx.view(t)
    _convolve(
        ctx,
        weights.reshape(outputs, channels, *weights.shape[1:]),
        values.reshape(n, channels, *values.shape[1:]),
        axes,
        target.reshape(n, outputs, *target.shape[1:]),
    )


# -- CONV_2D_DW ------------------------------------------------------------------------------------


@contract(Op.CONV_2D_DW)
def _conv_2d_dw_contract(t: Tensor) -> None:
    """src0 (width, height, 1, channels): each channel of src1 has a kernel of its own.

    In memory channels may be the innermost dimension, of the result too: strides tell.
    """
    kernel, x = _require_convolution(t)
    checks.shape(kernel, (*kernel.ne[:2], 1, x.ne[2]), "source 0")
    height, width = _places(_axes(t, kernel, x, 2))
    checks.shape(t, (width, height, *x.ne[2:]), "the result")


@reference(Op.CONV_2D_DW)
def _conv_2d_dw(ctx: ArrayContext, t: Tensor) -> None:
    """Unlike the other convolutions this one doesn't round its input for a kernel of F16."""
    kernel, x, target = ctx.f32(source(t, 0)), ctx.view(source(t, 1)), ctx.view(t)
    target[...] = 0
    for (row, column), places, samples in each_tap(_axes(t, source(t, 0), source(t, 1), 2)):
        ctx.look()
        weights = kernel[:, 0, row, column][:, None, None]
        target[(..., *places)] += weights * x[(..., *samples)]


# -- CONV_TRANSPOSE_1D, CONV_TRANSPOSE_2D ----------------------------------------------------------


def _axes_transposed(t: Tensor, n: int) -> list[Axis]:
    """The input's elements are the places from which the kernel adds to the result's."""
    kernel, x, stride = source(t, 0), source(t, 1), t.param_i32(0)
    require(stride > 0, f"stride {stride}")
    return [
        Axis((x.ne[i] - 1) * stride + kernel.ne[i], kernel.ne[i], x.ne[i], stride)
        for i in reversed(range(n))
    ]


@contract(Op.CONV_TRANSPOSE_1D, Op.CONV_TRANSPOSE_2D)
def _transposed_contract(t: Tensor) -> None:
    """src0 (width, [height,] results, channels), src1 (width, [height,] channels, pictures).

    op_params: the stride of all dimensions; of lines, which are one picture, padding and dilation.
    """
    kernel, x = _require_convolution(t)
    n = 1 if t.op is Op.CONV_TRANSPOSE_1D else 2
    if n == 1:
        require(t.op_params[1:3] == (0, 1), f"padding, dilation {t.op_params[1:3]}")
        checks.shape(x, (*x.ne[:2], 1, 1), "source 1")
    checks.shape(kernel, (*kernel.ne[: n + 1], x.ne[n], 1)[:4], "source 0")
    samples = [axis.samples for axis in _axes_transposed(t, n)]
    checks.shape(t, (*samples[::-1], kernel.ne[n], x.ne[n + 1], 1)[:4], "the result")


@reference(Op.CONV_TRANSPOSE_1D, Op.CONV_TRANSPOSE_2D)
def _transposed(ctx: ArrayContext, t: Tensor) -> None:
    n = 1 if t.op is Op.CONV_TRANSPOSE_1D else 2
    kernel, x = ctx.f32(source(t, 0)), _inputs(ctx, source(t, 0), source(t, 1))
    target = ctx.view(t)
    if n == 1:
        kernel, x, target = kernel[0], x[0], target[0]
    # A product for each element of the window, which is a matrix: (*taps, results, channels).
    weights = ctx.xp.ascontiguousarray(kernel.transpose(*range(2, 2 + n), 1, 0))
    inputs = ctx.xp.ascontiguousarray(x).reshape(*x.shape[:2], math.prod(x.shape[2:]))

    def columns(tap: Tap) -> Any:
        return (weights[tap] @ inputs).reshape(x.shape[0], kernel.shape[1], *x.shape[2:])

    scatter(columns, _axes_transposed(t, n), target)
