"""Weight formats: how a block of each type becomes unsigned codes, scales and minima.

Everything the kernels know about a type is its row in :data:`FORMATS`. A quantized weight is
``scale * code + minimum`` with a code of 0..255; symmetric types get their offset as a minimum, so
that one dot product serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from protocol.ggml.tables import FP4_VALUES, IQ4_VALUES
from protocol.ggml.types import TYPE_INFO, GgmlType
from rpc_server.devices.cpu.kernels import grid_formats
from rpc_server.devices.cpu.kernels.interface.layout import SCALE_GROUPS
from rpc_server.devices.cpu.kernels.vector import F16, F32, I8, I16, I32, I64, Emit, vector


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A block, or several of 32 elements, in registers.

    ``codes`` are vectors of 32 I8, one for each run of 32 elements; ``scales`` and ``minima`` F32,
    a lane for each group (a scalar if that is one).
    """

    codes: Sequence[Any]
    scales: Any
    minima: Any


# Of an offset in a block: the bytes from there on, a vector of I8.
Bytes = Callable[[int], Any]


@dataclass(frozen=True, slots=True)
class CodeLanes:
    """The decoding of a format whose bytes each hold codes of their own alone.

    ``codes`` gives those of the block's runs by the ``width`` (16 or 32) bytes from an offset on.
    What it is given may as well be any of these bytes, of as many rows as there is room for: it
    gives what becomes of them. With 16 bytes each run has two vectors, of its halves.
    """

    codes: Callable[[Emit, Bytes], list[Any]]
    width: int = 32


@dataclass(frozen=True, slots=True)
class Quantized:
    """Blocks of ``block`` elements in ``size`` bytes, a scale for each ``group`` of 16 or 32.

    A block is a divisor of 256, and at least 32.

    ``largest`` is the largest code; ``unpack`` emits the decoding of the block at an address, or of
    so many blocks from there on where they are small. ``lanes`` says how many rows are decoded at
    once, for the formats that can be.
    """

    unpack: Callable[[Emit, Any, int], Unpacked]
    largest: int
    block: int
    size: int
    group: int
    lanes: CodeLanes | None = None


@dataclass(frozen=True, slots=True)
class Plain:
    """Floats of ``size`` bytes, loaded as ``element`` and widened to F32."""

    element: ir.Type
    size: int


# -- pieces of blocks ------------------------------------------------------------------------------


def _half(e: Emit, address: Any, offset: int) -> Any:
    """An F16 scale as F32."""
    return e.widen(e.load(address, F16, offset))


def _gather(e: Emit, blocks: Any, kind: ir.Type, offset: int, stride: int, n: int) -> Any:
    """The values at ``offset`` of ``n`` blocks; a scalar if it is one."""
    if n == 1:
        return e.load(blocks, kind, offset)
    joined = ir.Constant(vector(kind, n), ir.Undefined)
    for i in range(n):
        value = e.load(blocks, kind, offset + stride * i)
        joined = e.b.insert_element(joined, value, ir.Constant(I32, i))
    return joined


def _nibbles(e: Emit, address: Any, offset: int) -> Any:
    """32 codes from 16 bytes: low nibbles first."""
    packed = e.load(address, vector(I8, 16), offset)
    if e.isa.is_arm:
        return e.concat(e.and_(packed, 15), e.shift_right(packed, 4))
    # x86 shifts no bytes.
    twice = e.b.bitcast(e.concat(packed, packed), vector(I64, 4))
    shifted = e.b.lshr(twice, e.constant(I64, [0, 0, 4, 4], 4))
    return e.and_(e.b.bitcast(shifted, vector(I8, 32)), 15)


def _shifted(e: Emit, bytes_: Any, shift: int, mask: int) -> Any:
    return e.and_(e.shift_right(bytes_, shift), mask)


def _bits(e: Emit, word: Any, weight: int) -> Any:
    """32 bytes that are ``weight`` where the I32 has a bit."""
    return e.b.select(e.bits(word), e.constant(I8, weight, 32), e.constant(I8, 0, 32))


def _bytes_as_f32(e: Emit, low: Any, high: Any | None = None, *, signed: bool = False) -> Any:
    """The bytes of one I64, or of two, as F32 lanes."""
    pieces = [e.b.bitcast(w, vector(I8, 8)) for w in (low, high) if w is not None]
    joined = pieces[0] if len(pieces) == 1 else e.concat(*pieces)
    ints = vector(I32, joined.type.count)
    wide = e.b.sext(joined, ints) if signed else e.b.zext(joined, ints)
    return e.b.sitofp(wide, vector(F32, joined.type.count))


