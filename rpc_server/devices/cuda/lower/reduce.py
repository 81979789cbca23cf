"""Lowerings of ops that reduce or sort rows."""

from __future__ import annotations

from protocol.ggml.ops import Op
from protocol.tensor import Tensor
from rpc_server.devices.cuda.kernels import kernel
from rpc_server.devices.cuda.lower.walk import as_row
from rpc_server.devices.cuda.planner import MAX_GRID, CudaPlanner, lowers, threads_for
from rpc_server.devices.planning.shapes import is_flat
from rpc_server.ops.table import source

_SUM_ROWS = kernel("reduce", "sum_rows")
_ARGMAX = kernel("reduce", "argmax")
_SUM = kernel("reduce", "sum", 1024)
_COUNT_EQUAL = kernel("reduce", "count_equal", 1024)
_CUMSUM = kernel("reduce", "cumsum")
_ARGSORT = kernel("reduce", "argsort", 1024)

# Rows of so many elements are sorted in shared memory; longer ones in scratch.
_IN_SHARED = 8192
_MOST_BLOCKS_IN_SCRATCH = 64


@lowers(Op.SUM_ROWS, Op.MEAN)
def lower_sum_rows(t: Tensor, planner: CudaPlanner) -> bool:
    extra = (int(t.op is Op.MEAN),)
    return planner.each_row(_SUM_ROWS, t, t.nrows, source(t, 0).ne[0], extra=extra)


@lowers(Op.ARGMAX)
def lower_argmax(t: Tensor, planner: CudaPlanner) -> bool:
    return planner.each_row(_ARGMAX, t, t.ne[0], source(t, 0).ne[0])


@lowers(Op.ARGSORT, Op.TOP_K)
def lower_sort(t: Tensor, planner: CudaPlanner) -> bool:
    places = 1 << max(source(t, 0).ne[0] - 1, 0).bit_length()
    if places > 1 << 30:
        return False
    blocks, scratch, shared = min(t.nrows, MAX_GRID[0]), 0, 4 * places
    if places > _IN_SHARED:
        blocks, shared = min(t.nrows, _MOST_BLOCKS_IN_SCRATCH), 0
        scratch = planner.scratch(4 * places * blocks)
    top_k = t.op is Op.TOP_K
    descending = top_k or t.param_i32(0) == 1
    extra = (places, scratch, int(descending), int(top_k))
    threads = threads_for(places // 2, 1024)
    planner.launch(_ARGSORT, t, (blocks,), threads, extra=extra, shared=shared)
    return True


@lowers(Op.SUM)
def lower_sum(t: Tensor, planner: CudaPlanner) -> bool:
    whole = as_row(source(t, 0))
    planner.launch(_SUM, t, (1,), threads_for(whole.ne[0], 1024), slots=(t, whole))
    return True


@lowers(Op.COUNT_EQUAL)
def lower_count_equal(t: Tensor, planner: CudaPlanner) -> bool:
    a, b = source(t, 0), source(t, 1)
    if is_flat(a) and is_flat(b):
        a, b = as_row(a), as_row(b)
    planner.launch(_COUNT_EQUAL, t, (1,), threads_for(a.ne[0], 1024), slots=(t, a, b))
    return True


@lowers(Op.CUMSUM)
def lower_cumsum(t: Tensor, planner: CudaPlanner) -> bool:
    return planner.each_row(_CUMSUM, t, t.nrows, t.ne[0])
