"""Lowerings of matrix products."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from protocol.ggml.ops import Op
from protocol.ggml.types import FLOATS, GgmlType
from protocol.tensor import Tensor
from rpc_server.devices.cpu.catalog import product_of, route_columns
from rpc_server.devices.cpu.instruction_sets import chosen_isa
from rpc_server.devices.cpu.kernels.interface.layout import (
    LANES,
    PRODUCT_TYPES,
    SCALE_GROUPS,
    RowForm,
    panel_columns,
    product_form,
    product_scratch,
    routing_bytes,
    row_bytes,
)
from rpc_server.devices.cpu.planner import Planner, lowers


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
    """Return where the columns lie as the weights' type wants them, and their strides.

    These are 4 extra words.
    """
    form = product_form(weights.type, chosen_isa())
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
    products = weights.ne[0] * t.ne[0] * t.ne[1] * t.ne[2] * t.ne[3]
    planner.emit(product_of(weights.type, isa), t, extra=extra, products=products)


def _most_columns(weights: Tensor, planner: Planner) -> int:
    """So many columns are a part of a record with the rows that are multiplied at once."""
    return max(planner.part_products // (LANES * max(weights.ne[0], 1)), 1)


def _ranges(n: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield where each of the ranges begins that ``n`` is cut into, and its length."""
    return ((at, min(most, n - at)) for at in range(0, n, most))


def _few_columns(t: Tensor, most: int) -> Iterator[tuple[Tensor, int, int, int]]:
    """Cut a product into some of up to ``most`` columns for each matrix of weights.

    Each comes with the number of its first column in dimensions 1 to 3.
    """
    weights = t.src[0]
    assert weights is not None
    repeat2, repeat3 = t.ne[2] // weights.ne[2], t.ne[3] // weights.ne[3]
    for i3, i2 in itertools.product(range(t.ne[3]), range(weights.ne[2])):
        matrix = replace(
            weights,
            ne=(*weights.ne[:2], 1, 1),
            address=weights.address + i2 * weights.nb[2] + i3 // repeat3 * weights.nb[3],
        )
        at2 = i2 * repeat2
        per_head = min(most, t.ne[1])
        heads = max(most // t.ne[1], 1)
        for (first2, n2), (first1, n1) in itertools.product(
            _ranges(repeat2, heads), _ranges(t.ne[1], per_head)
        ):
            first = (first1, at2 + first2, i3)
            yield (
                replace(
                    t,
                    ne=(t.ne[0], n1, n2, 1),
                    address=t.address + sum(i * b for i, b in zip(first, t.nb[1:], strict=True)),
                    src=(matrix, *t.src[1:]),
                ),
                *first,
            )


@lowers(Op.MUL_MAT)
def lower_mul_mat(t: Tensor, planner: Planner) -> bool:
    if not _supported(t):
        return False
    weights, activations = t.src[0], t.src[1]
    assert weights is not None
    assert activations is not None
    columns = _activations(weights, activations, planner)
    n = t.ne[1] * (t.ne[2] // weights.ne[2]) * (t.ne[3] // weights.ne[3])
    most = _most_columns(weights, planner)
    if n <= most:
        _emit_product(t, planner, columns, n, routed=0)
        return True
    start, *strides = columns
    for piece, *first in _few_columns(t, most):
        at = start + sum(i * b for i, b in zip(first, strides, strict=True))
        _emit_product(piece, planner, (at, *columns[1:]), piece.ne[1] * piece.ne[2], routed=0)
    return True


@lowers(Op.MUL_MAT_ID)
def lower_mul_mat_id(t: Tensor, planner: Planner) -> bool:
    if not _supported(t):
        return False
    weights, activations, experts = t.src[0], t.src[1], t.src[2]
    assert weights is not None
    assert activations is not None
    assert experts is not None
    columns = _activations(weights, activations, planner)
    # An expert may get all columns of a record.
    most = max(_most_columns(weights, planner) // t.ne[1], 1)
    routed = planner.scratch(routing_bytes(weights.ne[2], t.ne[1] * min(most, t.ne[2])))
    for first, tokens in _ranges(t.ne[2], most):
        n = t.ne[1] * tokens
        piece = replace(
            t,
            ne=(*t.ne[:2], tokens, 1),
            address=t.address + first * t.nb[2],
            src=(
                weights,
                activations,
                replace(
                    experts,
                    ne=(experts.ne[0], tokens, 1, 1),
                    address=experts.address + first * experts.nb[1],
                ),
                *t.src[3:],
            ),
        )
        own = (columns[0] + first * columns[2], *columns[1:])
        # One thread's work: it counts what it sorts.
        planner.emit(route_columns, piece, extra=(*own, routed), work=8 * n, parts=0)
        _emit_product(piece, planner, own, n, routed)
    return True
