"""How kernels are written: what they are declared with, and how they read and write memory.

What a kernel is given is told in ``record``. This module, like those of kernels, needs numba: it is
for the processes that compile (see ``rpc_server.native``), not for the server.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from rpc_server.devices.cpu.kernels.interface.abi import (
    DST,
    EXTRA_WORD,
    PARAM_WORD,
    RECORD_WORDS,
    SLOT_WORDS,
    SRC0,
    SRC1,
    SRC2,
    SRC3,
    SRC4,
    SRC5,
    SRC6,
    SRC7,
    SRC8,
    SRC9,
    Status,
)
from rpc_server.native.source import FASTMATH, routine

__all__ = [
    "DST",
    "EXTRA_WORD",
    "PARAM_WORD",
    "RECORD_WORDS",
    "SLOT_WORDS",
    "SRC0",
    "SRC1",
    "SRC2",
    "SRC3",
    "SRC4",
    "SRC5",
    "SRC6",
    "SRC7",
    "SRC8",
    "SRC9",
    "Status",
]

KernelFunction = Callable[..., int]


def kernel(function: KernelFunction) -> KernelFunction:
    """Declare ``function(record, part, n_parts)``, or with the thread behind, as a kernel."""
    return routine(function)


# Nobody calls a helper from Python or C: without entries for these it compiles faster by a fifth.
_JIT = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def helper(function: Callable[..., Any]) -> Any:
    """Declare a function that kernels call; compiled with the kernel that uses it.

    Helpers have no code of their own: the kernel contains it.
    """
    return numba.njit(**_JIT, fastmath=FASTMATH, error_model="numpy")(function)


def inline_helper(function: Callable[..., Any]) -> Any:
    """Return a helper small enough that LLVM must always inline it."""
    return numba.njit(**_JIT, fastmath=FASTMATH, error_model="numpy", forceinline=True)(function)


def pasted_helper(function: Callable[..., Any]) -> Any:
    """Return a helper whose text stands in for its call: the code is as if it were written there.

    LLVM joins calls to it late. What loops do for each vector or row is faster this way.
    """
    return numba.njit(**_JIT, fastmath=FASTMATH, error_model="numpy", inline="always")(function)


def exact_helper(function: Callable[..., Any]) -> Any:
    """Return a helper whose float operations are each rounded on their own, none contracted."""
    # Said explicitly: what is left unsaid numba inherits from the caller.
    return numba.njit(**_JIT, fastmath=False, error_model="numpy")(function)


# -- memory access ---------------------------------------------------------------------------------


def _pointer(builder: Any, address: Any, pointee: ir.Type) -> Any:
    return builder.inttoptr(address, pointee.as_pointer())


def _make_load(ir_type: ir.Type, nb_type: Any, convert: str | None = None) -> Any:
    def load(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value = builder.load(_pointer(builder, args[0], ir_type), align=1)
            if convert == "fpext":
                value = builder.fpext(value, ir.FloatType())
            elif convert == "sext":
                value = builder.sext(value, ir.IntType(64))
            elif convert == "zext":
                value = builder.zext(value, ir.IntType(64))
            return value

        return nb_type(types.int64), codegen

    return load


def _make_index_load(bits: int) -> Any:
    def load(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            pointer = _pointer(builder, args[0], _i(bits))
            # A load that is atomic, however weakly, is done once: LLVM may neither repeat it where
            # the value is used nor split it. On every processor of ours it is a plain load.
            value = builder.load_atomic(pointer, "monotonic", bits // 8)
            return value if bits == 64 else builder.sext(value, _i(64))

        return types.int64(types.int64), codegen

    return load


def _make_store(ir_type: ir.Type, nb_type: Any, convert: str | None = None) -> Any:
    def store(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            stored = args[1]
            if convert == "fptrunc":
                stored = builder.fptrunc(stored, ir_type)
            elif convert == "trunc":
                stored = builder.trunc(stored, ir_type)
            builder.store(stored, _pointer(builder, args[0], ir_type), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, nb_type), codegen

    return store


def _i(bits: int) -> ir.IntType:
    return ir.IntType(bits)


# Integers narrower than 64 bits are widened: kernels compute indices in int64 throughout.
load_i64 = intrinsic(_make_load(_i(64), types.int64))
load_i32, load_i16, load_i8, load_u32, load_u16, load_u8 = (
    intrinsic(_make_load(_i(bits), types.int64, extension))
    for extension in ("sext", "zext")
    for bits in (32, 16, 8)
)
load_f32 = intrinsic(_make_load(ir.FloatType(), types.float32))
load_f64 = intrinsic(_make_load(ir.DoubleType(), types.float64))
load_f16 = intrinsic(_make_load(ir.HalfType(), types.float32, "fpext"))

# For numbers in a client's memory that decide an address, a count or a bound. Whatever the node
# writes may lie over them, and another thread may be writing it: such a number is loaded once, by
# one of these, and that value is checked and used.
load_index = intrinsic(_make_index_load(32))
load_index_64 = intrinsic(_make_index_load(64))

store_i64 = intrinsic(_make_store(_i(64), types.int64))
store_i32, store_i16, store_i8 = (
    intrinsic(_make_store(_i(bits), types.int64, "trunc")) for bits in (32, 16, 8)
)
store_f32 = intrinsic(_make_store(ir.FloatType(), types.float32))
store_f64 = intrinsic(_make_store(ir.DoubleType(), types.float64))
store_f16 = intrinsic(_make_store(ir.HalfType(), types.float32, "fptrunc"))


def _make_bits(to: ir.Type, result: Any, value: Any) -> Any:
    def bits(typingctx: Any, of: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.bitcast(args[0], to)

        return result(value), codegen

    return intrinsic(bits)


# The bit pattern of a float32 as int32, and back.
f32_bits = _make_bits(_i(32), types.int32, types.float32)
bits_f32 = _make_bits(ir.FloatType(), types.float32, types.int32)


@intrinsic
def round_f16(typingctx: Any, value: Any) -> Any:
    """Return the nearest value that F16 has (ties to even), as float32."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fpext(builder.fptrunc(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.float32), codegen


