"""Lowerings of normalisations."""

from __future__ import annotations

from collections.abc import Sequence

from protocol.ggml.ops import Op
from protocol.tensor import Tensor
from rpc_server.devices.cuda.kernels import kernel
from rpc_server.devices.cuda.planner import MAX_GRID, CudaPlanner, lowers, threads_for

_NORMALIZE = kernel("norm", "normalize", 512)
_GROUP_NORM = kernel("norm", "group_norm", 512)

# The numbers of norm.cu.
_KINDS = {Op.RMS_NORM: 0, Op.NORM: 1, Op.L2_NORM: 2}


def normalize(
    t: Tensor,
    planner: CudaPlanner,
    slots: Sequence[Tensor | None] | None = None,
    columns: Sequence[int] = (),
) -> bool:
    """Emit a launch of norm.cu; ``slots`` and ``columns`` are what that does besides."""
    extra = (_KINDS[t.op], *columns)
    return planner.each_row(_NORMALIZE, t, t.nrows, t.ne[0], extra=extra, slots=slots)


@lowers(*_KINDS)
def lower_norm(t: Tensor, planner: CudaPlanner) -> bool:
    return normalize(t, planner)


@lowers(Op.GROUP_NORM)
def lower_group_norm(t: Tensor, planner: CudaPlanner) -> bool:
    step = -(-t.ne[2] // t.param_i32(0))
    groups = -(-t.ne[2] // step)
    if t.ne[3] > MAX_GRID[1]:
        return False
    threads = threads_for(t.ne[0] * t.ne[1] * step, 512)
    planner.launch(_GROUP_NORM, t, (groups, t.ne[3]), threads, extra=(step,))
    return True
