"""The two products of attention with a block of positions, for several rows of queries at once.

What is loaded of a block serves all of the rows, so that products wait for no loads. Keys lie in
*panels* for that: 16 positions after each other, of each a lane of a vector for each element. Each
sum adds up in the order of its elements (scores) or of positions (values), whatever the number of
rows.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from rpc_server.devices.cpu.kernels.interface.isa import Isa
from rpc_server.devices.cpu.kernels.vector import F32, LANES, Emit, vector

_VECTOR_BYTES = 4 * LANES

# Registers that hold 16 lanes are also twice as many: of them a block of sums is larger.
_WIDE = "+avx512f" in cpu_target.target_context.codegen().magic_tuple()[2].split(",")
# Panels that rows are multiplied with at once, and vectors of values.
PANELS = 2 if _WIDE else 1
_VALUES = 4 if _WIDE else 1


@intrinsic
def panel_of_rows(typingctx: Any, rows: Any, stride: Any, n: Any, panel: Any) -> Any:
    """Turn 16 rows of ``n`` F32 (a multiple of 8), ``stride`` bytes apart, to a panel."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        e = Emit(builder, Isa.GENERIC)
        rows, stride, n, panel = args

        def body(i: Any, _: list[Any]) -> list[Any]:
            at = e.b.add(rows, e.shift_left(i, 2))
            loaded = []
            for _row in range(LANES):
                loaded.append(e.load(at, vector(F32, 8)))
                at = e.b.add(at, stride)
            to = e.b.add(panel, e.shift_left(i, 6))
            for k, value in enumerate(e.transpose(loaded)):
                e.store(value, to, k * _VECTOR_BYTES)
            return []

        e.loop(e.i64(0), n, 8, [], body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic(prefer_literal=True)
def score_rows(
    typingctx: Any,
    rows: Any,
    panels: Any,
    queries: Any,
    query_stride: Any,
    keys: Any,
    n: Any,
    scores: Any,
    score_stride: Any,
) -> Any:
    """Multiply ``rows`` rows of ``n`` F32 with ``panels`` neighbouring panels (both literals).

    Of each row 16 scores for a panel are written; strides are bytes between rows.
    """
    if not all(isinstance(a, types.IntegerLiteral) for a in (rows, panels)):
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        e = Emit(builder, Isa.GENERIC)
        n_rows, n_panels = (a.literal_value for a in sig.args[:2])
        queries, query_stride, keys, n, scores, score_stride = args[2:]
        panel_bytes = e.shift_left(n, 6)
        panels = [e.b.add(keys, e.b.mul(e.i64(p), panel_bytes)) for p in range(n_panels)]
        rows = [e.b.add(queries, e.b.mul(e.i64(r), query_stride)) for r in range(n_rows)]

        def body(i: Any, sums: list[Any]) -> list[Any]:
            offset, element = e.shift_left(i, 6), e.shift_left(i, 2)
            loaded = [e.load(e.b.add(p, offset), vector(F32, LANES)) for p in panels]
            new = []
            for r, row in enumerate(rows):
                x = e.splat(e.load(e.b.add(row, element), F32), LANES)
                new += [e.fma(k, x, sums[r * n_panels + p]) for p, k in enumerate(loaded)]
            return new

        zeros = [e.constant(F32, 0.0, LANES)] * (n_rows * n_panels)
        sums = e.loop(e.i64(0), n, 1, zeros, body)
        for r in range(n_rows):
            to = e.b.add(scores, e.b.mul(e.i64(r), score_stride))
            for p in range(n_panels):
                e.store(sums[r * n_panels + p], to, p * _VECTOR_BYTES)
        return context.get_dummy_value()

    return types.void(rows, panels, *[types.int64] * 6), codegen


@intrinsic(prefer_literal=True)
def add_values(
    typingctx: Any,
    rows: Any,
    weights: Any,
    weight_stride: Any,
    count: Any,
    values: Any,
    sums: Any,
    n: Any,
) -> Any:
    """Add to each of ``rows`` rows (a literal) of sums: ``count`` values times the row's weights.

    A row of sums, and of values, is ``n`` F32, a multiple of 16; ``weight_stride`` is bytes.
    """
    if not isinstance(rows, types.IntegerLiteral):
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        e = Emit(builder, Isa.GENERIC)
        n_rows = sig.args[0].literal_value
        weights, weight_stride, count, values, sums, n = args[1:]
        row_bytes = e.shift_left(n, 2)
        weight_rows = [e.b.add(weights, e.b.mul(e.i64(r), weight_stride)) for r in range(n_rows)]
        sum_rows = [e.b.add(sums, e.b.mul(e.i64(r), row_bytes)) for r in range(n_rows)]
        lanes = vector(F32, LANES)

        def columns(first: Any, width: int) -> None:
            """``width`` vectors of every row, from element ``first`` on."""
            offset = e.shift_left(first, 2)
            at = [e.b.add(row, offset) for row in sum_rows]
            start = [e.load(a, lanes, v * _VECTOR_BYTES) for a in at for v in range(width)]

            def body(p: Any, totals: list[Any]) -> list[Any]:
                value = e.b.add(e.b.add(values, offset), e.b.mul(p, row_bytes))
                loaded = [e.load(value, lanes, v * _VECTOR_BYTES) for v in range(width)]
                element, new = e.shift_left(p, 2), []
                for r, row in enumerate(weight_rows):
                    x = e.splat(e.load(e.b.add(row, element), F32), LANES)
                    new += [e.fma(v, x, totals[r * width + i]) for i, v in enumerate(loaded)]
                return new

            totals = e.loop(e.i64(0), count, 1, start, body)
            for i, total in enumerate(totals):
                e.store(total, at[i // width], i % width * _VECTOR_BYTES)

        def stretch(first: Any, end: Any, width: int) -> Any:
            """As many times ``width`` vectors as there are; where they end."""

            def body(i: Any, _: list[Any]) -> list[Any]:
                columns(i, width)
                return []

            step = width * LANES
            whole = e.b.mul(e.b.sdiv(e.b.sub(end, first), e.i64(step)), e.i64(step))
            last = e.b.add(first, whole)
            e.loop(first, last, step, [], body)
            return last

        at = stretch(e.i64(0), n, _VALUES)
        if _VALUES > 1:
            stretch(at, n, 1)
        return context.get_dummy_value()

    return types.void(rows, *[types.int64] * 6), codegen
