"""Lowering of SOFT_MAX."""

from __future__ import annotations

from protocol.ggml.ops import Op
from protocol.tensor import Tensor
from rpc_server.devices.cuda.kernels import kernel
from rpc_server.devices.cuda.planner import CudaPlanner, lowers

_SOFT_MAX = kernel("softmax", "soft_max", 512)


@lowers(Op.SOFT_MAX)
def lower_soft_max(t: Tensor, planner: CudaPlanner) -> bool:
    return planner.each_row(_SOFT_MAX, t, t.nrows, t.ne[0])
