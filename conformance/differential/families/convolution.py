"""Convolutions of lines, pictures and volumes, direct, transposed, or as columns for a product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from client.builder.signals import Pair, Triple
from conformance.differential.compare import PRODUCT_NMSE, Check
from conformance.differential.sketch import Sketch, family
from conformance.differential.type_sets import BF16, F16, F32
from conformance.differential.values import ValueKind
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor

PRODUCT = Check(bound=PRODUCT_NMSE)

_NUMBERS = (ValueKind.NORMAL, ValueKind.NORMAL, ValueKind.SPECIAL)
# Not-a-number and infinities meet the zeros of paddings, in some ops and not in others.
_FACTORS = (*[ValueKind.NORMAL] * 5, ValueKind.INFINITE, ValueKind.SPECIAL)

_CHANNELS = (3, 1, 2, 4, 5, 8, 9, 16, 17, 33)

Types = tuple[GgmlType, GgmlType]


@dataclass(frozen=True, slots=True)
class _Axis:
    """One dimension: ``taps`` of the kernel at ``places`` on ``samples``."""

    samples: int
    taps: int
    stride: int
    padding: int
    dilation: int

    @property
    def places(self) -> int:
        room = self.samples + 2 * self.padding - self.dilation * (self.taps - 1) - 1
        return math.trunc(room / self.stride) + 1


def _axis(s: Sketch, most: int, least: int = 1) -> _Axis:
    """Numbers that leave at least one place; ``most`` samples beyond what that takes."""
    taps = s.pick((3, 1, 2, 4, 5, 7, 11))
    stride = s.pick((1, 1, 2, 3, 5, 16))
    dilation = s.pick((1, 1, 1, 2, 3))
    padding = s.pick((0, 1, taps // 2, taps - 1, 2, 9, -1))
    covered = dilation * (taps - 1) + 1 - 2 * padding
    # C divides towards zero: of a window too large by less than a stride there is a place, too.
    fewer = s.integer(0, stride - 1) if s.seldom() else 0
    samples = max(covered - fewer, least) + s.pick((0, 1, s.integer(0, most)))
    return _Axis(samples, taps, stride, padding, dilation)


def _axes(s: Sketch, n: int, most: int, least: int = 1) -> list[_Axis]:
    return [_axis(s, most, least) for _ in range(n)]


def _samples(axes: Sequence[_Axis]) -> list[int]:
    return [axis.samples for axis in axes]


def _taps(axes: Sequence[_Axis]) -> list[int]:
    return [axis.taps for axis in axes]


def _pairs(axes: Sequence[_Axis]) -> tuple[Pair, Pair, Pair]:
    """Strides, paddings, dilations of two dimensions; of a line's second there are none."""
    first = axes[0]
    if len(axes) == 1:
        return (first.stride, 0), (first.padding, 0), (first.dilation, 0)
    a, b = axes
    return (a.stride, b.stride), (a.padding, b.padding), (a.dilation, b.dilation)


def _triples(axes: Sequence[_Axis]) -> tuple[Triple, Triple, Triple]:
    a, b, c = axes
    return (
        (a.stride, b.stride, c.stride),
        (a.padding, b.padding, c.padding),
        (a.dilation, b.dilation, c.dilation),
    )


def _batches(s: Sketch) -> int:
    return 0 if s.seldom() and s.seldom() else s.pick((1, 2, 3))


def _channels(s: Sketch) -> int:
    """Those that are summed over; of none the sum is zero."""
    return 0 if s.seldom() and s.seldom() else s.pick((*_CHANNELS, 65))


# -- IM2COL, IM2COL_3D, IM2COL_BACK ----------------------------------------------------------------


@family(
    Op.IM2COL,
    variants=[(n, *types) for n in (1, 2) for types in ((F32, F32), (F32, F16), (F16, F16))],
    examples=60,
)
def _im2col(s: Sketch, variant: tuple[int, GgmlType, GgmlType]) -> None:
    n, type, result = variant
    axes, channels = _axes(s, n, 200 if n == 1 else 16), s.pick(_CHANNELS)
    # Only the kernel's sizes count.
    kernel = s.leaf(s.pick((F16, F32)), (*_taps(axes), channels, s.integer(1, 3)))
    # Lines of a picture are read as if they were dense.
    shape = (*_samples(axes), channels, _batches(s))
    x = s.leaf(type, shape, _NUMBERS, layout="planes" if n == 2 else "rows")
    s.output(s.g.im2col(kernel, x, *_pairs(axes), is_2d=n == 2, type=result))


@family(Op.IM2COL_3D, variants=[F32, F16], examples=125)
def _im2col_3d(s: Sketch, result: GgmlType) -> None:
    axes, channels = _axes(s, 3, 5), s.integer(1, 4)
    kernel = s.leaf(s.pick((F16, F32)), (*_taps(axes), channels * s.integer(1, 3)))
    # Channels that don't make up a volume are left out.
    planes = channels * s.integer(1, 2) + (s.integer(0, channels - 1) if s.seldom() else 0)
    x = s.leaf(F32, (*_samples(axes), planes), _NUMBERS, layout="rows")
    s.output(s.g.im2col_3d(kernel, x, channels, *_triples(axes), type=result))


