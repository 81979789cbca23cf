"""Kernels of SOFT_MAX and what attention masks need: rows of F32, shared among threads."""

from __future__ import annotations

import math

import numpy as np

from rpc_server.devices.cpu.kernels.functions import exp
from rpc_server.devices.cpu.kernels.intrinsics import (
    DST,
    SRC0,
    SRC1,
    SRC2,
    data,
    extra,
    ggml_type,
    given,
    inline_helper,
    kernel,
    load_f32,
    n_rows,
    ne,
    param_f32,
    param_i32,
    place,
    row_address,
)
from rpc_server.devices.cpu.kernels.lanes import (
    LANES,
    fma,
    load_f32s,
    load_f32s_part,
    max_lanes,
    maximum,
    splat,
    store_f32s,
    store_f32s_part,
    sum_lanes,
)
from rpc_server.devices.cpu.kernels.typed import (
    first_lanes,
    load_lanes,
    load_lanes_part,
    share_rows,
    size_of,
)


@inline_helper
def alibi_slope(head, n_head, max_bias):  # type: ignore[no-untyped-def]
    """Return the weight of the mask in ``head``: 1 without ALiBi, else falling powers of two."""
    if max_bias <= np.float32(0.0):
        return np.float32(1.0)
    power = 1
    while power * 2 <= n_head:
        power *= 2
    if head < power:
        base, exponent = np.float32(2.0) ** (-max_bias / np.float32(power)), head + 1
    else:
        base = np.float32(2.0) ** (-max_bias / np.float32(2.0) / np.float32(power))
        exponent = 2 * (head - power) + 1
    return np.float32(math.pow(base, np.float64(exponent)))


@kernel
def soft_max(rec, ith, nth):  # type: ignore[no-untyped-def]
    """Compute dst = softmax(src0 * scale + slope * mask) along rows.

    Sinks (src2) only add to the sum.
    """
    n, ne1, ne2 = ne(rec, DST, 0), ne(rec, DST, 1), ne(rec, DST, 2)
    scale, max_bias = param_f32(rec, 0), param_f32(rec, 1)
    masked = given(rec, SRC1)
    mask_type = ggml_type(rec, SRC1)
    mask_size = size_of(mask_type)
    lowest = splat(np.float32(-np.inf))
    row, end = share_rows(n_rows(rec, DST), ith, nth)
    while row < end:
        source, to = row_address(rec, SRC0, row), row_address(rec, DST, row)
        i1, rest = row % ne1, row // ne1
        i2, i3 = rest % ne2, rest // ne2
        row += 1
        mask = np.int64(0)
        slope = np.float32(1.0)
        if masked:
            mask = place(rec, SRC1, i1, i2 % ne(rec, SRC1, 2), i3 % ne(rec, SRC1, 3))
            slope = alibi_slope(i2, ne2, max_bias)
        highest = lowest
        i = 0
        while i < n:
            left = n - i
            if left >= LANES:
                x = load_f32s(source + i * 4) * scale
                if masked:
                    x = fma(load_lanes(mask_type, mask + i * mask_size), splat(slope), x)
                store_f32s(to + i * 4, x)
            else:
                x = load_f32s_part(source + i * 4, left) * scale
                if masked:
                    m = load_lanes_part(mask_type, mask + i * mask_size, left)
                    x = fma(m, splat(slope), x)
                x = first_lanes(x, left, lowest)
                store_f32s_part(to + i * 4, x, left)
            highest = maximum(highest, x)
            i += LANES
        top = max_lanes(highest)
        sink = np.float32(0.0)
        if given(rec, SRC2):
            sink = load_f32(data(rec, SRC2) + i2 * 4)
            top = max(top, sink)
        total = splat(np.float32(0.0))
        i = 0
        while i < n:
            left = n - i
            if left >= LANES:
                x = exp(load_f32s(to + i * 4) - top)
                store_f32s(to + i * 4, x)
            else:
                x = exp(load_f32s_part(to + i * 4, left) - top)
                store_f32s_part(to + i * 4, x, left)
                x = first_lanes(x, left, splat(np.float32(0.0)))
            total = total + x
            i += LANES
        all_ = sum_lanes(total)
        if given(rec, SRC2):
            all_ += np.float32(math.exp(sink - top))
        factor = np.float32(1.0) / all_
        i = 0
        while i + LANES <= n:
            store_f32s(to + i * 4, load_f32s(to + i * 4) * factor)
            i += LANES
        if i < n:
            x = load_f32s_part(to + i * 4, n - i) * factor
            store_f32s_part(to + i * 4, x, n - i)
    return 0


@kernel
def diagonal_mask(rec, ith, nth):  # type: ignore[no-untyped-def]
    """Copy src0 to dst, but above a diagonal write the value of extra(0)'s bits.

    The diagonal is shifted by op_params[0].
    """
    n, ne1, past = ne(rec, DST, 0), ne(rec, DST, 1), param_i32(rec, 0)
    value = np.float32(-np.inf) if extra(rec, 0) == 1 else np.float32(0.0)
    row, end = share_rows(n_rows(rec, DST), ith, nth)
    while row < end:
        source, to = row_address(rec, SRC0, row), row_address(rec, DST, row)
        keep = past + row % ne1
        row += 1
        i = 0
        while i < n:
            left, inside = n - i, keep + 1 - i
            if left >= LANES:
                x = load_f32s(source + i * 4)
                store_f32s(to + i * 4, first_lanes(x, inside, splat(value)))
            else:
                x = load_f32s_part(source + i * 4, left)
                store_f32s_part(to + i * 4, first_lanes(x, inside, splat(value)), left)
            i += LANES
    return 0
