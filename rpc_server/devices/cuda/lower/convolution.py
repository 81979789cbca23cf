"""Lowerings of convolutions, whole or as columns, of their gradients, and of pools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.devices.cuda.kernels import CudaKernel, kernels
from rpc_server.devices.cuda.lower.walk import elements, small
from rpc_server.devices.cuda.planner import CudaPlanner, lowers
from rpc_server.ops.table import source

_IM2COL, _IM2COL_BACK, _COL2IM, _CONVOLVE, _TRANSPOSED = kernels(
    "convolution", "im2col im2col_back col2im convolve convolve_transposed"
)
_POOL, _POOL_MAXIMA, _POOL_BACK = kernels("convolution", "pool pool_maxima pool_back")

# Flags of convolution.cu.
_HALVES, _PADDED = 1, 2


def _rounding(weights: Tensor) -> int:
    return _HALVES if weights.type is GgmlType.F16 else 0


def _three(numbers: Sequence[int], missing: int) -> list[int]:
    return [*numbers, *[missing] * (3 - len(numbers))]


_Steps = tuple[Sequence[int], Sequence[int], Sequence[int]]


@dataclass(slots=True)
class _Geometry:
    """The words that convolution.cu reads of windows; fewer than three dimensions are filled up.

    Strides of input, kernel and result are bytes: those of dimensions, then of channels and
    batches, of channels and results, of results and batches.
    """

    taps: Sequence[int]
    places: Sequence[int]
    samples: Sequence[int]
    # Strides, paddings and dilations.
    steps: _Steps
    channels: int = 1
    results: int = 1
    input: tuple[Sequence[int], int, int] = ((), 0, 0)
    kernel: tuple[Sequence[int], int, int] = ((), 0, 0)
    result: tuple[Sequence[int], int, int] = ((), 0, 0)
    input_of_result: int = 0

    def launch(self, chosen: CudaKernel, t: Tensor, planner: CudaPlanner, flags: int = 0) -> bool:
        if not small(t, *(s for s in t.src if s is not None)):
            return False
        strides, paddings, dilations = self.steps
        steps = (*_three(strides, 1), *_three(paddings, 0), *_three(dilations, 1))
        dims, *rest = self.result
        extra = [*_three(self.taps, 1), *_three(self.places, 1), *_three(self.samples, 1)]
        extra.append(self.channels)
        for between, one, other in (self.input, self.kernel):
            extra += [*_three(between, 0), one, other]
        extra += [self.results, self.input_of_result, flags]
        params = (*steps, *_three(dims, 0), *rest, 0, 0)
        return elements(chosen, t, planner, *extra, params=params)


def _numbers(t: Tensor, n: int, layout: int) -> _Steps:
    """Strides, paddings and dilations of ``n`` dimensions; op_params have ``layout`` of each."""
    p = t.op_params
    return p[:n], p[layout : layout + n], p[2 * layout : 2 * layout + n]


@lowers(Op.IM2COL, Op.IM2COL_3D)
def lower_im2col(t: Tensor, planner: CudaPlanner) -> bool:
    taps, x = source(t, 0), source(t, 1)
    if t.op is Op.IM2COL_3D:
        n, layout, channels = 3, 3, t.param_i32(9)
        places = [*t.ne[1:3], t.ne[3] // (x.ne[3] // channels)]
        strides = x.nb[3], channels * x.nb[3]
    else:
        n, layout = (2, 2) if t.param_i32(6) == 1 else (1, 2)
        channels, places, strides = x.ne[n], list(t.ne[1 : 1 + n]), (x.nb[n], x.nb[n + 1])
    geometry = _Geometry(
        taps.ne[:n],
        places,
        x.ne[:n],
        _numbers(t, n, layout),
        channels=channels,
        input=(x.nb[:n], *strides),
    )
    return geometry.launch(_IM2COL, t, planner)


@lowers(Op.IM2COL_BACK)
def lower_im2col_back(t: Tensor, planner: CudaPlanner) -> bool:
    gradients, n = source(t, 0), 2 if t.param_i32(6) == 1 else 1
    geometry = _Geometry(
        source(t, 1).ne[:n],
        gradients.ne[1 : 1 + n],
        t.ne[:n],
        _numbers(t, n, 2),
        channels=t.ne[n],
        result=(t.nb[:n] if n == 2 else (t.nb[0], 0), t.nb[n], t.nb[n + 1]),
    )
    return geometry.launch(_IM2COL_BACK, t, planner)


@lowers(Op.COL2IM_1D)
def lower_col2im(t: Tensor, planner: CudaPlanner) -> bool:
    columns, (stride, channels, padding) = source(t, 0), t.op_params[:3]
    taps = columns.ne[0] // channels
    geometry = _Geometry([taps], [columns.ne[1]], [t.ne[0]], ([stride], [padding], [1]))
    return geometry.launch(_COL2IM, t, planner)


@lowers(Op.CONV_2D, Op.CONV_2D_DW)
def lower_conv_2d(t: Tensor, planner: CudaPlanner) -> bool:
    weights, x = source(t, 0), source(t, 1)
    alone = t.op is Op.CONV_2D_DW
    geometry = _Geometry(
        weights.ne[:2],
        t.ne[:2],
        x.ne[:2],
        _numbers(t, 2, 2),
        channels=1 if alone else x.ne[2],
        results=t.ne[2],
        input=(x.nb[:2], 0 if alone else x.nb[2], x.nb[3]),
        kernel=(weights.nb[:2], weights.nb[2], weights.nb[3]),
        result=(t.nb[:2], t.nb[2], t.nb[3]),
        input_of_result=x.nb[2] if alone else 0,
    )
    return geometry.launch(_CONVOLVE, t, planner, 0 if alone else _rounding(weights) | _PADDED)


@lowers(Op.CONV_3D)
def lower_conv_3d(t: Tensor, planner: CudaPlanner) -> bool:
    weights, x = source(t, 0), source(t, 1)
    channels, _, results = t.op_params[9:12]
    geometry = _Geometry(
        weights.ne[:3],
        t.ne[:3],
        x.ne[:3],
        _numbers(t, 3, 3),
        channels=channels,
        results=results,
        input=(x.nb[:3], x.nb[3], channels * x.nb[3]),
        kernel=(weights.nb[:3], weights.nb[3], channels * weights.nb[3]),
        result=(t.nb[:3], t.nb[3], results * t.nb[3]),
    )
    return geometry.launch(_CONVOLVE, t, planner, _rounding(weights) | _PADDED)


@lowers(Op.CONV_TRANSPOSE_1D, Op.CONV_TRANSPOSE_2D)
def lower_transposed(t: Tensor, planner: CudaPlanner) -> bool:
    weights, x = source(t, 0), source(t, 1)
    n = 1 if t.op is Op.CONV_TRANSPOSE_1D else 2
    # Dimensions behind the last: of lines there is one picture.
    batches = 0 if n == 1 else 3
    geometry = _Geometry(
        weights.ne[:n],
        x.ne[:n],
        t.ne[:n],
        ([t.param_i32(0)] * n, [0] * n, [1] * n),
        channels=x.ne[n],
        results=t.ne[n],
        input=(x.nb[:n], x.nb[n], x.nb[batches] if batches else 0),
        kernel=(weights.nb[:n], weights.nb[n + 1], weights.nb[n]),
        result=(t.nb[:n], t.nb[n], t.nb[batches] if batches else 0),
    )
    return geometry.launch(_TRANSPOSED, t, planner, _rounding(weights))


def _pool_words(t: Tensor) -> list[int]:
    """Sizes, strides and paddings of two dimensions."""
    n = 1 if t.op is Op.POOL_1D else 2
    groups = (t.op_params[1 + i * n : 1 + (i + 1) * n] for i in range(3))
    missing = (1, 1, 0)
    return [
        word
        for group, one in zip(groups, missing, strict=True)
        for word in (group if n == 2 else (*group, one))
    ]


@lowers(Op.POOL_1D, Op.POOL_2D)
def lower_pool(t: Tensor, planner: CudaPlanner) -> bool:
    if not small(t, source(t, 0)):
        return False
    return elements(_POOL, t, planner, *_pool_words(t), int(t.op is Op.POOL_1D))


@lowers(Op.POOL_2D_BACK)
def lower_pool_back(t: Tensor, planner: CudaPlanner) -> bool:
    gradients, x = source(t, 0), source(t, 1)
    if not small(t, gradients):
        return False
    words, maxima = _pool_words(t), 0
    if t.param_i32(0) == 0 and not gradients.empty:
        maxima = planner.scratch(8 * gradients.nelements)
        n, slots = gradients.nelements, (gradients, None, x)
        elements(_POOL_MAXIMA, t, planner, *words, maxima, n=n, slots=slots)
    return elements(_POOL_BACK, t, planner, *words, maxima)
