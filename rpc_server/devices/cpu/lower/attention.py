"""Lowering of FLASH_ATTN_EXT."""

from __future__ import annotations

import dataclasses

from protocol.ggml.ops import Op
from protocol.ggml.types import DECODABLE, TYPE_INFO, GgmlType
from protocol.tensor import Tensor
from rpc_server.devices.cpu.catalog import attention_kernel, merge_attention
from rpc_server.devices.cpu.kernels.interface.layout import (
    BLOCK,
    RowForm,
    activation_form,
    partial_floats,
    row_bytes,
    thread_floats,
)
from rpc_server.devices.cpu.planner import Planner, lowers

# Rows of a task: enough to make up for turning a block to float32, and few enough for the cache.
_ROWS = 64


def _rounded_queries(q: Tensor, keys: GgmlType, planner: Planner) -> Tensor:
    """Queries rounded as ggml rounds them for a product with keys of this type."""
    form = activation_form(keys)
    if form is RowForm.F32:
        return q
    if TYPE_INFO[keys].quantized:
        form = RowForm.Q8_0_FLOATS
    stride = row_bytes(form, q.ne[0])
    return dataclasses.replace(
        q,
        address=planner.converted_rows(q, form),
        nb=(4, stride, stride * q.ne[1], stride * q.ne[1] * q.ne[2]),
    )


@lowers(Op.FLASH_ATTN_EXT)
def lower_attention(t: Tensor, planner: Planner) -> bool:
    q, k, v, mask = t.src[0], t.src[1], t.src[2], t.src[3]
    assert q is not None
    assert k is not None
    assert v is not None
    if q.type is not GgmlType.F32 or t.type is not GgmlType.F32:
        return False
    if k.type not in DECODABLE or v.type not in DECODABLE or k.ne[2:] != v.ne[2:]:
        return False
    if activation_form(k.type) is RowForm.Q8_K:
        # No cache is of such types; there are no queries rounded so for this kernel.
        return False
    if not all(x.contiguous_rows for x in (t, q, k, v)) or 0 in k.ne or q.ne[2] % k.ne[2]:
        return False
    if mask is not None and (mask.type is not GgmlType.F16 or not mask.contiguous_rows):
        return False
    q = _rounded_queries(q, k.type, planner)
    group = q.ne[2] // k.ne[2]
    tile = min(q.ne[1], max(1, _ROWS // group))
    # With many positions fewer rows, or a task would take long.
    products = max(group * k.ne[1] * (k.ne[0] + v.ne[0]), 1)
    tile = max(1, min(tile, planner.part_products // products))
    tasks = -(-q.ne[1] // tile) * k.ne[2] * q.ne[3]
    blocks = -(-k.ne[1] // BLOCK)
    # Whole tasks are dealt out one by one; below a few for each thread the last would wait long.
    split = planner.n_threads > 1 and tasks < 4 * planner.n_threads and tasks * blocks > 1
    rows, threads = tile * group, planner.n_threads
    products *= q.ne[1] * k.ne[2] * q.ne[3]
    # Of tasks that are split, each part leaves what the others are to be put together with.
    shares = planner.parts(0, products) or threads if split else threads
    parts = (shares if shares > threads else 0) if split else None
    thread_bytes = -(-thread_floats(rows, k.ne[0], v.ne[0]) * 4 // 64) * 64
    scratch = planner.scratch(threads * thread_bytes)
    partials = 0
    if split:
        partials = planner.scratch(tasks * shares * partial_floats(rows, v.ne[0]) * 4)
    words = (scratch, thread_bytes, tile, int(split), partials)
    slots = (t, q, *t.src[1:])
    planner.emit(
        attention_kernel(k.type, v.type),
        t,
        extra=words,
        slots=slots,
        products=products,
        parts=parts,
    )
    if split:
        # Shares are those of the kernel before.
        planner.emit(merge_attention, t, extra=words, slots=slots, parts=parts)
    return True
