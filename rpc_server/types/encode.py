"""Encoders of block types: float32 (blocks, block size) to uint8 (blocks, type size).

They follow ggml's CPU on x86 to the bit: its reference encoders, but for Q8_0 and Q8_1, for which
it has vector code. That decides details that look arbitrary: sums run in float32 from left to
right, of equal extremes the first counts, and "round" is to nearest with ties away from zero, to
nearest even, or adding a half and cutting off, as the type has it.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from protocol.ggml.tables import E8M0_VALUES, FP4_VALUES, UE4M3_VALUES
from protocol.ggml.types import GgmlType
from rpc_server.types.blocks import (
    Bytes,
    Encoder,
    Floats,
    Integers,
    extreme,
    f16,
    fields,
    in_parts,
    inverse,
    nearest_int,
    nibbles,
    round_away,
    sum_in_order,
)


def _low_and_high(codes: Bytes, bits: int) -> list[Bytes]:
    """The code fields of a block: for 5 bits, the fifth ones come first as a bit field."""
    if bits == 4:
        return [nibbles(codes)]
    return [np.packbits(codes >> 4, axis=-1, bitorder="little"), nibbles(codes & 15)]


def _symmetric(x: Floats, bits: int) -> Bytes:
    # Q4_0, Q5_0: the extreme is mapped to the lowest code, whichever sign it has.
    half = 1 << (bits - 1)
    d = extreme(x) / np.float32(-half)
    codes = (x * inverse(d) + np.float32(half + 0.5)).astype(np.int8)
    codes = np.minimum(codes, 2 * half - 1).astype(np.uint8)
    return np.concatenate([f16(d), *_low_and_high(codes, bits)], axis=-1)


def _affine(x: Floats, bits: int) -> Bytes:
    # Q4_1, Q5_1
    top = (1 << bits) - 1
    low = np.take_along_axis(x, x.argmin(axis=-1, keepdims=True), axis=-1)
    high = np.take_along_axis(x, x.argmax(axis=-1, keepdims=True), axis=-1)
    d = (high - low) / np.float32(top)
    codes = ((x - low) * inverse(d) + np.float32(0.5)).astype(np.int8)
    codes = np.minimum(codes, top).astype(np.uint8)
    return np.concatenate([f16(d), f16(low), *_low_and_high(codes, bits)], axis=-1)


def _eight_bits(x: Floats) -> tuple[Floats, Integers]:
    """Scales and codes; not by ggml's reference, but by its vector code for x86.

    What is not finite is the smallest int32 there, which later saturates.
    """
    largest = np.abs(x).max(axis=-1, keepdims=True)
    scale = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest != 0)
    scaled = np.rint(x * scale)
    finite = np.isfinite(scaled)
    codes = np.where(finite, scaled, np.float32(0)).astype(np.int32)
    codes[~finite] = np.iinfo(np.int32).min
    return largest / np.float32(127), codes


def _saturated(codes: Integers) -> Bytes:
    return np.clip(codes, -128, 127).astype(np.int8).view(np.uint8)


def _q8_0(x: Floats) -> Bytes:
    d, codes = _eight_bits(x)
    return np.concatenate([f16(d), _saturated(codes)], axis=-1)


def _q8_1(x: Floats) -> Bytes:
    # The sum uses d before it is rounded to half precision.
    d, codes = _eight_bits(x)
    total = codes.sum(axis=-1, keepdims=True, dtype=np.int32).astype(np.float32)
    return np.concatenate([f16(d), f16(total * d), _saturated(codes)], axis=-1)


def _q8_k(x: Floats) -> Bytes:
    largest = extreme(x)
    zero = largest == 0
    scale = np.where(zero, np.float32(0), np.float32(-127) / largest)
    q = np.minimum(nearest_int(scale * x), 127).astype(np.int8)
    sums = q.reshape(len(q), 16, 16).sum(axis=-1, dtype=np.int16)
    d = np.where(zero, np.float32(0), np.float32(1) / scale)
    return np.concatenate([d.view(np.uint8), q.view(np.uint8), sums.view(np.uint8)], axis=-1)


def _q1_0(x: Floats) -> Bytes:
    d = sum_in_order(np.abs(x)) / np.float32(128)
    return np.concatenate([f16(d), np.packbits(x >= 0, axis=-1, bitorder="little")], axis=-1)


def _whole_parts(x: Floats, overflow: int) -> tuple[Floats, Integers]:
    """The largest magnitude and the elements as whole multiples of it: -1, 0 or 1.

    The inverse of a subnormal may be infinite; then ``overflow`` stands for what isn't finite.
    """
    d = np.abs(x).max(axis=-1, keepdims=True)
    parts = round_away(x * inverse(d))
    return d, np.where(np.isfinite(parts), parts, np.float32(overflow)).astype(np.int32)


def _q2_0(x: Floats) -> Bytes:
    d, parts = _whole_parts(x, overflow=-1)
    codes = (parts + 1).astype(np.uint8)
    return np.concatenate([f16(d), fields(codes.reshape(len(x), -1, 4, 1), 2)], axis=-1)


def _ternary(x: Floats) -> tuple[Floats, Integers]:
    d, parts = _whole_parts(x, overflow=0)
    return d, parts + 1


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
    return np.concatenate([packed.astype(np.uint8), f16(d)], axis=-1)


def _tq2_0(x: Floats) -> Bytes:
    d, digits = _ternary(x)
    return np.concatenate([fields(digits.reshape(len(x), 2, 4, 32), 2), f16(d)], axis=-1)


def _nearest_fp4(x: Floats, scale: Floats) -> Bytes:
    """Codes of the values nearest to ``x``, of equally near ones the first."""
    codes = np.zeros(x.shape, np.uint8)
    best = np.full(x.shape, np.inf, np.float32)
    for code, value in enumerate(FP4_VALUES):
        error = np.abs(value * scale - x)
        nearer = error < best
        codes[nearer] = code
        np.copyto(best, error, where=nearer)
    return codes


def _mxfp4(x: Floats) -> Bytes:
    largest = np.abs(x).max(axis=-1, keepdims=True)
    # Rounded to float32 before the floor: just below a power of two counts as that power.
    exponent = np.floor(np.log2(largest.astype(np.float64)).astype(np.float32))
    e = np.where(largest > 0, exponent - 2 + 127, 0).astype(np.int32).astype(np.uint8)
    return np.concatenate([e, nibbles(_nearest_fp4(x, E8M0_VALUES[e]))], axis=-1)


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
    return np.concatenate([scales, nibbles(codes.reshape(len(x), 64), 16)], axis=-1)


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
    GgmlType.MXFP4: in_parts(_mxfp4),
    GgmlType.NVFP4: in_parts(_nvfp4),
}
