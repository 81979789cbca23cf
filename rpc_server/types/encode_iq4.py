"""Encoders of IQ4_NL and IQ4_XS: codes stand for sixteen unevenly spaced values."""

from __future__ import annotations

from typing import Any

import numpy as np

from protocol.ggml.tables import IQ4_VALUES
from protocol.ggml.types import GgmlType
from rpc_server.types import blocks
from rpc_server.types.blocks import (
    GROUP_EPSILON,
    ONE,
    ZERO,
    Floats,
    Integers,
    extreme,
    f16,
    nearest_int,
    nibbles,
    sum_in_order,
)

# IQ4_XS tries scales up to this many codes around that of the extreme.
_TRIES = 7
_HALF_WAY = (IQ4_VALUES[1:] + IQ4_VALUES[:-1]) / np.float32(2)


def _nearest(x: Floats) -> Integers:
    """Codes of the values nearest to ``x``, uint8, the upper of two as near; NaN is the last.

    Half way between two values float32 subtracts exactly, so that one comparison says which is
    nearer.
    """
    codes = np.full(x.shape, len(_HALF_WAY), np.uint8)
    for half_way in _HALF_WAY:
        codes -= x < half_way
    return codes


def _fit(x: Floats, inverse_scale: Any) -> tuple[Integers, Floats, Floats]:
    """Codes of groups (groups, 32) at a scale; the sums whose quotient is their best scale."""
    codes = _nearest(inverse_scale * x)
    q, weight = IQ4_VALUES[codes], x * x
    return codes, sum_in_order(weight * q * x), sum_in_order(weight * q * q)


def _iq4_nl(x: Floats) -> blocks.Bytes:
    largest = extreme(x)
    codes, numerator, square = _fit(x, ONE / (largest / IQ4_VALUES[0]))
    zero = np.abs(largest) < GROUP_EPSILON
    scale = np.where((square > 0) & ~zero, numerator / square, ZERO)
    # ggml leaves the codes of a zero block as they happened to be; its scale makes them zeros.
    codes = np.where(zero, np.uint8(0), codes)
    return np.concatenate([f16(scale), nibbles(codes)], axis=-1)


def _searched_scales(x: Floats) -> Floats:
    """The scale of each group (groups, 32) that leaves the least over, of all that are tried."""
    largest = extreme(x)
    _, numerator, square = _fit(x, ONE / (-largest / IQ4_VALUES[0]))
    scale = np.where(square > 0, numerator / square, ZERO)
    best = scale * numerator
    for step in range(-_TRIES, _TRIES + 1):
        _, numerator, square = _fit(x, (np.float32(step) + IQ4_VALUES[0]) / largest)
        better = (square > 0) & (numerator * numerator > best * square)
        scale = np.where(better, numerator / square, scale)
        best = np.where(better, scale * numerator, best)
    return np.where(np.abs(largest) < GROUP_EPSILON, ZERO, scale)


def _iq4_xs(x: Floats) -> blocks.Bytes:
    groups = x.reshape(-1, 32)
    scales = _searched_scales(groups).reshape(-1, 8)
    unit = -extreme(scales) / np.float32(32)
    inverse = np.where(unit != 0, ONE / unit, ZERO)
    multiples = np.clip(nearest_int(inverse * scales), -32, 31)
    # The codes are for the scale before it is rounded to half precision.
    scale = (unit * multiples.astype(np.float32)).reshape(-1, 1)
    codes = _nearest(np.where(scale != 0, ONE / scale, ZERO) * groups)
    six_bits = (multiples + 32).astype(np.uint16)
    upper = np.bitwise_or.reduce(six_bits >> 4 << np.arange(0, 16, 2, dtype=np.uint16), axis=-1)
    lower = (six_bits[:, ::2] & 15 | (six_bits[:, 1::2] & 15) << 4).astype(np.uint8)
    return np.concatenate(
        [f16(unit), upper[:, None].view(np.uint8), lower, nibbles(codes.reshape(len(x), 256))],
        axis=-1,
    )


ENCODERS = {GgmlType.IQ4_NL: _iq4_nl, GgmlType.IQ4_XS: _iq4_xs}
