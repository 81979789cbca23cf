"""Lowerings of ops that read or write rows named by indices in another tensor."""

from __future__ import annotations

from protocol.ggml_ops import Op
from protocol.ggml_types import GgmlType
from rpc_server.devices.cuda.kernels import kernel, kernel_of_weights
from rpc_server.devices.cuda.lower.copy import ENCODED
from rpc_server.devices.cuda.planner import MAX_GRID, CudaPlanner, lowers
from rpc_server.graph.tensor import Tensor

_GET = kernel("copy", "get_rows")
_SET = kernel("copy", "set_rows")
_SET_ENCODED = kernel("copy", "set_rows_encoded", 64)

_PLAIN = (GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.I32)


@lowers(Op.GET_ROWS)
def lower_get_rows(t: Tensor, planner: CudaPlanner) -> bool:
    table = t.src[0]
    assert table is not None
    if table.type in _PLAIN:
        planner.rows(_GET, t, t.nrows, t.ne[0])
        return True
    if not table.quantized or not table.contiguous_rows:
        return False
    grid = (min(t.nrows, MAX_GRID[0]), min(-(-table.ne[0] // 32 // 128), MAX_GRID[1]))
    chosen = kernel_of_weights("dequantize", "get_rows_decoded", table.type)
    planner.launch(chosen, t, grid, 128)
    return True


@lowers(Op.SET_ROWS)
def lower_set_rows(t: Tensor, planner: CudaPlanner) -> bool:
    values = t.src[0]
    assert values is not None
    if values.empty:
        return True
    # Source 2, where there is one, is the tensor that the node is a view of.
    slots = (t, values, t.src[1])
    if t.type in _PLAIN:
        planner.rows(_SET, t, values.nrows, values.ne[0], slots=slots)
        return True
    if t.type not in ENCODED or not t.contiguous_rows:
        return False
    planner.rows(_SET_ENCODED, t, values.nrows, values.ne[0] // 32, slots=slots)
    return True
