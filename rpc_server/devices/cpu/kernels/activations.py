"""Kernels that turn rows of activations to the forms that products read (see ``layout``)."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from rpc_server.devices.cpu.kernels.interface.isa import Isa
from rpc_server.devices.cpu.kernels.interface.layout import (
    HALF_SUMS_AT,
    SCALES_AT,
    SUMS_AT,
    UNIT_BYTES,
    RowForm,
)
from rpc_server.devices.cpu.kernels.intrinsics import (
    SRC0,
    bits_f32,
    extra,
    ggml_type,
    inline_helper,
    kernel,
    load_f32,
    n_rows,
    ne,
    round_bf16,
    round_f16,
    row_address,
    store_bf16,
    store_f16,
    store_f32,
)
from rpc_server.devices.cpu.kernels.lanes import (
    LANES,
    bf16_bits,
    from_bits,
    load_f32s,
    store_bf16s,
    store_f16s,
    store_f32s,
)
from rpc_server.devices.cpu.kernels.typed import load_scalar, size_of
from rpc_server.devices.cpu.kernels.vector import F32, I8, I32, I64, Emit, vector


@intrinsic
def _largest_bits(typingctx: Any, source: Any) -> Any:
    """The bits of the largest magnitude of 32 F32, as int32."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        e = Emit(builder, Isa.GENERIC)
        halves = [e.load(args[0], vector(F32, 16), 64 * i) for i in range(2)]
        # Compared as integers, of which a NaN is the largest: it makes the scale a NaN.
        magnitudes = [e.and_(e.b.bitcast(h, vector(I32, 16)), 0x7FFFFFFF) for h in halves]
        joined = e.call_vector("smax", *magnitudes)
        return e.fold(joined, lambda x, y: e.call_vector("smax", x, y))

    return types.int32(types.int64), codegen


