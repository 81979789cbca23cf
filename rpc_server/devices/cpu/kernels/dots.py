"""The inner loops of matrix products, emitted for one weight format and one instruction set.

Few columns: :func:`row_dots` reads each weight once, straight from memory, and multiplies it with
up to three of them. Many columns: :func:`unpack_tile` turns 16 rows into a *tile*, in which a
vector holds the same four codes (or one float) of all 16 rows, and :func:`tile_product` multiplies
it with several columns at a time; sums then need no shuffling, and decoding is paid once.

Each column has sums of its own, which are added up in one order: how many others are multiplied
with it doesn't change what comes out.

A tile of a quantized format is a record for each run of 32 elements: 8 vectors of codes (where two
rows are multiplied with two columns, 4 of twice the size, with eight codes of each row), then for
each group of the run a vector of scales and one of minima (F32, a lane for each row). A tile of
floats is a vector of F32 for each element (of F16 where they are multiplied as such), or one of
pairs of BF16 for every other one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from protocol.ggml.types import GgmlType
from rpc_server.devices.cpu.kernels.formats import FORMATS, Plain, Quantized, Unpacked
from rpc_server.devices.cpu.kernels.interface.isa import Isa
from rpc_server.devices.cpu.kernels.interface.layout import (
    HALF_SUMS_AT,
    SCALES_AT,
    STAGE_BYTES,
    STAGE_MINIMA,
    STAGE_SCALES,
    SUBBLOCK,
    SUMS_AT,
    UNIT,
    UNIT_BYTES,
    in_halves,
    in_pairs,
    run_bytes,
)
from rpc_server.devices.cpu.kernels.vector import (
    F16,
    F32,
    FETCHES_AHEAD,
    I8,
    I16,
    I32,
    I64,
    IS_TOLD,
    LANES,
    Emit,
    vector,
)

_VECTOR_BYTES = 64
_I8_MOST = 127


def rows_at_once(type_: GgmlType, columns: int = 1) -> int:
    """Return how many rows :func:`row_dots` does with so many columns.

    Each has sums and an unpacked block in registers.

    Several share what is loaded of the column, but one is a single stretch of memory.
    """
    if FETCHES_AHEAD or columns > 1:
        return 1
    return 2 if isinstance(FORMATS[type_], Quantized) else 4


def tile_columns_from(type_: GgmlType) -> int:
    """Return from how many columns on tiles are worth being made."""
    return 4 if isinstance(FORMATS[type_], Quantized) else 6


def _groups(format_: Quantized) -> int:
    """Groups of a run."""
    return SUBBLOCK // format_.group


def _emitter(builder: Any, sig: Any) -> tuple[Emit, Quantized | Plain, GgmlType]:
    type_ = GgmlType(sig.args[0].literal_value)
    return Emit(builder, Isa(sig.args[1].literal_value)), FORMATS[type_], type_


def _literals(*args: Any) -> bool:
    return all(isinstance(a, types.IntegerLiteral) for a in args)


# -- few columns -----------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def row_dots(
    typingctx: Any,
    type_: Any,
    isa: Any,
    count: Any,
    weights: Any,
    stride: Any,
    row: Any,
    last: Any,
    k: Any,
    ahead: Any,
    columns: Any,
) -> Any:
    """Multiply rows ``row``, ... (rows_at_once of them, none beyond ``last``) by ``count`` columns.

    ``weights`` is row 0, ``stride`` bytes on is row 1. ``columns`` are pairs of int64: a column's
    activations and its F32 results, of which element ``row`` is set, and those after it. ``ahead``
    bytes further on lie the weights to be asked for now, on processors that want to be told.
    """
    if not _literals(type_, isa, count):
        return None
    signature = types.void(type_, isa, count, *[types.int64] * 7)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        e, format_, kind = _emitter(builder, sig)
        n = sig.args[2].literal_value
        weights, stride, row, last, k, ahead, columns = args[3:]
        sources, targets = _column_pairs(e, columns, n)
        numbers = [e.call_vector("smin", e.at(row, i), last) for i in range(rows_at_once(kind, n))]
        rows = [e.b.add(weights, e.b.mul(i, stride)) for i in numbers]
        if in_pairs(kind, e.isa):
            sums = _paired_dots(e, rows, k, sources)
        elif isinstance(format_, Plain):
            sums = _plain_dots(e, format_, _column_element(e, kind), rows, k, ahead, sources)
        else:
            sums = _quantized_dots(e, format_, rows, k, ahead, sources)
        places = itertools.product(numbers, targets)
        for (number, target), value in zip(places, sums, strict=True):
            e.store(value, e.b.add(target, e.shift_left(number, 2)))
        return context.get_dummy_value()

    return signature, codegen


def _column_element(e: Emit, type_: GgmlType) -> ir.Type:
    """Return what floats of a column are, and those of a tile."""
    return F16 if in_halves(type_, e.isa) else F32


def _place(e: Emit, at: Any, i: Any, element: ir.Type) -> Any:
    """Return where float ``i`` of those from ``at`` on is."""
    return e.b.add(at, e.shift_left(i, 1 if element == F16 else 2))


def _column_pairs(e: Emit, columns: Any, n: int) -> tuple[list[Any], list[Any]]:
    """Return where the activations of ``n`` columns lie, and where their results go."""
    sources, targets = ([e.load(columns, I64, 16 * i + at) for i in range(n)] for at in (0, 8))
    return sources, targets


# Sums are those of each row with each column, a row's one after the other.
def _add_products(
    sums: list[Any], rows: list[Any], columns: list[Any], add: Callable[[Any, Any, Any], Any]
) -> list[Any]:
    """``add(sum, row, column)`` of all of them."""
    pairs = itertools.product(rows, columns)
    return [add(s, row, column) for s, (row, column) in zip(sums, pairs, strict=True)]


def _plain_dots(
    e: Emit,
    format_: Plain,
    element: ir.Type,
    rows: list[Any],
    k: Any,
    ahead: Any,
    sources: list[Any],
) -> list[Any]:
    kind, column = vector(format_.element, LANES), vector(element, LANES)
    zeros = [e.constant(F32, 0.0, LANES) for _ in rows for _ in sources]
    # Registers of 16 bytes are done with LANES as fast as a loop comes round.
    step = 2 * LANES if e.isa.is_arm else LANES
    whole = e.b.and_(k, e.i64(-step))

    def add(total: Any, weights: Any, x: Any) -> Any:
        return e.fma_wide(weights, x, total)

    def body(first: Any, sums: list[Any]) -> list[Any]:
        for at in range(0, step, LANES):
            i = e.at(first, at)
            x = [e.load(_place(e, source, i, element), column) for source in sources]
            offset = e.b.mul(i, e.i64(format_.size))
            for r in rows:
                if IS_TOLD:
                    e.prefetch(e.b.add(e.b.add(r, offset), ahead), LANES * format_.size)
            weights = [e.load(e.b.add(r, offset), kind) for r in rows]
            sums = _add_products(sums, weights, x, add)
        return sums

    def rest(i: Any, sums: list[Any]) -> list[Any]:
        n = e.call_vector("smin", e.b.sub(k, i), e.i64(LANES))
        x = [e.load_part(_place(e, source, i, element), column, n) for source in sources]
        offset = e.b.mul(i, e.i64(format_.size))
        weights = [e.load_part(e.b.add(r, offset), kind, n) for r in rows]
        return _add_products(sums, weights, x, add)

    sums = e.loop(e.i64(0), whole, step, zeros, body)
    return [e.sum(s) for s in e.loop(whole, k, LANES, sums, rest)]


def _paired_dots(e: Emit, rows: list[Any], k: Any, sources: list[Any]) -> list[Any]:
    """Rows of BF16 times columns of BF16, a pair in each lane."""
    pairs, halves = vector(I32, LANES), vector(I16, 2 * LANES)
    whole = e.b.and_(k, e.i64(-2 * LANES))

    def body(i: Any, sums: list[Any]) -> list[Any]:
        offset = e.shift_left(i, 1)
        values, x = (
            [e.load(e.b.add(at, offset), pairs) for at in places] for places in (rows, sources)
        )
        return _add_products(sums, values, x, e.dot_bf16)

    def rest(i: Any, sums: list[Any]) -> list[Any]:
        n, offset = e.b.sub(k, i), e.shift_left(i, 1)

        def part(at: Any) -> Any:
            return e.b.bitcast(e.load_part(e.b.add(at, offset), halves, n), pairs)

        values, x = ([part(at) for at in places] for places in (rows, sources))
        return _add_products(sums, values, x, e.dot_bf16)

    zeros = [e.constant(F32, 0.0, LANES) for _ in rows for _ in sources]
    sums = e.loop(e.i64(0), whole, 2 * LANES, zeros, body)
    return [e.sum(s) for s in e.loop(whole, k, 2 * LANES, sums, rest)]


# Of a row and a column: products in two vectors, so that additions needn't wait for each other, and
# minima.
_TOTALS = 3


def _dot_blocks(
    e: Emit,
    format_: Quantized,
    unpacked: Unpacked,
    codes: list[Any],
    d: Any,
    sums: Any,
    totals: list[Any],
) -> list[Any]:
    """``totals`` of a row and a column with the products of some runs added.

    ``codes`` are the column's, ``d`` its scales and ``sums`` its sums, as many as the weights'.
    """
    *products, minima = totals
    scales = e.b.fmul(unpacked.scales, d)
    pieces = [
        piece
        for run, (code, value) in enumerate(zip(unpacked.codes, codes, strict=True))
        for piece in _sums_of_run(e, format_, scales, run, code, value)
    ]
    for i, (ints, scale) in enumerate(pieces):
        value = e.b.sitofp(ints, scale.type)
        products[i % 2] = e.fma(value, scale, products[i % 2])
    if e.centres(format_.largest):
        # The codes' centre is what their minima would take off.
        return [*products, minima]
    lanes = minima.type.count
    return [*products, e.fma(_padded(e, unpacked.minima, lanes), _padded(e, sums, lanes), minima)]


def _sums_of_run(
    e: Emit, format_: Quantized, scales: Any, run: int, code: Any, value: Any
) -> list[tuple[Any, Any]]:
    """Sums of a run's products (I32), each with its scale in as many lanes."""
    if not e.isa.is_arm:
        ints = e.dot4(e.constant(I32, 0, 8), code, value, format_.largest)
        if format_.group == SUBBLOCK:
            return [(ints, e.splat(e.lane(scales, run), 8))]
        return [(ints, e.shuffle(scales, [2 * run] * 4 + [2 * run + 1] * 4))]
    if e.centres(format_.largest):
        code = e.centred(code)
    # A register is sums of one scale: as few conversions and products as there can be.
    groups = _groups(format_)
    pieces = []
    for i in range(groups):
        lanes = range(i * format_.group, (i + 1) * format_.group)
        a, b = (e.shuffle(v, lanes) if groups > 1 else v for v in (code, value))
        ints = e.sum_products(a, b, format_.largest)
        pieces.append((ints, e.splat(e.lane(scales, groups * run + i), 4)))
    return pieces