@family(
    Op.IM2COL_BACK,
    variants=[(n, kernel) for n in (1, 2) for kernel in (F32, F16)],
    examples=70,
)
def _im2col_back(s: Sketch, variant: tuple[int, GgmlType]) -> None:
    n, type = variant
    axes, channels = _axes(s, n, 200 if n == 1 else 16), s.pick(_CHANNELS[:6])
    batches = s.integer(1, 3)
    kernel = s.leaf(type, (*_taps(axes), channels, s.integer(1, 3)))
    columns = (math.prod(_taps(axes)) * channels, *(axis.places for axis in axes), batches)
    gradients = s.leaf(F32, columns, _NUMBERS, layout="contiguous")
    ne = (*_samples(axes), channels, batches)
    s.output(s.g.im2col_back(gradients, kernel, ne, *_pairs(axes), is_2d=n == 2))


# -- COL2IM_1D -------------------------------------------------------------------------------------


@family(Op.COL2IM_1D, variants=[F32, F16, BF16], examples=90)
def _col2im_1d(s: Sketch, type: GgmlType) -> None:
    taps, channels, places = s.pick((4, 1, 2, 3, 6, 8, 16)), s.pick(_CHANNELS), s.size(100)
    stride = s.pick((1, 2, 3, 8, taps, taps + 2))
    whole = (places - 1) * stride + taps
    padding = s.pick((0, 0, min(taps // 2, (whole - 1) // 2), s.integer(0, (whole - 1) // 2)))
    x = s.leaf(type, (taps * channels, places), _NUMBERS, layout="contiguous")
    s.output(s.g.col2im_1d(x, stride, channels, padding), None if type is F32 else PRODUCT)


# -- CONV_2D, CONV_3D ------------------------------------------------------------------------------


@family(Op.CONV_2D, variants=[F32, F16], examples=150)
def _conv_2d(s: Sketch, type: GgmlType) -> None:
    axes, channels, outputs = _axes(s, 2, 20), _channels(s), s.pick(_CHANNELS)
    kernel = s.leaf(type, (*_taps(axes), channels, outputs), _FACTORS, layout="contiguous")
    x = s.leaf(F32, (*_samples(axes), channels, _batches(s)), _FACTORS)
    s.output(s.g.conv_2d_direct(kernel, x, *_pairs(axes)), PRODUCT)


@family(Op.CONV_3D, variants=[F32, F16], examples=125)
def _conv_3d(s: Sketch, type: GgmlType) -> None:
    axes = _axes(s, 3, 5)
    channels, outputs, n = s.integer(1, 4), s.integer(1, 5), s.integer(1, 3)
    kernel = s.leaf(type, (*_taps(axes), channels * outputs), _FACTORS, layout="contiguous")
    x = s.leaf(F32, (*_samples(axes), channels * n), _FACTORS)
    s.output(s.g.conv_3d_direct(kernel, x, *_triples(axes), channels, n, outputs), PRODUCT)


# -- CONV_2D_DW ------------------------------------------------------------------------------------


@family(
    Op.CONV_2D_DW,
    variants=[
        (layout, type) for layout in ("width first", "channels first") for type in (F32, F16)
    ],
    examples=90,
)
def _conv_2d_dw(s: Sketch, variant: tuple[str, GgmlType]) -> None:
    """Upstream knows two layouts, both dense, and by the strides of x which it is."""
    layout, type = variant
    # With one channel or one column the second would be no other layout than the first, or none.
    axes = _axes(s, 2, 20, least=2)
    channels, batches = s.pick(_CHANNELS), s.integer(1, 3)
    (width, height), (across, down) = _samples(axes), _taps(axes)
    if layout == "width first":
        kernel = s.leaf(type, (across, down, 1, channels), _FACTORS, layout="contiguous")
        x = s.leaf(F32, (width, height, channels, batches), _FACTORS, layout="contiguous")
        s.output(s.g.conv_2d_dw_direct(kernel, x, *_pairs(axes)))
        return
    channels = max(channels, 2)
    kernel = s.leaf(type, (channels, 1, across, down), _FACTORS, layout="contiguous")
    x = s.leaf(F32, (channels, width, height, batches), _FACTORS, layout="contiguous")
    s.output(
        s.g.conv_2d_dw_direct(
            s.g.permute(kernel, 3, 2, 0, 1), s.g.permute(x, 2, 0, 1, 3), *_pairs(axes)
        )
    )


# -- CONV_TRANSPOSE_1D, CONV_TRANSPOSE_2D ----------------------------------------------------------

_STRIDES = (1, 1, 2, 3, 5, 16)


def _weights(s: Sketch, type: GgmlType, ne: tuple[int, ...], layout: str) -> Tensor:
    return s.leaf(type, ne, _FACTORS, layout=layout)


@family(Op.CONV_TRANSPOSE_1D, variants=[F32, F16], examples=125)
def _conv_transpose_1d(s: Sketch, type: GgmlType) -> None:
    channels, outputs = _channels(s), s.pick(_CHANNELS)
    kernel = _weights(s, type, (s.pick((3, 1, 2, 4, 5, 16)), outputs, channels), "rows")
    x = _weights(s, F32, (s.size(129), channels), "rows")
    s.output(s.g.conv_transpose_1d(kernel, x, s.pick(_STRIDES)))


@family(Op.CONV_TRANSPOSE_2D, variants=[F32, F16], examples=125)
def _conv_transpose_2d(s: Sketch, type: GgmlType) -> None:
    channels, outputs = _channels(s), s.pick(_CHANNELS)
    width, height = s.pick((3, 1, 2, 4)), s.pick((3, 1, 2, 5))
    # Rows of the kernel are read as if they were dense.
    kernel = _weights(s, type, (width, height, outputs, channels), "planes")
    x = _weights(s, F32, (s.size(17), s.size(17), channels, s.integer(1, 3)), "rows")
    s.output(s.g.conv_transpose_2d_p0(kernel, x, s.pick(_STRIDES[:5])), PRODUCT)
