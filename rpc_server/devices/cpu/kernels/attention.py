"""Kernels of FLASH_ATTN_EXT: attention in one pass over keys and values, sums in float32.

A *task* is the queries of all heads that share a key/value head, for a tile of tokens: its *rows*
are (token, head) pairs. Keys and values are read block by block and turned to float32 once for all
rows of the task. Per row there is the largest score so far, the sum of exponentials relative to it,
and the weighted sum of values; a larger score rescales both.

Where there are fewer tasks than threads can share, blocks of keys are dealt out evenly instead;
each thread leaves what it has of a task in scratch, and :data:`merge_attention` puts it together.

Extra words, see :class:`Words`.
"""

from __future__ import annotations

import enum
import functools
import math

import numpy as np

from protocol.ggml.types import GgmlType
from rpc_server.devices.cpu.kernels.attention_blocks import (
    PANELS,
    add_values,
    panel_of_rows,
    score_rows,
)
from rpc_server.devices.cpu.kernels.dequantize import dequantize_row
from rpc_server.devices.cpu.kernels.functions import exp, tanh
from rpc_server.devices.cpu.kernels.interface.layout import BLOCK, ROWS_AT_ONCE
from rpc_server.devices.cpu.kernels.intrinsics import (
    DST,
    SRC0,
    SRC1,
    SRC2,
    SRC3,
    SRC4,
    KernelFunction,
    data,
    extra,
    given,
    inline_helper,
    kernel,
    load_f32,
    memory_set,
    nb,
    ne,
    param_f32,
    store_f32,
)
from rpc_server.devices.cpu.kernels.lanes import (
    LANES,
    even_lanes,
    fma,
    load_f16s,
    load_f16s_part,
    load_f32s,
    load_f32s_part,
    max_lanes,
    maximum,
    odd_lanes,
    select,
    splat,
    store_f32s,
    store_f32s_part,
    sum_lanes,
)
from rpc_server.devices.cpu.kernels.softmax import alibi_slope
from rpc_server.devices.cpu.kernels.typed import first_lanes, share_rows

_Q, _K, _V, _MASK, _SINKS = SRC0, SRC1, SRC2, SRC3, SRC4


class Words(enum.IntEnum):
    """Extra words of attention records."""

    # Address of scratch, and bytes of each thread's part of it.
    SCRATCH = 0
    THREAD_BYTES = 1
    # Tokens of a tile; 1 if blocks are dealt out and merged; address of what is merged.
    TILE = 2
    SPLIT = 3
    PARTIALS = 4


_SCRATCH, _THREAD_BYTES, _TILE, _SPLIT, _PARTIALS = (int(word) for word in Words)


