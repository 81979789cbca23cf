"""Lowerings of matrix products."""

from __future__ import annotations

from protocol.ggml.ops import Op
from protocol.ggml.types import FLOATS, GgmlType
from rpc_server.devices.cpu.catalog import product_kernel, route_columns
from rpc_server.devices.cpu.instruction_sets import chosen_isa
from rpc_server.devices.cpu.kernels.interface.layout import (
    PRODUCT_TYPES,
    SCALE_GROUPS,
    RowForm,
    activation_form,
    panel_columns,
    product_scratch,
    routing_bytes,
    row_bytes,
)
from rpc_server.devices.cpu.planner import Planner, lowers
from rpc_server.graph.tensor import Tensor


def _supported(t: Tensor) -> bool:
    weights, activations = t.src[0], t.src[1]
    assert weights is not None
    assert activations is not None
    if weights.type in SCALE_GROUPS and activations.type is not GgmlType.F32:
        return False
    return (
        weights.type in PRODUCT_TYPES
        and activations.type in FLOATS
        and weights.contiguous_rows
        and activations.contiguous_rows
        and t.type is GgmlType.F32
        and t.contiguous_rows
    )


def _activations(
    weights: Tensor, activations: Tensor, planner: Planner
) -> tuple[int, int, int, int]:
    """Where the columns lie as the weights' type wants them, and their strides: 4 extra words."""
    form = activation_form(weights.type)
    if activations.type is GgmlType.F32 and form is RowForm.F32:
        return activations.address, *activations.nb[1:]
    nb1 = row_bytes(form, activations.ne[0])
    nb2 = nb1 * activations.ne[1]
    return planner.converted_rows(activations, form), nb1, nb2, nb2 * activations.ne[2]


def _emit_product(
    t: Tensor, planner: Planner, columns: tuple[int, int, int, int], n: int, routed: int
) -> None:
    """``n`` is the most columns that one matrix may have."""
    weights = t.src[0]
    assert weights is not None
    isa = chosen_isa()
    scratch, stride = planner.thread_scratch(product_scratch(weights.type, isa, n))
    panel = panel_columns(isa, columns[1])
    extra = (*columns, routed, scratch, stride, panel)
    planner.emit(product_kernel(weights.type, isa), t, extra=extra)


@lowers(Op.MUL_MAT)
def lower_mul_mat(t: Tensor, planner: Planner) -> bool:
    if not _supported(t):
        return False
    weights, activations = t.src[0], t.src[1]
    assert weights is not None
    assert activations is not None
    columns = _activations(weights, activations, planner)
    n = t.ne[1] * (t.ne[2] // weights.ne[2]) * (t.ne[3] // weights.ne[3])
    _emit_product(t, planner, columns, n, routed=0)
    return True


@lowers(Op.MUL_MAT_ID)
def lower_mul_mat_id(t: Tensor, planner: Planner) -> bool:
    if not _supported(t):
        return False
    weights, activations = t.src[0], t.src[1]
    assert weights is not None
    assert activations is not None
    columns = _activations(weights, activations, planner)
    n = t.ne[1] * t.ne[2]
    routed = planner.scratch(routing_bytes(weights.ne[2], n))
    # One thread's work: it counts what it sorts.
    planner.emit(route_columns, t, extra=(*columns, routed), work=8 * n)
    _emit_product(t, planner, columns, n, routed)
    return True
