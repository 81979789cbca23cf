"""Lowering of ROPE and its gradient."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from protocol.ggml.ops import Op
from protocol.tensor import Tensor
from rpc_server.devices.cuda.kernels import kernel
from rpc_server.devices.cuda.planner import CudaPlanner, lowers
from rpc_server.ops.rope import Geometry, correction_range

_ROPE = kernel("rope", "rope")


def _bits(value: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def turn(t: Tensor, planner: CudaPlanner, kept: Sequence[Tensor] = ()) -> bool:
    """Emit a launch of rope.cu.

    ``kept``: a view of the result as rows, their indices, and what the rows are written to.
    """
    g = Geometry.of(t)
    ratio = np.float32(t.param_f32(5)) ** np.float32(-2.0 / t.param_i32(1))
    low, high = correction_range(t) if t.param_f32(7) else (np.float32(0), np.float32(0))
    extra = (g.first, g.pairs, g.step, g.distance, int(t.op is Op.ROPE_BACK))
    angles = (_bits(float(x)) for x in (ratio, low, high))
    slots = (t, *t.src[:3], *kept)
    width = max(g.pairs, t.ne[0] // 2)
    return planner.each_row(_ROPE, t, t.nrows, width, extra=(*extra, *angles), slots=slots)


@lowers(Op.ROPE, Op.ROPE_BACK)
def lower_rope(t: Tensor, planner: CudaPlanner) -> bool:
    return turn(t, planner)
