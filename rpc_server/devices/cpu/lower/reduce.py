"""Lowerings of ops that sum, search or sort along rows."""

from __future__ import annotations

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.devices.cpu.catalog import argmax, argsort, cumulative_sum, sum_all, sum_rows, top_k
from rpc_server.devices.cpu.kernels.interface.codes import TOP_K_INSERT
from rpc_server.devices.cpu.lower.norm import f32_rows
from rpc_server.devices.cpu.planner import Planner, lowers


@lowers(Op.SUM_ROWS, Op.MEAN)
def _lower_row_sums(t: Tensor, planner: Planner) -> bool:
    if not f32_rows(t, t.src[0]):
        return False
    planner.emit(sum_rows, t, extra=(int(t.op is Op.MEAN),))
    return True


@lowers(Op.SUM, Op.CUMSUM)
def lower_sum(t: Tensor, planner: Planner) -> bool:
    if not f32_rows(t, t.src[0]):
        return False
    planner.emit(sum_all if t.op is Op.SUM else cumulative_sum, t)
    return True


def _indices_of(t: Tensor) -> bool:
    return t.type is GgmlType.I32 and f32_rows(t.src[0])


@lowers(Op.ARGMAX)
def lower_argmax(t: Tensor, planner: Planner) -> bool:
    if not _indices_of(t):
        return False
    planner.emit(argmax, t)
    return True


@lowers(Op.ARGSORT)
def lower_argsort(t: Tensor, planner: Planner) -> bool:
    if not _indices_of(t) or not t.contiguous_rows:
        return False
    scratch = planner.scratch(planner.n_threads * t.ne[0] * 8)
    planner.emit(argsort, t, extra=(t.param_i32(0), scratch))
    return True


@lowers(Op.TOP_K)
def lower_top_k(t: Tensor, planner: Planner) -> bool:
    source = t.src[0]
    assert source is not None
    if not _indices_of(t) or not t.contiguous_rows:
        return False
    each = 4 * TOP_K_INSERT if t.ne[0] <= TOP_K_INSERT else 8 * source.ne[0]
    planner.emit(top_k, t, extra=(planner.scratch(planner.n_threads * each), each))
    return True
