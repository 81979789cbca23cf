"""Lowering of SOFT_MAX."""

from __future__ import annotations

from protocol.ggml_ops import Op
from rpc_server.devices.cuda.kernels import kernel
from rpc_server.devices.cuda.lower.norm import threads_for
from rpc_server.devices.cuda.planner import MAX_GRID, CudaPlanner, lowers
from rpc_server.graph.tensor import Tensor

_SOFT_MAX = kernel("softmax", "soft_max", 512)


@lowers(Op.SOFT_MAX)
def lower_soft_max(t: Tensor, planner: CudaPlanner) -> bool:
    grid = (min(t.nrows, MAX_GRID[0]),)
    planner.launch(_SOFT_MAX, t, grid, threads_for(t.ne[0], 512))
    return True
