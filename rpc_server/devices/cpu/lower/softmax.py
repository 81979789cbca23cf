"""Lowerings of SOFT_MAX and the diagonal masks."""

from __future__ import annotations

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.devices.cpu.catalog import diagonal_mask, soft_max
from rpc_server.devices.cpu.lower.norm import f32_rows
from rpc_server.devices.cpu.planner import Planner, lowers


@lowers(Op.SOFT_MAX)
def lower_soft_max(t: Tensor, planner: Planner) -> bool:
    mask, sinks = t.src[1], t.src[2]
    if not f32_rows(t, t.src[0]):
        return False
    if mask is not None and (
        mask.type not in (GgmlType.F32, GgmlType.F16) or not mask.contiguous_rows
    ):
        return False
    if sinks is not None and not f32_rows(sinks):
        return False
    planner.emit(soft_max, t)
    return True


@lowers(Op.DIAG_MASK_INF, Op.DIAG_MASK_ZERO)
def _lower_diagonal_mask(t: Tensor, planner: Planner) -> bool:
    fits = f32_rows(t, t.src[0])
    if fits:
        planner.emit(diagonal_mask, t, extra=(int(t.op is Op.DIAG_MASK_INF),))
    return fits
