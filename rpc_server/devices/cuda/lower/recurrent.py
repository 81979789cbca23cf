"""Lowerings of ops that carry a state from token to token, and of triangular systems."""

from __future__ import annotations

from protocol.ggml.ops import Op
from protocol.tensor import Tensor
from rpc_server.devices.cuda.kernels import CudaKernel, kernel
from rpc_server.devices.cuda.lower.walk import elements
from rpc_server.devices.cuda.planner import MAX_GRID, CudaPlanner, lowers
from rpc_server.ops.table import source

_THREADS = 128
_CONV = kernel("recurrent", "ssm_conv")
_SCAN = kernel("recurrent", "ssm_scan", _THREADS)
_WKV7 = kernel("recurrent", "wkv7", _THREADS)
_DELTA_NET = kernel("recurrent", "delta_net", _THREADS)
_SOLVE = kernel("recurrent", "solve_triangular", _THREADS)
# A thread has a column of a state.
_BY_COLUMNS = {
    Op.RWKV_WKV6: kernel("recurrent", "wkv6", _THREADS),
    Op.GATED_LINEAR_ATTN: kernel("recurrent", "gated_linear", _THREADS),
}


def _by_rows(chosen: CudaKernel, t: Tensor, planner: CudaPlanner, rows: int, extra: int) -> bool:
    """A warp has a row of a state."""
    grid = (min(-(-rows // (_THREADS // 32)), MAX_GRID[0]),)
    planner.launch(chosen, t, grid, _THREADS, extra=(extra,))
    return True


def _snapshots(t: Tensor) -> int:
    return t.param_i32(0) or 1


@lowers(Op.SSM_CONV)
def lower_conv(t: Tensor, planner: CudaPlanner) -> bool:
    return elements(_CONV, t, planner)


@lowers(Op.SSM_SCAN)
def lower_scan(t: Tensor, planner: CudaPlanner) -> bool:
    x = source(t, 1)
    rows = x.ne[0] * x.ne[1] * x.ne[3]
    return rows > 0 and _by_rows(_SCAN, t, planner, rows, _snapshots(t))


@lowers(Op.RWKV_WKV7)
def lower_wkv7(t: Tensor, planner: CudaPlanner) -> bool:
    sequences = source(t, 6).ne[1]
    return _by_rows(_WKV7, t, planner, t.ne[0] * sequences, sequences)


@lowers(Op.GATED_DELTA_NET)
def lower_delta_net(t: Tensor, planner: CudaPlanner) -> bool:
    return _by_rows(_DELTA_NET, t, planner, t.ne[0] * source(t, 2).ne[3], _snapshots(t))


@lowers(*_BY_COLUMNS)
def lower_by_columns(t: Tensor, planner: CudaPlanner) -> bool:
    states = next(s for s in reversed(t.src) if s is not None)
    n = t.ne[0] * states.ne[1]
    return elements(_BY_COLUMNS[t.op], t, planner, states.ne[1], n=n)


@lowers(Op.SOLVE_TRI)
def lower_solve(t: Tensor, planner: CudaPlanner) -> bool:
    return elements(_SOLVE, t, planner, n=t.ne[0] * t.ne[2] * t.ne[3])
