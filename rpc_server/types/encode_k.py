"""Encoders of Q2_K to Q6_K: blocks of 256 in groups of 16 or 32, whose scales are quantized, too.

Each group's scale is searched for among candidates, by weighted squares (or distances) of what they
leave over. Which candidate wins hangs on the last bit of sums, so all sums run in float32, element
by element, in ggml's order. The search works on all groups at once: arrays are (elements, groups),
and a row of such an array is one step of the loop over the elements of a group.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from protocol.ggml.types import GgmlType
from rpc_server.types import blocks
from rpc_server.types.blocks import (
    GROUP_EPSILON,
    ONE,
    ZERO,
    Bytes,
    Floats,
    Integers,
    extreme,
    f16,
    fields,
    largest_of_rows,
    nearest_int,
    nibbles,
    sum_rows,
)


def _clipped(x: Floats, low: int, high: int) -> Integers:
    """The nearest integers within ``low`` to ``high``, int32."""
    return np.minimum(np.maximum(nearest_int(x), low), high)


def _groups(x: Floats, size: int) -> Floats:
    """Blocks of 256 as (size, groups): a column for each group."""
    return np.ascontiguousarray(x.reshape(-1, size).T)


def _blocks(columns: Any) -> Any:
    """Codes (size, groups) back as (blocks, groups of a block, size), uint8."""
    size = len(columns)
    return columns.T.astype(np.uint8).reshape(-1, 256 // size, size)


def _rounded_scale(scale: Floats) -> Floats:
    """Scales of blocks as a reader of their half precision sees them."""
    return scale.astype(np.float16).astype(np.float32)


# -- Q2_K, Q4_K, Q5_K: a scale and a minimum for each group ----------------------------------------


def _scale_and_min(
    x: Floats, weights: Floats, top: int, start: float, steps: int, squares: bool
) -> tuple[Integers, Floats, Floats]:
    """Codes up to ``top``, scale and minus the minimum of groups ``x`` (elements, groups).

    Candidates divide the range from the best minimum so far into top + start + 0.1 * (0 to
    ``steps``) parts; the least-squares scale and minimum for the codes that this gives count by
    their error, squared or absolute.
    """
    low, high = -largest_of_rows(-x), largest_of_rows(x)
    sum_w, sum_x = sum_rows(weights), sum_rows(weights * x)
    low = np.where(low > 0, ZERO, low)
    constant = high == low

    def error(codes: Floats, scale: Floats, minimum: Floats) -> Floats:
        difference = scale * codes + minimum - x
        size = difference * difference if squares else np.abs(difference)
        return sum_rows(weights * size)

    def codes_for(parts: np.float32, minimum: Floats) -> Floats:
        return _clipped(parts / (high - minimum) * (x - minimum), 0, top).astype(np.float32)

    scale = ONE / (np.float32(top) / (high - low))
    minimum = low
    best_codes = codes_for(np.float32(top), minimum)
    best_error = error(best_codes, scale, minimum)
    for step in range(steps + 1):
        parts = np.float32(start) + np.float32(0.1) * np.float32(step) + np.float32(top)
        codes = codes_for(parts, minimum)
        weighted = weights * codes
        sum_l, sum_l2 = sum_rows(weighted), sum_rows(weighted * codes)
        sum_xl = sum_rows(weighted * x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        fitted_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        fitted_min = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        positive = fitted_min > 0
        fitted_min = np.where(positive, ZERO, fitted_min)
        fitted_scale = np.where(positive, sum_xl / sum_l2, fitted_scale)
        fitted_error = error(codes, fitted_scale, fitted_min)
        better = (determinant > 0) & (fitted_error < best_error)
        best_error = np.where(better, fitted_error, best_error)
        scale = np.where(better, fitted_scale, scale)
        minimum = np.where(better, fitted_min, minimum)
        best_codes = np.where(better, codes, best_codes)
    scale = np.where(constant, ZERO, scale)
    minimum = np.where(constant, low, minimum)
    return np.where(constant, 0, best_codes).astype(np.int32), scale, -minimum


def _quantized_scales(scales: Floats, top: int) -> tuple[Floats, Integers]:
    """Scales or minima (blocks, groups) as a float32 unit for each block and int32 multiples.

    What isn't positive in a whole block counts as nothing.
    """
    largest = np.fmax.reduce(scales, axis=-1, keepdims=True)
    largest = np.where(largest > 0, largest, ZERO)
    inverse = np.where(largest > 0, np.float32(top) / largest, ZERO)
    return largest / np.float32(top), nearest_int(inverse * scales) & 0xFF


def _requantized(
    x: Floats, codes: Integers, scale: Floats, minimum: Floats | np.float32, low: int, high: int
) -> Integers:
    """Codes of groups ``x`` for the final scales and minima; where the scale is 0, as they were."""
    fresh = _clipped((x + minimum) / scale, low, high) - low
    return np.where(scale == 0, codes, fresh)


def _with_minima(
    x: Floats, codes: Integers, units: list[Floats], multiples: list[Integers], top: int
) -> Integers:
    """Final codes (elements, groups) of a type with minima; units and multiples of both."""
    scale, minimum = (
        (_rounded_scale(unit) * multiple.astype(np.float32)).reshape(-1)
        for unit, multiple in zip(units, multiples, strict=True)
    )
    return _requantized(x, codes, scale, minimum, 0, top)


def _q2_k(x: Floats) -> Bytes:
    groups = _groups(x, 16)
    codes, scale, minimum = _scale_and_min(groups, np.abs(groups), 3, -0.5, 15, False)
    units, multiples = zip(
        *(_quantized_scales(s.reshape(-1, 16), 15) for s in (scale, minimum)), strict=True
    )
    # The fields are not masked: what overflows that of the scale is in that of the minimum.
    both = (multiples[0] | multiples[1] << 4) & 0xFF
    codes = _with_minima(groups, codes, list(units), [both & 15, both >> 4], 3)
    packed = fields(_blocks(codes).reshape(len(x), 2, 4, 32), 2)
    return np.concatenate([both.astype(np.uint8), packed, f16(units[0]), f16(units[1])], axis=-1)


def _six_bit_scales(scales: Integers, minima: Integers) -> Bytes:
    """Eight scales and minima (blocks, 8) of 6 bits in 12 bytes.

    Those of the first four groups are whole; their spare bits hold the upper two bits of the
    others, whose lower four are nibbles of the last bytes.
    """
    upper = [s[:, 4:] >> 4 << 6 for s in (scales, minima)]
    whole = [s[:, :4] | u for s, u in zip((scales, minima), upper, strict=True)]
    lower = (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4
    return np.concatenate([*whole, lower], axis=-1).astype(np.uint8)


def _q4_q5(x: Floats, bits: int, start: float, steps: int) -> Bytes:
    groups, top = _groups(x, 32), (1 << bits) - 1
    mean = np.sqrt(sum_rows(groups * groups) / np.float32(32))
    codes, scale, minimum = _scale_and_min(groups, mean + np.abs(groups), top, start, steps, True)
    units, multiples = zip(
        *(_quantized_scales(s.reshape(-1, 8), 63) for s in (scale, minimum)), strict=True
    )
    six_bits = [np.minimum(m, 63) for m in multiples]
    codes = _with_minima(groups, codes, list(units), six_bits, top)
    blocks = _blocks(codes)
    head = [f16(units[0]), f16(units[1]), _six_bit_scales(*six_bits)]
    if bits == 5:
        # A bit of each group in each byte.
        head.append(fields((blocks >> 4).reshape(len(x), 1, 8, 32), 1))
    return np.concatenate([*head, nibbles((blocks & 15).reshape(len(x), 256), 64)], axis=-1)


# -- Q3_K, Q6_K: a signed scale for each group -----------------------------------------------------


def _q3_scale(x: Floats) -> tuple[Integers, Floats]:
    """Codes 0 to 7 for -4 to 3, and scales, of groups ``x`` (elements, groups).

    From the codes of the extreme's scale on, each element in turn moves to the code that is best
    for the scale that the others have, if that helps the whole group; five times over.
    """
    largest = extreme(x.T)[:, 0]
    weights = x * x
    weighted = weights * x
    codes = _clipped(np.float32(-4) / largest * x, -4, 3)
    numerator = sum_rows(weighted * codes.astype(np.float32))
    square = sum_rows(weights * codes.astype(np.float32) * codes.astype(np.float32))
    for _ in range(5):
        before = codes.copy()
        for i, (w, wx) in enumerate(zip(weights, weighted, strict=True)):
            old = codes[i].astype(np.float32)
            rest, rest_square = numerator - wx * old, square - w * old * old
            code = _clipped(x[i] * rest_square / rest, -4, 3)
            new = code.astype(np.float32)
            new_numerator, new_square = rest + wx * new, rest_square + w * new * new
            gain = new_numerator * new_numerator * square > numerator * numerator * new_square
            moves = (rest > 0) & (code != codes[i]) & (new_square > 0) & gain
            codes[i] = np.where(moves, code, codes[i])
            numerator = np.where(moves, new_numerator, numerator)
            square = np.where(moves, new_square, square)
        if (codes == before).all():
            break
    scale = np.where(square > 0, numerator / square, ZERO)
    nothing = np.abs(largest) < GROUP_EPSILON
    return np.where(nothing, 0, codes + 4), np.where(nothing, ZERO, scale)


def _q6_scale(x: Floats) -> tuple[Integers, Floats]:
    """Codes 0 to 63 for -32 to 31, and scales, of groups ``x`` (elements, groups)."""
    largest = extreme(x.T)[:, 0]
    weights = x * x
    weighted = weights * x

    def fit(inverse_scale: Floats) -> tuple[Integers, Floats, Floats]:
        codes = _clipped(inverse_scale * x, -32, 31)
        values = codes.astype(np.float32)
        return codes, sum_rows(weighted * values), sum_rows(weights * values * values)

    best_codes, numerator, square = fit(np.float32(-32) / largest)
    scale = np.where(square != 0, numerator / square, ZERO)
    best = scale * numerator
    for step in (*range(-9, 0), *range(1, 10)):
        parts = -(np.float32(32) + np.float32(0.1) * np.float32(step))
        codes, numerator, square = fit(parts / largest)
        better = (square > 0) & (numerator * numerator > best * square)
        scale = np.where(better, numerator / square, scale)
        best = np.where(better, scale * numerator, best)
        best_codes = np.where(better, codes, best_codes)
    nothing = np.abs(largest) < GROUP_EPSILON
    return np.where(nothing, 0, best_codes + 32), np.where(nothing, ZERO, scale)


def _inverse_unit(scales: Floats, lowest: int) -> tuple[Floats, Floats]:
    """The extreme scale of each block (blocks, groups) and what maps it to ``lowest``."""
    largest = extreme(scales)
    return largest, np.float32(lowest) / largest


def _q3_k(x: Floats) -> Bytes:
    groups = _groups(x, 16)
    codes, scale = _q3_scale(groups)
    scales = scale.reshape(-1, 16)
    largest, inverse = _inverse_unit(scales, -32)
    six_bits = np.clip(nearest_int(inverse * scales).astype(np.int8), -32, 31).astype(np.int32) + 32
    six_bits = np.where(largest == 0, 0, six_bits)
    unit = np.where(largest == 0, ZERO, ONE / inverse)
    multiples = (six_bits - 32).astype(np.float32)
    final = (_rounded_scale(unit) * multiples).reshape(-1)
    codes = _requantized(groups, codes, final, ZERO, -4, 3)
    flat = _blocks(codes)
    packed_scales = np.concatenate(
        [
            nibbles(six_bits.astype(np.uint8) & 15, 16),
            fields((six_bits >> 4).reshape(-1, 1, 4, 4), 2),
        ],
        axis=-1,
    )
    # A bit for each run of 32 elements in each byte, set for codes from 0 (4) on.
    upper = fields((flat >> 2).reshape(len(x), 1, 8, 32), 1)
    lower = fields((flat & 3).reshape(len(x), 2, 4, 32), 2)
    return np.concatenate([upper, lower, packed_scales, f16(unit)], axis=-1)


def _q6_k(x: Floats) -> Bytes:
    groups = _groups(x, 16)
    codes, scale = _q6_scale(groups)
    scales = scale.reshape(-1, 16)
    largest, inverse = _inverse_unit(scales, -128)
    eight_bits = np.minimum(nearest_int(inverse * scales), 127).astype(np.int8)
    unit = ONE / inverse
    final = (_rounded_scale(unit) * eight_bits.astype(np.float32)).reshape(-1)
    flat = _blocks(_requantized(groups, codes, final, ZERO, -32, 31)).reshape(len(x), 2, 4, 32)
    # Runs of 32: the lower nibbles of the first two lie below those of the last two.
    lower = (flat[:, :, :2] & 15) | (flat[:, :, 2:] & 15) << 4
    block = np.concatenate(
        [lower.reshape(len(x), 128), fields(flat >> 4, 2), eight_bits.view(np.uint8), f16(unit)],
        axis=-1,
    )
    return np.where(np.abs(largest) < GROUP_EPSILON, np.uint8(0), block)


ENCODERS: dict[GgmlType, blocks.Encoder] = {
    GgmlType.Q2_K: _q2_k,
    GgmlType.Q3_K: _q3_k,
    GgmlType.Q4_K: functools.partial(_q4_q5, bits=4, start=-1, steps=20),
    GgmlType.Q5_K: functools.partial(_q4_q5, bits=5, start=-0.5, steps=15),
    GgmlType.Q6_K: _q6_k,
}
