"""Lowerings of ops that fill a tensor by rule."""

from __future__ import annotations

from protocol.ggml.ops import Op
from protocol.tensor import Tensor
from rpc_server.devices.cuda.kernels import kernel
from rpc_server.devices.cuda.lower.walk import elements
from rpc_server.devices.cuda.planner import CudaPlanner, lowers

_KERNELS = {
    Op.FILL: kernel("fill", "fill"),
    Op.ARANGE: kernel("fill", "arange"),
    Op.DIAG: kernel("fill", "diag"),
    Op.TRI: kernel("fill", "triangle"),
    Op.DIAG_MASK_INF: kernel("fill", "mask_diagonal"),
    Op.DIAG_MASK_ZERO: kernel("fill", "mask_diagonal"),
    Op.TIMESTEP_EMBEDDING: kernel("fill", "timestep_embedding"),
}


@lowers(*_KERNELS)
def lower_fill(t: Tensor, planner: CudaPlanner) -> bool:
    return elements(_KERNELS[t.op], t, planner, int(t.op is Op.DIAG_MASK_INF))
