"""Kernels of normalisations: each works row by row on F32, the threads share rows."""

from __future__ import annotations

import functools
import math

import numpy as np

from rpc_server.devices.cpu.kernels.interface.codes import Norm
from rpc_server.devices.cpu.kernels.intrinsics import (
    DST,
    SRC0,
    KernelFunction,
    data,
    extra,
    inline_helper,
    kernel,
    n_rows,
    nb,
    ne,
    param_f32,
    pasted_helper,
    row_address,
)
from rpc_server.devices.cpu.kernels.lanes import (
    LANES,
    fma,
    load_f32s,
    load_f32s_part,
    splat,
    store_f32s,
    store_f32s_part,
    sum_lanes,
)
from rpc_server.devices.cpu.kernels.typed import first_lanes, share_rows

_RMS, _NORM, _L2 = (int(code) for code in Norm)


@inline_helper
def row_sum(row, n):  # type: ignore[no-untyped-def]
    """Sum of ``n`` float32."""
    a = splat(np.float32(0.0))
    b = a
    i = 0
    while i + 2 * LANES <= n:
        a = a + load_f32s(row + i * 4)
        b = b + load_f32s(row + (i + LANES) * 4)
        i += 2 * LANES
    while i < n:
        at, left = row + i * 4, n - i
        a = a + (load_f32s(at) if left >= LANES else load_f32s_part(at, left))
        i += LANES
    return sum_lanes(a + b)


@inline_helper
def row_square_sum(row, n, mean):  # type: ignore[no-untyped-def]
    """Sum of (x - mean) squared over ``n`` float32."""
    a = splat(np.float32(0.0))
    b = a
    i = 0
    while i + 2 * LANES <= n:
        x = load_f32s(row + i * 4) - mean
        y = load_f32s(row + (i + LANES) * 4) - mean
        a = fma(x, x, a)
        b = fma(y, y, b)
        i += 2 * LANES
    while i < n:
        at, left = row + i * 4, n - i
        if left >= LANES:
            x = load_f32s(at) - mean
        else:
            # Lanes beyond the row count as the mean, not as zero.
            x = load_f32s_part(at, left) - mean
            x = first_lanes(x, left, splat(np.float32(0.0)))
        a = fma(x, x, a)
        i += LANES
    return sum_lanes(a + b)


@inline_helper
def _statistics(code, row, n, eps):  # type: ignore[no-untyped-def]
    """(mean to subtract, factor)."""
    mean = np.float32(0.0)
    if code == _NORM:
        mean = row_sum(row, n) / np.float32(n)
    square_sum = row_square_sum(row, n, mean)
    if code == _L2:
        length = np.float32(math.sqrt(square_sum))
        # C's fmaxf: NaN doesn't count.
        return mean, np.float32(1.0) / (length if length > eps else eps)
    return mean, np.float32(1.0) / np.float32(math.sqrt(square_sum / np.float32(n) + eps))


@pasted_helper
def _normalize(x_row, y_row, n, mean, factor):  # type: ignore[no-untyped-def]
    """Write (x - mean) * factor of ``n`` float32."""
    i = 0
    while i + LANES <= n:
        store_f32s(y_row + i * 4, (load_f32s(x_row + i * 4) - mean) * factor)
        i += LANES
    if i < n:
        x = load_f32s_part(x_row + i * 4, n - i)
        store_f32s_part(y_row + i * 4, (x - mean) * factor, n - i)


@functools.cache
def norm_kernel(code: int) -> KernelFunction:
    """Return the kernel of dst = (src0 - mean) * factor along rows, for a :class:`Norm`."""

    @kernel
    def norm(rec, ith, nth):  # type: ignore[no-untyped-def]
        n, eps = ne(rec, DST, 0), param_f32(rec, 0)
        row, end = share_rows(n_rows(rec, DST), ith, nth)
        while row < end:
            source, to = row_address(rec, SRC0, row), row_address(rec, DST, row)
            row += 1
            mean, factor = _statistics(code, source, n, eps)
            _normalize(source, to, n, mean, factor)
        return 0

    return norm


@kernel
def group_norm(rec, ith, nth):  # type: ignore[no-untyped-def]
    """Compute NORM over groups of extra(0) channels (dim 2); planes of dims 0 and 1 are dense."""
    channels, eps = extra(rec, 0), param_f32(rec, 1)
    plane = ne(rec, DST, 0) * ne(rec, DST, 1)
    n_channels = ne(rec, DST, 2)
    groups = -(-n_channels // channels)
    task, end = share_rows(groups * ne(rec, DST, 3), ith, nth)
    while task < end:
        first, i3 = task % groups * channels, task // groups
        last = min(first + channels, n_channels)
        task += 1
        source = data(rec, SRC0) + i3 * nb(rec, SRC0, 3)
        to = data(rec, DST) + i3 * nb(rec, DST, 3)
        count = np.float32(plane * (last - first))
        total = np.float32(0.0)
        for c in range(first, last):
            total += row_sum(source + c * nb(rec, SRC0, 2), plane)
        mean = total / count
        total = np.float32(0.0)
        for c in range(first, last):
            total += row_square_sum(source + c * nb(rec, SRC0, 2), plane, mean)
        factor = np.float32(1.0) / np.float32(math.sqrt(total / count + eps))
        for c in range(first, last):
            x_row, y_row = source + c * nb(rec, SRC0, 2), to + c * nb(rec, DST, 2)
            _normalize(x_row, y_row, plane, mean, factor)
    return 0