def _join(e: Emit, low: Any, high: Any) -> Any:
    """Two I32 as an I64."""
    return e.b.or_(e.b.zext(low, I64), e.shift_left(e.b.zext(high, I64), 32))


def _scaled(e: Emit, d: Any, values: Any) -> Any:
    return e.b.fmul(values, e.splat(d, values.type.count))


def _centred(e: Emit, scales: Any, offset: int) -> Any:
    """The minima of symmetric codes whose zero is ``offset``."""
    return e.b.fmul(scales, e.like(scales, float(-offset)))


# -- blocks of 32 ----------------------------------------------------------------------------------


def _small(
    type_: GgmlType,
    code: Callable[[Emit, Any, int], Any],
    *,
    centre: int | None = None,
    scales: Callable[[Emit, Any, int, int], Any] | None = None,
) -> Callable[[Emit, Any, int], Unpacked]:
    """Unpacking of a type with blocks of 32, whose codes ``code(e, address, offset)`` decodes.

    Codes are symmetric around ``centre``, or their minimum is an F16 behind the scale. ``scales``
    stands in for F16 scales.
    """
    size = TYPE_INFO[type_].type_size

    def unpack(e: Emit, blocks: Any, n: int) -> Unpacked:
        codes = [code(e, blocks, size * i) for i in range(n)]
        if centre is not None:
            if scales is None:
                d = e.widen(_gather(e, blocks, F16, 0, size, n))
            else:
                d = scales(e, blocks, size, n)
            return Unpacked(codes, d, _centred(e, d, centre))
        # Both factors in one load of 4 bytes.
        pair = _gather(e, blocks, I32, 0, size, n)
        short, half = (vector(I16, n), vector(F16, n)) if n > 1 else (I16, F16)
        factors = [
            e.widen(e.b.bitcast(e.b.trunc(e.shift_right(pair, shift), short), half))
            for shift in (0, 16)
        ]
        return Unpacked(codes, *factors)

    return unpack


def _nibbles_at(at: int) -> Callable[[Emit, Any, int], Any]:
    return lambda e, address, offset: _nibbles(e, address, offset + at)


def _nibble_lanes(at: int) -> CodeLanes:
    """Of what :func:`_nibbles_at` decodes."""
    return CodeLanes(lambda e, bytes_: _both_nibbles(e, bytes_(at)), 16)


def _look_up_lanes(table: Sequence[int], at: int, runs: int = 1) -> CodeLanes:
    """Of what :func:`_looked_up` decodes: so many runs one after the other."""

    def codes(e: Emit, bytes_: Bytes) -> list[Any]:
        packed = [bytes_(at + 16 * run) for run in range(runs)]
        return [e.look_up(table, half) for run in packed for half in _both_nibbles(e, run)]

    return CodeLanes(codes, 16)


def _both_nibbles(e: Emit, packed: Any) -> list[Any]:
    return [e.and_(packed, 15), e.shift_right(packed, 4)]


def _five_bits_at(at: int) -> Callable[[Emit, Any, int], Any]:
    """A bit field of 32 fifth bits, then nibbles."""

    def code(e: Emit, address: Any, offset: int) -> Any:
        high = _bits(e, e.load(address, I32, offset + at), 16)
        return e.b.or_(_nibbles(e, address, offset + at + 4), high)

    return code


def _looked_up(table: Sequence[int], at: int) -> Callable[[Emit, Any, int], Any]:
    return lambda e, address, offset: e.look_up(table, _nibbles(e, address, offset + at))


def _unsigned(e: Emit, bytes_: Any) -> Any:
    return e.b.xor(bytes_, e.like(bytes_, -128))


def _signed_bytes(e: Emit, address: Any, offset: int) -> Any:
    return _unsigned(e, e.load(address, vector(I8, 32), offset + 2))


_IQ4_CODES = [int(v) + 128 for v in IQ4_VALUES]
_FP4_CODES = [int(v) + 12 for v in FP4_VALUES]


