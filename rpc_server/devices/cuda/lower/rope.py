"""Lowering of ROPE and its gradient."""

from __future__ import annotations

import struct

import numpy as np

from protocol.ggml.ops import Op
from protocol.tensor import Tensor
from rpc_server.devices.cuda.kernels import kernel
from rpc_server.devices.cuda.planner import CudaPlanner, lowers
from rpc_server.ops.rope import Geometry, correction_range
from rpc_server.ops.table import source

_ROPE = kernel("rope", "rope")


def _bits(value: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def turn(
    t: Tensor,
    planner: CudaPlanner,
    kept: Tensor | None = None,
    other: Tensor | None = None,
    values: Tensor | None = None,
) -> bool:
    """Emit a launch of rope.cu.

    ``kept`` is a SET_ROWS of the result, ``other`` another ROPE by the same positions and
    parameters, ``values`` another SET_ROWS.
    """
    g = Geometry.of(t)
    ratio = np.float32(t.param_f32(5)) ** np.float32(-2.0 / t.param_i32(1))
    low, high = correction_range(t) if t.param_f32(7) else (np.float32(0), np.float32(0))
    extra = [g.first, g.pairs, g.step, g.distance, int(t.op is Op.ROPE_BACK)]
    extra += (_bits(float(x)) for x in (ratio, low, high))
    slots: list[Tensor | None] = [t, *t.src[:3], None, None, None, None, None, None, None]
    rows = t.nrows
    if kept is not None:
        of = source(kept, 0)
        extra += (of.ne[0] // t.ne[0], of.ne[1], of.ne[2])
        slots[4:6] = source(kept, 1), kept
    if other is not None:
        slots[6:8] = other, source(other, 0)
        rows += other.nrows
    if values is not None:
        slots[8:11] = source(values, 0), source(values, 1), values
        rows += source(values, 0).nrows
    width = max(g.pairs, t.ne[0] // 2)
    return planner.each_row(_ROPE, t, rows, width, extra=extra, slots=slots)


@lowers(Op.ROPE, Op.ROPE_BACK)
def lower_rope(t: Tensor, planner: CudaPlanner) -> bool:
    return turn(t, planner)
