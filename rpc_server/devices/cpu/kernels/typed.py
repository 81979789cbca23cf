"""Values of any float type as lanes or scalars of float32, and how threads share elements.

The type is looked at once per vector: where that counts, kernels are made for F32 alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from protocol.ggml.types import GgmlType
from rpc_server.devices.cpu.kernels.intrinsics import (
    inline_helper,
    load_bf16,
    load_f16,
    load_f32,
    load_i32,
    memory_copy,
    pasted_helper,
    store_bf16,
    store_f16,
    store_f32,
    store_i32,
)
from rpc_server.devices.cpu.kernels.lanes import (
    LANES,
    iota,
    load_bf16s,
    load_bf16s_part,
    load_f16s,
    load_f16s_part,
    load_f32s,
    load_f32s_part,
    select,
    store_bf16s,
    store_bf16s_part,
    store_f16s,
    store_f16s_part,
    store_f32s,
    store_f32s_part,
)

F32, F16, BF16, I32 = map(int, (GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.I32))


def choose_by_type(stub: Callable[..., None], choice: Callable[[GgmlType], Any]) -> None:
    """Let compiled calls of ``stub(type_, x, y, n)`` be calls of ``choice(type_)(x, y, n)``.

    The type must be a constant where it is called, so that a kernel contains one function only.
    """

    # numba compares the names and annotations of the two, hence none here.
    def choose(type_, x, y, n):  # type: ignore[no-untyped-def]
        if not isinstance(type_, types.IntegerLiteral):
            return None
        row = choice(GgmlType(type_.literal_value))

        def call(type_, x, y, n):  # type: ignore[no-untyped-def]
            row(x, y, n)

        return call

    overload(stub, prefer_literal=True)(choose)


@inline_helper
def size_of(type_):  # type: ignore[no-untyped-def]
    """Return the bytes of an element of F32, F16, BF16 or I32."""
    return 4 if type_ in (F32, I32) else 2


@inline_helper
def load_lanes(type_, address):  # type: ignore[no-untyped-def]
    """Return 16 elements of F32, F16 or BF16."""
    if type_ == F32:
        return load_f32s(address)
    return load_f16s(address) if type_ == F16 else load_bf16s(address)


@inline_helper
def load_lanes_part(type_, address, n):  # type: ignore[no-untyped-def]
    """Return the first ``n`` of 16 elements, zero beyond."""
    if type_ == F32:
        return load_f32s_part(address, n)
    return load_f16s_part(address, n) if type_ == F16 else load_bf16s_part(address, n)


@inline_helper
def store_lanes(type_, address, value):  # type: ignore[no-untyped-def]
    """Store 16 elements, rounded to nearest even."""
    if type_ == F32:
        store_f32s(address, value)
    elif type_ == F16:
        store_f16s(address, value)
    else:
        store_bf16s(address, value)


@inline_helper
def store_lanes_part(type_, address, value, n):  # type: ignore[no-untyped-def]
    """Store the first ``n`` of 16 elements."""
    if type_ == F32:
        store_f32s_part(address, value, n)
    elif type_ == F16:
        store_f16s_part(address, value, n)
    else:
        store_bf16s_part(address, value, n)


@pasted_helper
def first_lanes(x, n, other):  # type: ignore[no-untyped-def]
    """Return ``n`` lanes of ``x`` and, beyond, those of ``other``."""
    return select(iota() < np.float32(n), x, other)


@inline_helper
def load_scalar(type_, address):  # type: ignore[no-untyped-def]
    """Return one element of F32, F16, BF16 or I32 as float32."""
    if type_ == F32:
        return load_f32(address)
    if type_ == F16:
        return load_f16(address)
    if type_ == BF16:
        return load_bf16(address)
    return np.float32(load_i32(address))


@inline_helper
def store_scalar(type_, address, value):  # type: ignore[no-untyped-def]
    """Store one element; towards I32 it is truncated."""
    if type_ == F32:
        store_f32(address, value)
    elif type_ == F16:
        store_f16(address, value)
    elif type_ == BF16:
        store_bf16(address, value)
    else:
        store_i32(address, np.int64(value))


@inline_helper
def convert_row(type_x, type_y, x, y, n):  # type: ignore[no-untyped-def]
    """Convert ``n`` dense elements of F32, F16 or BF16 to another of these."""
    if type_x == type_y:
        memory_copy(y, x, n * size_of(type_x))
        return
    size_x, size_y = size_of(type_x), size_of(type_y)
    i = 0
    while i + LANES <= n:
        store_lanes(type_y, y + i * size_y, load_lanes(type_x, x + i * size_x))
        i += LANES
    if i < n:
        value = load_lanes_part(type_x, x + i * size_x, n - i)
        store_lanes_part(type_y, y + i * size_y, value, n - i)


@inline_helper
def share(n, ith, nth, grain, unit):  # type: ignore[no-untyped-def]
    """Return this thread's (begin, end) of ``n`` items, in whole units, ``grain`` at least.

    What is too little to share goes to the first thread.
    """
    each = max(-(-n // nth), grain)
    each = -(-each // unit) * unit
    begin = min(n, ith * each)
    return begin, min(n, begin + each)


@inline_helper
def share_rows(n, ith, nth):  # type: ignore[no-untyped-def]
    """Return this thread's (begin, end) of ``n`` rows."""
    return n * ith // nth, n * (ith + 1) // nth


@pasted_helper
def share_elements(rows, width, ith, nth, grain, unit):  # type: ignore[no-untyped-def]
    """Return this thread's rows and what it does of each: (row, end of rows, begin, end).

    Threads share rows, or the ``width`` elements of a single one as :func:`share` has it.
    """
    row, row_end, begin, end = 0, 1, 0, width
    if rows == 1:
        begin, end = share(width, ith, nth, grain, unit)
    else:
        row, row_end = share_rows(rows, ith, nth)
    return row, row_end, begin, end
