"""Rows of the types whose codes are points of a grid (IQ1, IQ2, IQ3) to float32.

Imported only when such a row is compiled: the grids come from the ``gguf`` package and take a
moment to unpack. Groups of 8 or 4 values are looked up together; IQ2 and IQ3 give each a sign.
"""

from __future__ import annotations

import gguf.quants
import numpy as np

from protocol.ggml.types import GgmlType
from rpc_server.devices.cpu.kernels.dequantize import decodes
from rpc_server.devices.cpu.kernels.intrinsics import (
    inline_helper,
    load_f16,
    load_u8,
    load_u16,
    load_u32,
    store_f32,
    store_i16,
)


def _grid(name: str) -> np.ndarray:
    quant = getattr(gguf.quants, name)
    quant.init_grid()
    values: np.ndarray = quant.grid
    return np.ascontiguousarray(values.reshape(values.shape[-2:]).astype(np.int8))


_IQ2_XXS, _IQ2_XS, _IQ2_S = _grid("IQ2_XXS"), _grid("IQ2_XS"), _grid("IQ2_S")
_IQ3_XXS, _IQ3_S = _grid("IQ3_XXS"), _grid("IQ3_S")
_IQ1 = _grid("IQ1_S")

# Seven bits that stand for eight signs, an even number of them negative.
_SIGNS = np.frombuffer(gguf.quants.IQ2_XXS.ksigns, np.uint8).copy()
_DELTA = np.float32(0.125)

# What products look up.
TABLES = {
    "IQ2_XXS": _IQ2_XXS,
    "IQ2_XS": _IQ2_XS,
    "IQ2_S": _IQ2_S,
    "IQ3_XXS": _IQ3_XXS,
    "IQ3_S": _IQ3_S,
    "IQ1": _IQ1,
    "SIGNS": _SIGNS,
}


@inline_helper
def _signed(to, grid, index, count, signs, scale):  # type: ignore[no-untyped-def]
    for j in range(count):
        value = np.float32(grid[index, j]) * scale
        store_f32(to + j * 4, -value if signs >> j & 1 else value)


@inline_helper
def _nibble(at, i):  # type: ignore[no-untyped-def]
    """Nibble ``i`` of the bytes at ``at``, low ones first."""
    return load_u8(at + i // 2) >> (4 * (i % 2)) & 15


@decodes(GgmlType.IQ2_XXS)
def _iq2_xxs(at, to):  # type: ignore[no-untyped-def]
    d = load_f16(at)
    for i in range(32):
        group = at + 2 + i // 4 * 8
        word = load_u32(group + 4)
        scale = d * (np.float32(0.5) + np.float32(word >> 28)) * np.float32(0.25)
        signs = _SIGNS[word >> (7 * (i % 4)) & 127]
        _signed(to + i * 32, _IQ2_XXS, load_u8(group + i % 4), 8, signs, scale)


@decodes(GgmlType.IQ2_XS)
def _iq2_xs(at, to):  # type: ignore[no-untyped-def]
    d = load_f16(at)
    for i in range(32):
        q = load_u16(at + 2 + 2 * i)
        nibble = np.float32(_nibble(at + 66, i // 2))
        scale = d * (np.float32(0.5) + nibble) * np.float32(0.25)
        _signed(to + i * 32, _IQ2_XS, q & 511, 8, _SIGNS[q >> 9], scale)


@decodes(GgmlType.IQ2_S)
def _iq2_s(at, to):  # type: ignore[no-untyped-def]
    d = load_f16(at)
    for i in range(32):
        high = load_u8(at + 66 + i // 4) >> (2 * (i % 4)) & 3
        nibble = np.float32(_nibble(at + 74, i // 2))
        scale = d * (np.float32(0.5) + nibble) * np.float32(0.25)
        index = load_u8(at + 2 + i) | high << 8
        _signed(to + i * 32, _IQ2_S, index, 8, load_u8(at + 34 + i), scale)


@decodes(GgmlType.IQ3_XXS)
def _iq3_xxs(at, to):  # type: ignore[no-untyped-def]
    d = load_f16(at)
    for i in range(64):
        word = load_u32(at + 66 + i // 8 * 4)
        scale = d * (np.float32(0.5) + np.float32(word >> 28)) * np.float32(0.5)
        signs = np.int64(_SIGNS[word >> (7 * (i // 2 % 4)) & 127]) >> (4 * (i % 2))
        _signed(to + i * 16, _IQ3_XXS, load_u8(at + 2 + i), 4, signs, scale)


@decodes(GgmlType.IQ3_S)
def _iq3_s(at, to):  # type: ignore[no-untyped-def]
    d = load_f16(at)
    for i in range(64):
        scale = d * np.float32(1 + 2 * _nibble(at + 106, i // 8))
        index = load_u8(at + 2 + i) | (load_u8(at + 66 + i // 8) >> (i % 8) & 1) << 8
        _signed(to + i * 16, _IQ3_S, index, 4, _nibble(at + 74, i), scale)


@inline_helper
def _shifted(to, index, delta, scale):  # type: ignore[no-untyped-def]
    """A point of IQ1's grid of -1, 0, 1, moved by ``delta``."""
    for j in range(8):
        store_f32(to + j * 4, scale * (np.float32(_IQ1[index, j]) + delta))


@decodes(GgmlType.IQ1_S)
def _iq1_s(at, to):  # type: ignore[no-untyped-def]
    d = load_f16(at)
    for i in range(32):
        high = load_u16(at + 34 + i // 4 * 2)
        scale = d * np.float32(2 * (high >> 12 & 7) + 1)
        index = load_u8(at + 2 + i) | (high >> (3 * (i % 4)) & 7) << 8
        _shifted(to + i * 32, index, -_DELTA if high & 0x8000 else _DELTA, scale)


@decodes(GgmlType.IQ1_M)
def _iq1_m(at, to):  # type: ignore[no-untyped-def]
    # The half float is spread over the top nibbles of four words.
    bits = 0
    for j in range(4):
        bits |= (load_u16(at + 48 + 2 * j) >> 12) << (4 * j)
    store_i16(to, bits)
    d = load_f16(to)
    for i in range(32):
        scale = load_u16(at + 48 + i // 8 * 2) >> (3 * (i // 2 % 4)) & 7
        nibble = _nibble(at + 32, i)
        index = load_u8(at + i) | (nibble & 7) << 8
        delta = -_DELTA if nibble & 8 else _DELTA
        _shifted(to + i * 32, index, delta, d * np.float32(2 * scale + 1))
