"""Lowerings of copies, with conversions among types."""

from __future__ import annotations

from protocol.ggml_ops import Op
from protocol.ggml_types import GgmlType
from rpc_server.devices.cuda.kernels import kernel
from rpc_server.devices.cuda.lower.walk import as_floats, decoded, elements
from rpc_server.devices.cuda.planner import CudaPlanner, lowers
from rpc_server.graph.tensor import Tensor
from rpc_server.ops.arrays import NATIVE
from rpc_server.ops.checks import FLOATS, source

_SAME = kernel("copy", "copy_same")
_DENSE = kernel("copy", "copy_dense")
_CONVERTED = kernel("copy", "copy_converted")
_ENCODED = kernel("copy", "copy_encoded", 64)

# What encode.cuh can write; other blocks are written by their array code.
ENCODED = frozenset(
    {
        GgmlType.Q4_0,
        GgmlType.Q4_1,
        GgmlType.Q5_0,
        GgmlType.Q5_1,
        GgmlType.Q8_0,
        GgmlType.IQ4_NL,
    }
)


def encoded(to: Tensor, values: Tensor, planner: CudaPlanner) -> bool:
    """A launch that encodes floats, as many elements, to blocks of a type of ENCODED."""
    return elements(_ENCODED, to, planner, n=to.nelements // 32, slots=(to, values))


@lowers(Op.CPY, Op.CONT, Op.DUP)
def lower_copy(t: Tensor, planner: CudaPlanner) -> bool:
    values = source(t, 0)
    slots = (t, values)
    if values.type is t.type:
        whole = t.contiguous and values.contiguous and t.nbytes % 16 == 0
        if whole and t.address % 16 == 0 and values.address % 16 == 0:
            return elements(_DENSE, t, planner, n=t.nbytes // 16, slots=slots)
        # An element is a block, however many values it stands for.
        n = t.nelements // t.block_size
        return elements(_SAME, t, planner, t.type_size, t.block_size, n=n, slots=slots)
    if values.type in NATIVE and t.type in NATIVE:
        return elements(_CONVERTED, t, planner, slots=slots)
    if t.type in ENCODED and values.type in FLOATS and t.contiguous_rows:
        return encoded(t, values, planner)
    if values.quantized and t.type in FLOATS and values.contiguous_rows:
        if values.same_shape(t):
            decoded(t, values, planner)
            return True
        return elements(_CONVERTED, t, planner, slots=(t, as_floats(values, planner)))
    return False
