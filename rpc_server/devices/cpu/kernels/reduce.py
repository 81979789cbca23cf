"""Kernels that sum, search or sort along rows of F32; the threads share rows."""

from __future__ import annotations

import numpy as np

from rpc_server.devices.cpu.kernels.interface.codes import TOP_K_INSERT
from rpc_server.devices.cpu.kernels.intrinsics import (
    DST,
    SRC0,
    data,
    extra,
    inline_helper,
    kernel,
    load_f32,
    load_i32,
    memory_copy,
    n_rows,
    nb,
    ne,
    row_address,
    store_f32,
    store_i32,
)
from rpc_server.devices.cpu.kernels.norm import row_sum
from rpc_server.devices.cpu.kernels.typed import share_rows


@kernel
def sum_rows(rec, ith, nth):  # type: ignore[no-untyped-def]
    """Compute dst row = the sum of src0's row, divided by its length if extra(0) is 1."""
    n = ne(rec, SRC0, 0)
    row, end = share_rows(n_rows(rec, SRC0), ith, nth)
    while row < end:
        total = row_sum(row_address(rec, SRC0, row), n)
        if extra(rec, 0) == 1:
            total /= np.float32(n)
        store_f32(row_address(rec, DST, row), total)
        row += 1
    return 0


@kernel
def sum_all(rec, ith, nth):  # type: ignore[no-untyped-def]
    """Compute dst = the sum of all of src0, by one thread."""
    if ith != 0:
        return 0
    total = 0.0
    for row in range(n_rows(rec, SRC0)):
        total += row_sum(row_address(rec, SRC0, row), ne(rec, SRC0, 0))
    store_f32(data(rec, DST), np.float32(total))
    return 0


@kernel
def cumulative_sum(rec, ith, nth):  # type: ignore[no-untyped-def]
    row, end = share_rows(n_rows(rec, DST), ith, nth)
    while row < end:
        x, y = row_address(rec, SRC0, row), row_address(rec, DST, row)
        row += 1
        total = np.float32(0.0)
        for i in range(ne(rec, DST, 0)):
            total += load_f32(x + i * 4)
            store_f32(y + i * 4, total)
    return 0


@kernel
def argmax(rec, ith, nth):  # type: ignore[no-untyped-def]
    """Write the index of the largest of each row, of equals the last.

    A NaN starts the search anew.
    """
    row, end = share_rows(n_rows(rec, SRC0), ith, nth)
    while row < end:
        x = row_address(rec, SRC0, row)
        best, at = np.float32(-np.inf), 0
        for i in range(ne(rec, SRC0, 0)):
            value = load_f32(x + i * 4)
            if not best > value:
                best = value
            if best == value:
                at = i
        store_i32(data(rec, DST) + row * nb(rec, DST, 0), at)
        row += 1
    return 0


@inline_helper
def _before(a, b, descending):  # type: ignore[no-untyped-def]
    """Return whether ``a`` comes strictly before ``b``; NaNs come last in either order."""
    if b != b:
        return a == a
    return a > b if descending else a < b


@inline_helper
def _sort_indices(x, n, indices, buffer, descending):  # type: ignore[no-untyped-def]
    """Write the order of ``n`` values to ``indices``; both int32[n] of scratch. Stable.

    A merge sort. Its indices are addresses as long as they are sorted: they are not to lie where a
    client can have other things written over them, as in the result.
    """
    for i in range(n):
        store_i32(indices + i * 4, i)
    source, to = indices, buffer
    width = 1
    while width < n:
        for low in range(0, n, 2 * width):
            middle, high = min(low + width, n), min(low + 2 * width, n)
            left, right = low, middle
            for out in range(low, high):
                take_left = right >= high
                if left < middle and right < high:
                    a = load_f32(x + load_i32(source + left * 4) * 4)
                    b = load_f32(x + load_i32(source + right * 4) * 4)
                    take_left = not _before(b, a, descending)
                if take_left:
                    store_i32(to + out * 4, load_i32(source + left * 4))
                    left += 1
                else:
                    store_i32(to + out * 4, load_i32(source + right * 4))
                    right += 1
        source, to = to, source
        width *= 2
    if source != indices:
        memory_copy(indices, source, n * 4)


@kernel
def argsort(rec, ith, nth, thread):  # type: ignore[no-untyped-def]
    """Order of each row; extra words: 1 if descending, scratch of 8 * ne0 bytes per thread."""
    n = ne(rec, DST, 0)
    order = extra(rec, 1) + thread * n * 8
    row, end = share_rows(n_rows(rec, DST), ith, nth)
    while row < end:
        _sort_indices(row_address(rec, SRC0, row), n, order, order + n * 4, extra(rec, 0) == 1)
        memory_copy(row_address(rec, DST, row), order, n * 4)
        row += 1
    return 0


@inline_helper
def _insert_largest(x, n, y, k):  # type: ignore[no-untyped-def]
    """The ``k`` largest in order, by keeping them so in scratch at ``y`` while the row is read."""
    count = 0
    for i in range(n):
        value = load_f32(x + i * 4)
        if count == k:
            if not _before(value, load_f32(x + load_i32(y + (k - 1) * 4) * 4), True):
                continue
            count -= 1
        at = count
        while at > 0:
            other = load_i32(y + (at - 1) * 4)
            if not _before(value, load_f32(x + other * 4), True):
                break
            store_i32(y + at * 4, other)
            at -= 1
        store_i32(y + at * 4, i)
        count += 1


@kernel
def top_k(rec, ith, nth, thread):  # type: ignore[no-untyped-def]
    """Write indices of the largest of each row, the first two swapped, as ggml's CPU does.

    Extra words: address of scratch, and bytes of each thread's: TOP_K_INSERT indices, or above that
    two for each of src0's ne0.
    """
    n, k = ne(rec, SRC0, 0), ne(rec, DST, 0)
    row, end = share_rows(n_rows(rec, DST), ith, nth)
    order = extra(rec, 0) + thread * extra(rec, 1)
    while row < end:
        x = row_address(rec, SRC0, row)
        if k <= TOP_K_INSERT:
            _insert_largest(x, n, order, k)
        else:
            _sort_indices(x, n, order, order + n * 4, True)
        if k > 1:
            first = load_i32(order)
            store_i32(order, load_i32(order + 4))
            store_i32(order + 4, first)
        memory_copy(row_address(rec, DST, row), order, k * 4)
        row += 1
    return 0
