"""Lowerings of copies, with conversions among types."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.ggml.ops import Op
from protocol.ggml.types import CACHE_TYPES, FLOATS, GgmlType
from protocol.tensor import Tensor
from rpc_server.devices.cuda.kernels import CudaKernel, kernel, kernel_of_weights
from rpc_server.devices.cuda.lower.walk import as_floats, as_row, decoded, dense, elements
from rpc_server.devices.cuda.planner import MAX_GRID, CudaPlanner, lowers
from rpc_server.ops.arrays import NATIVE
from rpc_server.ops.table import source

_SAME = kernel("copy", "copy_same")
_DENSE = kernel("copy", "copy_dense")
_CONVERTED = kernel("copy", "copy_converted")


@dataclass(frozen=True, slots=True)
class Encoder:
    """The kernels that write blocks of a type.

    These are one for all of a tensor, and one for rows by index.

    A thread has ``group`` elements, one behind another; those of a block's groups work together.
    """

    copy: CudaKernel
    rows: CudaKernel
    group: int


# What encode_super.cuh writes, by how many elements are a group there.
_GROUPS = {
    GgmlType[name]: elements
    for elements, names in (
        (16, "Q8_K Q2_K Q3_K Q6_K NVFP4"),
        (32, "Q8_1 Q4_K Q5_K IQ4_XS TQ1_0 TQ2_0 MXFP4 Q1_0 Q2_0"),
    )
    for name in names.split()
}


def _encoder(type_: GgmlType) -> Encoder:
    names = ("copy_encoded", "set_rows_encoded")
    if type_ in CACHE_TYPES:
        copy, rows = (kernel("copy", name, 64) for name in names)
        return Encoder(copy, rows, 32)
    copy, rows = (kernel_of_weights("encode", name, type_) for name in names)
    return Encoder(copy, rows, _GROUPS[type_])


# Of CACHE_TYPES encode.cuh writes a block by a thread; attention reads them as they are.
ENCODERS: dict[GgmlType, Encoder] = {t: _encoder(t) for t in (*CACHE_TYPES, *_GROUPS)}


def encoded(to: Tensor, values: Tensor, planner: CudaPlanner) -> bool:
    """Emit launches that encode floats, as many elements, to blocks of a type of ENCODERS."""
    encoder = ENCODERS[to.type]
    if values.ne[0] % encoder.group:
        # A thread reads its elements from one row.
        row = dense(values, GgmlType.F32, planner.scratch(4 * values.nelements))
        elements(_CONVERTED, row, planner, slots=(row, values))
        values = as_row(row)
    threads = encoder.copy.threads
    grid = (min(-(-to.nelements // encoder.group // threads), MAX_GRID[0]),)
    extra = (to.nelements // to.block_size,)
    planner.launch(encoder.copy, to, grid, threads, extra=extra, slots=(to, values))
    return True


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
    if t.type in ENCODERS and values.type in FLOATS and t.contiguous_rows:
        return encoded(t, values, planner)
    if values.quantized and t.type in FLOATS and values.contiguous_rows:
        if values.same_shape(t):
            decoded(t, values, planner)
            return True
        return elements(_CONVERTED, t, planner, slots=(t, as_floats(values, planner)))
    return False
