"""Vector code that unpacks the types whose codes are points of a grid (IQ1, IQ2, IQ3).

A point is 8 or 4 values, looked up as one word. IQ2 and IQ3 give each value a sign. IQ1 moves its
-1, 0 and 1 by an eighth, so its codes count in eighths. Every index has as many bits as its grid
has points: whatever a client's bytes are, what is read is a point.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from rpc_server.devices.cpu.kernels.vector import F16, F32, I8, I16, I32, I64, Emit, vector

# How far codes are above values: more than the largest value of any grid, or of IQ3_S's.
CENTRE, CENTRE_IQ3_S, CENTRE_IQ1 = 64, 16, 9
# The largest codes: 62 and 15 are the largest values, IQ1 has 8 and an eighth more of 1.
LARGEST, LARGEST_IQ3_S, LARGEST_IQ1 = CENTRE + 62, CENTRE_IQ3_S + 15, CENTRE_IQ1 + 9

# Codes and scales of a block.
Grid = tuple[list[Any], Any]
Unpack = Callable[[Emit, Any], Grid]


def _table(e: Emit, name: str) -> Any:
    """The address of a table of ``grids``, its rows packed to words, or of its signs."""
    # That module unpacks the grids when it is imported, which is only to be where one is used.
    values = importlib.import_module("rpc_server.devices.cpu.kernels.grids").TABLES[name]
    if name == "IQ1":
        values = (8 * values + CENTRE_IQ1).astype(np.int8)
    packed = values.view({8: np.uint64, 4: np.uint32}[values.shape[1]] if values.ndim > 1 else "u1")
    flat = packed.reshape(-1)
    kind = ir.IntType(8 * flat.itemsize)
    array = ir.Constant(ir.ArrayType(kind, len(flat)), [int(v) for v in flat])
    place = cgutils.global_constant(e.b.module, f".grid.{name}", array)
    return e.b.ptrtoint(place, I64)


def _look_up(e: Emit, table: Any, indices: Sequence[Any]) -> Any:
    """32 values: the points with these indices (I64)."""
    kind = I64 if len(indices) == 4 else I32
    words = ir.Constant(vector(kind, len(indices)), ir.Undefined)
    for i, index in enumerate(indices):
        at = e.b.add(table, e.shift_left(index, 3 if kind == I64 else 2))
        words = e.b.insert_element(words, e.load(at, kind), ir.Constant(I32, i))
    return e.b.bitcast(words, vector(I8, 32))


def _byte(e: Emit, block: Any, offset: int) -> Any:
    return e.b.zext(e.load(block, I8, offset), I64)


def _field(e: Emit, word: Any, shift: int, mask: int, up: int = 0) -> Any:
    """Bits of an I64, moved ``up``."""
    return e.shift_left(e.and_(e.shift_right(word, shift), mask), up)


def _signed(e: Emit, points: Any, signs: Any, centre: int) -> Any:
    """Codes of 32 values, negative where the I32 ``signs`` has a bit."""
    negative = e.b.sub(e.like(points, 0), points)
    values = e.b.select(e.bits(signs), negative, points)
    return e.b.add(values, e.like(values, centre))


def _signs(e: Emit, table: Any, sevens: Sequence[Any]) -> Any:
    """32 signs from four times seven bits."""
    signs = ir.Constant(I32, 0)
    for i, seven in enumerate(sevens):
        eight = e.b.zext(e.load(e.b.add(table, seven), I8), I32)
        signs = e.b.or_(signs, e.shift_left(eight, 8 * i))
    return signs


def _half(e: Emit, block: Any) -> Any:
    return e.widen(e.load(block, F16))


def _scales(e: Emit, d: Any, codes: Any, plus: float, times: float) -> Any:
    """``d * times * (code + plus)`` of vectors of I32."""
    n = codes.type.count
    floats = e.b.fadd(e.b.uitofp(codes, vector(F32, n)), e.constant(F32, plus, n))
    return e.b.fmul(floats, e.splat(e.b.fmul(d, ir.Constant(F32, times)), n))


def _joined(e: Emit, values: Sequence[Any]) -> Any:
    """Scalars as a vector."""
    joined = ir.Constant(vector(values[0].type, len(values)), ir.Undefined)
    for i, value in enumerate(values):
        joined = e.b.insert_element(joined, value, ir.Constant(I32, i))
    return joined


def _nibble_pairs(e: Emit, block: Any, offset: int) -> Any:
    """16 nibbles of 8 bytes as I32, low ones first."""
    wide = e.b.zext(e.load(block, vector(I8, 8), offset), vector(I32, 8))
    low, high = e.and_(wide, 15), e.shift_right(wide, 4)
    return e.shuffle(low, [i // 2 + 8 * (i % 2) for i in range(16)], high)


def _xxs(e: Emit, block: Any, name: str, count: int, words_at: range, times: float) -> Grid:
    """A run's word has its scale on top of four times seven bits for signs."""
    points, signs = _table(e, name), _table(e, "SIGNS")
    codes, words = [], []
    for run, at in enumerate(words_at):
        found = _look_up(e, points, [_byte(e, block, 2 + 8 * run + i) for i in range(count)])
        words.append(e.load(block, I32, at))
        word = e.b.zext(words[-1], I64)
        sevens = [_field(e, word, 7 * i, 127) for i in range(4)]
        codes.append(_signed(e, found, _signs(e, signs, sevens), CENTRE))
    top = e.shift_right(_joined(e, words), 28)
    return codes, _scales(e, _half(e, block), top, 0.5, times)


