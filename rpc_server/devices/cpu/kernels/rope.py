"""Kernels of ROPE: a table of angles for the positions of a graph, and the rotation by it.

All layers of a model rotate by the same angles, so the table is made once per graph and kept in
scratch. A row of the table belongs to a position: ``pairs`` cosines, then ``pairs`` sines.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from rpc_server.devices.cpu.kernels.interface.codes import (
    MODE_IMROPE,
    MODE_MROPE,
    MODE_VISION,
)
from rpc_server.devices.cpu.kernels.intrinsics import (
    DST,
    SRC0,
    SRC1,
    SRC2,
    KernelFunction,
    bits_f32,
    data,
    extra,
    ggml_type,
    inline_helper,
    kernel,
    load_f32,
    load_i32,
    memory_copy,
    ne,
    param_f32,
    param_i32,
    place,
    store_f32,
)
from rpc_server.devices.cpu.kernels.lanes import (
    LANES,
    even_lanes,
    interleave_high,
    interleave_low,
    load_f32s,
    load_f32s_part,
    odd_lanes,
)
from rpc_server.devices.cpu.kernels.typed import (
    load_lanes,
    load_lanes_part,
    load_scalar,
    share_rows,
    size_of,
    store_lanes,
    store_lanes_part,
    store_scalar,
)


@inline_helper
def _section(rec, pair):  # type: ignore[no-untyped-def]
    """Return which position (time, height, width, extra) turns pair number ``pair``."""
    s0, s1, s2 = param_i32(rec, 11), param_i32(rec, 12), param_i32(rec, 13)
    sector = pair % (s0 + s1 + s2 + param_i32(rec, 14))
    if param_i32(rec, 2) == MODE_IMROPE:
        if sector % 3 == 1 and sector < 3 * s1:
            return 1
        if sector % 3 == 2 and sector < 3 * s2:
            return 2
        if sector % 3 == 0 and sector < 3 * s0:
            return 0
        return 3
    if sector < s0:
        return 0
    if sector < s0 + s1:
        return 1
    if sector < s0 + s1 + s2:
        return 2
    return 3


@inline_helper
def _begins(rec, pair):  # type: ignore[no-untyped-def]
    """The position whose angles VISION counts anew from this pair on; -1 if none.

    Where empty sections begin at the same pair, it is the first of them.
    """
    s0, s1, s2 = param_i32(rec, 11), param_i32(rec, 12), param_i32(rec, 13)
    sector = pair % (s0 + s1 + s2 + param_i32(rec, 14))
    if sector == 0:
        return 0
    if sector == s0:
        return 1
    if sector == s0 + s1:
        return 2
    if sector == s0 + s1 + s2:
        return 3
    return -1


@kernel
def rope_table(rec, ith, nth):  # type: ignore[no-untyped-def]
    """Write the angles of the positions in src1 (src2: frequency factors), YaRN's scaling included.

    Extra words: 0 address of the table, 1 pairs, 2 positions, 3 ratio of neighbouring angles, 4 and
    5 YaRN's correction range, 6 YaRN's magnitude, 7 sign of the sine (all but the first three are
    float32 bits).
    """
    table, pairs, count = extra(rec, 0), extra(rec, 1), extra(rec, 2)
    ratio = bits_f32(np.int32(extra(rec, 3)))
    low, high = bits_f32(np.int32(extra(rec, 4))), bits_f32(np.int32(extra(rec, 5)))
    magnitude, sign = bits_f32(np.int32(extra(rec, 6))), bits_f32(np.int32(extra(rec, 7)))
    mode, freq_scale, ext_factor = param_i32(rec, 2), param_f32(rec, 6), param_f32(rec, 7)
    multiple, factors = mode & MODE_MROPE != 0, data(rec, SRC2)
    one = np.float32(1.0)
    begin, end = share_rows(count, ith, nth)
    for i in range(begin, end):
        row = table + i * pairs * 8
        # The angle is the position times a power that is multiplied up step by step, in float32:
        # rounding included, these are the angles that models are run with everywhere.
        angle0 = np.float32(load_i32(data(rec, SRC1) + i * 4))
        angle1, angle2, angle3 = angle0, angle0, angle0
        if multiple:
            angle1 = np.float32(load_i32(data(rec, SRC1) + (i + count) * 4))
            angle2 = np.float32(load_i32(data(rec, SRC1) + (i + 2 * count) * 4))
            angle3 = np.float32(load_i32(data(rec, SRC1) + (i + 3 * count) * 4))
        start0, start1, start2, start3 = angle0, angle1, angle2, angle3
        for pair in range(pairs):
            angle = angle0
            if multiple:
                section = _section(rec, pair)
                if mode == MODE_VISION:
                    begins = _begins(rec, pair)
                    angle0 = start0 if begins == 0 else angle0
                    angle1 = start1 if begins == 1 else angle1
                    angle2 = start2 if begins == 2 else angle2
                    angle3 = start3 if begins == 3 else angle3
                first = angle0 if section == 0 else angle1
                angle = first if section < 2 else angle2 if section == 2 else angle3
            if factors != 0:
                angle = angle / load_f32(factors + pair * 4)
            theta = freq_scale * angle
            if ext_factor != np.float32(0.0):
                ramp = (np.float32(pair) - low) / max(np.float32(0.001), high - low)
                mix = (one - min(one, max(np.float32(0.0), ramp))) * ext_factor
                # Rounded once less, as ggml is compiled: far from position 0 it shows.
                exact = np.float64(theta) * np.float64(one - mix) + np.float64(angle * mix)
                theta = np.float32(exact)
            store_f32(row + pair * 4, np.float32(math.cos(theta)) * magnitude)
            store_f32(row + (pairs + pair) * 4, np.float32(math.sin(theta)) * magnitude * sign)
            angle0 *= ratio
            angle1 *= ratio
            angle2 *= ratio
            angle3 *= ratio
    return 0


@inline_helper
def rotate_apart(type_, x, y, cosines, sines, pairs, distance):  # type: ignore[no-untyped-def]
    """Rotate a row whose pairs lie ``distance`` elements apart, from ``x`` to ``y``."""
    size = size_of(type_)
    gap = distance * size
    i = 0
    while i < pairs:
        n = pairs - i
        at, to = x + i * size, y + i * size
        if n >= LANES:
            c, s = load_f32s(cosines + i * 4), load_f32s(sines + i * 4)
            a, b = load_lanes(type_, at), load_lanes(type_, at + gap)
            store_lanes(type_, to, a * c - b * s)
            store_lanes(type_, to + gap, a * s + b * c)
        else:
            c, s = load_f32s_part(cosines + i * 4, n), load_f32s_part(sines + i * 4, n)
            a, b = load_lanes_part(type_, at, n), load_lanes_part(type_, at + gap, n)
            store_lanes_part(type_, to, a * c - b * s, n)
            store_lanes_part(type_, to + gap, a * s + b * c, n)
        i += LANES


@inline_helper
def rotate_neighbours(type_, x, y, cosines, sines, pairs):  # type: ignore[no-untyped-def]
    """Rotate a row whose pairs are neighbours, from ``x`` to ``y``."""
    size = size_of(type_)
    i = 0
    while i + LANES <= pairs:
        at, to = x + 2 * i * size, y + 2 * i * size
        c, s = load_f32s(cosines + i * 4), load_f32s(sines + i * 4)
        low, high = load_lanes(type_, at), load_lanes(type_, at + LANES * size)
        a, b = even_lanes(low, high), odd_lanes(low, high)
        u, v = a * c - b * s, a * s + b * c
        store_lanes(type_, to, interleave_low(u, v))
        store_lanes(type_, to + LANES * size, interleave_high(u, v))
        i += LANES
    while i < pairs:
        at, to = x + 2 * i * size, y + 2 * i * size
        c, s = load_f32(cosines + i * 4), load_f32(sines + i * 4)
        a, b = load_scalar(type_, at), load_scalar(type_, at + size)
        store_scalar(type_, to, a * c - b * s)
        store_scalar(type_, to + size, a * s + b * c)
        i += 1


@functools.cache
def rope_kernel(neighbours: bool) -> KernelFunction:
    """Rotate src0 by the table at extra(0) of extra(1) pairs.

    Extra words 2: first rotated element of a row, 3: how far the members of a pair are apart. The
    other elements are copied.
    """

    @kernel
    def rope(rec, ith, nth):  # type: ignore[no-untyped-def]
        table, pairs, first, distance = extra(rec, 0), extra(rec, 1), extra(rec, 2), extra(rec, 3)
        type_, width = ggml_type(rec, DST), ne(rec, DST, 0)
        ne1, ne2 = ne(rec, DST, 1), ne(rec, DST, 2)
        size = size_of(type_)
        row, end = share_rows(ne1 * ne2 * ne(rec, DST, 3), ith, nth)
        while row < end:
            i1, rest = row % ne1, row // ne1
            i2, i3 = rest % ne2, rest // ne2
            row += 1
            x, y = place(rec, SRC0, i1, i2, i3), place(rec, DST, i1, i2, i3)
            if 2 * pairs < width and x != y:
                memory_copy(y, x, first * size)
                behind = (first + 2 * pairs) * size
                memory_copy(y + behind, x + behind, width * size - behind)
            cosines = table + i2 * pairs * 8
            sines = cosines + pairs * 4
            if neighbours:
                rotate_neighbours(type_, x + first * size, y + first * size, cosines, sines, pairs)
            else:
                rotate_apart(
                    type_, x + first * size, y + first * size, cosines, sines, pairs, distance
                )
        return 0

    return rope
