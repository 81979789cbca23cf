"""Lowerings of nodes together with what follows them: a launch costs as much as a small op.

Results in between are written all the same: clients may read them, and nodes behind do. What is
spared is launches, and reading the results again.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, product

from protocol.ggml.ops import Op
from protocol.ggml.types import FLOATS, GgmlType
from protocol.tensor import Tensor
from rpc_server.devices.cuda.lower.matmul import (
    ROUNDED_AS,
    column_form,
    is_one_column,
    multiply_one_column,
    place_columns,
    reads_codes,
)
from rpc_server.devices.cuda.lower.norm import normalize
from rpc_server.devices.cuda.lower.rope import turn
from rpc_server.devices.cuda.planner import CudaPlanner, fuses, is_valid
from rpc_server.ops.table import OPS, source


def _apart(a: Tensor, b: Tensor) -> bool:
    return a.address + a.nbytes <= b.address or b.address + b.nbytes <= a.address


def _apart_or_same(a: Tensor, b: Tensor) -> bool:
    """Return whether no element of one shares memory with another element of the other."""
    return (a.address, a.ne, a.nb) == (b.address, b.ne, b.nb) or _apart(a, b)


def _independent(written: Sequence[Tensor], read: Sequence[Tensor]) -> bool:
    """Return whether threads that each do all nodes for an element do as nodes one after the
    other.
    """
    return all(_apart_or_same(a, b) for a, b in product(written, [*written, *read]))


def _f32(*tensors: Tensor) -> bool:
    return all(t.type is GgmlType.F32 for t in tensors)


def _other_source(t: Tensor, of: Tensor) -> Tensor | None:
    """Return what ``of`` is combined with in ``t``, a MUL or ADD of its shape; None if it isn't
    that.
    """
    first, second = source(t, 0), source(t, 1)
    if not t.same_shape(of) or (first is of) == (second is of):
        return None
    other = second if first is of else first
    return other if _f32(t, other) else None


@fuses(Op.ADD, Op.RMS_NORM)
def fuse_norm(t: Tensor, planner: CudaPlanner) -> bool:
    """Fuse ADD of a residual, RMS_NORM, MUL by weights and ADD.

    The first and the last may be missing.
    """
    summed = t if t.op is Op.ADD else None
    chain = (
        planner.chain(Op.RMS_NORM, Op.MUL, Op.ADD)
        if summed
        else [t, *planner.chain(Op.MUL, Op.ADD)]
    )
    if len(chain) < 2:
        return False
    norm, scaled = chain[:2]
    x, addends = source(norm, 0), []
    if summed:
        addends = [source(summed, 0), source(summed, 1)]
        if x is not summed or not _f32(summed, *addends) or not addends[1].same_shape(summed):
            return False
    factor = _other_source(scaled, norm)
    if factor is None:
        return False
    shifted = chain[2] if len(chain) > 2 else None
    term = _other_source(shifted, scaled) if shifted else None
    steps = [norm, scaled] if shifted is None or term is None else [norm, scaled, shifted]
    written = [summed, *steps] if summed else steps
    operands = [factor] if term is None else [factor, term]
    if not _independent(written, [x, *operands, *addends]):
        return False
    first, second = addends or (None, None)
    slots = (norm, x, factor, term, first, second, scaled, shifted if term else None)
    planner.absorb(written)
    return normalize(norm, planner, slots, _columns_for(steps[-1], planner))


def _columns_for(x: Tensor, planner: CudaPlanner) -> tuple[int, ...]:
    """Return where ``x`` goes as columns, their stride and form, if the next node reads them."""
    reader = next(planner.ahead(), None)
    if reader is None or reader.op not in (Op.MUL_MAT, Op.MUL_MAT_ID) or not is_valid(reader):
        return ()
    weights, columns = source(reader, 0), source(reader, 1)
    same = columns.address == x.address and columns.nelements == x.nelements
    dense = columns.contiguous and x.contiguous and columns.ne[0] == x.ne[0]
    if not (same and dense and _f32(columns) and reads_codes(reader, planner)):
        return ()
    address, stride, _ = place_columns(weights, columns, planner)
    return address, stride, ROUNDED_AS[column_form(weights, columns)]


@fuses(Op.ROPE)
def fuse_rope(t: Tensor, planner: CudaPlanner) -> bool:
    """Fuse ROPE of keys, and SET_ROWS that puts them into the cache."""
    chain = planner.chain(Op.SET_ROWS)
    if not chain:
        return False
    (kept,) = chain
    rows, ids = source(kept, 0), source(kept, 1)
    dense = rows.contiguous and t.contiguous
    same = rows.address == t.address and rows.nelements == t.nelements and _f32(rows, t)
    # Of blocks a thread would have to write 32 elements at once.
    if not dense or not same or rows.ne[0] % t.ne[0] or kept.type not in FLOATS:
        return False
    read = [s for s in (*t.src, ids) if s is not None]
    if not _independent([kept], [t, *read]) or not _independent([t], [ids]):
        return False
    planner.absorb([kept])
    return turn(t, planner, (rows, ids, kept))


# How many nodes a product may be moved over to its fellows, and how many may go together.
_WINDOW, _MOST_JOINED = 6, 3


def _may_be_done_before(t: Tensor, other: Tensor) -> bool:
    """Return whether ``t``, which comes later, may as well be done before ``other``, or at once."""
    spec = OPS.get(other.op)
    if spec is None:
        return False
    touched = [other, *(s for s in other.src if s is not None)]
    read = [s for s in t.src if s is not None]
    return all(_apart(t, x) for x in touched) and all(
        _apart(x, written) for x, written in product(read, spec.written(other))
    )


@fuses(Op.MUL_MAT)
def fuse_products(t: Tensor, planner: CudaPlanner) -> bool:
    """Fuse products of a token by several matrices of one type.

    These are queries, keys and values; or gate and up, and GLU.
    """
    if not is_one_column(t):
        return False
    joined, passed = [t], list[Tensor]()
    for node in islice(planner.ahead(), _WINDOW):
        if _is_glu_of(node, joined) and not passed and is_valid(node):
            multiply_one_column(joined, planner, glu=node)
            planner.absorb([*joined, node])
            return True
        if (
            _goes_with(node, t)
            and is_valid(node)
            and is_one_column(node)
            and all(_may_be_done_before(node, other) for other in (*passed, *joined))
        ):
            joined.append(node)
            if len(joined) == _MOST_JOINED:
                break
        else:
            passed.append(node)
    if len(joined) == 1:
        return False
    multiply_one_column(joined, planner)
    planner.absorb(joined)
    return True


def _goes_with(t: Tensor, first: Tensor) -> bool:
    """A product of the same column with weights of the same type."""
    return (
        t.op is Op.MUL_MAT
        and t.src[1] is first.src[1]
        and source(t, 0).type is source(first, 0).type
    )


def _is_glu_of(t: Tensor, products: Sequence[Tensor]) -> bool:
    if t.op is not Op.GLU or len(products) != 2 or set(t.src[:2]) != set(products):
        return False
    # Products read columns in scratch: their source, where GLU's result may lie, is done with.
    weights = [source(x, 0) for x in products]
    return (
        t.same_shape(products[0])
        and _f32(t)
        and all(_apart(t, w) for w in weights)
        and _independent([t], products)
    )
