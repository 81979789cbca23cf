"""Lowerings of ops that copy: CPY, CONT, DUP, CONCAT, REPEAT and PAD."""

from __future__ import annotations

from dataclasses import replace

from protocol.ggml.ops import Op
from protocol.ggml.types import CACHE_TYPES, DECODABLE, FLOATS, GgmlType, row_size
from protocol.tensor import Tensor
from rpc_server.devices.cpu.catalog import convert_kernel, copy_same_type, copy_strided, pad, repeat
from rpc_server.devices.cpu.planner import Planner, lowers

_SCALARS = FLOATS | {GgmlType.I32}


def _convertible(x: GgmlType, y: GgmlType) -> bool:
    if x in _SCALARS and y in _SCALARS:
        return True
    if x in FLOATS and y in CACHE_TYPES:
        return True
    return y is GgmlType.F32 and x in DECODABLE


def copy_elements(t: Tensor, source: Tensor, planner: Planner) -> bool:
    """Emit the copy of ``source``'s elements to ``t``, in ggml's order; False if there's none."""
    same_type = source.type is t.type
    if not same_type and not _convertible(source.type, t.type):
        return False
    slots = (t, source)
    if t.contiguous and source.contiguous:
        rows, width = 1, t.nelements
    elif t.same_shape(source) and t.contiguous_rows and source.contiguous_rows:
        rows, width = t.nrows, t.ne[0]
    elif t.block_size == 1 and source.block_size == 1:
        planner.emit(copy_strided, t, slots=slots, extra=(t.type_size,))
        return True
    else:
        return False
    if same_type:
        size = row_size(t.type, width)
        planner.emit(copy_same_type, t, slots=slots, extra=(rows, size))
        return True
    buffer = planner.scratch(planner.n_threads * 1024) if t.quantized else 0
    planner.emit(convert_kernel(source.type, t.type), t, slots=slots, extra=(rows, width, buffer))
    return True


@lowers(Op.CPY, Op.CONT, Op.DUP)
def _lower_copy(t: Tensor, planner: Planner) -> bool:
    source = t.src[0]
    assert source is not None
    return copy_elements(t, source, planner)


@lowers(Op.CONCAT)
def lower_concat(t: Tensor, planner: Planner) -> bool:
    """Emit a copy for each source, to its part of the result."""
    a, b, dim = t.src[0], t.src[1], t.param_i32(0)
    assert a is not None
    assert b is not None
    if t.quantized and not all(x.contiguous_rows for x in (t, a, b)):
        return False
    offset = a.ne[dim] * t.nb[dim] // (t.block_size if dim == 0 else 1)
    for source, at in ((a, t.address), (b, t.address + offset)):
        if not source.empty:
            copied = copy_elements(replace(t, ne=source.ne, address=at), source, planner)
            assert copied
    return True


@lowers(Op.REPEAT)
def lower_repeat(t: Tensor, planner: Planner) -> bool:
    source = t.src[0]
    assert source is not None
    if t.block_size != 1 or source.type is not t.type:
        return False
    planner.emit(repeat, t, extra=(t.type_size,))
    return True


@lowers(Op.PAD)
def lower_pad(t: Tensor, planner: Planner) -> bool:
    source = t.src[0]
    assert source is not None
    if t.type is not GgmlType.F32 or source.type is not GgmlType.F32 or not t.contiguous_rows:
        return False
    planner.emit(pad, t)
    return True
