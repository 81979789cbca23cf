"""Lowerings of sparse attention's indexer and of hyper connections."""

from __future__ import annotations

from protocol.ggml.ops import Op
from protocol.tensor import Tensor
from rpc_server.devices.cuda.kernels import kernel
from rpc_server.devices.cuda.lower.walk import as_floats, elements
from rpc_server.devices.cuda.planner import CudaPlanner, lowers
from rpc_server.ops.table import source

_INDEXER = kernel("streams", "lightning_indexer", 128)
_COMBINE = kernel("streams", "combine", 128)
_TO_ONE = kernel("streams", "streams_to_one")
_TO_STREAMS = kernel("streams", "one_to_streams")


@lowers(Op.LIGHTNING_INDEXER)
def lower_indexer(t: Tensor, planner: CudaPlanner) -> bool:
    keys = as_floats(source(t, 1), planner)
    return elements(_INDEXER, t, planner, slots=(t, t.src[0], keys, *t.src[2:4]))


@lowers(Op.DSV4_HC_COMB)
def lower_combine(t: Tensor, planner: CudaPlanner) -> bool:
    return elements(_COMBINE, t, planner, n=t.ne[2])


@lowers(Op.DSV4_HC_PRE)
def lower_to_one(t: Tensor, planner: CudaPlanner) -> bool:
    return elements(_TO_ONE, t, planner)


@lowers(Op.DSV4_HC_POST)
def lower_to_streams(t: Tensor, planner: CudaPlanner) -> bool:
    return elements(_TO_STREAMS, t, planner, int(t.src[3] is not None))
