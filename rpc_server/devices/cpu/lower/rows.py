"""Lowerings of GET_ROWS, SET_ROWS and ADD_ID."""

from __future__ import annotations

from protocol.ggml.ops import Op
from protocol.ggml.types import CACHE_TYPES, DECODABLE, FLOATS, GgmlType
from protocol.tensor import Tensor
from rpc_server.devices.cpu.catalog import add_id, get_rows_kernel, set_rows_kernel
from rpc_server.devices.cpu.lower.norm import f32_rows
from rpc_server.devices.cpu.planner import Planner, lowers


@lowers(Op.GET_ROWS)
def lower_get_rows(t: Tensor, planner: Planner) -> bool:
    source, index = t.src[0], t.src[1]
    assert source is not None
    assert index is not None
    if index.type is not GgmlType.I32 or not (t.contiguous_rows and source.contiguous_rows):
        return False
    if source.type is GgmlType.I32 and t.type is GgmlType.I32:
        planner.emit(get_rows_kernel(int(GgmlType.F32)), t, work=2 * t.nbytes)
        return True
    if t.type is not GgmlType.F32 or source.type not in DECODABLE:
        return False
    planner.emit(get_rows_kernel(int(source.type)), t, work=2 * t.nbytes)
    return True


@lowers(Op.SET_ROWS)
def lower_set_rows(t: Tensor, planner: Planner) -> bool:
    source, index = t.src[0], t.src[1]
    assert source is not None
    assert index is not None
    if index.type not in (GgmlType.I64, GgmlType.I32):
        return False
    if source.type not in (GgmlType.F32, GgmlType.F16):
        return False
    if not (t.contiguous_rows and source.contiguous_rows):
        return False
    if source.empty:
        return True
    if t.type in FLOATS:
        planner.emit(set_rows_kernel(None), t, work=2 * source.nbytes)
        return True
    if t.type not in CACHE_TYPES:
        return False
    floats = 0
    if source.type is GgmlType.F16:
        floats = planner.scratch(planner.n_threads * source.ne[0] * 4)
    planner.emit(set_rows_kernel(int(t.type)), t, extra=(floats,), work=2 * source.nbytes)
    return True


@lowers(Op.ADD_ID)
def lower_add_id(t: Tensor, planner: Planner) -> bool:
    index = t.src[2]
    assert index is not None
    if not f32_rows(t, t.src[0], t.src[1]) or index.type is not GgmlType.I32:
        return False
    planner.emit(add_id, t)
    return True