@intrinsic
def _quantize_run(typingctx: Any, source: Any, inverse: Any, codes: Any) -> Any:
    """32 F32 at ``source`` times ``inverse`` as codes; sums of halves, the second in high bits."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        e = Emit(builder, Isa.GENERIC)
        b = e.b
        source, inverse, codes = args
        wide = e.splat(inverse, 16)
        sums = []
        for i in range(2):
            half = e.load(source, vector(F32, 16), 64 * i)
            # Beyond 127: products with a denormal's infinite inverse, and what is not finite.
            scaled = e.call_vector("maxnum", b.fmul(half, wide), e.like(half, -127.0))
            scaled = e.call_vector("minnum", scaled, e.like(half, 127.0))
            ints = b.fptosi(e.call_vector("rint", scaled), vector(I32, 16))
            e.store(b.trunc(ints, vector(I8, 16)), codes, 16 * i)
            sums.append(b.sext(e.sum(ints), I64))
        return b.add(sums[0], b.shl(sums[1], ir.Constant(I64, 32)))

    return types.int64(types.int64, types.float32, types.int64), codegen


_F32, _F16, _BF16, _Q8_0, _Q8_1, _Q8_K = (int(form) for form in tuple(RowForm)[:6])
_Q8_0_FLOATS, _BF16_PAIRS, _F16_HALVES = (int(form) for form in tuple(RowForm)[6:])


@inline_helper
def _inverse(largest):  # type: ignore[no-untyped-def]
    """Return what maps the largest magnitude to 127."""
    return np.float32(0.0) if largest == 0 else np.float32(127.0) / largest


@inline_helper
def _store_run(form, source, unit, run, inverse, d):  # type: ignore[no-untyped-def]
    """One run of a unit: codes, scale, sums. ``d`` is the scale before it is rounded."""
    rounded = d if form == _Q8_K else round_f16(d)
    packed = _quantize_run(source, inverse, unit + run * 32)
    low = np.int64(np.int32(packed))
    high = (packed - low) >> 32
    total = np.float32(low + high) * d
    store_f32(unit + SCALES_AT + run * 4, rounded)
    # block_q8_1 keeps the sum that belongs to the scale before rounding, and rounds it.
    store_f32(
        unit + SUMS_AT + run * 4,
        round_f16(total) if form == _Q8_1 else np.float32(low + high) * rounded,
    )
    store_f32(unit + HALF_SUMS_AT + run * 8, np.float32(low) * rounded)
    store_f32(unit + HALF_SUMS_AT + run * 8 + 4, np.float32(high) * rounded)


@kernel
def quantize_rows(rec, ith, nth):  # type: ignore[no-untyped-def]
    """Write rows of SRC0 (F32) in a coded form (extra 2) to extra 0, extra 1 bytes apart."""
    form = extra(rec, 2)
    runs = ne(rec, SRC0, 0) // 32
    units = (runs + 7) // 8
    total = units * n_rows(rec, SRC0)
    for at in range(total * ith // nth, total * (ith + 1) // nth):
        row = at // units
        first = (at - row * units) * 8
        source = row_address(rec, SRC0, row) + first * 128
        unit = extra(rec, 0) + row * extra(rec, 1) + first // 8 * UNIT_BYTES
        count = min(runs - first, 8)
        inverse = np.float32(0.0)
        d = np.float32(0.0)
        if form == _Q8_K:
            bits = np.int32(0)
            for run in range(count):
                bits = max(bits, _largest_bits(source + run * 128))
            largest = bits_f32(bits)
            inverse = _inverse(largest)
            d = np.float32(0.0) if largest == 0 else np.float32(1.0) / inverse
        for run in range(count):
            if form != _Q8_K:
                largest = bits_f32(_largest_bits(source + run * 128))
                inverse = _inverse(largest)
                d = largest / np.float32(127.0)
            _store_run(form, source + run * 128, unit, run, inverse, d)
    return 0


@inline_helper
def _round_run(source, target):  # type: ignore[no-untyped-def]
    """32 F32 to the values of the Q8_0 block that they make."""
    largest = bits_f32(_largest_bits(source))
    inverse, d = _inverse(largest), round_f16(largest / np.float32(127.0))
    for i in range(0, 128, 4):
        store_f32(target + i, np.rint(load_f32(source + i) * inverse) * d)


@inline_helper
def _round_bf16_row(source, target, n):  # type: ignore[no-untyped-def]
    """A row of ``n`` F32 to values that BF16 has."""
    i = 0
    while i + LANES <= n:
        bits = bf16_bits(load_f32s(source + i * 4))
        store_f32s(target + i * 4, from_bits(bits << np.int32(16)))
        i += LANES
    while i < n:
        store_f32(target + i * 4, round_bf16(load_f32(source + i * 4)))
        i += 1


@inline_helper
def _store_pairs(type_, source, target, n):  # type: ignore[no-untyped-def]
    """A row of ``n`` floats as BF16, a zero behind an odd number of them."""
    i = 0
    while type_ == _F32 and i + LANES <= n:
        store_bf16s(target + i * 2, load_f32s(source + i * 4))
        i += LANES
    step = size_of(type_)
    while i < n:
        store_bf16(target + i * 2, load_scalar(type_, source + i * step))
        i += 1
    if n % 2 != 0:
        store_bf16(target + n * 2, np.float32(0.0))


@inline_helper
def _store_halves(type_, source, target, n):  # type: ignore[no-untyped-def]
    """A row of ``n`` floats as F16."""
    i = 0
    while type_ == _F32 and i + LANES <= n:
        store_f16s(target + i * 2, load_f32s(source + i * 4))
        i += LANES
    step = size_of(type_)
    while i < n:
        store_f16(target + i * 2, load_scalar(type_, source + i * step))
        i += 1


@kernel
def round_rows(rec, ith, nth):  # type: ignore[no-untyped-def]
    """Write rows of SRC0 (floats) in a float form (extra 2) to extra 0, extra 1 bytes apart.

    Q8_0_FLOATS takes F32 of whole runs of 32.
    """
    type_, form = ggml_type(rec, SRC0), extra(rec, 2)
    step = size_of(type_)
    rows, n = n_rows(rec, SRC0), ne(rec, SRC0, 0)
    for row in range(rows * ith // nth, rows * (ith + 1) // nth):
        source = row_address(rec, SRC0, row)
        target = extra(rec, 0) + row * extra(rec, 1)
        if type_ == _F32 and form == _F16:
            # The usual case, in a loop that becomes vector code.
            for i in range(n):
                store_f32(target + i * 4, round_f16(load_f32(source + i * 4)))
            continue
        if type_ == _F32 and form == _BF16:
            _round_bf16_row(source, target, n)
            continue
        if form == _BF16_PAIRS:
            _store_pairs(type_, source, target, n)
            continue
        if form == _F16_HALVES:
            _store_halves(type_, source, target, n)
            continue
        if form == _Q8_0_FLOATS:
            for i in range(0, n - 31, 32):
                _round_run(source + i * 4, target + i * 4)
            continue
        for i in range(n):
            value = load_scalar(type_, source + i * step)
            if form == _F16:
                value = round_f16(value)
            elif form == _BF16:
                value = round_bf16(value)
            store_f32(target + i * 4, value)
    return 0