@inline_helper
def load_bf16(address):  # type: ignore[no-untyped-def]
    return bits_f32(np.int32(load_u16(address) << 16))


@inline_helper
def _bf16_bits(value):  # type: ignore[no-untyped-def]
    """Round to nearest even; NaN stays NaN (ggml_compute_fp32_to_bf16)."""
    bits = np.int64(f32_bits(value)) & 0xFFFFFFFF
    if (bits & 0x7FFFFFFF) > 0x7F800000:
        return (bits >> 16) | 64
    return (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16


@inline_helper
def store_bf16(address, value):  # type: ignore[no-untyped-def]
    """Store the nearest BF16."""
    store_i16(address, _bf16_bits(value))


@inline_helper
def round_bf16(value):  # type: ignore[no-untyped-def]
    """Return the nearest value that BF16 has, as float32."""
    return bits_f32(np.int32(_bf16_bits(value) << 16))


def _make_memory_op(name: str, second: Any) -> Any:
    def memory_op(typingctx: Any, dst: Any, value: Any, n: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            byte_pointer = _i(8).as_pointer()
            dst_pointer = builder.inttoptr(args[0], byte_pointer)
            if name == "memset":
                cgutils.memset(builder, dst_pointer, args[2], builder.trunc(args[1], _i(8)))
            else:
                src_pointer = builder.inttoptr(args[1], byte_pointer)
                cgutils.raw_memcpy(builder, dst_pointer, src_pointer, args[2], 1)
            return context.get_dummy_value()

        return types.void(types.int64, second, types.int64), codegen

    return memory_op


memory_copy = intrinsic(_make_memory_op("memcpy", types.int64))
memory_set = intrinsic(_make_memory_op("memset", types.int64))


# -- the record ------------------------------------------------------------------------------------


@inline_helper
def data(rec, slot):  # type: ignore[no-untyped-def]
    """Return the address of element 0 of the tensor in ``slot``; 0 if the slot is empty."""
    return load_i64(rec + slot * 80)


@inline_helper
def ggml_type(rec, slot):  # type: ignore[no-untyped-def]
    """Return the ggml type number of the tensor in ``slot``."""
    return load_i64(rec + slot * 80 + 8)


@inline_helper
def ne(rec, slot, dim):  # type: ignore[no-untyped-def]
    """Return the number of elements along ``dim`` of the tensor in ``slot``."""
    return load_i64(rec + slot * 80 + 16 + dim * 8)


@inline_helper
def nb(rec, slot, dim):  # type: ignore[no-untyped-def]
    """Return the stride in bytes along ``dim`` of the tensor in ``slot``."""
    return load_i64(rec + slot * 80 + 48 + dim * 8)


@inline_helper
def param_i32(rec, i):  # type: ignore[no-untyped-def]
    """Return op_params[i] as an integer."""
    return load_i64(rec + 880 + i * 8)


@inline_helper
def param_f32(rec, i):  # type: ignore[no-untyped-def]
    """Return op_params[i] as a float32."""
    return bits_f32(np.int32(load_i64(rec + 880 + i * 8)))


@inline_helper
def extra(rec, i):  # type: ignore[no-untyped-def]
    """Return the extra word ``i`` given when the record was emitted."""
    return load_i64(rec + 1024 + i * 8)


@inline_helper
def n_rows(rec, slot):  # type: ignore[no-untyped-def]
    """Return ne1 * ne2 * ne3 of the tensor in ``slot``."""
    return ne(rec, slot, 1) * ne(rec, slot, 2) * ne(rec, slot, 3)


@pasted_helper
def given(rec, slot):  # type: ignore[no-untyped-def]
    """Return whether there is a tensor in ``slot``."""
    return data(rec, slot) != 0


@pasted_helper
def place(rec, slot, i1, i2, i3):  # type: ignore[no-untyped-def]
    """Return the address of the first element of the row with these indices."""
    return data(rec, slot) + i1 * nb(rec, slot, 1) + i2 * nb(rec, slot, 2) + i3 * nb(rec, slot, 3)


@inline_helper
def row_address(rec, slot, row):  # type: ignore[no-untyped-def]
    """Return the address of the first element of row ``row`` (rows counted over dims 1, 2, 3)."""
    ne1, ne2 = ne(rec, slot, 1), ne(rec, slot, 2)
    rest = row // ne1
    return place(rec, slot, row % ne1, rest % ne2, rest // ne2)