def iq2_xxs(e: Emit, block: Any) -> Grid:
    return _xxs(e, block, "IQ2_XXS", 4, range(6, 70, 8), 0.25)


def iq3_xxs(e: Emit, block: Any) -> Grid:
    return _xxs(e, block, "IQ3_XXS", 8, range(66, 98, 4), 0.5)


def iq2_xs(e: Emit, block: Any) -> Grid:
    points, signs = _table(e, "IQ2_XS"), _table(e, "SIGNS")
    codes = []
    for run in range(8):
        words = [e.b.zext(e.load(block, I16, 2 + 8 * run + 2 * i), I64) for i in range(4)]
        found = _look_up(e, points, [e.and_(word, 511) for word in words])
        sevens = [e.shift_right(word, 9) for word in words]
        codes.append(_signed(e, found, _signs(e, signs, sevens), CENTRE))
    return codes, _scales(e, _half(e, block), _nibble_pairs(e, block, 66), 0.5, 0.25)


def _s(e: Emit, block: Any, name: str, count: int, signs_at: int, centre: int) -> list[Any]:
    """Codes of ``count`` points a run: low bits of their numbers in bytes, higher ones shared."""
    points, bits = _table(e, name), 8 // count
    codes = []
    for run in range(8):
        high = _byte(e, block, 66 + run)
        indices = [
            e.b.or_(
                _byte(e, block, 2 + count * run + i),
                _field(e, high, bits * i, (1 << bits) - 1, 8),
            )
            for i in range(count)
        ]
        signs = e.load(block, I32, signs_at + 4 * run)
        codes.append(_signed(e, _look_up(e, points, indices), signs, centre))
    return codes


def iq2_s(e: Emit, block: Any) -> Grid:
    codes = _s(e, block, "IQ2_S", 4, 34, CENTRE)
    return codes, _scales(e, _half(e, block), _nibble_pairs(e, block, 74), 0.5, 0.25)


def iq3_s(e: Emit, block: Any) -> Grid:
    codes = _s(e, block, "IQ3_S", 8, 74, CENTRE_IQ3_S)
    packed = e.splat(e.load(block, I32, 106), 8)
    nibbles = e.and_(e.b.lshr(packed, e.constant(I32, range(0, 32, 4), 8)), 15)
    return codes, _scales(e, _half(e, block), nibbles, 0.5, 2.0)


def _moved(e: Emit, points: Any, down: Sequence[Any]) -> Any:
    """Codes of IQ1: an eighth less where the I1 of their eight is set, else one more."""
    ones = [
        e.b.select(bit, ir.Constant(I64, (1 << 64) - 1), ir.Constant(I64, 0x0101010101010101))
        for bit in down
    ]
    return e.b.add(points, e.b.bitcast(_joined(e, ones), vector(I8, 32)))


def _bit(e: Emit, word: Any, mask: int) -> Any:
    return e.b.icmp_unsigned("!=", e.and_(word, mask), ir.Constant(I64, 0))


def iq1_s(e: Emit, block: Any) -> Grid:
    points = _table(e, "IQ1")
    codes, words = [], []
    for run in range(8):
        word = e.b.zext(e.load(block, I16, 34 + 2 * run), I64)
        words.append(e.b.trunc(_field(e, word, 12, 7), I32))
        indices = [
            e.b.or_(_byte(e, block, 2 + 4 * run + i), _field(e, word, 3 * i, 7, 8))
            for i in range(4)
        ]
        found = _look_up(e, points, indices)
        codes.append(_moved(e, found, [_bit(e, word, 0x8000)] * 4))
    return codes, _scales(e, _half(e, block), _joined(e, words), 0.5, 0.25)


def iq1_m(e: Emit, block: Any) -> Grid:
    points = _table(e, "IQ1")
    codes = []
    for run in range(8):
        nibbles = e.b.zext(e.load(block, I16, 32 + 2 * run), I64)
        indices = [
            e.b.or_(_byte(e, block, 4 * run + i), _field(e, nibbles, 4 * i, 7, 8)) for i in range(4)
        ]
        down = [_bit(e, nibbles, 8 << 4 * i) for i in range(4)]
        codes.append(_moved(e, _look_up(e, points, indices), down))
    # Four words, of which each has four scales, and a quarter of the block's factor on top.
    words = e.load(block, I64, 48)
    bits = ir.Constant(I64, 0)
    for i in range(4):
        bits = e.b.or_(bits, _field(e, words, 16 * i + 12, 15, 4 * i))
    d = e.widen(e.b.bitcast(e.b.trunc(bits, I16), F16))
    wide = e.b.zext(e.b.bitcast(words, vector(I16, 4)), vector(I32, 4))
    spread = e.shuffle(wide, [i // 4 for i in range(16)])
    scales = e.and_(e.b.lshr(spread, e.constant(I32, [0, 3, 6, 9] * 4, 16)), 7)
    return codes, _scales(e, d, scales, 0.5, 0.25)
