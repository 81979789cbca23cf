"""Matrix products: which thread multiplies which rows with which columns, for every weight type.

MUL_MAT and MUL_MAT_ID are the same work: some matrices of weights, and for each a list of columns.
MUL_MAT's matrices are those of src0's dimensions 2 and 3, with the columns of every head that
shares one; MUL_MAT_ID's are the experts, with the columns that were routed to them.

A list of columns is pairs of int64: where the column's activations lie and where its results go.
"""

from __future__ import annotations

import functools

from protocol.ggml.types import GgmlType
from rpc_server.devices.cpu.kernels.dots import (
    row_dots,
    rows_at_once,
    tile_columns_from,
    tile_product,
    unpack_tile,
)
from rpc_server.devices.cpu.kernels.interface.isa import Isa
from rpc_server.devices.cpu.kernels.interface.layout import (
    LANES,
    columns_at_once,
    k_chunk,
    tile_bytes,
)
from rpc_server.devices.cpu.kernels.intrinsics import (
    DST,
    SRC0,
    SRC1,
    SRC2,
    KernelFunction,
    data,
    extra,
    inline_helper,
    kernel,
    load_i64,
    load_index,
    nb,
    ne,
    store_i64,
)
from rpc_server.devices.cpu.kernels.vector import left_out
from rpc_server.native.source import without

INDEX_OUT_OF_RANGE = 1

# Extra words of a product.
(
    ACTIVATIONS,
    ACTIVATION_NB1,
    ACTIVATION_NB2,
    ACTIVATION_NB3,
    ROUTED,
    SCRATCH,
    SCRATCH_STRIDE,
    PANEL,
) = range(8)

# Threads get whole groups of so many rows.
_GRAIN = 4

# Memory is asked for at least so many bytes before it is multiplied.
_AHEAD = 4096


@kernel
def route_columns(rec, ith, nth):  # type: ignore[no-untyped-def]
    """Sort MUL_MAT_ID's columns by expert, at extra ROUTED.

    There go the places where each expert's begin, and then the lists.

    Slots are those of the node. An index that names no expert fails the graph. Behind the lists are
    the columns' experts, as they were when they were counted: each is read from the node's source
    once, or the lists could be longer than what was counted.
    """
    if ith != 0:
        return 0
    n_experts = ne(rec, SRC0, 2)
    n_used = ne(rec, SRC2, 0)
    n_tokens = ne(rec, SRC2, 1)
    n_inputs = ne(rec, SRC1, 1)
    starts = extra(rec, ROUTED)
    columns = starts + 8 * (n_experts + 1)
    experts = columns + 16 * n_used * n_tokens
    for e in range(n_experts + 1):
        store_i64(starts + 8 * e, 0)
    for t in range(n_tokens):
        for i in range(n_used):
            e = load_index(data(rec, SRC2) + i * nb(rec, SRC2, 0) + t * nb(rec, SRC2, 1))
            if e < 0 or e >= n_experts:
                return INDEX_OUT_OF_RANGE
            store_i64(experts + 8 * (t * n_used + i), e)
            store_i64(starts + 8 * e, load_i64(starts + 8 * e) + 1)
    # Counts become ends, which filling from the back turns into starts.
    total = 0
    for e in range(n_experts + 1):
        total += load_i64(starts + 8 * e)
        store_i64(starts + 8 * e, total)
    for t in range(n_tokens - 1, -1, -1):
        for i in range(n_used - 1, -1, -1):
            e = load_i64(experts + 8 * (t * n_used + i))
            at = load_i64(starts + 8 * e) - 1
            store_i64(starts + 8 * e, at)
            source = i % n_inputs * extra(rec, ACTIVATION_NB1) + t * extra(rec, ACTIVATION_NB2)
            target = i * nb(rec, DST, 1) + t * nb(rec, DST, 2)
            store_i64(columns + 16 * at, extra(rec, ACTIVATIONS) + source)
            store_i64(columns + 16 * at + 8, data(rec, DST) + target)
    return 0


@inline_helper
def _list_columns(rec, matrix, columns):  # type: ignore[no-untyped-def]
    """The columns of MUL_MAT's matrix ``matrix`` (dimension 2, then 3); how many there are."""
    ne02 = ne(rec, SRC0, 2)
    repeat2 = ne(rec, DST, 2) // ne02
    repeat3 = ne(rec, DST, 3) // ne(rec, SRC0, 3)
    first2 = matrix % ne02 * repeat2
    first3 = matrix // ne02 * repeat3
    n = 0
    for i3 in range(first3, first3 + repeat3):
        for i2 in range(first2, first2 + repeat2):
            source = extra(rec, ACTIVATIONS) + (
                i2 * extra(rec, ACTIVATION_NB2) + i3 * extra(rec, ACTIVATION_NB3)
            )
            target = data(rec, DST) + i2 * nb(rec, DST, 2) + i3 * nb(rec, DST, 3)
            for i1 in range(ne(rec, DST, 1)):
                store_i64(columns + 16 * n, source + i1 * extra(rec, ACTIVATION_NB1))
                store_i64(columns + 16 * n + 8, target + i1 * nb(rec, DST, 1))
                n += 1
    return n


