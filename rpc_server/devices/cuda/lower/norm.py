"""Lowerings of normalisations."""

from __future__ import annotations

from protocol.ggml_ops import Op
from rpc_server.devices.cuda.kernels import kernel
from rpc_server.devices.cuda.planner import MAX_GRID, CudaPlanner, lowers, threads_for
from rpc_server.graph.tensor import Tensor

NORMALIZE = kernel("norm", "normalize", 512)
_GROUP_NORM = kernel("norm", "group_norm", 512)

# The numbers of norm.cu.
_KINDS = {Op.RMS_NORM: 0, Op.NORM: 1, Op.L2_NORM: 2}


@lowers(*_KINDS)
def lower_norm(t: Tensor, planner: CudaPlanner) -> bool:
    return planner.each_row(NORMALIZE, t, t.nrows, t.ne[0], extra=(_KINDS[t.op],))


@lowers(Op.GROUP_NORM)
def lower_group_norm(t: Tensor, planner: CudaPlanner) -> bool:
    step = -(-t.ne[2] // t.param_i32(0))
    groups = -(-t.ne[2] // step)
    if t.ne[3] > MAX_GRID[1]:
        return False
    threads = threads_for(t.ne[0] * t.ne[1] * step, 512)
    planner.launch(_GROUP_NORM, t, (groups, t.ne[3]), threads, extra=(step,))
    return True
