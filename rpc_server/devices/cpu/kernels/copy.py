"""Kernels that copy: elements in order from one tensor to another of any layout, or repeated."""

from __future__ import annotations

import functools

import numpy as np

from protocol.ggml.types import FLOATS, TYPE_INFO, GgmlType
from rpc_server.devices.cpu.kernels.dequantize import dequantize_row
from rpc_server.devices.cpu.kernels.intrinsics import (
    DST,
    SRC0,
    KernelFunction,
    data,
    extra,
    ggml_type,
    inline_helper,
    kernel,
    load_f32,
    load_i8,
    load_i16,
    load_i32,
    load_i64,
    memory_copy,
    memory_set,
    nb,
    ne,
    param_i32,
    place,
    row_address,
    store_f32,
    store_i8,
    store_i16,
    store_i32,
    store_i64,
)
from rpc_server.devices.cpu.kernels.quantize import quantize_row
from rpc_server.devices.cpu.kernels.typed import (
    F32,
    convert_row,
    load_scalar,
    share,
    share_elements,
    share_rows,
    store_scalar,
)

# Elements that are worth a second thread.
_GRAIN = 4096
# Shares of a dense run are whole blocks of every type.
_CHUNK = 256


@kernel
def copy_same_type(rec, ith, nth):  # type: ignore[no-untyped-def]
    """Copy rows whose bytes are dense: extra words are rows and bytes of a row."""
    rows, size = extra(rec, 0), extra(rec, 1)
    if rows == 1:
        begin, end = share(size, ith, nth, _GRAIN, _CHUNK)
        memory_copy(data(rec, DST) + begin, data(rec, SRC0) + begin, end - begin)
        return 0
    row, row_end = share_rows(rows, ith, nth)
    while row < row_end:
        memory_copy(row_address(rec, DST, row), row_address(rec, SRC0, row), size)
        row += 1
    return 0


