"""Ops on rows that indices name, and on diagonals and triangles."""

from __future__ import annotations

from collections.abc import Callable

from client.builder.partial import Triangle
from conformance.differential import type_sets
from conformance.differential.compare import EXACT
from conformance.differential.sketch import Sketch, family
from conformance.differential.type_sets import BF16, F16, F32, FLOATS, I32, I64
from conformance.differential.values import ValueKind
from protocol.ggml.ops import Op
from protocol.ggml.types import TYPE_INFO, GgmlType
from protocol.tensor import Tensor

_NUMBERS = (ValueKind.NORMAL, ValueKind.SPECIAL)


# -- GET_ROWS, GET_ROWS_BACK -----------------------------------------------------------------------


@family(Op.GET_ROWS, variants=(F32, F16, BF16, I32, *type_sets.DECODABLE), examples=20)
def _get_rows(s: Sketch, type: GgmlType) -> None:
    ne = list(s.shape(8192, block=TYPE_INFO[type].block_size))
    if not ne[1]:
        ne[1] = 1
    if type is I32:
        table = s.leaf(type, ne, ValueKind.INTEGERS, -(1 << 30), 1 << 30, layout="rows")
    else:
        table = s.leaf(type, ne, _NUMBERS, layout="rows")
    count = 0 if s.seldom() and s.seldom() else s.size(40)
    ids = s.indices((count, ne[2], ne[3]), ne[1], layout="any")
    s.output(s.g.get_rows(table, ids))


@family(Op.GET_ROWS_BACK, variants=[F32, F16], examples=130)
def _get_rows_back(s: Sketch, type: GgmlType) -> None:
    columns, count, rows = s.size(300), s.size(40), s.size(40)
    gradients = s.leaf(type, (columns, count), _NUMBERS, layout="even")
    # Upstream reads the indices as if they were dense.
    ids = s.indices((count,), rows)
    s.output(s.g.get_rows_back(gradients, ids, s.g.new_tensor(F32, (columns, rows))))


# -- SET_ROWS --------------------------------------------------------------------------------------


@family(
    Op.SET_ROWS,
    variants=[
        (source, target, index)
        for target in (*FLOATS, I32, *type_sets.ENCODABLE)
        for source in (F32, F16)
        for index in (I64, I32)
    ],
    examples=8,
)
def _set_rows(s: Sketch, variant: tuple[GgmlType, GgmlType, GgmlType]) -> None:
    source, type, index = variant
    ne = s.shape(s.pick((1024, 8192)), block=TYPE_INFO[type].block_size, empty=False)
    to = s.leaf(type, ne, ValueKind.CONSTANT, 7.0, layout="rows")
    # A row that is named twice gets either's values.
    count = s.integer(1, ne[1])
    planes = s.broadcast_to(ne[2:])
    ids = s.indices((count, *planes[:2]), ne[1], type=index, distinct=True)
    kinds: tuple[ValueKind, ...] = (ValueKind.NORMAL, ValueKind.UNIFORM, ValueKind.CONSTANT)
    if type in FLOATS:
        kinds = (*kinds, ValueKind.SPECIAL)
    rows = s.leaf(source, (ne[0], count, ne[2], ne[3]), kinds, 0.5, 3.0, layout="rows")
    t = s.g.set_rows(to, rows, ids)
    if t.type in type_sets.DECODABLE:
        s.output(s.g.cast(t, F32))
    else:
        s.output(t, EXACT if t.quantized else None)


# -- DIAG, DIAG_MASK_INF, DIAG_MASK_ZERO, TRI ------------------------------------------------------


@family(Op.DIAG, examples=360)
def _diag(s: Sketch, _: str) -> None:
    ne = s.shape(256)
    a = s.leaf(F32, (ne[0], 1, *ne[2:]), _NUMBERS, layout="rows")
    s.output(s.g.diag(a))


def _diag_mask(op: Op) -> Callable[[Sketch, str], None]:
    def draws(s: Sketch, _: str) -> None:
        ne = s.shape(4096, empty=False)
        inplace = s.flag()
        a = s.leaf(F32, ne, _NUMBERS, layout="even" if inplace else "contiguous")
        n_past = s.pick((0, 1, ne[0] - 1, ne[0], ne[0] + 3, s.integer(0, ne[0])))
        build: dict[Op, Callable[..., Tensor]] = {
            Op.DIAG_MASK_INF: s.g.diag_mask_inf,
            Op.DIAG_MASK_ZERO: s.g.diag_mask_zero,
        }
        s.output(build[op](a, n_past, inplace=inplace))

    return draws


for _op in (Op.DIAG_MASK_INF, Op.DIAG_MASK_ZERO):
    family(_op, examples=300)(_diag_mask(_op))


@family(Op.TRI, variants=list(Triangle), examples=70)
def _tri(s: Sketch, triangle: Triangle) -> None:
    ne = s.shape(1024)
    a = s.leaf(F32, (ne[0], ne[0], min(ne[2], 4), ne[3]), _NUMBERS, layout="contiguous")
    s.output(s.g.tri(a, triangle))
