"""Rows of quantized blocks to float32, a function per type, and one table of them.

These serve ops that read some rows (GET_ROWS, copies, caches of keys and values); products have
kernels of their own that never make the floats.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from protocol.ggml.tables import (
    E8M0_VALUES,
    FP4_VALUES,
    IQ4_VALUES,
    UE4M3_VALUES,
)
from protocol.ggml.types import GgmlType
from rpc_server.devices.cpu.kernels.intrinsics import (
    helper,
    inline_helper,
    load_f16,
    load_f32,
    load_i8,
    load_u8,
    load_u16,
    load_u32,
    memory_copy,
    store_f32,
)
from rpc_server.devices.cpu.kernels.lanes import (
    LANES,
    load_bf16s,
    load_bf16s_part,
    load_f16s,
    load_f16s_part,
    load_i8s_as_f32,
    store_f32s,
    store_f32s_part,
)
from rpc_server.devices.cpu.kernels.typed import choose_by_type


@helper
def _f16_row(x, y, n):  # type: ignore[no-untyped-def]
    i = 0
    while i + LANES <= n:
        store_f32s(y + i * 4, load_f16s(x + i * 2))
        i += LANES
    if i < n:
        store_f32s_part(y + i * 4, load_f16s_part(x + i * 2, n - i), n - i)


@helper
def _bf16_row(x, y, n):  # type: ignore[no-untyped-def]
    i = 0
    while i + LANES <= n:
        store_f32s(y + i * 4, load_bf16s(x + i * 2))
        i += LANES
    if i < n:
        store_f32s_part(y + i * 4, load_bf16s_part(x + i * 2, n - i), n - i)


@helper
def _q8_0_row(x, y, n):  # type: ignore[no-untyped-def]
    for block in range(n // 32):
        at, to = x + block * 34, y + block * 128
        d = load_f16(at)
        store_f32s(to, load_i8s_as_f32(at + 2) * d)
        store_f32s(to + LANES * 4, load_i8s_as_f32(at + 2 + LANES) * d)


@inline_helper
def _nibble_block(qs, to, d, m):  # type: ignore[no-untyped-def]
    """16 bytes: the low nibbles, then the high ones, times d plus m."""
    for i in range(16):
        q = load_u8(qs + i)
        store_f32(to + i * 4, np.float32(q & 15) * d + m)
        store_f32(to + (i + 16) * 4, np.float32(q >> 4) * d + m)


@helper
def _q4_0_row(x, y, n):  # type: ignore[no-untyped-def]
    for block in range(n // 32):
        at = x + block * 18
        d = load_f16(at)
        _nibble_block(at + 2, y + block * 128, d, d * np.float32(-8.0))


@helper
def _q4_1_row(x, y, n):  # type: ignore[no-untyped-def]
    for block in range(n // 32):
        at = x + block * 20
        _nibble_block(at + 4, y + block * 128, load_f16(at), load_f16(at + 2))


@inline_helper
def _five_bit_block(high, qs, to, d, m):  # type: ignore[no-untyped-def]
    for i in range(16):
        q = load_u8(qs + i)
        low = (q & 15) | ((high >> i) & 1) << 4
        top = (q >> 4) | ((high >> (i + 16)) & 1) << 4
        store_f32(to + i * 4, np.float32(low) * d + m)
        store_f32(to + (i + 16) * 4, np.float32(top) * d + m)


@helper
def _q5_0_row(x, y, n):  # type: ignore[no-untyped-def]
    for block in range(n // 32):
        at = x + block * 22
        d = load_f16(at)
        _five_bit_block(load_u32(at + 2), at + 6, y + block * 128, d, d * np.float32(-16.0))


@helper
def _q5_1_row(x, y, n):  # type: ignore[no-untyped-def]
    for block in range(n // 32):
        at = x + block * 24
        _five_bit_block(load_u32(at + 4), at + 8, y + block * 128, load_f16(at), load_f16(at + 2))


@inline_helper
def _table_block(qs, to, d, table):  # type: ignore[no-untyped-def]
    for i in range(16):
        q = load_u8(qs + i)
        store_f32(to + i * 4, table[q & 15] * d)
        store_f32(to + (i + 16) * 4, table[q >> 4] * d)


@helper
def _iq4_nl_row(x, y, n):  # type: ignore[no-untyped-def]
    for block in range(n // 32):
        at = x + block * 18
        _table_block(at + 2, y + block * 128, load_f16(at), IQ4_VALUES)


@helper
def _mxfp4_row(x, y, n):  # type: ignore[no-untyped-def]
    for block in range(n // 32):
        at = x + block * 17
        _table_block(at + 1, y + block * 128, E8M0_VALUES[load_u8(at)], FP4_VALUES)


@helper
def _iq4_xs_row(x, y, n):  # type: ignore[no-untyped-def]
    for block in range(n // 256):
        at, to = x + block * 136, y + block * 1024
        d = load_f16(at)
        scales_high = load_u16(at + 2)
        for j in range(8):
            low = load_u8(at + 4 + j // 2) >> (4 * (j % 2)) & 15
            scale = low | (scales_high >> (2 * j) & 3) << 4
            _table_block(at + 8 + 16 * j, to + 128 * j, d * np.float32(scale - 32), IQ4_VALUES)


@helper
def _q2_k_row(x, y, n):  # type: ignore[no-untyped-def]
    for block in range(n // 256):
        at, to = x + block * 84, y + block * 1024
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


@helper
def _q3_k_row(x, y, n):  # type: ignore[no-untyped-def]
    for block in range(n // 256):
        at, to = x + block * 110, y + block * 1024
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


@helper
def _q4_k_row(x, y, n):  # type: ignore[no-untyped-def]
    for block in range(n // 256):
        at, to = x + block * 144, y + block * 1024
        d, dmin = load_f16(at), load_f16(at + 2)
        for j in range(8):
            ds = d * np.float32(_k4_scale(at + 4, j))
            m = dmin * np.float32(_k4_minimum(at + 4, j))
            qs, shift = at + 16 + j // 2 * 32, 4 * (j % 2)
            for i in range(32):
                q = load_u8(qs + i) >> shift & 15
                store_f32(to + (j * 32 + i) * 4, ds * np.float32(q) - m)


@helper
def _q5_k_row(x, y, n):  # type: ignore[no-untyped-def]
    for block in range(n // 256):
        at, to = x + block * 176, y + block * 1024
        d, dmin = load_f16(at), load_f16(at + 2)
        for j in range(8):
            ds = d * np.float32(_k4_scale(at + 4, j))
            m = dmin * np.float32(_k4_minimum(at + 4, j))
            qs, shift = at + 48 + j // 2 * 32, 4 * (j % 2)
            for i in range(32):
                high = load_u8(at + 16 + i) >> j & 1
                q = (load_u8(qs + i) >> shift & 15) | high << 4
                store_f32(to + (j * 32 + i) * 4, ds * np.float32(q) - m)


@helper
def _q6_k_row(x, y, n):  # type: ignore[no-untyped-def]
    for block in range(n // 256):
        at, to = x + block * 210, y + block * 1024
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


@helper
def _q8_1_row(x, y, n):  # type: ignore[no-untyped-def]
    for block in range(n // 32):
        at, to = x + block * 36, y + block * 128
        d = load_f16(at)
        store_f32s(to, load_i8s_as_f32(at + 4) * d)
        store_f32s(to + LANES * 4, load_i8s_as_f32(at + 4 + LANES) * d)


@helper
def _tq1_0_row(x, y, n):  # type: ignore[no-untyped-def]
    """Ternary digits, five to a byte (four in the last run), as fractions of 256."""
    for block in range(n // 256):
        at, to = x + block * 54, y + block * 1024
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


@helper
def _tq2_0_row(x, y, n):  # type: ignore[no-untyped-def]
    for block in range(n // 256):
        at, to = x + block * 66, y + block * 1024
        d = load_f16(at + 64)
        for i in range(256):
            q = load_u8(at + i // 128 * 32 + i % 32) >> (2 * (i // 32 % 4)) & 3
            store_f32(to + i * 4, np.float32(q - 1) * d)


@helper
def _q8_k_row(x, y, n):  # type: ignore[no-untyped-def]
    for block in range(n // 256):
        at, to = x + block * 292, y + block * 1024
        d = load_f32(at)
        for i in range(0, 256, LANES):
            store_f32s(to + i * 4, load_i8s_as_f32(at + 4 + i) * d)


@helper
def _q1_0_row(x, y, n):  # type: ignore[no-untyped-def]
    for block in range(n // 128):
        at, to = x + block * 18, y + block * 512
        d = load_f16(at)
        for i in range(128):
            store_f32(to + i * 4, d if load_u8(at + 2 + i // 8) >> (i % 8) & 1 else -d)


@helper
def _q2_0_row(x, y, n):  # type: ignore[no-untyped-def]
    for block in range(n // 64):
        at, to = x + block * 18, y + block * 256
        d = load_f16(at)
        for i in range(64):
            q = load_u8(at + 2 + i // 4) >> (2 * (i % 4)) & 3
            store_f32(to + i * 4, np.float32(q - 1) * d)


@helper
def _nvfp4_row(x, y, n):  # type: ignore[no-untyped-def]
    for block in range(n // 64):
        at, to = x + block * 36, y + block * 256
        for i in range(64):
            q = load_u8(at + 4 + i // 16 * 8 + i % 8) >> (4 * (i // 8 % 2)) & 15
            store_f32(to + i * 4, FP4_VALUES[q] * UE4M3_VALUES[load_u8(at + i // 16)])


@helper
def _f32_row(x, y, n):  # type: ignore[no-untyped-def]
    memory_copy(y, x, n * 4)


# type -> function(x, y, n): n elements of a dense row at x to float32 at y.
ROWS = {
    GgmlType.F32: _f32_row,
    GgmlType.F16: _f16_row,
    GgmlType.BF16: _bf16_row,
    GgmlType.Q4_0: _q4_0_row,
    GgmlType.Q4_1: _q4_1_row,
    GgmlType.Q5_0: _q5_0_row,
    GgmlType.Q5_1: _q5_1_row,
    GgmlType.Q8_0: _q8_0_row,
    GgmlType.Q8_1: _q8_1_row,
    GgmlType.Q2_K: _q2_k_row,
    GgmlType.Q3_K: _q3_k_row,
    GgmlType.Q4_K: _q4_k_row,
    GgmlType.Q5_K: _q5_k_row,
    GgmlType.Q6_K: _q6_k_row,
    GgmlType.IQ4_NL: _iq4_nl_row,
    GgmlType.IQ4_XS: _iq4_xs_row,
    GgmlType.MXFP4: _mxfp4_row,
    GgmlType.NVFP4: _nvfp4_row,
    GgmlType.TQ1_0: _tq1_0_row,
    GgmlType.TQ2_0: _tq2_0_row,
    GgmlType.Q1_0: _q1_0_row,
    GgmlType.Q2_0: _q2_0_row,
    GgmlType.Q8_K: _q8_k_row,
}
# Types whose functions are in a module that is imported when one of them is compiled.
GRID_TYPES = (
    GgmlType.IQ1_S,
    GgmlType.IQ1_M,
    GgmlType.IQ2_XXS,
    GgmlType.IQ2_XS,
    GgmlType.IQ2_S,
    GgmlType.IQ3_XXS,
    GgmlType.IQ3_S,
)


def _row_function(type_: GgmlType) -> Any:
    if type_ in GRID_TYPES:
        return importlib.import_module("rpc_server.devices.cpu.kernels.grids").ROWS[type_]
    return ROWS[type_]


def dequantize_row(type_: int, x: int, y: int, n: int) -> None:
    """Dequantize a row in kernels, where ``type_`` is a constant."""
    raise NotImplementedError("only compiled code can call this")


choose_by_type(dequantize_row, _row_function)