@functools.cache
def product_kernel(type_: GgmlType, isa: Isa) -> KernelFunction:
    """Return the kernel of products with weights of one type, for MUL_MAT and MUL_MAT_ID."""
    return _product(type_, isa, tiles=True)


@functools.cache
def few_columns_kernel(type_: GgmlType, isa: Isa) -> KernelFunction:
    """Return the same, but what is for many columns: those are multiplied one by one.

    It is compiled in a fraction of the time. The result is the same to the bit where the whole
    kernel makes no tiles, elsewhere as far as the order of sums lets it.
    """
    return _product(type_, isa, tiles=False)


def _product(type_: GgmlType, isa: Isa, *, tiles: bool) -> KernelFunction:
    # Plain numbers, which numba takes for constants: what isn't for TILES is left out.
    TYPE, ISA, TILES = int(type_), int(isa), tiles
    ROWS, COLUMNS = rows_at_once(type_), columns_at_once(isa)
    # Of the last columns there may be few enough for half of that.
    HALF = COLUMNS // 2
    TILES_FROM, CHUNK, TILE_BYTES = tile_columns_from(type_), k_chunk(type_), tile_bytes(type_)

    @kernel
    def product(rec, ith, nth, thread):  # type: ignore[no-untyped-def]
        """Compute DST = SRC0 times the columns given by the extra words."""
        routed = extra(rec, ROUTED)
        tile = extra(rec, SCRATCH) + thread * extra(rec, SCRATCH_STRIDE)
        own_columns = tile + TILE_BYTES
        n_rows, k, stride = ne(rec, SRC0, 1), ne(rec, SRC0, 0), nb(rec, SRC0, 1)
        n_matrices = ne(rec, SRC0, 2) * ne(rec, SRC0, 3)
        # Whole groups of rows ahead, so that each line is asked for once.
        ahead = (_AHEAD // max(ROWS * stride, 1) + 1) * ROWS * stride
        grains = (n_rows + _GRAIN - 1) // _GRAIN
        # Matrices of MUL_MAT are alike, and threads share the rows of all of them; experts have
        # each their number of columns, and threads share the rows of each.
        shared = grains if routed != 0 else grains * n_matrices
        begin, end = shared * ith // nth, shared * (ith + 1) // nth
        for matrix in range(n_matrices):
            if routed != 0:
                first_row = begin * _GRAIN
                end_row = min(end * _GRAIN, n_rows)
            else:
                first_row = max(begin - matrix * grains, 0) * _GRAIN
                end_row = min((end - matrix * grains) * _GRAIN, n_rows)
            if first_row >= end_row:
                continue
            weights = data(rec, SRC0) + (
                matrix % ne(rec, SRC0, 2) * nb(rec, SRC0, 2)
                + matrix // ne(rec, SRC0, 2) * nb(rec, SRC0, 3)
            )
            if routed != 0:
                at = load_i64(routed + 8 * matrix)
                n = load_i64(routed + 8 * (matrix + 1)) - at
                columns = routed + 8 * (n_matrices + 1) + 16 * at
            else:
                columns = own_columns
                n = _list_columns(rec, matrix, own_columns)
            if n == 0:
                continue
            last = end_row - 1
            if not TILES or n == 1:
                for row in range(first_row, end_row, ROWS):
                    for c in range(n):
                        at = columns + 16 * c
                        row_dots(TYPE, ISA, 1, weights, stride, row, last, k, ahead, at)
                continue
            if n < TILES_FROM:
                for row in range(first_row, end_row):
                    c = 0
                    while c < n:
                        at = columns + 16 * c
                        # Two or three at a time, so that none is left.
                        if n - c == 3:
                            row_dots(TYPE, ISA, 3, weights, stride, row, last, k, ahead, at)
                            c += 3
                        else:
                            row_dots(TYPE, ISA, 2, weights, stride, row, last, k, ahead, at)
                            c += 2
                continue
            if columns != own_columns:
                for c in range(2 * n):
                    store_i64(own_columns + 8 * c, load_i64(columns + 8 * c))
            # Whole groups of columns: the last column fills the last group.
            for c in range(n, n + COLUMNS):
                store_i64(own_columns + 16 * c, load_i64(own_columns + 16 * (n - 1)))
                store_i64(own_columns + 16 * c + 8, load_i64(own_columns + 16 * (n - 1) + 8))
            panel = extra(rec, PANEL)
            for first_column in range(0, n, panel):
                end_column = min(n, first_column + panel)
                for row in range(first_row, end_row, LANES):
                    rows = min(end_row - row, LANES)
                    for k_begin in range(0, k, CHUNK):
                        k_end = min(k, k_begin + CHUNK)
                        unpack_tile(TYPE, ISA, tile, k_begin, k_end, weights, stride, row, last)
                        for c in range(first_column, end_column, COLUMNS):
                            at = own_columns + 16 * c
                            if end_column - c <= HALF:
                                tile_product(TYPE, ISA, HALF, tile, row, rows, k_begin, k_end, at)
                                continue
                            tile_product(TYPE, ISA, COLUMNS, tile, row, rows, k_begin, k_end, at)
        return 0

    return without(product, left_out(isa))
