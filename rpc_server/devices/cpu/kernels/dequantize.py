"""Rows of quantized blocks to float32, a function per type, and one table of them.

These serve ops that read some rows (GET_ROWS, copies, caches of keys and values); products have
kernels of their own that never make the floats.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from protocol.ggml.tables import (
    E8M0_VALUES,
    FP4_VALUES,
    IQ4_VALUES,
    UE4M3_VALUES,
)
from protocol.ggml.types import TYPE_INFO, GgmlType
from rpc_server.devices.cpu.kernels.intrinsics import (
    helper,
    inline_helper,
    load_f16,
    load_f32,
    load_i8,
    load_u8,
    load_u16,
    load_u32,
    store_f32,
)
from rpc_server.devices.cpu.kernels.lanes import LANES, load_i8s_as_f32, store_f32s
from rpc_server.devices.cpu.kernels.typed import BF16, F16, F32, choose_by_type, convert_row

# type -> function(x, y, n): n elements of a dense row at x to float32 at y.
ROWS: dict[GgmlType, Any] = {}


def decodes(type_: GgmlType) -> Callable[[Callable[..., None]], Any]:
    """Declare ``decode(at, to)``, a block of ``type_`` to float32, and add its rows to ROWS."""
    elements, size = TYPE_INFO[type_].block_size, TYPE_INFO[type_].type_size

    def declare(decode: Callable[..., None]) -> Any:
        decode = inline_helper(decode)

        @helper
        def row(x, y, n):  # type: ignore[no-untyped-def]
            for block in range(n // elements):
                decode(x + block * size, y + block * elements * 4)

        ROWS[type_] = row
        return decode

    return declare


def _plain_row(type_: int) -> Any:
    @helper
    def row(x, y, n):  # type: ignore[no-untyped-def]
        convert_row(type_, F32, x, y, n)

    return row


ROWS |= {GgmlType(type_): _plain_row(type_) for type_ in (F32, F16, BF16)}


@inline_helper
def _signed_bytes(codes, to, d, n):  # type: ignore[no-untyped-def]
    for i in range(0, n, LANES):
        store_f32s(to + i * 4, load_i8s_as_f32(codes + i) * d)


@decodes(GgmlType.Q8_0)
def _q8_0(at, to):  # type: ignore[no-untyped-def]
    _signed_bytes(at + 2, to, load_f16(at), 32)


@inline_helper
def _nibble_block(qs, to, d, m):  # type: ignore[no-untyped-def]
    """16 bytes: the low nibbles, then the high ones, times d plus m."""
    for i in range(16):
        q = load_u8(qs + i)
        store_f32(to + i * 4, np.float32(q & 15) * d + m)
        store_f32(to + (i + 16) * 4, np.float32(q >> 4) * d + m)


@decodes(GgmlType.Q4_0)
def _q4_0(at, to):  # type: ignore[no-untyped-def]
    d = load_f16(at)
    _nibble_block(at + 2, to, d, d * np.float32(-8.0))


@decodes(GgmlType.Q4_1)
def _q4_1(at, to):  # type: ignore[no-untyped-def]
    _nibble_block(at + 4, to, load_f16(at), load_f16(at + 2))


@inline_helper
def _five_bit_block(high, qs, to, d, m):  # type: ignore[no-untyped-def]
    for i in range(16):
        q = load_u8(qs + i)
        low = (q & 15) | ((high >> i) & 1) << 4
        top = (q >> 4) | ((high >> (i + 16)) & 1) << 4
        store_f32(to + i * 4, np.float32(low) * d + m)
        store_f32(to + (i + 16) * 4, np.float32(top) * d + m)


@decodes(GgmlType.Q5_0)
def _q5_0(at, to):  # type: ignore[no-untyped-def]
    d = load_f16(at)
    _five_bit_block(load_u32(at + 2), at + 6, to, d, d * np.float32(-16.0))


@decodes(GgmlType.Q5_1)
def _q5_1(at, to):  # type: ignore[no-untyped-def]
    _five_bit_block(load_u32(at + 4), at + 8, to, load_f16(at), load_f16(at + 2))


@inline_helper
def _table_block(qs, to, d, table):  # type: ignore[no-untyped-def]
    for i in range(16):
        q = load_u8(qs + i)
        store_f32(to + i * 4, table[q & 15] * d)
        store_f32(to + (i + 16) * 4, table[q >> 4] * d)


@decodes(GgmlType.IQ4_NL)
def _iq4_nl(at, to):  # type: ignore[no-untyped-def]
    _table_block(at + 2, to, load_f16(at), IQ4_VALUES)


@decodes(GgmlType.MXFP4)
def _mxfp4(at, to):  # type: ignore[no-untyped-def]
    _table_block(at + 1, to, E8M0_VALUES[load_u8(at)], FP4_VALUES)


@decodes(GgmlType.IQ4_XS)
def _iq4_xs(at, to):  # type: ignore[no-untyped-def]
    d = load_f16(at)
    scales_high = load_u16(at + 2)
    for j in range(8):
        low = load_u8(at + 4 + j // 2) >> (4 * (j % 2)) & 15
        scale = low | (scales_high >> (2 * j) & 3) << 4
        _table_block(at + 8 + 16 * j, to + 128 * j, d * np.float32(scale - 32), IQ4_VALUES)


@decodes(GgmlType.Q2_K)
def _q2_k(at, to):  # type: ignore[no-untyped-def]
    d, dmin = load_f16(at + 80), load_f16(at + 82)
    for i in range(256):
        half, part, j = i // 128, i // 32 % 4, i % 32
        scale = load_u8(at + i // 16)
        q = load_u8(at + 16 + half * 32 + j) >> (2 * part) & 3
        value = d * np.float32(scale & 15) * np.float32(q) - dmin * np.float32(scale >> 4)
        store_f32(to + i * 4, value)


@inline_helper
def _q3_k_scale(at, j):  # type: ignore[no-untyped-def]
    """Scale ``j`` of 16: four low bits and two high bits, less 32."""
    low = load_u8(at + j % 8) >> (4 * (j // 8)) & 15
    high = load_u8(at + 8 + j % 4) >> (2 * (j // 4)) & 3
    return (low | high << 4) - 32


@decodes(GgmlType.Q3_K)
def _q3_k(at, to):  # type: ignore[no-untyped-def]
    d = load_f16(at + 108)
    for i in range(256):
        half, part, j = i // 128, i // 32 % 4, i % 32
        q = load_u8(at + 32 + half * 32 + j) >> (2 * part) & 3
        # The mask holds the third bit, inverted.
        if load_u8(at + j) >> (half * 4 + part) & 1 == 0:
            q -= 4
        scale = np.float32(_q3_k_scale(at + 96, i // 16))
        store_f32(to + i * 4, d * scale * np.float32(q))


@inline_helper
def _k4_scale(at, j):  # type: ignore[no-untyped-def]
    """Scale ``j`` of 8; scales and minima are six bits each, packed in 12 bytes."""
    if j < 4:
        return load_u8(at + j) & 63
    return (load_u8(at + j + 4) & 15) | (load_u8(at + j - 4) >> 6) << 4


@inline_helper
def _k4_minimum(at, j):  # type: ignore[no-untyped-def]
    # Not one function with the scale: LLVM 22 loses both if they are returned as a pair.
    if j < 4:
        return load_u8(at + j + 4) & 63
    return (load_u8(at + j + 4) >> 4) | (load_u8(at + j) >> 6) << 4


def _k4_block(fifth_bits: bool) -> Callable[..., None]:
    """Q4_K, and Q5_K, which has fifth bits before the nibbles."""
    nibbles = 48 if fifth_bits else 16

    def decode(at, to):  # type: ignore[no-untyped-def]
        d, dmin = load_f16(at), load_f16(at + 2)
        for j in range(8):
            ds = d * np.float32(_k4_scale(at + 4, j))
            m = dmin * np.float32(_k4_minimum(at + 4, j))
            qs, shift = at + nibbles + j // 2 * 32, 4 * (j % 2)
            for i in range(32):
                q = load_u8(qs + i) >> shift & 15
                if fifth_bits:
                    q |= (load_u8(at + 16 + i) >> j & 1) << 4
                store_f32(to + (j * 32 + i) * 4, ds * np.float32(q) - m)

    return decode


decodes(GgmlType.Q4_K)(_k4_block(fifth_bits=False))
decodes(GgmlType.Q5_K)(_k4_block(fifth_bits=True))


@decodes(GgmlType.Q6_K)
def _q6_k(at, to):  # type: ignore[no-untyped-def]
    d = load_f16(at + 208)
    for group in range(8):
        # 32 values: nibbles of one of four 32-byte runs, two high bits each from 'qh'.
        half, part = group // 4, group % 4
        low = at + half * 64 + part % 2 * 32
        high = at + 128 + half * 32
        for i in range(32):
            q = load_u8(low + i) >> (4 * (part // 2)) & 15
            q |= (load_u8(high + i) >> (2 * part) & 3) << 4
            scale = load_i8(at + 192 + group * 2 + i // 16)
            value = d * np.float32(scale) * np.float32(q - 32)
            store_f32(to + (group * 32 + i) * 4, value)


@decodes(GgmlType.Q8_1)
def _q8_1(at, to):  # type: ignore[no-untyped-def]
    _signed_bytes(at + 4, to, load_f16(at), 32)


@decodes(GgmlType.TQ1_0)
def _tq1_0(at, to):  # type: ignore[no-untyped-def]
    """Ternary digits, five to a byte (four in the last run), as fractions of 256."""
    d = load_f16(at + 52)
    for i in range(256):
        if i < 160:
            byte, power = load_u8(at + i % 32), i // 32
        elif i < 240:
            byte, power = load_u8(at + 32 + (i - 160) % 16), (i - 160) // 16
        else:
            byte, power = load_u8(at + 48 + (i - 240) % 4), (i - 240) // 4
        for _ in range(power):
            byte = byte * 3 & 255
        store_f32(to + i * 4, np.float32((byte * 3 >> 8) - 1) * d)


@decodes(GgmlType.TQ2_0)
def _tq2_0(at, to):  # type: ignore[no-untyped-def]
    d = load_f16(at + 64)
    for i in range(256):
        q = load_u8(at + i // 128 * 32 + i % 32) >> (2 * (i // 32 % 4)) & 3
        store_f32(to + i * 4, np.float32(q - 1) * d)


@decodes(GgmlType.Q8_K)
def _q8_k(at, to):  # type: ignore[no-untyped-def]
    _signed_bytes(at + 4, to, load_f32(at), 256)


@decodes(GgmlType.Q1_0)
def _q1_0(at, to):  # type: ignore[no-untyped-def]
    d = load_f16(at)
    for i in range(128):
        store_f32(to + i * 4, d if load_u8(at + 2 + i // 8) >> (i % 8) & 1 else -d)


@decodes(GgmlType.Q2_0)
def _q2_0(at, to):  # type: ignore[no-untyped-def]
    d = load_f16(at)
    for i in range(64):
        q = load_u8(at + 2 + i // 4) >> (2 * (i % 4)) & 3
        store_f32(to + i * 4, np.float32(q - 1) * d)


@decodes(GgmlType.NVFP4)
def _nvfp4(at, to):  # type: ignore[no-untyped-def]
    for i in range(64):
        q = load_u8(at + 4 + i // 16 * 8 + i % 8) >> (4 * (i // 8 % 2)) & 15
        store_f32(to + i * 4, FP4_VALUES[q] * UE4M3_VALUES[load_u8(at + i // 16)])


# Types whose functions are in a module that is imported when one of them is compiled.
GRID_TYPES = tuple(t for t in GgmlType if t.name.startswith(("IQ1_", "IQ2_", "IQ3_")))


def _row_function(type_: GgmlType) -> Any:
    if type_ in GRID_TYPES:
        importlib.import_module("rpc_server.devices.cpu.kernels.grids")
    return ROWS[type_]


def dequantize_row(type_: int, x: int, y: int, n: int) -> None:
    """Dequantize a row in kernels, where ``type_`` is a constant."""
    raise NotImplementedError("only compiled code can call this")


choose_by_type(dequantize_row, _row_function)