def _exponents(e: Emit, blocks: Any, size: int, n: int) -> Any:
    """E8M0 scales, halved as the codes are doubled; the two smallest are no normal floats."""
    byte = _gather(e, blocks, I8, 0, size, n)
    wide, floats = (vector(I32, n), vector(F32, n)) if n > 1 else (I32, F32)
    exponent = e.b.zext(byte, wide)
    normal = e.shift_left(e.b.sub(exponent, e.like(exponent, 1)), 23)
    small = e.b.shl(e.like(exponent, 0x200000), e.and_(exponent, 1))
    is_small = e.b.icmp_unsigned("<", exponent, e.like(exponent, 2))
    return e.b.bitcast(e.b.select(is_small, small, normal), floats)


# -- blocks of 64 and 128 --------------------------------------------------------------------------


def _several(e: Emit, blocks: Any, n: int, size: int, one: Callable[[Any], Unpacked]) -> Unpacked:
    """``n`` blocks, a power of two, each unpacked by ``one``."""
    parts = [one(e.at(blocks, size * i)) for i in range(n)]
    while len(parts) > 1:
        parts = [
            Unpacked(
                [*a.codes, *b.codes], e.concat(a.scales, b.scales), e.concat(a.minima, b.minima)
            )
            for a, b in zip(parts[::2], parts[1::2], strict=True)
        ]
    return parts[0]


def _q1_0(e: Emit, blocks: Any, n: int) -> Unpacked:
    def one(block: Any) -> Unpacked:
        scales = e.splat(_half(e, block, 0), 4)
        codes = [_bits(e, e.load(block, I32, 2 + 4 * run), 2) for run in range(4)]
        return Unpacked(codes, scales, _centred(e, scales, 1))

    return _several(e, blocks, n, TYPE_INFO[GgmlType.Q1_0].type_size, one)


