"""Convolutions, pooling, resizing and padding of lines, pictures and volumes; ranges and steps.

Numbers for several dimensions are tuples, dimension 0 (width) first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from client.builder.nodes import NodeFactory
from client.tensors import dims, require
from protocol.ggml.ops import Op
from protocol.ggml.types import TYPE_INFO, GgmlType
from protocol.tensor import Dims, Tensor

# ggml_op_pool.
POOL_MAX = 0
POOL_AVG = 1

# ggml_scale_mode and its flags.
SCALE_NEAREST = 0
SCALE_BILINEAR = 1
SCALE_BICUBIC = 2
SCALE_ALIGN_CORNERS = 1 << 8
SCALE_ANTIALIAS = 1 << 9

Pair = tuple[int, int]
Padding = tuple[float, float]
Triple = tuple[int, int, int]


def _outputs(
    kernel: Tensor,
    x: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Places of a kernel in each dimension that there are numbers for, divided as C does."""
    require(min(stride) > 0, f"strides {stride} of a convolution")
    numbers = zip(x.ne, kernel.ne, stride, padding, dilation, strict=False)
    return [math.trunc((n + 2 * p - d * (k - 1) - 1) / s) + 1 for n, k, s, p, d in numbers]


def _pooled(ins: int, width: int, stride: int, padding: float) -> int:
    """Places of a window. ggml's paddings may be fractions: it computes in single precision."""
    f = np.float32
    return int((f(ins) + f(2) * f(padding) - f(width)) / f(stride) + f(1))


