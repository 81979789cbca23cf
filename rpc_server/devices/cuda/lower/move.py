"""Lowerings of ops that move elements, and of those that resize pictures."""

from __future__ import annotations

import struct

import numpy as np

from protocol.ggml.ops import Op
from protocol.tensor import Tensor
from rpc_server.devices.cuda.kernels import kernel, kernels
from rpc_server.devices.cuda.lower.copy import lower_copy
from rpc_server.devices.cuda.lower.walk import elements
from rpc_server.devices.cuda.planner import CudaPlanner, lowers
from rpc_server.ops.table import source

# Ops that say all there is to say with their op_params.
_SIMPLE = {
    Op.PAD: kernel("move", "pad"),
    Op.PAD_REFLECT_1D: kernel("move", "pad_reflect"),
    Op.ROLL: kernel("move", "roll"),
    Op.WIN_PART: kernel("move", "win_part"),
    Op.WIN_UNPART: kernel("move", "win_unpart"),
    Op.GET_REL_POS: kernel("move", "get_rel_pos"),
}
_CONCAT, _REPEAT, _SET_PART, _ADD_ID, _ADD_REL_POS, _UPSCALE = kernels(
    "move", "concat repeat set_part add_id add_rel_pos upscale"
)


@lowers(*_SIMPLE)
def lower_simple(t: Tensor, planner: CudaPlanner) -> bool:
    return elements(_SIMPLE[t.op], t, planner)


@lowers(Op.CONCAT)
def lower_concat(t: Tensor, planner: CudaPlanner) -> bool:
    if any(s.ne[0] % t.block_size for s in (source(t, 0), t)):
        return False
    n = t.nelements // t.block_size
    return elements(_CONCAT, t, planner, t.type_size, t.block_size, n=n)


@lowers(Op.REPEAT)
def lower_repeat(t: Tensor, planner: CudaPlanner) -> bool:
    return elements(_REPEAT, t, planner, t.type_size)


@lowers(Op.SET, Op.ACC)
def lower_set(t: Tensor, planner: CudaPlanner) -> bool:
    if not t.param_i32(4) and not lower_copy(t, planner):
        return False
    part = source(t, 1)
    if part.empty:
        return True
    return elements(_SET_PART, t, planner, int(t.op is Op.ACC), n=part.nelements)


@lowers(Op.ADD_ID)
def lower_add_id(t: Tensor, planner: CudaPlanner) -> bool:
    planner.rows(_ADD_ID, t, t.nrows, t.ne[0])
    return True


@lowers(Op.ADD_REL_POS)
def lower_add_rel_pos(t: Tensor, planner: CudaPlanner) -> bool:
    with_positions = t.ne[0] * t.ne[1] * t.ne[2]
    return elements(_ADD_REL_POS, t, planner, with_positions, source(t, 1).ne[0])


_ALIGN_CORNERS = 1 << 8


@lowers(Op.UPSCALE)
def lower_upscale(t: Tensor, planner: CudaPlanner) -> bool:
    ratios = [n / m for n, m in zip(t.ne, source(t, 0).ne, strict=True)]
    if t.param_i32(0) & _ALIGN_CORNERS:
        for d in (0, 1):
            n, m = t.ne[d], source(t, 0).ne[d]
            if n > 1 and m > 1:
                ratios[d] = (n - 1) / (m - 1)
    bits = (struct.unpack("<i", np.float32(ratio).tobytes())[0] for ratio in ratios)
    return elements(_UPSCALE, t, planner, *bits)