@functools.cache
def convert_kernel(type_x: GgmlType, type_y: GgmlType) -> KernelFunction:
    """Return the kernel for dense rows of one type to another.

    These are floats among each other, or F32 to blocks and back.

    Extra words: rows, elements of a row, address of scratch: a float32 row for each thread, needed
    where F16 or BF16 is quantized.
    """
    number_x, number_y = int(type_x), int(type_y)
    block_x, size_x = TYPE_INFO[type_x].block_size, TYPE_INFO[type_x].type_size
    block_y, size_y = TYPE_INFO[type_y].block_size, TYPE_INFO[type_y].type_size
    floats = type_x in FLOATS and type_y in FLOATS
    quantizing = block_y > 1
    through_f32 = quantizing and type_x != GgmlType.F32
    dequantizing = block_x > 1

    @kernel
    def convert(rec, ith, nth, thread):  # type: ignore[no-untyped-def]
        rows, width = extra(rec, 0), extra(rec, 1)
        row, row_end, begin, end = share_elements(rows, width, ith, nth, _GRAIN, _CHUNK)
        while row < row_end:
            x = row_address(rec, SRC0, row) + begin // block_x * size_x
            y = row_address(rec, DST, row) + begin // block_y * size_y
            n = end - begin
            row += 1
            if floats:
                convert_row(number_x, number_y, x, y, n)
            elif through_f32:
                # A piece at a time: the scratch is small whatever the row.
                buffer = extra(rec, 2) + thread * _CHUNK * 4
                for i in range(0, n, _CHUNK):
                    count = min(_CHUNK, n - i)
                    convert_row(number_x, F32, x + i * size_x, buffer, count)
                    quantize_row(number_y, buffer, y + i // block_y * size_y, count)
            elif quantizing:
                quantize_row(number_y, x, y, n)
            elif dequantizing:
                dequantize_row(number_x, x, y, n)
            else:
                for i in range(n):
                    value = load_scalar(number_x, x + i * size_x)
                    store_scalar(number_y, y + i * size_y, value)
        return 0

    return convert


@inline_helper
def _copy_run(rec, x, y, n, step_x, step_y):  # type: ignore[no-untyped-def]
    """``n`` elements at any strides; of one type they are copied as they are."""
    type_x, type_y, size = ggml_type(rec, SRC0), ggml_type(rec, DST), extra(rec, 0)
    if type_x != type_y:
        for i in range(n):
            store_scalar(type_y, y + i * step_y, load_scalar(type_x, x + i * step_x))
    elif size == 4:
        for i in range(n):
            store_i32(y + i * step_y, load_i32(x + i * step_x))
    elif size == 2:
        for i in range(n):
            store_i16(y + i * step_y, load_i16(x + i * step_x))
    elif size == 8:
        for i in range(n):
            store_i64(y + i * step_y, load_i64(x + i * step_x))
    else:
        for i in range(n):
            store_i8(y + i * step_y, load_i8(x + i * step_x))


@inline_helper
def _element(rec, slot, i):  # type: ignore[no-untyped-def]
    """(address, elements left in its row) of element ``i`` in ggml's order."""
    ne0, ne1, ne2 = ne(rec, slot, 0), ne(rec, slot, 1), ne(rec, slot, 2)
    i0, rest = i % ne0, i // ne0
    i1, rest = rest % ne1, rest // ne1
    at = place(rec, slot, i1, rest % ne2, rest // ne2)
    return at + i0 * nb(rec, slot, 0), ne0 - i0


@kernel
def copy_strided(rec, ith, nth):  # type: ignore[no-untyped-def]
    """Copy elements in ggml's order whatever shape and strides.

    The types are plain, or F32, F16, BF16 and I32 mixed.

    Extra word 0: bytes of an element.
    """
    n = ne(rec, DST, 0) * ne(rec, DST, 1) * ne(rec, DST, 2) * ne(rec, DST, 3)
    i, end = share(n, ith, nth, _GRAIN, _CHUNK)
    step_x, step_y = nb(rec, SRC0, 0), nb(rec, DST, 0)
    while i < end:
        x, left_x = _element(rec, SRC0, i)
        y, left_y = _element(rec, DST, i)
        run = min(end - i, min(left_x, left_y))
        _copy_run(rec, x, y, run, step_x, step_y)
        i += run
    return 0


@kernel
def repeat(rec, ith, nth):  # type: ignore[no-untyped-def]
    """Compute dst = copies of src0 along every dimension; extra word 0: bytes of an element."""
    ne0, ne1, ne2 = ne(rec, DST, 0), ne(rec, DST, 1), ne(rec, DST, 2)
    n, size = ne(rec, SRC0, 0), extra(rec, 0)
    step_x, step_y = nb(rec, SRC0, 0), nb(rec, DST, 0)
    row, end = share_rows(ne1 * ne2 * ne(rec, DST, 3), ith, nth)
    while row < end:
        i1, rest = row % ne1, row // ne1
        i1, i2 = i1 % ne(rec, SRC0, 1), rest % ne2 % ne(rec, SRC0, 2)
        x = place(rec, SRC0, i1, i2, rest // ne2 % ne(rec, SRC0, 3))
        y = row_address(rec, DST, row)
        row += 1
        if n == 1:
            # One value all along the row: a source that doesn't move.
            _copy_run(rec, x, y, ne0, 0, step_y)
        elif step_x == size and step_y == size:
            for i in range(0, ne0, n):
                memory_copy(y + i * size, x, n * size)
        else:
            for i in range(0, ne0, n):
                _copy_run(rec, x, y + i * step_y, n, step_x, step_y)
    return 0


@kernel
def pad(rec, ith, nth):  # type: ignore[no-untyped-def]
    """Write F32 rows of dst: src0's with zeros around, or repeated if op_params[8] is set."""
    left0, left1 = param_i32(rec, 0), param_i32(rec, 2)
    left2, left3 = param_i32(rec, 4), param_i32(rec, 6)
    ne0, ne1, ne2 = ne(rec, DST, 0), ne(rec, DST, 1), ne(rec, DST, 2)
    n0, n1, n2, n3 = ne(rec, SRC0, 0), ne(rec, SRC0, 1), ne(rec, SRC0, 2), ne(rec, SRC0, 3)
    around = param_i32(rec, 8) != 0
    row, end = share_rows(ne1 * ne2 * ne(rec, DST, 3), ith, nth)
    while row < end:
        i1, rest = row % ne1 - left1, row // ne1
        i2, i3 = rest % ne2 - left2, rest // ne2 - left3
        y = row_address(rec, DST, row)
        row += 1
        if around:
            i1, i2, i3 = i1 % n1, i2 % n2, i3 % n3
        elif i1 < 0 or i1 >= n1 or i2 < 0 or i2 >= n2 or i3 < 0 or i3 >= n3:
            memory_set(y, 0, ne0 * 4)
            continue
        x = place(rec, SRC0, i1, i2, i3)
        for i in range(ne0):
            i0 = i - left0
            value = np.float32(0.0)
            if around:
                value = load_f32(x + i0 % n0 * nb(rec, SRC0, 0))
            elif i0 >= 0 and i0 < n0:
                value = load_f32(x + i0 * nb(rec, SRC0, 0))
            store_f32(y + i * 4, value)
    return 0
