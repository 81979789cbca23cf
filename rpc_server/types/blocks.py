"""What encoders of block types are made of: rounding, extremes, sums, packed fields."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

# uint8 and float32, a row for each block.
Bytes = np.ndarray[Any, Any]
Floats = np.ndarray[Any, Any]
Integers = np.ndarray[Any, Any]
Encoder = Callable[[Floats], Bytes]

ONE = np.float32(1)
ZERO = np.float32(0)
# Below this a group of the types that search for a scale counts as zeros.
GROUP_EPSILON = np.float32(1e-15)

# Searches go over their values many times: this many stay in the cache with what they give.
_ELEMENTS_AT_ONCE = 1 << 15


def in_parts(encode: Encoder) -> Encoder:
    """Return ``encode`` on a few blocks at a time."""

    def run(x: Floats) -> Bytes:
        step = _ELEMENTS_AT_ONCE // x.shape[1]
        parts = [encode(x[i : i + step]) for i in range(0, len(x), step)]
        return np.concatenate(parts)

    return run


def round_away(x: Floats) -> Floats:
    # Adding a half first would round the largest float below 0.5 up.
    whole = np.trunc(x)
    return np.where(np.abs(x - whole) >= 0.5, whole + np.copysign(np.float32(1), x), whole)


def inverse(d: Floats) -> Floats:
    return np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)


def extreme(x: Floats) -> Floats:
    """Return the element farthest from zero, sign kept, NaN passed over; +0 if all are zero."""
    magnitude = np.abs(x)
    magnitude[np.isnan(magnitude)] = 0
    at = magnitude.argmax(axis=-1, keepdims=True)
    value = np.take_along_axis(x, at, axis=-1)
    return np.where(np.abs(value) > 0, value, np.float32(0))


def sum_in_order(x: Floats) -> Floats:
    return np.add.accumulate(x, axis=-1, dtype=np.float32)[:, -1:]


def f16(x: Floats) -> Bytes:
    return x.astype(np.float16).view(np.uint8)


def nibbles(codes: Bytes, group: int = 32) -> Bytes:
    """Pack codes below 16: those of the first half of each group go to the low nibbles."""
    halves = codes.reshape(len(codes), -1, 2, group // 2)
    packed: Bytes = halves[:, :, 0] | (halves[:, :, 1] << 4)
    return packed.reshape(len(codes), -1)


def nearest_int(x: Floats) -> Integers:
    """Return the nearest integers below 2^22, ties to even, as ggml reads them off a mantissa.

    What is too large, infinite or NaN gives the integer that those bits happen to be.
    """
    return ((x + np.float32(12582912)).view(np.int32) & 0x7FFFFF) - 0x400000


def sum_rows(x: Floats) -> Floats:
    """Return the sum along axis 0, row after row, as a loop over a group's elements sums it.

    numpy may sum in another order where there are few columns.
    """
    total = np.zeros(x.shape[1:], np.float32)
    for row in x:
        total += row
    return total


def largest_of_rows(x: Floats) -> Floats:
    """Return the largest along axis 0 as comparisons find it: NaN counts only if it comes first."""
    rest: Floats = np.fmax.reduce(x, axis=0)
    return np.where(np.isnan(x[0]), x[0], rest)


def fields(codes: Integers, bits: int) -> Bytes:
    """Pack codes (blocks, runs, n, width) in fields of ``bits``: n codes of a run share a byte."""
    shifted = codes.astype(np.uint8) << (bits * np.arange(codes.shape[2], dtype=np.uint8))[:, None]
    packed: Bytes = np.bitwise_or.reduce(shifted, axis=2)
    return packed.reshape(len(codes), -1)
