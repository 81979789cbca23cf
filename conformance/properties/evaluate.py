"""The ops of conformance.properties.programs in numpy: values, and how far a server's may be off.

What one rounding decides (sums of two, products of two, copies) has to be equal. Sums of many may
be added up in any order, so their error is bounded by that of the worst order; functions such as
EXP by a few units in the last place; products of F16 by the rounding of their operands to F16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.ggml.ops import GluOp, Op, UnaryOp
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor

Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]

# One rounding to F32, relative; and to F16.
_EPS = 2.0**-24
_EPS_F16 = 2.0**-11
# Functions: units in the last place that ggml's own vector code is off by, and some more.
_FUNCTION = 16 * _EPS
# Below the smallest normal numbers relative errors mean nothing.
_TINY = 1e-36


@dataclass(frozen=True, slots=True)
class Evaluated:
    """``values`` (ne3, ne2, ne1, ne0) and how far off each may be; 0 is equality."""

    values: Array
    tolerance: Array | float = 0.0


Compute = Callable[[Tensor, Sequence[Array]], Evaluated]
_OPS: dict[Op, Compute] = {}


def _for(*ops: Op) -> Callable[[Compute], Compute]:
    def register(compute: Compute) -> Compute:
        for op in ops:
            _OPS[op] = compute
        return compute

    return register


def evaluate(t: Tensor, sources: Sequence[Array]) -> Evaluated:
    """Return what ``t`` has to be, of its sources' values.

    Raises KeyError for an op that isn't known here.
    """
    with np.errstate(all="ignore"):
        return _OPS[t.op](t, sources)


def _tiled(b: Array, shape: tuple[int, ...]) -> Array:
    return np.tile(b, [n // m for n, m in zip(shape, b.shape, strict=True)])


def _shape(t: Tensor) -> tuple[int, ...]:
    return tuple(reversed(t.ne))


def _double(a: Array) -> Doubles:
    return a.astype(np.float64)


# -- one rounding ----------------------------------------------------------------------------------

_PAIRS: dict[Op, Callable[[Array, Array], Array]] = {
    Op.ADD: np.add,
    Op.SUB: np.subtract,
    Op.MUL: np.multiply,
    Op.DIV: np.divide,
}


@_for(Op.ADD, Op.SUB, Op.MUL, Op.DIV)
def _pairs(t: Tensor, s: Sequence[Array]) -> Evaluated:
    return Evaluated(_PAIRS[t.op](s[0], _tiled(s[1], s[0].shape)))


@_for(Op.SCALE)
def _scale(t: Tensor, s: Sequence[Array]) -> Evaluated:
    return Evaluated(s[0] * np.float32(t.param_f32(0)) + np.float32(t.param_f32(1)))


@_for(Op.SQR)
def _sqr(t: Tensor, s: Sequence[Array]) -> Evaluated:
    return Evaluated(s[0] * s[0])


@_for(Op.SQRT)
def _sqrt(t: Tensor, s: Sequence[Array]) -> Evaluated:
    return Evaluated(np.sqrt(s[0]))


@_for(Op.CLAMP)
def _clamp(t: Tensor, s: Sequence[Array]) -> Evaluated:
    return Evaluated(np.clip(s[0], np.float32(t.param_f32(0)), np.float32(t.param_f32(1))))


@_for(Op.LEAKY_RELU)
def _leaky_relu(t: Tensor, s: Sequence[Array]) -> Evaluated:
    return Evaluated(np.where(s[0] > 0, s[0], s[0] * np.float32(t.param_f32(0))))


# -- functions -------------------------------------------------------------------------------------


def _sigmoid(x: Doubles) -> Doubles:
    return 1.0 / (1.0 + np.exp(-x))


_EXACT: dict[UnaryOp, Callable[[Array], Array]] = {
    UnaryOp.NEG: np.negative,
    UnaryOp.ABS: np.abs,
    UnaryOp.RELU: lambda x: np.maximum(x, np.float32(0)),
    UnaryOp.SGN: np.sign,
    UnaryOp.STEP: lambda x: (x > 0).astype(np.float32),
}
_FUNCTIONS: dict[UnaryOp, Callable[[Doubles], Doubles]] = {
    UnaryOp.TANH: np.tanh,
    UnaryOp.SIGMOID: _sigmoid,
    UnaryOp.SILU: lambda x: x * _sigmoid(x),
    UnaryOp.EXP: np.exp,
}


def _close(values: Doubles) -> Evaluated:
    return Evaluated(values, np.abs(values) * _FUNCTION + _TINY)


@_for(Op.UNARY)
def _unary(t: Tensor, s: Sequence[Array]) -> Evaluated:
    kind = UnaryOp(t.op_params[0])
    if kind in _EXACT:
        return Evaluated(_EXACT[kind](s[0]))
    result = _close(_FUNCTIONS[kind](_double(s[0])))
    # The exponential's argument is rounded before it is taken.
    slack = np.minimum(np.abs(_double(s[0])), 100.0) * _EPS * 4
    return Evaluated(result.values, result.tolerance + np.abs(result.values) * slack)


@_for(Op.GLU)
def _glu(t: Tensor, s: Sequence[Array]) -> Evaluated:
    kind, swapped = GluOp(t.op_params[0]), t.op_params[1]
    if len(s) > 1:
        gate, value = s[0], s[1]
    else:
        gate, value = np.split(s[0], 2, axis=-1)
        if swapped:
            gate, value = value, gate
    if kind is GluOp.REGLU:
        return Evaluated(np.where(gate > 0, gate, np.float32(0)) * value)
    x = _double(gate)
    values = x * _sigmoid(x) * _double(value)
    slack = np.minimum(np.abs(x), 100.0) * _EPS * 4 + _FUNCTION
    return Evaluated(values, np.abs(values) * slack + _TINY * (1 + np.abs(_double(value))))


# -- sums ------------------------------------------------------------------------------------------


def _summed(values: Doubles, magnitudes: Doubles, n: int) -> Evaluated:
    """Sums of ``n`` terms in any order; ``magnitudes`` are the sums of their absolute values."""
    return Evaluated(values, magnitudes * (_EPS * (n + 2)) + _TINY)


@_for(Op.SUM_ROWS)
def _sum_rows(t: Tensor, s: Sequence[Array]) -> Evaluated:
    x = _double(s[0])
    sums, all_ = x.sum(-1, keepdims=True), np.abs(x).sum(-1, keepdims=True)
    return _summed(sums, all_, x.shape[-1])


@_for(Op.MEAN)
def _mean(t: Tensor, s: Sequence[Array]) -> Evaluated:
    x = _double(s[0])
    sums, all_ = x.mean(-1, keepdims=True), np.abs(x).mean(-1, keepdims=True)
    return _summed(sums, all_, x.shape[-1])


@_for(Op.SUM)
def _sum(t: Tensor, s: Sequence[Array]) -> Evaluated:
    x = _double(s[0])
    shape = (1, 1, 1, 1)
    return _summed(x.sum().reshape(shape), np.abs(x).sum().reshape(shape), x.size)


@_for(Op.CUMSUM)
def _cumsum(t: Tensor, s: Sequence[Array]) -> Evaluated:
    x = _double(s[0])
    return _summed(np.cumsum(x, -1), np.cumsum(np.abs(x), -1), x.shape[-1])


@_for(Op.MUL_MAT)
def _mul_mat(t: Tensor, s: Sequence[Array]) -> Evaluated:
    a, b = _double(s[0]), _double(s[1])
    a = np.repeat(np.repeat(a, b.shape[0] // a.shape[0], 0), b.shape[1] // a.shape[1], 1)
    values = b @ a.swapaxes(-1, -2)
    magnitudes = np.abs(b) @ np.abs(a).swapaxes(-1, -2)
    result = _summed(values, magnitudes, a.shape[-1])
    source = t.src[0]
    if source is not None and source.type is GgmlType.F16:
        # Activations are rounded to F16 too, to an absolute error where they are very small.
        small = np.full_like(b, 2.0**-25) @ np.abs(a).swapaxes(-1, -2)
        return Evaluated(values, result.tolerance + magnitudes * _EPS_F16 + small)
    return result


# -- norms -----------------------------------------------------------------------------------------


@_for(Op.NORM)
def _norm(t: Tensor, s: Sequence[Array]) -> Evaluated:
    x, n = _double(s[0]), s[0].shape[-1]
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    root = np.sqrt(variance + t.param_f32(0))
    # The mean is off by as much as sums are, and so is every difference from it.
    off = np.abs(x).max(-1, keepdims=True) * _EPS * (n + 4)
    values = centred / root
    return Evaluated(values, off / root * (1 + np.abs(values)) + np.abs(values) * _EPS * (n + 8))


@_for(Op.RMS_NORM)
def _rms_norm(t: Tensor, s: Sequence[Array]) -> Evaluated:
    x, n = _double(s[0]), s[0].shape[-1]
    values = x / np.sqrt((x**2).mean(-1, keepdims=True) + t.param_f32(0))
    return Evaluated(values, np.abs(values) * _EPS * (n + 8) + _TINY)


@_for(Op.L2_NORM)
def _l2_norm(t: Tensor, s: Sequence[Array]) -> Evaluated:
    x, n = _double(s[0]), s[0].shape[-1]
    length = np.maximum(np.sqrt((x**2).sum(-1, keepdims=True)), t.param_f32(0))
    values = x / length
    return Evaluated(values, np.abs(values) * _EPS * (n + 8) + _TINY)


@_for(Op.SOFT_MAX)
def _soft_max(t: Tensor, s: Sequence[Array]) -> Evaluated:
    x = _double(s[0] * np.float32(t.param_f32(0)))
    if len(s) > 1:
        x = x + _double(s[1][:, :, : x.shape[2]])
    top = x.max(-1, keepdims=True)
    powers = np.exp(x - top)
    values = powers / powers.sum(-1, keepdims=True)
    # What the exponent is rounded by, the result is off by, relatively: also by the greatest's.
    finite = np.where(np.isfinite(x), np.abs(x), 0.0)
    slack = (finite.max(-1, keepdims=True) * 4 + x.shape[-1] + 32) * _EPS
    return Evaluated(values, values * slack + _TINY)


# -- moving ----------------------------------------------------------------------------------------


@_for(Op.REPEAT)
def _repeat(t: Tensor, s: Sequence[Array]) -> Evaluated:
    return Evaluated(_tiled(s[0], _shape(t)))


@_for(Op.CONCAT)
def _concat(t: Tensor, s: Sequence[Array]) -> Evaluated:
    return Evaluated(np.concatenate(s[:2], axis=3 - t.op_params[0]))


@_for(Op.CPY, Op.CONT, Op.DUP)
def _copy(t: Tensor, s: Sequence[Array]) -> Evaluated:
    moved = np.ascontiguousarray(s[0]).reshape(_shape(t))
    return Evaluated(
        moved.astype(np.float16) if t.type is GgmlType.F16 else moved.astype(np.float32)
    )


@_for(Op.GET_ROWS)
def _get_rows(t: Tensor, s: Sequence[Array]) -> Evaluated:
    table, ids = s[0], s[1][0]
    i3 = np.arange(table.shape[0])[:, None, None]
    i2 = np.arange(table.shape[1])[:, None]
    return Evaluated(table[i3, i2, ids].astype(np.float32))


@_for(Op.SET_ROWS)
def _set_rows(t: Tensor, s: Sequence[Array]) -> Evaluated:
    rows, ids, into = s[0], s[1].reshape(-1), s[2].copy()
    into[:, :, ids] = rows
    return Evaluated(into)


@_for(Op.ARGSORT)
def _argsort(t: Tensor, s: Sequence[Array]) -> Evaluated:
    keys = -s[0] if t.op_params[0] else s[0]
    return Evaluated(np.argsort(keys, axis=-1, kind="stable").astype(np.int32))


@_for(Op.PAD)
def _pad(t: Tensor, s: Sequence[Array]) -> Evaluated:
    pairs = [(t.op_params[2 * i], t.op_params[2 * i + 1]) for i in range(4)]
    return Evaluated(np.pad(s[0], list(reversed(pairs))))


@_for(Op.ROLL)
def _roll(t: Tensor, s: Sequence[Array]) -> Evaluated:
    return Evaluated(np.roll(s[0], tuple(reversed(t.op_params[:4])), axis=(0, 1, 2, 3)))


@_for(Op.DIAG_MASK_ZERO)
def _diag_mask_zero(t: Tensor, s: Sequence[Array]) -> Evaluated:
    _, _, rows, columns = s[0].shape
    beyond = np.arange(columns) > t.op_params[0] + np.arange(rows)[:, None]
    return Evaluated(np.where(beyond, np.float32(0), s[0]))


KNOWN = frozenset(_OPS)
