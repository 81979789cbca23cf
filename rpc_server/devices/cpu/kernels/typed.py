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
    store_bf16,
    store_f16,
    store_f32,
    store_i32,
)
from rpc_server.devices.cpu.kernels.lanes import (
    LANES,
    load_bf16s,
    load_bf16s_part,
    load_f16s,
    load_f16s_part,
    load_f32s,
    load_f32s_part,
    store_bf16s,
    store_bf16s_part,
    store_f16s,
    store_f16s_part,
    store_f32s,
    store_f32s_part,
)

F32 = int(GgmlType.F32)
F16 = int(GgmlType.F16)
BF16 = int(GgmlType.BF16)
I32 = int(GgmlType.I32)


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
    if type_ == F16:
        return load_f16s(address)
    return load_bf16s(address)


@inline_helper
def load_lanes_part(type_, address, n):  # type: ignore[no-untyped-def]
    """Return the first ``n`` of 16 elements, zero beyond."""
    if type_ == F32:
        return load_f32s_part(address, n)
    if type_ == F16:
        return load_f16s_part(address, n)
    return load_bf16s_part(address, n)


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
def share(n, ith, nth, grain):  # type: ignore[no-untyped-def]
    """Return this thread's (begin, end) of ``n`` items, in whole vectors, ``grain`` at least.

    What is too little to share goes to the first thread.
    """
    each = max(-(-n // nth), grain)
    each = -(-each // LANES) * LANES
    begin = min(n, ith * each)
    return begin, min(n, begin + each)


@inline_helper
def share_rows(n, ith, nth):  # type: ignore[no-untyped-def]
    """Return this thread's (begin, end) of ``n`` rows."""
    return n * ith // nth, n * (ith + 1) // nth
