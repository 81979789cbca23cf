"""Rows of activations in the forms that products read, and the kernels that make them.

``Q8``: 8-bit codes for weights that are quantized, in units of 256 elements (the last may be part
filled), 384 bytes each:

======  ==========================================================================================
offset  content
======  ==========================================================================================
0       256 signed codes, -127..127
256     8 F32 scales, one for each run of 32 elements
288     8 F32: the sum of a run's codes times its scale
320     16 F32: the same for runs of 16
======  ==========================================================================================

``F32``: dense floats, for weights that are floats and activations that are not F32.
"""

from __future__ import annotations

import enum
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from rpc_server.devices.cpu.abi import (
    SRC0,
    Kernel,
    extra,
    ggml_type,
    kernel,
    n_rows,
    ne,
    row_address,
    store_f32,
)
from rpc_server.devices.cpu.kernels.typed import load_scalar, size_of
from rpc_server.devices.cpu.kernels.vector import F32, I8, I32, Emit, Isa, vector

UNIT = 256
UNIT_BYTES = 384
SCALES_AT = 256
SUMS_AT = 288
HALF_SUMS_AT = 320


class RowForm(enum.IntEnum):
    """See the module."""

    Q8 = 0
    F32 = 1


def row_bytes(form: RowForm, n: int) -> int:
    """Bytes of a row of ``n`` elements."""
    if form is RowForm.Q8:
        return -(-n // UNIT) * UNIT_BYTES
    return -(-n * 4 // 64) * 64


@intrinsic
def _quantize_run(typingctx: Any, source: Any, codes: Any, scale: Any, half_sums: Any) -> Any:
    """32 F32 at ``source``: codes, scale (and sum, 32 bytes on) and the two sums of halves."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        e = Emit(builder, Isa.GENERIC)
        b = e.b
        source, codes, scale, half_sums = args
        halves = [e.load(source, vector(F32, 16), 64 * i) for i in range(2)]
        # Compared as integers, of which a NaN is the largest: it makes the scale a NaN.
        magnitudes = [e.and_(b.bitcast(h, vector(I32, 16)), 0x7FFFFFFF) for h in halves]
        bits = e.fold(e.call_vector("smax", *magnitudes), lambda x, y: e.call_vector("smax", x, y))
        largest = b.bitcast(bits, F32)
        d = b.fdiv(largest, ir.Constant(F32, 127.0))
        zero = b.fcmp_ordered("==", largest, ir.Constant(F32, 0.0))
        inverse = b.fdiv(ir.Constant(F32, 127.0), largest)
        inverse = e.splat(b.select(zero, ir.Constant(F32, 0.0), inverse), 16)
        sums = []
        for i, half in enumerate(halves):
            ints = e.to_int(e.call_vector("rint", b.fmul(half, inverse)))
            # The inverse of a denormal is infinite.
            ints = e.call_vector("smin", ints, e.constant(I32, 127, 16))
            ints = e.call_vector("smax", ints, e.constant(I32, -127, 16))
            e.store(b.trunc(ints, vector(I8, 16)), codes, 16 * i)
            sums.append(b.fmul(b.sitofp(e.sum(ints), F32), d))
            e.store(sums[i], half_sums, 4 * i)
        e.store(d, scale)
        e.store(b.fadd(*sums), scale, SUMS_AT - SCALES_AT)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@kernel
def quantize_rows(rec, ith, nth):  # type: ignore[no-untyped-def]
    """Rows of SRC0 (F32) to Q8 at extra 0, extra 1 bytes apart."""
    runs = ne(rec, SRC0, 0) // 32
    total = runs * n_rows(rec, SRC0)
    begin, end = total * ith // nth, total * (ith + 1) // nth
    at = begin
    while at < end:
        row = at // runs
        run = at - row * runs
        stop = min(runs, run + end - at)
        source = row_address(rec, SRC0, row)
        target = extra(rec, 0) + row * extra(rec, 1)
        at += stop - run
        while run < stop:
            unit = target + run // 8 * UNIT_BYTES
            within = run % 8
            _quantize_run(
                source + run * 128,
                unit + within * 32,
                unit + SCALES_AT + within * 4,
                unit + HALF_SUMS_AT + within * 8,
            )
            run += 1
    return 0


@kernel
def widen_rows(rec, ith, nth):  # type: ignore[no-untyped-def]
    """Rows of SRC0 (F16, BF16) to F32 at extra 0, extra 1 bytes apart."""
    type_ = ggml_type(rec, SRC0)
    step = size_of(type_)
    rows = n_rows(rec, SRC0)
    for row in range(rows * ith // nth, rows * (ith + 1) // nth):
        source = row_address(rec, SRC0, row)
        target = extra(rec, 0) + row * extra(rec, 1)
        for i in range(ne(rec, SRC0, 0)):
            store_f32(target + i * 4, load_scalar(type_, source + i * step))
    return 0


CONVERTERS: dict[RowForm, Kernel] = {RowForm.Q8: quantize_rows, RowForm.F32: widen_rows}