@inline_helper
def _padded(n):  # type: ignore[no-untyped-def]
    return -(-n // LANES) * LANES


@inline_helper
def _fold(a, b):  # type: ignore[no-untyped-def]
    """Sums of neighbouring lanes: 8 of ``a``, then 8 of ``b``."""
    return even_lanes(a, b) + odd_lanes(a, b)


@inline_helper
def _dot4(q, k, stride, n):  # type: ignore[no-untyped-def]
    """Dot products of ``q`` with 4 rows from ``k`` on, 4 partial sums each."""
    a = splat(np.float32(0.0))
    b, c, d = a, a, a
    for i in range(0, n, LANES):
        x = load_f32s(q + i * 4)
        a = fma(load_f32s(k + i * 4), x, a)
        b = fma(load_f32s(k + stride + i * 4), x, b)
        c = fma(load_f32s(k + 2 * stride + i * 4), x, c)
        d = fma(load_f32s(k + 3 * stride + i * 4), x, d)
    return _fold(_fold(a, b), _fold(c, d))


@inline_helper
def _dot16(q, k, stride, n):  # type: ignore[no-untyped-def]
    """Dot products of ``q`` with 16 rows from ``k`` on."""
    low = _fold(_dot4(q, k, stride, n), _dot4(q, k + 4 * stride, stride, n))
    k += 8 * stride
    return _fold(low, _fold(_dot4(q, k, stride, n), _dot4(q, k + 4 * stride, stride, n)))


@inline_helper
def _first_lane(value):  # type: ignore[no-untyped-def]
    """The value all lanes have."""
    return max_lanes(value)


@inline_helper
def _scale_row(row, n, factor):  # type: ignore[no-untyped-def]
    for i in range(0, n, LANES):
        store_f32s(row + i * 4, load_f32s(row + i * 4) * factor)


@inline_helper
def _load_mask(rec, token, head, batch, first, count, slope, scores, used):  # type: ignore[no-untyped-def]
    """slope * mask of ``count`` positions from ``first`` on, -inf beyond; the largest of them.

    Raises the elements of ``used`` to it.
    """
    lowest = splat(np.float32(-np.inf))
    largest = lowest
    at = data(rec, _MASK)
    if at != 0:
        at += token * nb(rec, _MASK, 1) + head % ne(rec, _MASK, 2) * nb(rec, _MASK, 2)
        at += batch % ne(rec, _MASK, 3) * nb(rec, _MASK, 3) + first * 2
    for i in range(0, BLOCK, LANES):
        left = count - i
        x = splat(np.float32(0.0))
        if given(rec, _MASK):
            if left >= LANES:
                x = load_f16s(at + i * 2) * slope
            elif left > 0:
                x = load_f16s_part(at + i * 2, left) * slope
        if left < LANES:
            x = first_lanes(x, left, lowest)
        store_f32s(scores + i * 4, x)
        store_f32s(used + i * 4, maximum(load_f32s(used + i * 4), x))
        largest = maximum(largest, x)
    return max_lanes(largest)


@inline_helper
def _finish_row(rec, token, head, batch, top, total, sums, dv):  # type: ignore[no-untyped-def]
    """Write a row of dst from its state; a head's sink takes part in the sum only."""
    if given(rec, _SINKS):
        sink = load_f32(data(rec, _SINKS) + head * 4)
        if sink > top:
            factor = np.float32(math.exp(top - sink))
            total = total * factor + np.float32(1.0)
            _scale_row(sums, _padded(dv), factor)
        else:
            total += np.float32(math.exp(sink - top))
    factor = np.float32(0.0)
    if total != np.float32(0.0):
        factor = np.float32(1.0) / total
    to = data(rec, DST) + head * nb(rec, DST, 1) + token * nb(rec, DST, 2)
    to += batch * nb(rec, DST, 3)
    i = 0
    while i + LANES <= dv:
        store_f32s(to + i * 4, load_f32s(sums + i * 4) * factor)
        i += LANES
    if i < dv:
        store_f32s_part(to + i * 4, load_f32s(sums + i * 4) * factor, dv - i)


@inline_helper
def _weigh_row(dots, weights, count, softcap, top_at, total_at, sums, dv):  # type: ignore[no-untyped-def]
    """Turn a row's products with a block's keys to weights of its values.

    ``weights`` holds the mask before. Returns whether any position counts; if none does, the
    weights are zeros. Sums and totals so far are scaled to the largest score.
    """
    lowest = np.float32(-np.inf)
    top = load_f32(top_at)
    largest = splat(top)
    for p in range(0, count, LANES):
        s = load_f32s(dots + p * 4)
        if softcap != np.float32(0.0):
            s = tanh(s) * softcap
        # A masked position doesn't count whatever its key.
        m = load_f32s(weights + p * 4)
        s = select(m > lowest, s + m, m)
        store_f32s(weights + p * 4, s)
        largest = maximum(largest, s)
    new_top = max_lanes(largest)
    if new_top == lowest:
        memory_set(weights, 0, BLOCK * 4)
        return False
    if new_top > top:
        factor = _first_lane(exp(splat(top - new_top)))
        _scale_row(sums, dv, factor)
        store_f32(total_at, load_f32(total_at) * factor)
        store_f32(top_at, new_top)
    total = splat(np.float32(0.0))
    for p in range(0, count, LANES):
        s = exp(load_f32s(weights + p * 4) - new_top)
        store_f32s(weights + p * 4, s)
        total = total + s
    store_f32(total_at, load_f32(total_at) + sum_lanes(total))
    return True


@functools.cache
def attention_kernel(type_k: GgmlType, type_v: GgmlType) -> KernelFunction:
    """Return the kernel of FLASH_ATTN_EXT over keys and values of these types; queries are F32."""
    number_k, number_v = int(type_k), int(type_v)

    @kernel
    def attention(rec, ith, nth, thread):  # type: ignore[no-untyped-def]
        dk, dv = ne(rec, _K, 0), ne(rec, _V, 0)
        dkp, dvp = _padded(dk), _padded(dv)
        n_kv, n_tokens, n_kv_heads = ne(rec, _K, 1), ne(rec, _Q, 1), ne(rec, _K, 2)
        group = ne(rec, _Q, 2) // n_kv_heads
        batches_per_kv = ne(rec, _Q, 3) // ne(rec, _K, 3)
        scale, max_bias, softcap = param_f32(rec, 0), param_f32(rec, 1), param_f32(rec, 2)
        if softcap != np.float32(0.0):
            scale /= softcap
        tile, split = extra(rec, _TILE), extra(rec, _SPLIT) == 1
        tiles = -(-n_tokens // tile)
        blocks = -(-n_kv // BLOCK)
        n_tasks = tiles * n_kv_heads * ne(rec, _Q, 3)
        max_rows = tile * group

        keys = extra(rec, _SCRATCH) + thread * extra(rec, _THREAD_BYTES)
        values = keys + BLOCK * dkp * 4
        queries = values + BLOCK * dvp * 4
        scores = queries + max_rows * dkp * 4
        used = scores + max_rows * BLOCK * 4
        mask_tops = used + BLOCK * 4
        own_sums = mask_tops + max_rows * 4
        dots = own_sums + max_rows * (dvp + 2) * 4
        stage = dots + ROWS_AT_ONCE * BLOCK * 4
        # Turning keys to panels is worth it where several rows use them.
        in_panels = max_rows >= ROWS_AT_ONCE
        if dk != dkp:
            # What lies beyond a row of keys must not count; queries are zero there, but anything
            # may have been left here, NaNs too.
            memory_set(keys, 0, BLOCK * dkp * 4)
            memory_set(stage, 0, LANES * dkp * 4)

        unit, unit_end = ith * blocks, n_tasks * blocks
        if split:
            unit, unit_end = share_rows(n_tasks * blocks, ith, nth)
        while unit < unit_end:
            task, first_block = unit // blocks, unit % blocks
            last_block = min(blocks, first_block + unit_end - unit)
            unit += last_block - first_block if split else nth * blocks
            token0, rest = task % tiles * tile, task // tiles
            kv_head, batch = rest % n_kv_heads, rest // n_kv_heads
            rows = min(tile, n_tokens - token0) * group
            sums = own_sums
            if split:
                sums = extra(rec, _PARTIALS) + (task * nth + ith) * max_rows * (dvp + 2) * 4
            tops = sums + max_rows * dvp * 4
            totals = tops + max_rows * 4
            memory_set(sums, 0, rows * dvp * 4)
            for r in range(rows):
                head, token = kv_head * group + r % group, token0 + r // group
                q = data(rec, _Q) + token * nb(rec, _Q, 1) + head * nb(rec, _Q, 2)
                q += batch * nb(rec, _Q, 3)
                for i in range(0, dk, LANES):
                    left = dk - i
                    x = load_f32s(q + i * 4) if left >= LANES else load_f32s_part(q + i * 4, left)
                    store_f32s(queries + (r * dkp + i) * 4, x * scale)
                store_f32(tops + r * 4, np.float32(-np.inf))
                store_f32(totals + r * 4, np.float32(0.0))
            kv_batch = batch // batches_per_kv
            k0 = data(rec, _K) + kv_head * nb(rec, _K, 2) + kv_batch * nb(rec, _K, 3)
            v0 = data(rec, _V) + kv_head * nb(rec, _V, 2) + kv_batch * nb(rec, _V, 3)
            for block in range(first_block, last_block):
                first = block * BLOCK
                count = min(BLOCK, n_kv - first)
                lowest = np.float32(-np.inf)
                for i in range(0, BLOCK, LANES):
                    store_f32s(used + i * 4, splat(lowest))
                any_used = False
                for r in range(rows):
                    head, token = kv_head * group + r % group, token0 + r // group
                    slope = alibi_slope(head, ne(rec, _Q, 2), max_bias)
                    row_scores = scores + r * BLOCK * 4
                    mask_top = _load_mask(
                        rec, token, head, batch, first, count, slope, row_scores, used
                    )
                    store_f32(mask_tops + r * 4, mask_top)
                    any_used = any_used or mask_top != lowest
                if not any_used:
                    continue
                for p in range(count):
                    key, value = keys + p * dkp * 4, values + p * dvp * 4
                    if in_panels:
                        key = stage + p % LANES * dkp * 4
                    if load_f32(used + p * 4) == lowest:
                        # What no row attends to may be anything, NaN included.
                        memory_set(value, 0, dvp * 4)
                    else:
                        k = k0 + (first + p) * nb(rec, _K, 1)
                        dequantize_row(number_k, k, key, dk)
                        v = v0 + (first + p) * nb(rec, _V, 1)
                        dequantize_row(number_v, v, value, dv)
                    if in_panels and (p % LANES == LANES - 1 or p == count - 1):
                        panel = keys + p // LANES * LANES * dkp * 4
                        panel_of_rows(stage, dkp * 4, dkp, panel)
                r = 0
                while r < rows:
                    query, weights = queries + r * dkp * 4, scores + r * BLOCK * 4
                    n = ROWS_AT_ONCE if in_panels and r + ROWS_AT_ONCE <= rows else 1
                    top = lowest
                    for i in range(r, r + n):
                        top = max(top, load_f32(mask_tops + i * 4))
                    if top == lowest:
                        r += n
                        continue
                    for p in range(0, count, LANES * PANELS if in_panels else LANES):
                        k, at = keys + p * dkp * 4, dots + p * 4
                        if n > 1:
                            score_rows(ROWS_AT_ONCE, PANELS, query, dkp * 4, k, dkp, at, BLOCK * 4)
                        elif in_panels:
                            score_rows(1, PANELS, query, dkp * 4, k, dkp, at, BLOCK * 4)
                        else:
                            store_f32s(at, _dot16(query, k, dkp * 4, dkp))
                    counts = False
                    for i in range(n):
                        counts |= _weigh_row(
                            dots + i * BLOCK * 4,
                            weights + i * BLOCK * 4,
                            count,
                            softcap,
                            tops + (r + i) * 4,
                            totals + (r + i) * 4,
                            sums + (r + i) * dvp * 4,
                            dvp,
                        )
                    if counts and n > 1:
                        to = sums + r * dvp * 4
                        add_values(ROWS_AT_ONCE, weights, BLOCK * 4, count, values, to, dvp)
                    elif counts:
                        add_values(1, weights, BLOCK * 4, count, values, sums + r * dvp * 4, dvp)
                    r += n
            if not split:
                for r in range(rows):
                    head, token = kv_head * group + r % group, token0 + r // group
                    top, total = load_f32(tops + r * 4), load_f32(totals + r * 4)
                    _finish_row(rec, token, head, batch, top, total, sums + r * dvp * 4, dv)
        return 0

    return attention


@kernel
def merge_attention(rec, ith, nth):  # type: ignore[no-untyped-def]
    """Put together what the threads left of each task, and write dst."""
    dv = ne(rec, _V, 0)
    dvp = _padded(dv)
    n_tokens, n_kv_heads = ne(rec, _Q, 1), ne(rec, _K, 2)
    group = ne(rec, _Q, 2) // n_kv_heads
    tile = extra(rec, _TILE)
    tiles = -(-n_tokens // tile)
    blocks = -(-ne(rec, _K, 1) // BLOCK)
    n_tasks = tiles * n_kv_heads * ne(rec, _Q, 3)
    max_rows = tile * group
    each = max_rows * (dvp + 2) * 4
    begin, end = share_rows(n_tasks * max_rows, ith, nth)
    for item in range(begin, end):
        task, r = item // max_rows, item % max_rows
        token0, rest = task % tiles * tile, task // tiles
        kv_head, batch = rest % n_kv_heads, rest // n_kv_heads
        head, token = kv_head * group + r % group, token0 + r // group
        if token >= n_tokens:
            continue
        merged = np.int64(0)
        top = np.float32(-np.inf)
        total = np.float32(0.0)
        for other in range(nth):
            first, last = share_rows(n_tasks * blocks, other, nth)
            if last <= task * blocks or first >= (task + 1) * blocks or first == last:
                continue
            base = extra(rec, _PARTIALS) + (task * nth + other) * each
            sums = base + r * dvp * 4
            other_top = load_f32(base + (max_rows * dvp + r) * 4)
            other_total = load_f32(base + (max_rows * (dvp + 1) + r) * 4)
            if merged == 0:
                merged, top, total = sums, other_top, other_total
                continue
            if other_top == np.float32(-np.inf):
                continue
            new_top = max(top, other_top)
            mine = np.float32(math.exp(top - new_top))
            theirs = np.float32(math.exp(other_top - new_top))
            total = total * mine + other_total * theirs
            top = new_top
            for i in range(0, dvp, LANES):
                x = load_f32s(merged + i * 4) * mine
                store_f32s(merged + i * 4, fma(load_f32s(sums + i * 4), splat(theirs), x))
        _finish_row(rec, token, head, batch, top, total, merged, dv)
    return 0