def _q2_0(e: Emit, blocks: Any, n: int) -> Unpacked:
    def one(block: Any) -> Unpacked:
        scales = e.splat(_half(e, block, 0), 2)
        codes = []
        for run in range(2):
            # A byte holds four neighbours.
            packed = e.load(block, vector(I8, 8), 2 + 8 * run)
            each = e.shuffle(packed, [i // 4 for i in range(32)])
            shifts = e.constant(I8, [0, 2, 4, 6] * 8, 32)
            codes.append(e.and_(e.b.lshr(each, shifts), 3))
        return Unpacked(codes, scales, _centred(e, scales, 1))

    return _several(e, blocks, n, TYPE_INFO[GgmlType.Q2_0].type_size, one)


def _ue4m3(e: Emit, code: Any) -> Any:
    """Half the values of unsigned E4M3 bytes, I32 lanes to F32; the format's NaN counts as 0."""
    n = code.type.count
    floats = vector(F32, n)
    is_nan = e.b.icmp_unsigned("==", code, e.like(code, 0x7F))
    code = e.and_(code, 0x7F)
    # Moved into place, exponent and mantissa are a float but for the bias; that is 127 - 7 + 1
    # for the halving. Below exponent 1 there is no leading one.
    bits = e.b.add(e.shift_left(code, 20), e.like(code, (127 - 7 - 1) << 23))
    small = e.b.fmul(e.b.uitofp(code, floats), e.constant(F32, 2.0**-10, n))
    normal = e.b.icmp_unsigned(">=", code, e.like(code, 8))
    value = e.b.select(normal, e.b.bitcast(bits, floats), small)
    return e.b.select(is_nan, e.constant(F32, 0.0, n), value)


def _nvfp4(e: Emit, blocks: Any, n: int) -> Unpacked:
    def one(block: Any) -> Unpacked:
        scales = _ue4m3(e, e.b.zext(e.load(block, vector(I8, 4)), vector(I32, 4)))
        codes = []
        for run in range(2):
            # Nibbles of two groups of 16, each low ones first.
            both = _nibbles(e, block, 4 + 16 * run)
            order = [*range(8), *range(16, 24), *range(8, 16), *range(24, 32)]
            codes.append(e.look_up(_FP4_CODES, e.shuffle(both, order)))
        return Unpacked(codes, scales, _centred(e, scales, 12))

    return _several(e, blocks, n, TYPE_INFO[GgmlType.NVFP4].type_size, one)


# -- blocks of 256 ---------------------------------------------------------------------------------


def _six_bit_pairs(e: Emit, block: Any, offset: int) -> tuple[Any, Any]:
    """8 scales and 8 minima of 6 bits in 12 bytes (Q4_K, Q5_K), F32 lanes."""
    b = e.b
    low, mid, high = (e.load(block, I32, offset + 4 * i) for i in range(3))
    first_scales, first_minima = e.and_(low, 0x3F3F3F3F), e.and_(mid, 0x3F3F3F3F)
    scales = b.or_(e.and_(high, 0x0F0F0F0F), _shifted(e, low, 2, 0x30303030))
    minima = b.or_(_shifted(e, high, 4, 0x0F0F0F0F), _shifted(e, mid, 2, 0x30303030))
    return (
        _bytes_as_f32(e, _join(e, first_scales, scales)),
        _bytes_as_f32(e, _join(e, first_minima, minima)),
    )


def _scales_and_minima(e: Emit, block: Any, d_at: int, pairs: tuple[Any, Any]) -> tuple[Any, Any]:
    """Codes of scales and of minima times the block's two F16 factors."""
    d, dmin = _half(e, block, d_at), _half(e, block, d_at + 2)
    return _scaled(e, d, pairs[0]), _scaled(e, e.b.fneg(dmin), pairs[1])


def _bytes_of(e: Emit, block: Any) -> Bytes:
    """The bytes of one block, 32 at a time."""
    return lambda at: e.load(block, vector(I8, 32), at)


def _q4_k_codes(e: Emit, bytes_: Bytes) -> list[Any]:
    return [code for pair in range(4) for code in _both_nibbles(e, bytes_(16 + 32 * pair))]


def _q4_k(e: Emit, block: Any, _: int) -> Unpacked:
    codes = _q4_k_codes(e, _bytes_of(e, block))
    return Unpacked(codes, *_scales_and_minima(e, block, 0, _six_bit_pairs(e, block, 4)))


def _q5_k_codes(e: Emit, bytes_: Bytes) -> list[Any]:
    high = bytes_(16)
    codes = []
    for pair in range(4):
        for i, low in enumerate(_both_nibbles(e, bytes_(48 + 32 * pair))):
            codes.append(e.b.or_(low, e.shift_left(_shifted(e, high, 2 * pair + i, 1), 4)))
    return codes


def _q5_k(e: Emit, block: Any, _: int) -> Unpacked:
    codes = _q5_k_codes(e, _bytes_of(e, block))
    return Unpacked(codes, *_scales_and_minima(e, block, 0, _six_bit_pairs(e, block, 4)))


def _q6_k_codes(e: Emit, bytes_: Bytes) -> list[Any]:
    codes = []
    for half in range(2):
        low = [bytes_(64 * half + 32 * i) for i in range(2)]
        high = bytes_(128 + 32 * half)
        for run in range(4):
            nibbles = _shifted(e, low[run % 2], 4 * (run // 2), 15)
            codes.append(e.b.or_(nibbles, e.shift_left(_shifted(e, high, 2 * run, 3), 4)))
    return codes


def _q6_k(e: Emit, block: Any, _: int) -> Unpacked:
    codes = _q6_k_codes(e, _bytes_of(e, block))
    packed = [e.load(block, I64, 192 + 8 * i) for i in range(2)]
    scales = _scaled(e, _half(e, block, 208), _bytes_as_f32(e, *packed, signed=True))
    return Unpacked(codes, scales, _centred(e, scales, 32))


def _two_bits(e: Emit, bytes_: Bytes, offset: int) -> list[Any]:
    """256 codes of 2 bits: a run of 32 bytes holds four runs of codes."""
    codes = []
    for half in range(2):
        packed = bytes_(offset + 32 * half)
        codes += [_shifted(e, packed, 2 * run, 3) for run in range(4)]
    return codes


def _q2_k_codes(e: Emit, bytes_: Bytes) -> list[Any]:
    return _two_bits(e, bytes_, 16)


def _q2_k(e: Emit, block: Any, _: int) -> Unpacked:
    packed = [e.load(block, I64, 8 * i) for i in range(2)]
    scales = _bytes_as_f32(e, *(e.and_(w, 0x0F0F0F0F0F0F0F0F) for w in packed))
    minima = _bytes_as_f32(e, *(_shifted(e, w, 4, 0x0F0F0F0F0F0F0F0F) for w in packed))
    codes = _q2_k_codes(e, _bytes_of(e, block))
    return Unpacked(codes, *_scales_and_minima(e, block, 80, (scales, minima)))


def _q3_k_codes(e: Emit, bytes_: Bytes) -> list[Any]:
    third = bytes_(0)
    return [
        e.b.or_(low, e.shift_left(_shifted(e, third, run, 1), 2))
        for run, low in enumerate(_two_bits(e, bytes_, 32))
    ]


def _q3_k(e: Emit, block: Any, _: int) -> Unpacked:
    codes = _q3_k_codes(e, _bytes_of(e, block))
    # 16 scales of 6 bits: the low four in 8 bytes of nibbles, the upper two in 4 bytes.
    low, upper = e.load(block, I64, 96), e.load(block, I32, 104)
    upper_parts = [_shifted(e, upper, 2 * i, 0x03030303) for i in range(4)]
    nibbles = [_shifted(e, low, 4 * i, 0x0F0F0F0F0F0F0F0F) for i in range(2)]
    words = [
        e.b.or_(n, e.shift_left(_join(e, *upper_parts[2 * i : 2 * i + 2]), 4))
        for i, n in enumerate(nibbles)
    ]
    centred = e.b.fsub(_bytes_as_f32(e, *words), e.constant(F32, 32.0, 16))
    scales = _scaled(e, _half(e, block, 108), centred)
    return Unpacked(codes, scales, _centred(e, scales, 4))


def _iq4_xs(e: Emit, block: Any, _: int) -> Unpacked:
    codes = [e.look_up(_IQ4_CODES, _nibbles(e, block, 8 + 16 * run)) for run in range(8)]
    lanes = vector(I32, 8)
    high = e.splat(e.b.zext(e.load(block, I16, 2), I32), 8)
    low = e.splat(e.load(block, I32, 4), 8)
    low = e.and_(e.b.lshr(low, e.constant(I32, range(0, 32, 4), 8)), 15)
    high = e.and_(e.b.lshr(high, e.constant(I32, range(0, 16, 2), 8)), 3)
    code = e.b.or_(low, e.shift_left(high, 4))
    centred = e.b.sitofp(e.b.sub(code, ir.Constant(lanes, [32] * 8)), vector(F32, 8))
    scales = _scaled(e, _half(e, block, 0), centred)
    return Unpacked(codes, scales, _centred(e, scales, 128))


def _tq2_0_codes(e: Emit, bytes_: Bytes) -> list[Any]:
    return _two_bits(e, bytes_, 0)


def _tq2_0(e: Emit, block: Any, _: int) -> Unpacked:
    scales = e.splat(_half(e, block, 64), 8)
    return Unpacked(_tq2_0_codes(e, _bytes_of(e, block)), scales, _centred(e, scales, 1))


def _tq1_0(e: Emit, block: Any, _: int) -> Unpacked:
    # A byte is a fraction whose digits to base 3 are the codes: multiplied by a power of 3, the
    # next digit is what carries beyond the byte when it is multiplied once more.
    def digits(packed: Any, place: int) -> Any:
        n = packed.type.count
        fraction = e.b.mul(packed, e.constant(I8, 3**place, n))
        tripled = e.b.mul(e.b.zext(fraction, vector(I16, n)), e.constant(I16, 3, n))
        return e.b.trunc(e.shift_right(tripled, 8), vector(I8, n))

    first = e.load(block, vector(I8, 32))
    codes = [digits(first, place) for place in range(5)]
    second = e.load(block, vector(I8, 16), 32)
    last = e.load(block, vector(I8, 4), 48)
    pieces = [digits(second, place) for place in range(5)]
    fours = [digits(last, place) for place in range(4)]
    pieces.append(e.concat(e.concat(*fours[:2]), e.concat(*fours[2:])))
    codes += [e.concat(*pieces[i : i + 2]) for i in (0, 2, 4)]
    scales = e.splat(_half(e, block, 52), 8)
    return Unpacked(codes, scales, _centred(e, scales, 1))


# -- grids -----------------------------------------------------------------------------------------


def _on_a_grid(
    type_: GgmlType, unpack: grid_formats.Unpack, centre: int, largest: int
) -> tuple[GgmlType, Quantized]:
    def unpacked(e: Emit, block: Any, _: int) -> Unpacked:
        codes, scales = unpack(e, block)
        return Unpacked(codes, scales, _centred(e, scales, centre))

    return _quantized(type_, unpacked, largest)


# -- the table -------------------------------------------------------------------------------------


def _quantized(
    type_: GgmlType,
    unpack: Callable[[Emit, Any, int], Unpacked],
    largest: int,
    lanes: CodeLanes | None = None,
) -> tuple[GgmlType, Quantized]:
    block, size = TYPE_INFO[type_].block_size, TYPE_INFO[type_].type_size
    return type_, Quantized(unpack, largest, block, size, SCALE_GROUPS[type_], lanes)


def _quantized_small(
    type_: GgmlType,
    code: Callable[[Emit, Any, int], Any],
    largest: int,
    lanes: CodeLanes | None = None,
    **how: Any,
) -> tuple[GgmlType, Quantized]:
    return _quantized(type_, _small(type_, code, **how), largest, lanes)


_SIGNED_LANES = CodeLanes(lambda e, bytes_: [_unsigned(e, bytes_(2))])
_GRID = grid_formats.CENTRE, grid_formats.LARGEST
_GRID_IQ3_S = grid_formats.CENTRE_IQ3_S, grid_formats.LARGEST_IQ3_S
_GRID_IQ1 = grid_formats.CENTRE_IQ1, grid_formats.LARGEST_IQ1
_IQ4, _FP4 = _looked_up(_IQ4_CODES, 2), _looked_up(_FP4_CODES, 1)

QUANTIZED: dict[GgmlType, Quantized] = dict(
    (
        _quantized_small(GgmlType.Q4_0, _nibbles_at(2), 15, _nibble_lanes(2), centre=8),
        _quantized_small(GgmlType.Q4_1, _nibbles_at(4), 15, _nibble_lanes(4)),
        _quantized_small(GgmlType.Q5_0, _five_bits_at(2), 31, centre=16),
        _quantized_small(GgmlType.Q5_1, _five_bits_at(4), 31),
        _quantized_small(GgmlType.Q8_0, _signed_bytes, 255, _SIGNED_LANES, centre=128),
        _quantized_small(
            GgmlType.IQ4_NL, _IQ4, max(_IQ4_CODES), _look_up_lanes(_IQ4_CODES, 2), centre=128
        ),
        _quantized_small(
            GgmlType.MXFP4,
            _FP4,
            max(_FP4_CODES),
            _look_up_lanes(_FP4_CODES, 1),
            centre=12,
            scales=_exponents,
        ),
        _quantized(GgmlType.Q1_0, _q1_0, 2),
        _quantized(GgmlType.Q2_0, _q2_0, 3),
        _quantized(GgmlType.NVFP4, _nvfp4, max(_FP4_CODES)),
        _quantized(GgmlType.TQ1_0, _tq1_0, 2),
        _quantized(GgmlType.TQ2_0, _tq2_0, 3, CodeLanes(_tq2_0_codes)),
        _quantized(GgmlType.Q2_K, _q2_k, 3, CodeLanes(_q2_k_codes)),
        _quantized(GgmlType.Q3_K, _q3_k, 7, CodeLanes(_q3_k_codes)),
        _quantized(GgmlType.Q4_K, _q4_k, 15, CodeLanes(_q4_k_codes)),
        _quantized(GgmlType.Q5_K, _q5_k, 31, CodeLanes(_q5_k_codes)),
        _quantized(GgmlType.Q6_K, _q6_k, 63, CodeLanes(_q6_k_codes)),
        _quantized(GgmlType.IQ4_XS, _iq4_xs, max(_IQ4_CODES), _look_up_lanes(_IQ4_CODES, 8, 8)),
        _on_a_grid(GgmlType.IQ2_XXS, grid_formats.iq2_xxs, *_GRID),
        _on_a_grid(GgmlType.IQ2_XS, grid_formats.iq2_xs, *_GRID),
        _on_a_grid(GgmlType.IQ2_S, grid_formats.iq2_s, *_GRID),
        _on_a_grid(GgmlType.IQ3_XXS, grid_formats.iq3_xxs, *_GRID),
        _on_a_grid(GgmlType.IQ3_S, grid_formats.iq3_s, *_GRID_IQ3_S),
        _on_a_grid(GgmlType.IQ1_S, grid_formats.iq1_s, *_GRID_IQ1),
        _on_a_grid(GgmlType.IQ1_M, grid_formats.iq1_m, *_GRID_IQ1),
    )
)

PLAIN: dict[GgmlType, Plain] = {
    GgmlType.F32: Plain(F32, 4),
    GgmlType.F16: Plain(F16, 2),
    GgmlType.BF16: Plain(I16, 2),
}

FORMATS: dict[GgmlType, Quantized | Plain] = {**QUANTIZED, **PLAIN}
