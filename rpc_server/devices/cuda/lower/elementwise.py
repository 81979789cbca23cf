"""Lowerings of ops that treat each element alone."""

from __future__ import annotations

from protocol.ggml.ops import GluOp, Op, UnaryOp
from protocol.ggml.types import FLOATS
from protocol.tensor import Tensor
from rpc_server.devices.cuda.kernels import kernel
from rpc_server.devices.cuda.lower.copy import ENCODERS, encoded
from rpc_server.devices.cuda.lower.walk import as_floats
from rpc_server.devices.cuda.planner import CudaPlanner, lowers
from rpc_server.devices.planning.shapes import gated_and_gate, rows_and_width
from rpc_server.ops.table import source

_UNARY = kernel("elementwise", "unary")
_BINARY = kernel("elementwise", "binary")
_GLU = kernel("elementwise", "glu")

# The numbers of elementwise.cu; those of UNARY are ggml's.
_FUNCTIONS = {
    op: 100 + i
    for i, op in enumerate(
        (Op.SQR, Op.SQRT, Op.LOG, Op.SIN, Op.COS, Op.SCALE, Op.CLAMP, Op.LEAKY_RELU)
    )
}
_BINARY_CODES = {Op.ADD: 0, Op.SUB: 1, Op.MUL: 2, Op.DIV: 3, Op.ADD1: 0}


def floats(*tensors: Tensor) -> bool:
    return all(t.type in FLOATS for t in tensors)


@lowers(Op.UNARY, *_FUNCTIONS)
def lower_function(t: Tensor, planner: CudaPlanner) -> bool:
    x = source(t, 0)
    code = t.param_i32(0) if t.op is Op.UNARY else _FUNCTIONS[t.op]
    if not floats(t, x) or (t.op is Op.UNARY and code not in set(UnaryOp)):
        return False
    rows, width = rows_and_width(t, x)
    planner.rows(_UNARY, t, rows, width, extra=(rows, width, code))
    return True


@lowers(*_BINARY_CODES)
def lower_binary(t: Tensor, planner: CudaPlanner) -> bool:
    x, y = source(t, 0), source(t, 1)
    if x.quantized:
        return _add_to_blocks(t, x, planner)
    if not floats(t, x, y):
        return False
    return _binary(t, (t, x, y), planner)


def _add_to_blocks(t: Tensor, blocks: Tensor, planner: CudaPlanner) -> bool:
    """Decoded, added to as floats, and encoded again if the result is blocks, too."""
    if t.quantized and t.type not in ENCODERS:
        return False
    x = as_floats(blocks, planner)
    if not t.quantized:
        return _binary(t, (t, x, source(t, 1)), planner)
    return _binary(t, (x, x, source(t, 1)), planner) and encoded(t, x, planner)


def _binary(t: Tensor, slots: tuple[Tensor, Tensor, Tensor], planner: CudaPlanner) -> bool:
    """``slots``: the result, what source 1 is repeated over, and source 1."""
    to, x, y = slots
    rows, width = to.nrows, to.ne[0]
    # One row of everything: where source 1 doesn't repeat, or is a single element.
    if y.same_shape(to) or y.nelements == 1:
        rows, width = rows_and_width(to, x, *(() if y.nelements == 1 else (y,)))
    own = width if y.same_shape(to) and rows == 1 else y.ne[0]
    extra = (rows, width, _BINARY_CODES[t.op], own)
    planner.rows(_BINARY, t, rows, width, extra=extra, slots=slots)
    return True


@lowers(Op.GLU)
def lower_glu(t: Tensor, planner: CudaPlanner) -> bool:
    x, gate = gated_and_gate(t)
    if not floats(t, x, gate) or t.param_i32(0) not in set(GluOp):
        return False
    rows, width = rows_and_width(t, x, gate)
    planner.rows(_GLU, t, rows, width, extra=(rows, width), slots=(t, x, gate))
    return True
