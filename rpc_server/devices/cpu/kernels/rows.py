"""Kernels that read or write rows picked by an index tensor; indices are checked when they run."""

from __future__ import annotations

import functools

from protocol.ggml.types import GgmlType
from rpc_server.devices.cpu.kernels.dequantize import dequantize_row
from rpc_server.devices.cpu.kernels.intrinsics import (
    DST,
    SRC0,
    SRC1,
    SRC2,
    KernelFunction,
    Status,
    data,
    extra,
    ggml_type,
    inline_helper,
    kernel,
    load_index,
    load_index_64,
    nb,
    ne,
    place,
    row_address,
)
from rpc_server.devices.cpu.kernels.lanes import (
    LANES,
    load_f32s,
    load_f32s_part,
    store_f32s,
    store_f32s_part,
)
from rpc_server.devices.cpu.kernels.quantize import quantize_row
from rpc_server.devices.cpu.kernels.typed import F16, F32, convert_row, share_rows

_OUT_OF_RANGE = int(Status.INDEX_OUT_OF_RANGE)
_I64 = int(GgmlType.I64)


@functools.cache
def get_rows_kernel(type_: int) -> KernelFunction:
    """Return the kernel of GET_ROWS.

    It writes dst row i = row src1[i] of src0, of ``type_``, as F32 (I32 stays as it is).
    """

    @kernel
    def get_rows(rec, ith, nth):  # type: ignore[no-untyped-def]
        n, limit = ne(rec, DST, 0), ne(rec, SRC0, 1)
        ne10, ne11 = ne(rec, SRC1, 0), ne(rec, SRC1, 1)
        row, end = share_rows(ne10 * ne11 * ne(rec, SRC1, 2), ith, nth)
        while row < end:
            i10, rest = row % ne10, row // ne10
            i11, i12 = rest % ne11, rest // ne11
            row += 1
            at = i10 * nb(rec, SRC1, 0) + i11 * nb(rec, SRC1, 1) + i12 * nb(rec, SRC1, 2)
            index = load_index(data(rec, SRC1) + at)
            if index < 0 or index >= limit:
                return _OUT_OF_RANGE
            x = place(rec, SRC0, index, i11, i12)
            dequantize_row(type_, x, place(rec, DST, i10, i11, i12), n)
        return 0

    return get_rows


@inline_helper
def _row_index(rec, i10, i11, i12):  # type: ignore[no-untyped-def]
    at = data(rec, SRC1)
    at += i10 * nb(rec, SRC1, 0) + i11 * nb(rec, SRC1, 1) + i12 * nb(rec, SRC1, 2)
    return load_index_64(at) if ggml_type(rec, SRC1) == _I64 else load_index(at)


@inline_helper
def indices_valid(rec):  # type: ignore[no-untyped-def]
    """Return whether all of SET_ROWS's indices are rows of dst; every thread looks at all of them.

    So that nothing is written for a graph whose indices are wrong from the start. Rows may lie over
    the indices, so each is read anew where it is used, and that value checked.
    """
    limit = ne(rec, DST, 1)
    for i12 in range(ne(rec, SRC1, 2)):
        for i11 in range(ne(rec, SRC1, 1)):
            for i10 in range(ne(rec, SRC1, 0)):
                index = _row_index(rec, i10, i11, i12)
                if index < 0 or index >= limit:
                    return False
    return True


@functools.cache
def set_rows_kernel(blocks: int | None) -> KernelFunction:
    """Return the kernel of row src1[i] of dst = row i of src0, as floats or ``blocks`` of a type.

    src0 is F32 or F16; extra word 0 is an address of scratch: a float32 row for each thread, needed
    where F16 is quantized.
    """

    @kernel
    def set_rows(rec, ith, nth, thread):  # type: ignore[no-untyped-def]
        if not indices_valid(rec):
            return _OUT_OF_RANGE
        n, type_x, type_y = ne(rec, SRC0, 0), ggml_type(rec, SRC0), ggml_type(rec, DST)
        limit = ne(rec, DST, 1)
        ne1, ne2 = ne(rec, SRC0, 1), ne(rec, SRC0, 2)
        ne11, ne12 = ne(rec, SRC1, 1), ne(rec, SRC1, 2)
        row, end = share_rows(ne1 * ne2 * ne(rec, SRC0, 3), ith, nth)
        i1, rest = row % ne1, row // ne1
        i2, i3 = rest % ne2, rest // ne2
        while row < end:
            index = _row_index(rec, i1, i2 % ne11, i3 % ne12)
            if index < 0 or index >= limit:
                return _OUT_OF_RANGE
            x, y = place(rec, SRC0, i1, i2, i3), place(rec, DST, index, i2, i3)
            if blocks is not None:
                if type_x == F16:
                    floats = extra(rec, 0) + thread * n * 4
                    convert_row(F16, F32, x, floats, n)
                    x = floats
                quantize_row(blocks, x, y, n)
            else:
                convert_row(type_x, type_y, x, y, n)
            row += 1
            i1 += 1
            if i1 == ne1:
                i1 = 0
                i2 += 1
                if i2 == ne2:
                    i2 = 0
                    i3 += 1
        return 0

    return set_rows


@kernel
def add_id(rec, ith, nth):  # type: ignore[no-untyped-def]
    """Compute dst row = src0's row plus the row of src1 that src2 names; all F32."""
    n, ne1, ne2 = ne(rec, DST, 0), ne(rec, DST, 1), ne(rec, DST, 2)
    row, end = share_rows(ne1 * ne2 * ne(rec, DST, 3), ith, nth)
    while row < end:
        i1, i2 = row % ne1, row // ne1 % ne2
        at = i1 * nb(rec, SRC2, 0) + i2 * nb(rec, SRC2, 1)
        index = load_index(data(rec, SRC2) + at)
        if index < 0 or index >= ne(rec, SRC1, 1):
            return _OUT_OF_RANGE
        x, y = row_address(rec, SRC0, row), row_address(rec, DST, row)
        bias = data(rec, SRC1) + index * nb(rec, SRC1, 1)
        row += 1
        i = 0
        while i + LANES <= n:
            store_f32s(y + i * 4, load_f32s(x + i * 4) + load_f32s(bias + i * 4))
            i += LANES
        if i < n:
            z = load_f32s_part(x + i * 4, n - i) + load_f32s_part(bias + i * 4, n - i)
            store_f32s_part(y + i * 4, z, n - i)
    return 0
