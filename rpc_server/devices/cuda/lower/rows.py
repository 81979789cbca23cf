"""Lowerings of ops that read or write rows named by indices in another tensor."""

from __future__ import annotations

from protocol.ggml.ops import Op
from protocol.ggml.types import FLOATS
from protocol.tensor import Tensor
from rpc_server.devices.cuda.kernels import kernel, kernel_of_weights
from rpc_server.devices.cuda.lower.copy import ENCODERS
from rpc_server.devices.cuda.lower.walk import decode_grid
from rpc_server.devices.cuda.planner import CudaPlanner, lowers
from rpc_server.ops.checks import I32_ONLY
from rpc_server.ops.table import source

_GET = kernel("copy", "get_rows")
_SET = kernel("copy", "set_rows")

_PLAIN = FLOATS | I32_ONLY


@lowers(Op.GET_ROWS)
def lower_get_rows(t: Tensor, planner: CudaPlanner) -> bool:
    table = source(t, 0)
    if table.type in _PLAIN:
        planner.rows(_GET, t, t.nrows, t.ne[0])
        return True
    if not table.quantized or not table.contiguous_rows:
        return False
    chosen = kernel_of_weights("dequantize", "get_rows_decoded", table.type)
    planner.launch(chosen, t, decode_grid(t.nrows, table.ne[0]), 128)
    return True


@lowers(Op.SET_ROWS)
def lower_set_rows(t: Tensor, planner: CudaPlanner) -> bool:
    values = source(t, 0)
    if values.empty:
        return True
    # Source 2, where there is one, is the tensor that the node is a view of.
    slots = (t, values, t.src[1])
    if t.type in _PLAIN:
        planner.rows(_SET, t, values.nrows, values.ne[0], slots=slots)
        return True
    if t.type not in ENCODERS or not t.contiguous_rows:
        return False
    encoder = ENCODERS[t.type]
    planner.rows(encoder.rows, t, values.nrows, values.ne[0] // encoder.group, slots=slots)
    return True
