"""Quantizers of rows, bit for bit those that ggml's CPU runs on x86.

These are its references of each type but for Q8_0, which has vector code that rounds otherwise.

Compiled without contraction: a fused multiply-add would round where the reference doesn't.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from protocol.ggml.tables import IQ4_VALUES
from protocol.ggml.types import TYPE_INFO, GgmlType
from rpc_server.devices.cpu.kernels.intrinsics import (
    exact_helper,
    load_f32,
    load_u8,
    memory_set,
    store_f16,
    store_i8,
    store_i32,
)
from rpc_server.devices.cpu.kernels.lanes import (
    LANES,
    absolute,
    load_f32s,
    max_lanes,
    maximum,
    round_even,
    select,
    splat,
    store_f32s_as_i8,
)
from rpc_server.devices.cpu.kernels.typed import choose_by_type

_BLOCK = 32


@exact_helper
def _extreme(x):  # type: ignore[no-untyped-def]
    """The value of largest magnitude of a block, with its sign; the first of equals."""
    largest = np.float32(0.0)
    value = np.float32(0.0)
    for i in range(_BLOCK):
        v = load_f32(x + i * 4)
        if largest < abs(v):
            largest = abs(v)
            value = v
    return value


@exact_helper
def _inverse(d):  # type: ignore[no-untyped-def]
    return np.float32(1.0) / d if d != np.float32(0.0) else np.float32(0.0)


@exact_helper
def _eight_bits(scaled):  # type: ignore[no-untyped-def]
    """Rounded; what the infinite scale of a tiny block makes infinite or NaN becomes the lowest."""
    finite = absolute(scaled) <= np.float32(3.4028235e38)
    return select(finite, round_even(scaled), splat(np.float32(-128.0)))


def _q8_0_block(x, y):  # type: ignore[no-untyped-def]
    low, high = load_f32s(x), load_f32s(x + LANES * 4)
    largest = max_lanes(maximum(absolute(low), absolute(high)))
    scale = np.float32(127.0) / largest if largest != np.float32(0.0) else np.float32(0.0)
    store_f16(y, largest / np.float32(127.0))
    store_f32s_as_i8(y + 2, _eight_bits(low * scale))
    store_f32s_as_i8(y + 2 + LANES, _eight_bits(high * scale))


@exact_helper
def _symmetric_block(x, y, bits):  # type: ignore[no-untyped-def]
    """Q4_0 and Q5_0: the extreme value is the lowest code."""
    half = np.float32(1 << (bits - 1))
    d = _extreme(x) / -half
    scale = _inverse(d)
    store_f16(y, d)
    _pack_codes(x, y + 2, bits, scale, np.float32(0.0), half + np.float32(0.5))


@exact_helper
def _affine_block(x, y, bits):  # type: ignore[no-untyped-def]
    """Q4_1 and Q5_1: codes count from the smallest value."""
    low = np.float32(3.4028235e38)
    high = -low
    for i in range(_BLOCK):
        v = load_f32(x + i * 4)
        if v < low:
            low = v
        if v > high:
            high = v
    d = (high - low) / np.float32((1 << bits) - 1)
    scale = _inverse(d)
    store_f16(y, d)
    store_f16(y + 2, low)
    _pack_codes(x, y + 4, bits, scale, low, np.float32(0.5))


@exact_helper
def _pack_codes(x, y, bits, scale, low, offset):  # type: ignore[no-untyped-def]
    """Code = int((x - low) * scale + offset): low nibbles, before them the fifth bits if any."""
    top = (1 << bits) - 1
    high_bits = 0
    nibbles = y + 4 if bits == 5 else y
    for i in range(_BLOCK // 2):
        first = min(top, np.int64((load_f32(x + i * 4) - low) * scale + offset))
        second = min(top, np.int64((load_f32(x + (i + 16) * 4) - low) * scale + offset))
        store_i8(nibbles + i, (first & 15) | ((second & 15) << 4))
        high_bits |= ((first >> 4) & 1) << i
        high_bits |= ((second >> 4) & 1) << (i + 16)
    if bits == 5:
        store_i32(y, high_bits)


@exact_helper
def _nearest_iq4(v):  # type: ignore[no-untyped-def]
    """Index of the IQ4_NL value nearest to ``v``; of two as near, the greater."""
    if v <= IQ4_VALUES[0]:
        return 0
    if v >= IQ4_VALUES[15]:
        return 15
    low, high = 0, 15
    while high - low > 1:
        middle = (low + high) // 2
        if v < IQ4_VALUES[middle]:
            high = middle
        else:
            low = middle
    return low if v - IQ4_VALUES[high - 1] < IQ4_VALUES[high] - v else high


def _iq4_nl_block(x, y):  # type: ignore[no-untyped-def]
    """The scale is the least-squares fit of the codes, weighted by x squared."""
    extreme = _extreme(x)
    if abs(extreme) < np.float32(1e-15):
        memory_set(y, 0, 18)
        return
    scale = np.float32(1.0) / (extreme / IQ4_VALUES[0])
    sum_qx = np.float32(0.0)
    sum_q2 = np.float32(0.0)
    for i in range(_BLOCK):
        v = load_f32(x + i * 4)
        code = _nearest_iq4(scale * v)
        q, w = IQ4_VALUES[code], v * v
        sum_qx += w * q * v
        sum_q2 += w * q * q
        at = y + 2 + i % 16
        store_i8(at, code if i < 16 else load_u8(at) | code << 4)
    store_f16(y, sum_qx / sum_q2 if sum_q2 > np.float32(0.0) else np.float32(0.0))


def _row_of(type_: GgmlType, quantize: Callable[..., None]) -> Any:
    block_of, size = exact_helper(quantize), TYPE_INFO[type_].type_size

    @exact_helper
    def row(x, y, n):  # type: ignore[no-untyped-def]
        for block in range(n // _BLOCK):
            block_of(x + block * _BLOCK * 4, y + block * size)

    return row


# type -> function(x, y, n): n float32 at x, a multiple of 32, to blocks at y.
QUANTIZERS = {
    type_: _row_of(type_, block)
    for type_, block in (
        (GgmlType.Q4_0, lambda x, y: _symmetric_block(x, y, 4)),
        (GgmlType.Q4_1, lambda x, y: _affine_block(x, y, 4)),
        (GgmlType.Q5_0, lambda x, y: _symmetric_block(x, y, 5)),
        (GgmlType.Q5_1, lambda x, y: _affine_block(x, y, 5)),
        (GgmlType.Q8_0, _q8_0_block),
        (GgmlType.IQ4_NL, _iq4_nl_block),
    )
}


def quantize_row(type_: int, x: int, y: int, n: int) -> None:
    """Quantize a row in kernels, where the type is a constant, by its function of QUANTIZERS."""
    raise NotImplementedError("only compiled code can call this")


choose_by_type(quantize_row, QUANTIZERS.__getitem__)