class SignalOps(NodeFactory):
    """Results are F32 and dense unless said otherwise."""

    # -- convolutions as columns

    def im2col(
        self,
        kernel: Tensor,
        image: Tensor,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        *,
        is_2d: bool = True,
        type: GgmlType = GgmlType.F16,
    ) -> Tensor:
        """Return the image's patches as rows, for a product with the kernel; of ``type``.

        ``kernel`` (KW, KH, IC, OC) and ``image`` (W, H, IC, N) give (IC*KH*KW, OW, OH, N);
        without ``is_2d`` (KW, IC, OC) and (W, IC, N) give (IC*KW, OW, N).
        """
        n = 2 if is_2d else 1
        fits = kernel.ne[n] == image.ne[n] and (is_2d or image.ne[3] == 1)
        require(fits, f"im2col: {kernel!r} and {image!r} don't fit")
        places = _outputs(kernel, image, stride[:n], padding[:n], dilation[:n])
        require(min(places) > 0, f"im2col: {image!r} is too small for {kernel!r}")
        ne = (math.prod(kernel.ne[: n + 1]), *places, image.ne[n + 1])
        params = (*stride, *padding, *dilation, int(is_2d))
        return self.op(Op.IM2COL, type, ne, (kernel, image), params)

    def im2col_back(
        self,
        gradients: Tensor,
        kernel: Tensor,
        ne: Sequence[int],
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        *,
        is_2d: bool = True,
    ) -> Tensor:
        """Return gradients of an image of ``ne`` from those of its :meth:`im2col`."""
        params = (*stride, *padding, *dilation, int(is_2d))
        return self.op(Op.IM2COL_BACK, GgmlType.F32, ne, (gradients, kernel), params)

    def im2col_3d(
        self,
        kernel: Tensor,
        x: Tensor,
        channels: int,
        stride: Triple,
        padding: Triple,
        dilation: Triple,
        *,
        type: GgmlType = GgmlType.F16,
    ) -> Tensor:
        """Return patches of volumes as rows: (IC*KD*KH*KW, OW, OH, OD*N) of ``type``.

        ``kernel`` is (KW, KH, KD, IC*OC) and ``x`` (W, H, D, IC*N), with IC ``channels``.
        """
        require(channels > 0, f"im2col_3d: {channels} channels")
        places = _outputs(kernel, x, stride, padding, dilation)
        require(min(places) > 0, f"im2col_3d: {x!r} is too small for {kernel!r}")
        width, height, depth = places
        ne = (math.prod(kernel.ne[:3]) * channels, width, height, depth * (x.ne[3] // channels))
        params = (*stride, *padding, *dilation, channels)
        return self.op(Op.IM2COL_3D, type, ne, (kernel, x), params)

    def col2im_1d(self, columns: Tensor, stride: int, channels: int, padding: int = 0) -> Tensor:
        """Add up ``columns`` (taps * channels, places): (samples, channels) of their type."""
        types = (GgmlType.F32, GgmlType.F16, GgmlType.BF16)
        require(columns.type in types, f"col2im_1d: type of {columns!r}")
        fits = columns.ne[2:] == (1, 1) and columns.contiguous
        require(fits, f"col2im_1d: {columns!r} is not a contiguous matrix")
        numbers = stride > 0 and channels > 0 and padding >= 0
        require(numbers, f"col2im_1d: stride {stride}, {channels} channels, padding {padding}")
        taps, rest = divmod(columns.ne[0], channels)
        samples = (columns.ne[1] - 1) * stride + taps - 2 * padding
        fits = rest == 0 and taps > 0 and samples > 0
        require(fits, f"col2im_1d: {columns!r} for {channels} channels, padding {padding}")
        params = (stride, channels, padding)
        return self.op(Op.COL2IM_1D, columns.type, (samples, channels), (columns,), params)

    # -- convolutions

    def conv_2d_direct(
        self, kernel: Tensor, x: Tensor, stride: Pair, padding: Pair, dilation: Pair
    ) -> Tensor:
        """Return (OW, OH, OC, N) of the type of ``x`` from (KW, KH, IC, OC) and (W, H, IC, N)."""
        require(kernel.ne[2] == x.ne[2], f"conv_2d: {kernel!r} and {x!r} don't fit")
        ne = (*_outputs(kernel, x, stride, padding, dilation), kernel.ne[3], x.ne[3])
        params = (*stride, *padding, *dilation)
        return self.op(Op.CONV_2D, x.type, ne, (kernel, x), params)

    def conv_3d_direct(
        self,
        kernel: Tensor,
        x: Tensor,
        stride: Triple,
        padding: Triple,
        dilation: Triple,
        channels: int,
        n: int,
        outputs: int,
    ) -> Tensor:
        """Return (OW, OH, OD, OC*N) from (KW, KH, KD, IC*OC) and (W, H, D, IC*N)."""
        fits = kernel.ne[3] == channels * outputs and x.ne[3] == channels * n
        require(fits, f"conv_3d: {kernel!r} and {x!r} of {channels} channels")
        ne = (*_outputs(kernel, x, stride, padding, dilation), outputs * n)
        params = (*stride, *padding, *dilation, channels, n, outputs)
        return self.op(Op.CONV_3D, GgmlType.F32, ne, (kernel, x), params)

    def conv_2d_dw_direct(
        self, kernel: Tensor, x: Tensor, stride: Pair, padding: Pair, dilation: Pair
    ) -> Tensor:
        """Convolve each channel of ``x`` (W, H, C, N) with its kernel (KW, KH, 1, C).

        The result is (OW, OH, C, N).

        Where channels are innermost in the memory of ``x``, they are in the result's.
        """
        fits = kernel.ne[2] == 1 and kernel.ne[3] == x.ne[2]
        require(fits, f"conv_2d_dw: {kernel!r} and {x!r} don't fit")
        ne = (*_outputs(kernel, x, stride, padding, dilation), *x.ne[2:])
        params = (*stride, *padding, *dilation)
        result = self.op(Op.CONV_2D_DW, x.type, ne, (kernel, x), params)
        size = TYPE_INFO[x.type].type_size
        if x.nb[1] > x.nb[0] > x.nb[2] == size:
            width, _, channels, _ = result.ne
            result.nb = (channels * size, width * channels * size, size, result.nb[3])
        return result

    def conv_transpose_1d(self, kernel: Tensor, x: Tensor, stride: int) -> Tensor:
        """Return (OW, OC) from (KW, OC, IC) and (W, IC).

        ggml has other paddings than 0 in the name only.

        The dilation is 1.
        """
        fits = x.ne[2:] == (1, 1) and kernel.ne[2] == x.ne[1] and kernel.ne[3] == 1
        require(fits, f"conv_transpose_1d: {kernel!r} and {x!r} don't fit")
        ne = ((x.ne[0] - 1) * stride + kernel.ne[0], kernel.ne[1])
        return self.op(Op.CONV_TRANSPOSE_1D, GgmlType.F32, ne, (kernel, x), (stride, 0, 1))

    def conv_transpose_2d_p0(self, kernel: Tensor, x: Tensor, stride: int) -> Tensor:
        """Return (OW, OH, OC, N) from (KW, KH, OC, IC) and (W, H, IC, N)."""
        require(kernel.ne[3] == x.ne[2], f"conv_transpose_2d: {kernel!r} and {x!r} don't fit")
        width, height = ((x.ne[i] - 1) * stride + kernel.ne[i] for i in range(2))
        ne = (width, height, kernel.ne[2], x.ne[3])
        return self.op(Op.CONV_TRANSPOSE_2D, GgmlType.F32, ne, (kernel, x), (stride,))

    # -- pooling

    def pool_1d(self, a: Tensor, kind: int, width: int, stride: int, padding: int = 0) -> Tensor:
        """Return maxima or means (POOL_MAX, POOL_AVG) of windows along rows."""
        require(stride > 0, f"pool_1d: stride {stride}")
        ne0 = _pooled(a.ne[0], width, stride, padding)
        require(ne0 > 0, f"pool_1d: {a!r} is too small for {width}")
        params = (kind, width, stride, padding)
        return self.op(Op.POOL_1D, GgmlType.F32, (ne0, *a.ne[1:]), (a,), params)

    def pool_2d(
        self, a: Tensor, kind: int, size: Pair, stride: Pair, padding: Padding = (0.0, 0.0)
    ) -> Tensor:
        """Return maxima or means of rectangles.

        Of a padding only the size of the result has fractions.
        """
        require(min(stride) > 0, f"pool_2d: strides {stride}")
        sizes = [_pooled(*numbers) for numbers in zip(a.ne, size, stride, padding, strict=False)]
        require(min(sizes) > 0, f"pool_2d: {a!r} is too small for {size}")
        params = (kind, *size, *stride, *map(int, padding))
        return self.op(Op.POOL_2D, GgmlType.F32, (*sizes, *a.ne[2:]), (a,), params)

    def pool_2d_back(
        self,
        gradients: Tensor,
        a: Tensor,
        kind: int,
        size: Pair,
        stride: Pair,
        padding: Padding = (0.0, 0.0),
    ) -> Tensor:
        """Return gradients of ``a`` from those of its :meth:`pool_2d`."""
        params = (kind, *size, *stride, *map(int, padding))
        return self.op(Op.POOL_2D_BACK, GgmlType.F32, a.ne, (gradients, a), params)

    # -- sizes and ends

    def interpolate(self, a: Tensor, ne: Sequence[int], mode: int = SCALE_NEAREST) -> Tensor:
        """Resize ``a`` (F32) to ``ne`` (ggml_interpolate, ggml_upscale_ext).

        Dimensions 2 and 3 take the nearest element in every mode. ``mode`` is one of SCALE_NEAREST,
        SCALE_BILINEAR, SCALE_BICUBIC with SCALE_ALIGN_CORNERS, and SCALE_ANTIALIAS if bilinear.
        """
        kind = mode & 0xFF
        require(kind <= SCALE_BICUBIC, f"interpolate: no mode {kind}")
        smooth = kind == SCALE_BILINEAR or not mode & SCALE_ANTIALIAS
        require(smooth, f"interpolate: no antialiasing in mode {kind}")
        require(a.type == GgmlType.F32, f"interpolate: {a!r} is not F32")
        return self.op(Op.UPSCALE, a.type, ne, (a,), (mode,))

    def upscale(self, a: Tensor, factor: int, mode: int = SCALE_NEAREST) -> Tensor:
        """Make dimensions 0 and 1 ``factor`` times as large."""
        require(factor > 1, f"upscale: {factor} times")
        return self.interpolate(a, (a.ne[0] * factor, a.ne[1] * factor, *a.ne[2:]), mode)

    def pad_reflect_1d(self, a: Tensor, before: int, behind: int) -> Tensor:
        """Mirror rows (F32) at their ends, without the elements that are the ends."""
        fits = min(before, behind) >= 0 and max(before, behind) < a.ne[0]
        require(fits, f"pad_reflect_1d: {before} and {behind} of {a!r}")
        dense = a.contiguous and a.type == GgmlType.F32
        require(dense, f"pad_reflect_1d: {a!r} is not contiguous F32")
        ne: Dims = dims((a.ne[0] + before + behind, *a.ne[1:]))
        return self.op(Op.PAD_REFLECT_1D, a.type, ne, (a,), (before, behind))

    # -- ranges

    def arange(self, start: float, stop: float, step: float) -> Tensor:
        """Return ``start``, ``start + step``, ... below ``stop``."""
        first, end, by = (np.float32(x) for x in (start, stop, step))
        require(bool(end > first and by > 0), f"arange: {start} to {stop} by {step}")
        steps = int(np.ceil((end - first) / by))
        return self.op(Op.ARANGE, GgmlType.F32, (steps,), (), tuple(map(float, (first, end, by))))

    def timestep_embedding(self, timesteps: Tensor, dim: int, max_period: int) -> Tensor:
        """Return cosines, then sines, of the steps at frequencies down to 1/max_period.

        The result is (dim, steps).
        """
        ne = (dim, timesteps.ne[0])
        return self.op(Op.TIMESTEP_EMBEDDING, GgmlType.F32, ne, (timesteps,), (dim, max_period))
