"""Lowerings of normalisations."""

from __future__ import annotations

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.devices.cpu.catalog import group_norm, norm_kernel
from rpc_server.devices.cpu.kernels.interface.codes import Norm
from rpc_server.devices.cpu.planner import Planner, lowers


def f32_rows(*tensors: Tensor | None) -> bool:
    """Return whether all are F32 with dense rows."""
    return all(t is not None and t.type is GgmlType.F32 and t.contiguous_rows for t in tensors)


@lowers(Op.RMS_NORM, Op.NORM, Op.L2_NORM)
def _lower_norm(t: Tensor, planner: Planner) -> bool:
    if not f32_rows(t, t.src[0]):
        return False
    planner.emit(norm_kernel(int(Norm[t.op.name])), t)
    return True


@lowers(Op.GROUP_NORM)
def lower_group_norm(t: Tensor, planner: Planner) -> bool:
    source, groups = t.src[0], t.param_i32(0)
    if not f32_rows(t, source) or groups < 1:
        return False
    assert source is not None
    # Planes must be dense; channels and batches may have any stride.
    if any(x.ne[1] != 1 and x.nb[1] != 4 * x.ne[0] for x in (t, source)):
        return False
    planner.emit(group_norm, t, extra=(-(-t.ne[2] // groups),))
    return True
