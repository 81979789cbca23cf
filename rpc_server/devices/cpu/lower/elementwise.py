"""Lowerings of ops that treat each element alone."""

from __future__ import annotations

from collections.abc import Callable

from protocol.ggml.ops import GluOp, Op, UnaryOp
from protocol.ggml.types import FLOATS, GgmlType
from protocol.tensor import Tensor
from rpc_server.devices.cpu.catalog import (
    Kernel,
    binary_kernel,
    glu_kernel,
    trigonometric_kernel,
    unary_kernel,
)
from rpc_server.devices.cpu.kernels.interface.codes import BINARY_CODES, Function
from rpc_server.devices.cpu.planner import Planner, lowers
from rpc_server.devices.planning.shapes import gated_and_gate, rows_and_width
from rpc_server.ops import gelu

# What is looked up in a table; whether in that of the quick form.
_LOOKED_UP = {
    (Op.UNARY, int(UnaryOp.GELU)): False,
    (Op.UNARY, int(UnaryOp.GELU_QUICK)): True,
    (Op.GLU, int(GluOp.GEGLU)): False,
    (Op.GLU, int(GluOp.GEGLU_QUICK)): True,
}


def float_rows(*tensors: Tensor) -> bool:
    """Return whether all are F32, F16 or BF16 with dense rows."""
    return all(t.type in FLOATS and t.contiguous_rows for t in tensors)


def all_f32(*tensors: Tensor) -> bool:
    return all(t.type is GgmlType.F32 for t in tensors)


def _table(t: Tensor, type: GgmlType) -> int:
    """The address of the table in which the node's function of ``type`` is looked up, or 0."""
    kind = (t.op, t.param_i32(0))
    if kind not in _LOOKED_UP:
        return 0
    # F32 is looked up by its half precision.
    return gelu.table(
        _LOOKED_UP[kind], GgmlType.BF16 if type is GgmlType.BF16 else GgmlType.F16
    ).ctypes.data


def _lower_function(t: Tensor, planner: Planner, choose: Callable[[int, bool], Kernel]) -> bool:
    source = t.src[0]
    assert source is not None
    if not float_rows(t, source) or not t.same_shape(source):
        return False
    code = t.param_i32(0) if t.op is Op.UNARY else int(Function[t.op.name])
    kernel, extra = choose(code, all_f32(t, source)), rows_and_width(t, source)
    planner.emit(kernel, t, extra=(*extra, _table(t, source.type)))
    return True


@lowers(Op.UNARY)
def lower_unary(t: Tensor, planner: Planner) -> bool:
    if t.param_i32(0) not in set(UnaryOp):
        return False
    return _lower_function(t, planner, unary_kernel)


def _lower_own_function(t: Tensor, planner: Planner) -> bool:
    return _lower_function(t, planner, unary_kernel)


def _lower_trigonometric(t: Tensor, planner: Planner) -> bool:
    return _lower_function(t, planner, lambda code, f32: trigonometric_kernel(code))


for _function in Function:
    _trigonometric = _function in (Function.SIN, Function.COS)
    lowers(Op[_function.name])(_lower_trigonometric if _trigonometric else _lower_own_function)


@lowers(*BINARY_CODES)
def _lower_binary(t: Tensor, planner: Planner) -> bool:
    x, y = t.src[0], t.src[1]
    assert x is not None
    assert y is not None
    if not float_rows(t, x) or y.type not in FLOATS or not t.same_shape(x):
        return False
    if y.ne[0] == 1:
        form = 1
    elif y.ne[0] == t.ne[0] and y.contiguous_rows:
        form = 0
    else:
        form = 2
    rows, width = t.nrows, t.ne[0]
    # One row of everything: where src1 doesn't repeat, or is a single value.
    if (y.same_shape(t) and form == 0) or y.nelements == 1:
        rows, width = rows_and_width(t, x, *(() if y.nelements == 1 else (y,)))
    planner.emit(binary_kernel(BINARY_CODES[t.op], all_f32(t, x, y)), t, extra=(rows, width, form))
    return True


@lowers(Op.GLU)
def lower_glu(t: Tensor, planner: Planner) -> bool:
    x, gate = gated_and_gate(t)
    if t.param_i32(0) not in set(GluOp) or not float_rows(t, x, gate):
        return False
    if not t.same_shape(x) or not t.same_shape(gate):
        return False
    planner.emit(
        glu_kernel(t.param_i32(0), all_f32(t, x, gate)),
        t,
        slots=(t, x, gate),
        extra=(*rows_and_width(t, x, gate), _table(t, x.type)),
    )
    return True