def _padded(e: Emit, value: Any, lanes: int) -> Any:
    """A scalar or a short vector with zeros behind it."""
    if not isinstance(value.type, ir.VectorType):
        return e.b.insert_element(e.constant(F32, 0.0, lanes), value, ir.Constant(I32, 0))
    n = value.type.count
    if n == lanes:
        return value
    return e.shuffle(value, [min(i, n) for i in range(lanes)], e.constant(F32, 0.0, n))


def _quantized_dots(
    e: Emit, format_: Quantized, rows: list[Any], k: Any, ahead: Any, sources: list[Any]
) -> list[Any]:
    groups = _groups(format_)
    zeros = [e.constant(F32, 0.0, 4 if e.isa.is_arm else 8)] * 2
    start = [*zeros, e.constant(F32, 0.0, 8 * groups)] * (len(rows) * len(sources))

    def column(unit: Any, first: Any | None, n: int) -> tuple[list[Any], Any, Any]:
        """``n`` runs of a column from run ``first`` of a unit on: codes, scales and sums."""

        def moved(bits: int) -> Any:
            """The unit's address moved on by ``first`` of 2**bits bytes."""
            return unit if first is None else e.b.add(unit, e.shift_left(first, bits))

        codes_at, factors_at = moved(5), moved(2)
        codes = [e.load(codes_at, vector(I8, SUBBLOCK), SUBBLOCK * i) for i in range(n)]
        d = e.load(factors_at, vector(F32, n) if n > 1 else F32, SCALES_AT)
        if groups == 1:
            return codes, d, e.load(factors_at, d.type, SUMS_AT)
        d = e.shuffle(d, [i // 2 for i in range(2 * n)])
        # Of these there are two for each run.
        return codes, d, e.load(moved(3), d.type, HALF_SUMS_AT)

    def runs(
        block: Any, n_blocks: int, unit: Any, first: Any | None, totals: list[Any]
    ) -> list[Any]:
        """``n_blocks`` from number ``block`` on, and columns from run ``first`` of a unit on.

        ``unit`` is that of all columns, bytes from the first.
        """
        n = n_blocks * format_.block // SUBBLOCK
        columns = [column(e.b.add(source, unit), first, n) for source in sources]
        offset = e.b.mul(block, e.i64(format_.size))
        new: list[Any] = []
        for row in rows:
            at = e.b.add(row, offset)
            if n == UNIT // SUBBLOCK and IS_TOLD:
                e.prefetch(e.b.add(at, ahead), n_blocks * format_.size)
            unpacked = format_.unpack(e, at, n_blocks)
            for codes, d, sums in columns:
                old = totals[len(new) : len(new) + _TOTALS]
                new += _dot_blocks(e, format_, unpacked, codes, d, sums, old)
        return new

    def unit_body(i: Any, totals: list[Any]) -> list[Any]:
        unit = e.b.mul(i, e.i64(UNIT_BYTES))
        return runs(e.b.mul(i, e.i64(per_unit)), per_unit, unit, None, totals)

    def rest_body(i: Any, totals: list[Any]) -> list[Any]:
        within = e.b.mul(e.b.sub(i, whole_blocks), e.i64(format_.block // SUBBLOCK))
        return runs(i, 1, rest, within, totals)

    per_unit = UNIT // format_.block
    whole = e.b.sdiv(k, e.i64(UNIT))
    totals = e.loop(e.i64(0), whole, 1, start, unit_body)
    if per_unit > 1:
        whole_blocks = e.b.mul(whole, e.i64(per_unit))
        rest = e.b.mul(whole, e.i64(UNIT_BYTES))
        n_blocks = e.b.sdiv(k, e.i64(format_.block))
        totals = e.loop(whole_blocks, n_blocks, 1, totals, rest_body)
    sums = []
    for i in range(0, len(totals), _TOTALS):
        first, second, minima = totals[i : i + _TOTALS]
        sums.append(e.b.fadd(e.sum(e.b.fadd(first, second)), e.sum(minima)))
    return sums


# -- many columns ----------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def unpack_tile(
    typingctx: Any,
    type_: Any,
    isa: Any,
    tile: Any,
    begin: Any,
    end: Any,
    weights: Any,
    stride: Any,
    row: Any,
    last: Any,
) -> Any:
    """Unpack into the tile at ``tile`` elements ``begin`` to ``end`` of 16 rows from ``row`` on.

    Rows beyond ``last`` are copies of it. ``begin`` is a multiple of 256.
    """
    if not _literals(type_, isa):
        return None
    signature = types.void(type_, isa, *[types.int64] * 7)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        e, format_, kind = _emitter(builder, sig)
        tile, begin, end, weights, stride, row, last = args[2:]

        def row_start(i: Any) -> Any:
            number = e.call_vector("smin", e.b.add(row, i), last)
            return e.b.add(weights, e.b.mul(number, stride))

        first, ahead = e.at(tile, STAGE_BYTES), e.b.mul(stride, e.i64(LANES))
        if in_pairs(kind, e.isa):
            _unpack_pairs(e, row_start, begin, end, first)
        elif isinstance(format_, Plain):
            element = _column_element(e, kind)
            _unpack_plain(e, format_, element, row_start, begin, end, first)
        else:
            _unpack_quantized(e, format_, row_start, ahead, begin, end, tile, first)
        return context.get_dummy_value()

    return signature, codegen


def _unpack_plain(
    e: Emit,
    format_: Plain,
    element: ir.Type,
    row_start: Any,
    begin: Any,
    end: Any,
    tile: Any,
) -> None:
    kind = vector(format_.element, 8)
    rows = [row_start(e.i64(i)) for i in range(LANES)]
    bits = 5 if element == F16 else 6

    def turn(i: Any, loaded: list[Any]) -> None:
        out = e.b.add(tile, e.shift_left(e.b.sub(i, begin), bits))
        if element != F16:
            loaded = [e.widen(value) for value in loaded]
        for lane, value in enumerate(e.transpose(loaded)):
            e.store(value, out, lane << bits)

    def body(i: Any, _: list[Any]) -> list[Any]:
        offset = e.b.mul(i, e.i64(format_.size))
        turn(i, [e.load(e.b.add(r, offset), kind) for r in rows])
        return []

    def rest(i: Any, _: list[Any]) -> list[Any]:
        offset, n = e.b.mul(i, e.i64(format_.size)), e.b.sub(end, i)
        turn(i, [e.load_part(e.b.add(r, offset), kind, n) for r in rows])
        return []

    whole = e.b.and_(end, e.i64(-8))
    e.loop(begin, whole, 8, [], body)
    e.loop(whole, end, 8, [], rest)


def _unpack_pairs(e: Emit, row_start: Any, begin: Any, end: Any, tile: Any) -> None:
    """A vector of the tile holds a pair of BF16 of each row."""
    rows = [row_start(e.i64(i)) for i in range(LANES)]
    pairs, halves = vector(I32, 8), vector(I16, 16)

    def turn(i: Any, loaded: list[Any]) -> None:
        out = e.b.add(tile, e.shift_left(e.b.sub(i, begin), 5))
        for lane, value in enumerate(e.transpose(loaded)):
            e.store(value, out, lane * _VECTOR_BYTES)

    def body(i: Any, _: list[Any]) -> list[Any]:
        offset = e.shift_left(i, 1)
        turn(i, [e.load(e.b.add(r, offset), pairs) for r in rows])
        return []

    def rest(i: Any, _: list[Any]) -> list[Any]:
        offset, n = e.shift_left(i, 1), e.b.sub(end, i)
        parts = [e.load_part(e.b.add(r, offset), halves, n) for r in rows]
        turn(i, [e.b.bitcast(part, pairs) for part in parts])
        return []

    whole = e.b.and_(end, e.i64(-16))
    e.loop(begin, whole, 16, [], body)
    e.loop(whole, end, 16, [], rest)


def _multiplied(e: Emit, format_: Quantized, code: Any) -> Any:
    """Codes as they are in a tile."""
    return e.centred(code) if e.centres(format_.largest) else code


def _unpack_quantized(
    e: Emit,
    format_: Quantized,
    row_start: Any,
    ahead: Any,
    begin: Any,
    end: Any,
    stage: Any,
    tile: Any,
) -> None:
    runs, groups, per_unit = format_.block // SUBBLOCK, _groups(format_), UNIT // format_.block
    record = run_bytes(format_.group)
    # A tile in eights has another order.
    lanes = None if e.isa is Isa.I8MM else format_.lanes
    starts = [row_start(e.i64(i)) for i in range(LANES)] if lanes else []

    def unit_body(start: Any, _: list[Any]) -> list[Any]:
        count = e.call_vector("smin", e.b.sub(end, start), e.i64(UNIT))
        count = e.b.sdiv(count, e.i64(format_.block))
        first_block = e.b.sdiv(start, e.i64(format_.block))

        def row_body(i: Any, _: list[Any]) -> list[Any]:
            at = e.b.add(row_start(i), e.b.mul(first_block, e.i64(format_.size)))
            e.prefetch(e.b.add(at, ahead), per_unit * format_.size)
            codes = e.b.add(stage, e.shift_left(i, 8))
            factors = e.b.add(stage, e.shift_left(i, 6))

            def stage_blocks(j: Any, n: int) -> None:
                unpacked = format_.unpack(e, e.b.add(at, e.b.mul(j, e.i64(format_.size))), n)
                if lanes is None:
                    to = e.b.add(codes, e.b.mul(j, e.i64(format_.block)))
                    for run, code in enumerate(unpacked.codes):
                        e.store(_multiplied(e, format_, code), to, SUBBLOCK * run)
                to = e.b.add(factors, e.b.mul(j, e.i64(4 * runs * groups)))
                e.store(unpacked.scales, to, STAGE_SCALES)
                e.store(unpacked.minima, to, STAGE_MINIMA)

            def block_body(j: Any, _: list[Any]) -> list[Any]:
                stage_blocks(j, 1)
                return []

            if per_unit == 1:
                stage_blocks(e.i64(0), 1)
                return []
            whole = e.b.icmp_signed("==", count, e.i64(per_unit))
            with e.b.if_else(whole, likely=True) as (then, otherwise):
                with then:
                    stage_blocks(e.i64(0), per_unit)
                with otherwise:
                    e.loop(e.i64(0), count, 1, [], block_body)
            return []

        e.loop(e.i64(0), e.i64(LANES), 1, [], row_body)
        out = e.b.mul(e.b.sdiv(e.b.sub(start, begin), e.i64(SUBBLOCK)), e.i64(record))
        out = e.b.add(tile, out)

        def run_body(j: Any, _: list[Any]) -> list[Any]:
            at = e.b.add(stage, e.shift_left(j, 5))
            to = e.b.add(out, e.b.mul(j, e.i64(record)))
            if e.isa is Isa.I8MM:
                _turn_in_eights(e, at, to)
                return []
            loaded = [e.load(at, vector(I32, 8), UNIT * i) for i in range(LANES)]
            for i, value in enumerate(e.transpose(loaded)):
                e.store(value, to, i * _VECTOR_BYTES)
            return []

        def lanes_body(j: Any, _: list[Any]) -> list[Any]:
            block = e.b.mul(e.b.add(first_block, j), e.i64(format_.size))
            to = e.b.add(out, e.b.mul(j, e.i64(runs * record)))
            _unpack_lanes(e, format_, [e.b.add(s, block) for s in starts], to)
            return []

        if lanes is None:
            e.loop(e.i64(0), e.b.mul(count, e.i64(runs)), 1, [], run_body)
        else:
            e.loop(e.i64(0), count, 1, [], lanes_body)
        # Factors of runs that a short last unit lacks are written too: the tile has the room.
        for which, stage_at in enumerate((STAGE_SCALES, STAGE_MINIMA)):
            for half in range(groups):
                at = e.at(stage, stage_at + 32 * half)
                loaded = [e.load(at, vector(F32, 8), _VECTOR_BYTES * i) for i in range(LANES)]
                for i, value in enumerate(e.transpose(loaded)):
                    group = 8 * half + i
                    run, within = divmod(group, groups)
                    offset = run * record + (8 + 2 * within + which) * _VECTOR_BYTES
                    e.store(value, out, offset)
        return []

    e.loop(begin, end, UNIT, [], unit_body)


def _turn_in_eights(e: Emit, rows: Any, to: Any) -> None:
    """Turn a run of 16 rows, UNIT bytes apart: eight codes of each, then the next eight of each."""
    for row in range(0, LANES, 2):
        pair = [e.load(rows, vector(I64, 4), UNIT * (row + i)) for i in range(2)]
        for eight in range(4):
            value = e.shuffle(pair[0], [eight, 4 + eight], pair[1])
            e.store(value, to, 8 * (LANES * eight + row))


# Bytes of a row that are turned at once, and the words that they are.
_TURNED_BYTES, _TURNED_WORDS = 16, 4


def _unpack_lanes(e: Emit, format_: Quantized, blocks: list[Any], tile: Any) -> None:
    """Write the codes of a block of each of 16 rows to a tile, from its run at ``tile`` on.

    Packed bytes are turned first and decoded then, those of 16 rows at once.
    """
    lanes, record = format_.lanes, run_bytes(format_.group)
    assert lanes is not None

    def chunk_body(chunk: Any, _: list[Any]) -> list[Any]:
        turned: dict[int, list[Any]] = {}
        places = [e.b.add(block, e.shift_left(chunk, 4)) for block in blocks]

        def word(number: int, at: int) -> Any:
            """Word ``number`` of the chunk's bytes, ``at`` behind the begin of a block."""
            if at not in turned:
                loaded = [e.load(place, vector(I32, _TURNED_WORDS), at) for place in places]
                turned[at] = e.transpose_short(loaded)
            return e.b.bitcast(turned[at][number], vector(I8, 4 * LANES))

        to = e.b.add(tile, e.b.mul(chunk, e.i64(_TURNED_WORDS * _VECTOR_BYTES)))
        for number in range(_TURNED_WORDS):
            for i, code in enumerate(lanes.codes(e, functools.partial(word, number))):
                run, half = (i, 0) if lanes.width == SUBBLOCK else divmod(i, 2)
                at = run * record + (half * _TURNED_WORDS + number) * _VECTOR_BYTES
                e.store(_multiplied(e, format_, code), to, at)
        return []

    chunks = lanes.width // _TURNED_BYTES
    if chunks == 1:
        chunk_body(e.i64(0), [])
    else:
        e.loop(e.i64(0), e.i64(chunks), 1, [], chunk_body)


@intrinsic(prefer_literal=True)
def tile_product(
    typingctx: Any,
    type_: Any,
    isa: Any,
    count: Any,
    tile: Any,
    row: Any,
    rows: Any,
    begin: Any,
    end: Any,
    columns: Any,
) -> Any:
    """Multiply elements ``begin`` to ``end`` of a tile by ``count`` columns.

    ``columns`` are pairs of int64: a column's activations and its F32 results, of which ``rows``
    (at most 16) from ``row`` on are set, or added to where ``begin`` isn't 0.
    """
    if not _literals(type_, isa, count):
        return None
    signature = types.void(type_, isa, count, *[types.int64] * 6)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        e, format_, kind = _emitter(builder, sig)
        tile, row, rows, begin, end, columns = args[3:]
        sources, targets = _column_pairs(e, columns, sig.args[2].literal_value)
        first = e.at(tile, STAGE_BYTES)
        if in_pairs(kind, e.isa):
            sums = _paired_product(e, first, begin, end, sources)
        elif isinstance(format_, Plain):
            sums = _plain_product(e, _column_element(e, kind), first, begin, end, sources)
        else:
            sums = _quantized_product(e, format_, first, begin, end, sources)
        results = [e.b.add(t, e.shift_left(row, 2)) for t in targets]
        lanes = vector(F32, LANES)
        fresh = e.b.icmp_signed("==", begin, e.i64(0))
        with e.b.if_else(fresh) as (then, otherwise):
            with then:
                for value, at in zip(sums, results, strict=True):
                    e.store_part(value, at, rows)
            with otherwise:
                # All are read before any is written: the last columns may be one and the same.
                added = [
                    e.b.fadd(value, e.load_part(at, lanes, rows))
                    for value, at in zip(sums, results, strict=True)
                ]
                for value, at in zip(added, results, strict=True):
                    e.store_part(value, at, rows)
        return context.get_dummy_value()

    return signature, codegen


def _plain_product(
    e: Emit, element: ir.Type, tile: Any, begin: Any, end: Any, sources: list[Any]
) -> list[Any]:
    bits = 5 if element == F16 else 6

    def body(i: Any, sums: list[Any]) -> list[Any]:
        at = e.b.add(tile, e.shift_left(e.b.sub(i, begin), bits))
        weights = e.load(at, vector(element, LANES))
        return [
            e.fma_wide(weights, e.splat(e.load(_place(e, s, i, element), element), LANES), total)
            for s, total in zip(sources, sums, strict=True)
        ]

    return e.loop(begin, end, 1, [e.constant(F32, 0.0, LANES) for _ in sources], body)


def _paired_product(e: Emit, tile: Any, begin: Any, end: Any, sources: list[Any]) -> list[Any]:
    pairs = vector(I32, LANES)

    def body(i: Any, sums: list[Any]) -> list[Any]:
        weights = e.load(e.b.add(tile, e.shift_left(e.b.sub(i, begin), 5)), pairs)
        offset = e.shift_left(i, 1)
        return [
            e.dot_bf16(total, weights, e.splat(e.load(e.b.add(s, offset), I32), LANES))
            for s, total in zip(sources, sums, strict=True)
        ]

    return e.loop(begin, end, 2, [e.constant(F32, 0.0, LANES) for _ in sources], body)


def _sums_of_words(
    e: Emit, largest: int, tile: Any, columns: list[Any], first: int, count: int
) -> list[Any]:
    """Products of words ``first`` to ``first + count`` of a tile's run with those of columns.

    ``tile`` and ``columns`` are where the run's codes lie. Returns an I32[16] for each column. A
    format with codes above 127 is centred at 128: on AVX2 and ARM sums are of codes less 128.
    """
    bytes_ = vector(I8, 4 * LANES)

    def codes(word: Any) -> Any:
        return e.load(e.b.add(tile, e.shift_left(word, 6)), bytes_)

    def spread(column: Any, word: Any) -> Any:
        """A word of a column for all rows."""
        value = e.load(e.b.add(column, e.shift_left(word, 2)), I32)
        return e.b.bitcast(e.splat(value, LANES), bytes_)

    def add_words(word: Any, sums: list[Any]) -> list[Any]:
        code = codes(word)
        return [
            e.dot4(total, code, spread(c, word), largest)
            for c, total in zip(columns, sums, strict=True)
        ]

    def add_signed(word: Any, sums: list[Any]) -> list[Any]:
        # What has a sign is multiplied by what has none: the sign changes sides.
        signed = e.b.xor(codes(word), e.constant(I8, -128, 4 * LANES))
        sizes = e.absolute(signed)
        pairs = [e.pairs(sizes, e.sign(spread(c, word), signed)) for c in columns]
        return [e.add_pairs(s, p) for s, p in zip(sums, pairs, strict=True)]

    def add_short(word: Any, sums: list[Any]) -> list[Any]:
        code = codes(word)
        pairs = [e.pairs(code, spread(c, word)) for c in columns]
        return [e.b.add(s, p) for s, p in zip(sums, pairs, strict=True)]

    def over(begin: int, end: int, sums: list[Any], add: Callable[..., list[Any]]) -> list[Any]:
        if e.isa < Isa.AVX512:
            return e.loop(e.i64(begin), e.unknown(e.i64(end)), 1, sums, add)
        for word in range(begin, end):
            sums = add(e.i64(word), sums)
        return sums

    if e.isa is Isa.I8MM:
        return _sums_of_eights(e, tile, columns, first, count)
    zeros = [e.constant(I32, 0, LANES) for _ in columns]
    if _is_centred(e, largest) and not e.isa.is_arm:
        return over(first, first + count, zeros, add_signed)
    most = e.pairs_that_add_up(largest)
    if most < 2:
        return over(first, first + count, zeros, add_words)
    sums = zeros
    for begin in range(first, first + count, most):
        end = min(begin + most, first + count)
        short = [e.constant(I16, 0, 2 * LANES) for _ in columns]
        pairs = over(begin, end, short, add_short)
        sums = [e.add_pairs(s, p) for s, p in zip(sums, pairs, strict=True)]
    return sums


def _sums_of_eights(e: Emit, tile: Any, columns: list[Any], first: int, count: int) -> list[Any]:
    """Return the same as _sums_of_words, of two rows and two columns at once."""
    bytes_, n_pairs = vector(I8, 16), LANES // 2

    def add(eight: Any, sums: list[Any]) -> list[Any]:
        at = e.b.add(tile, e.shift_left(eight, 7))
        codes = [e.load(at, bytes_, 16 * p) for p in range(n_pairs)]
        loaded = [e.load(e.b.add(c, e.shift_left(eight, 3)), vector(I64, 1)) for c in columns]
        values = [
            e.b.bitcast(e.concat(*loaded[i : i + 2]), bytes_) for i in range(0, len(loaded), 2)
        ]
        return [
            e.smmla(total, codes[i % n_pairs], values[i // n_pairs]) for i, total in enumerate(sums)
        ]

    zeros = [e.constant(I32, 0, 4)] * (n_pairs * len(columns) // 2)
    end = e.unknown(e.i64((first + count) // 2))
    sums = e.loop(e.i64(first // 2), end, 1, zeros, add)
    found = []
    for column in range(len(columns)):
        pairs = sums[n_pairs * (column // 2) :][:n_pairs]
        lanes = [column % 2 + 2 * i for i in range(4)]
        fours = [e.shuffle(a, lanes, b) for a, b in zip(pairs[::2], pairs[1::2], strict=True)]
        found.append(e.joined(fours))
    return found


def _is_centred(e: Emit, largest: int) -> bool:
    """Return whether sums are of codes less 128, so that there are no minima any more."""
    return e.centres(largest) or (e.isa == Isa.AVX2 and largest > _I8_MOST)


def _quantized_product(
    e: Emit, format_: Quantized, tile: Any, begin: Any, end: Any, sources: list[Any]
) -> list[Any]:
    groups, record = _groups(format_), run_bytes(format_.group)
    words = 8 // groups
    sums_at = SUMS_AT if groups == 1 else HALF_SUMS_AT
    lanes = vector(F32, LANES)
    centred = _is_centred(e, format_.largest)

    def run_body(run: Any, unit: Any, at: Any, totals: list[Any]) -> list[Any]:
        """Run ``run`` of the unit at offset ``unit`` of the columns; its record is ``at``."""
        codes_at = e.b.add(unit, e.shift_left(run, 5))
        factor_at = e.b.add(unit, e.shift_left(run, 2))
        sum_at = e.b.add(unit, e.shift_left(run, 1 + groups))
        partial: list[Any] = [None] * len(sources)
        totals = list(totals)
        for group in range(groups):
            ints = _sums_of_words(
                e,
                format_.largest,
                at,
                [e.b.add(source, codes_at) for source in sources],
                words * group,
                words,
            )
            scales = e.load(at, lanes, (8 + 2 * group) * _VECTOR_BYTES)
            minima = e.load(at, lanes, (9 + 2 * group) * _VECTOR_BYTES)
            for c, source in enumerate(sources):
                value = e.b.sitofp(ints[c], lanes)
                known = partial[c]
                partial[c] = (
                    e.b.fmul(value, scales) if known is None else e.fma(value, scales, known)
                )
                if centred:
                    continue
                total = e.load(e.b.add(source, sum_at), F32, sums_at + 4 * group)
                totals[c] = e.fma(minima, e.splat(total, LANES), totals[c])
        for c, source in enumerate(sources):
            d = e.splat(e.load(e.b.add(source, factor_at), F32, SCALES_AT), LANES)
            totals[c] = e.fma(partial[c], d, totals[c])
        return totals

    def unit_body(start: Any, totals: list[Any]) -> list[Any]:
        count = e.call_vector("smin", e.b.sub(end, start), e.i64(UNIT))
        unit = e.b.mul(e.b.sdiv(start, e.i64(UNIT)), e.i64(UNIT_BYTES))
        out = e.b.mul(e.b.sdiv(e.b.sub(start, begin), e.i64(SUBBLOCK)), e.i64(record))
        out = e.b.add(tile, out)
        return e.loop(
            e.i64(0),
            e.b.sdiv(count, e.i64(SUBBLOCK)),
            1,
            totals,
            lambda j, t: run_body(j, unit, e.b.add(out, e.b.mul(j, e.i64(record))), t),
        )

    zeros = [e.constant(F32, 0.0, LANES) for _ in sources]
    return e.loop(begin, end, UNIT, zeros, unit_body)
