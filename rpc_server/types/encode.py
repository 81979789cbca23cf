"""Encoders of block types: float32 (blocks, block size) to uint8 (blocks, type size).

They follow ggml's reference encoders to the bit, which decides details that look arbitrary: sums
run in float32 from left to right, of equal extremes the first counts, and "round" is to nearest
with ties away from zero, to nearest even, or adding a half and cutting off, as the type has it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from protocol.ggml_types import GgmlType
from rpc_server.types.tables import E8M0_VALUES, FP4_VALUES, IQ4_VALUES, UE4M3_VALUES

# uint8 and float32, a row for each block.
Bytes = np.ndarray[Any, Any]
Floats = np.ndarray[Any, Any]
Encoder = Callable[[Floats], Bytes]

# Below this an IQ4_NL block counts as zero.
_IQ4_EPSILON = np.float32(1e-15)


def _round_away(x: Floats) -> Floats:
    # Adding a half first would round the largest float below 0.5 up.
    whole = np.trunc(x)
    return np.where(np.abs(x - whole) >= 0.5, whole + np.copysign(np.float32(1), x), whole)


def _inverse(d: Floats) -> Floats:
    return np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)


def _extreme(x: Floats) -> Floats:
    """The element farthest from zero, sign kept; +0 if all are zero."""
    at = np.abs(x).argmax(axis=-1, keepdims=True)
    value = np.take_along_axis(x, at, axis=-1)
    return np.where(value == 0, np.float32(0), value)


def _sum_in_order(x: Floats) -> Floats:
    return np.add.accumulate(x, axis=-1, dtype=np.float32)[:, -1:]


def _f16(x: Floats) -> Bytes:
    return x.astype(np.float16).view(np.uint8)


def _nibbles(codes: Bytes, group: int = 32) -> Bytes:
    """Codes below 16: those of the first half of each group go to the low nibbles."""
    halves = codes.reshape(len(codes), -1, 2, group // 2)
    packed: Bytes = halves[:, :, 0] | (halves[:, :, 1] << 4)
    return packed.reshape(len(codes), -1)


def _low_and_high(codes: Bytes, bits: int) -> list[Bytes]:
    """The code fields of a block: for 5 bits, the fifth ones come first as a bit field."""
    if bits == 4:
        return [_nibbles(codes)]
    return [np.packbits(codes >> 4, axis=-1, bitorder="little"), _nibbles(codes & 15)]


def _symmetric(x: Floats, bits: int) -> Bytes:
    # Q4_0, Q5_0: the extreme is mapped to the lowest code, whichever sign it has.
    half = 1 << (bits - 1)
    d = _extreme(x) / np.float32(-half)
    codes = (x * _inverse(d) + np.float32(half + 0.5)).astype(np.int8)
    codes = np.minimum(codes, 2 * half - 1).astype(np.uint8)
    return np.concatenate([_f16(d), *_low_and_high(codes, bits)], axis=-1)


def _affine(x: Floats, bits: int) -> Bytes:
    # Q4_1, Q5_1
    top = (1 << bits) - 1
    low = np.take_along_axis(x, x.argmin(axis=-1, keepdims=True), axis=-1)
    high = np.take_along_axis(x, x.argmax(axis=-1, keepdims=True), axis=-1)
    d = (high - low) / np.float32(top)
    codes = ((x - low) * _inverse(d) + np.float32(0.5)).astype(np.int8)
    codes = np.minimum(codes, top).astype(np.uint8)
    return np.concatenate([_f16(d), _f16(low), *_low_and_high(codes, bits)], axis=-1)


def _eight_bits(x: Floats) -> tuple[Floats, np.ndarray[Any, Any]]:
    d = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    return d, _round_away(x * _inverse(d)).astype(np.int8)


def _q8_0(x: Floats) -> Bytes:
    d, q = _eight_bits(x)
    return np.concatenate([_f16(d), q.view(np.uint8)], axis=-1)


def _q8_1(x: Floats) -> Bytes:
    # The sum uses d before it is rounded to half precision.
    d, q = _eight_bits(x)
    total = q.sum(axis=-1, keepdims=True, dtype=np.int32).astype(np.float32)
    return np.concatenate([_f16(d), _f16(total * d), q.view(np.uint8)], axis=-1)


def _q8_k(x: Floats) -> Bytes:
    extreme = _extreme(x)
    zero = extreme == 0
    scale = np.where(zero, np.float32(0), np.float32(-127) / extreme)
    q = np.minimum(np.rint(scale * x).astype(np.int32), 127).astype(np.int8)
    sums = q.reshape(len(q), 16, 16).sum(axis=-1, dtype=np.int16)
    d = _inverse(scale)
    return np.concatenate([d.view(np.uint8), q.view(np.uint8), sums.view(np.uint8)], axis=-1)


def _q1_0(x: Floats) -> Bytes:
    d = _sum_in_order(np.abs(x)) / np.float32(128)
    return np.concatenate([_f16(d), np.packbits(x >= 0, axis=-1, bitorder="little")], axis=-1)


def _q2_0(x: Floats) -> Bytes:
    d = np.abs(x).max(axis=-1, keepdims=True)
    codes = np.clip(_round_away(x * _inverse(d)) + 1, 0, 3).astype(np.uint8)
    codes = codes.reshape(len(x), -1, 4) << np.array([0, 2, 4, 6], np.uint8)
    return np.concatenate([_f16(d), np.bitwise_or.reduce(codes, axis=-1)], axis=-1)


def _ternary(x: Floats) -> tuple[Floats, np.ndarray[Any, Any]]:
    d = np.abs(x).max(axis=-1, keepdims=True)
    return d, (_round_away(x * _inverse(d)) + 1).astype(np.int32)


def _tq1_0(x: Floats) -> Bytes:
    # A byte holds five ternary digits as the fraction n / 243; the last four bytes hold four.
    d, digits = _ternary(x)
    fields: list[Any] = []
    start = 0
    for width, count in ((32, 5), (16, 5), (4, 4)):
        group = digits[:, start : start + width * count].reshape(len(x), count, width)
        start += width * count
        weights = 3 ** np.arange(4, 4 - count, -1)
        fields.append((group * weights[:, None]).sum(axis=1))
    packed = (np.concatenate(fields, axis=-1) * 256 + 242) // 243
    return np.concatenate([packed.astype(np.uint8), _f16(d)], axis=-1)


def _tq2_0(x: Floats) -> Bytes:
    d, digits = _ternary(x)
    groups = digits.reshape(len(x), 2, 4, 32) << np.array([0, 2, 4, 6])[:, None]
    codes = np.bitwise_or.reduce(groups, axis=2).reshape(len(x), 64).astype(np.uint8)
    return np.concatenate([codes, _f16(d)], axis=-1)


def _iq4_nl(x: Floats) -> Bytes:
    # A least-squares scale for the codes that the extreme element's scale gives.
    extreme = _extreme(x)
    d = extreme / IQ4_VALUES[0]
    zero = np.abs(extreme) < _IQ4_EPSILON
    scaled = x * np.where(zero, np.float32(0), np.float32(1) / d)
    above = np.clip(np.searchsorted(IQ4_VALUES, scaled, side="right"), 1, 15)
    lower_is_nearer = scaled - IQ4_VALUES[above - 1] < IQ4_VALUES[above] - scaled
    codes = np.where(lower_is_nearer, above - 1, above)
    q, weight = IQ4_VALUES[codes], x * x
    sum_qx = _sum_in_order(weight * q * x)
    sum_q2 = _sum_in_order(weight * q * q)
    fitted = np.where((sum_q2 > 0) & ~zero, sum_qx / sum_q2, np.float32(0))
    # ggml leaves the codes of a zero block as they happened to be; its scale makes them zeros.
    codes = np.where(zero, 0, codes).astype(np.uint8)
    return np.concatenate([_f16(fitted), _nibbles(codes)], axis=-1)


def _nearest_fp4(x: Floats, scale: Floats) -> Bytes:
    errors = np.abs(FP4_VALUES * scale[..., None] - x[..., None])
    codes: Bytes = errors.argmin(axis=-1).astype(np.uint8)
    return codes


def _mxfp4(x: Floats) -> Bytes:
    largest = np.abs(x).max(axis=-1, keepdims=True)
    # Rounded to float32 before the floor: just below a power of two counts as that power.
    exponent = np.floor(np.log2(largest.astype(np.float64)).astype(np.float32))
    e = np.where(largest > 0, exponent - 2 + 127, 0).astype(np.int32).astype(np.uint8)
    return np.concatenate([e, _nibbles(_nearest_fp4(x, E8M0_VALUES[e]))], axis=-1)


def _to_ue4m3(x: Floats) -> Bytes:
    """Non-negative float32 to unsigned E4M3, mantissa ties up; from 248 on it is 448."""
    x = np.minimum(x, np.float32(448))
    bits = x.view(np.int32)
    exponent = (bits >> 23) - 127 + 7
    # A mantissa that rounds up to 8 carries into the exponent by itself.
    normal = (exponent << 3) + ((bits >> 20) & 7) + ((bits >> 19) & 1)
    normal = np.where(normal >= 15 << 3, 0x7E, normal)
    subnormal = np.minimum((x * np.float32(512) + np.float32(0.5)).astype(np.int32), 7)
    code = np.where(exponent <= 0, subnormal, normal)
    return np.where(x > 0, code, 0).astype(np.uint8)


def _nvfp4(x: Floats) -> Bytes:
    groups = x.reshape(len(x), 4, 16)
    scales = _to_ue4m3(np.abs(groups).max(axis=-1) / np.float32(6))
    codes = _nearest_fp4(groups, UE4M3_VALUES[scales][..., None])
    return np.concatenate([scales, _nibbles(codes.reshape(len(x), 64), 16)], axis=-1)


ENCODERS: dict[GgmlType, Encoder] = {
    GgmlType.Q4_0: functools.partial(_symmetric, bits=4),
    GgmlType.Q5_0: functools.partial(_symmetric, bits=5),
    GgmlType.Q4_1: functools.partial(_affine, bits=4),
    GgmlType.Q5_1: functools.partial(_affine, bits=5),
    GgmlType.Q8_0: _q8_0,
    GgmlType.Q8_1: _q8_1,
    GgmlType.Q8_K: _q8_k,
    GgmlType.Q1_0: _q1_0,
    GgmlType.Q2_0: _q2_0,
    GgmlType.TQ1_0: _tq1_0,
    GgmlType.TQ2_0: _tq2_0,
    GgmlType.IQ4_NL: _iq4_nl,
    GgmlType.MXFP4: _mxfp4,
    GgmlType.NVFP4: _nvfp4,
}
