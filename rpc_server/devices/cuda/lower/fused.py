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
    columns_for_next,
    columns_in_scratch,
    is_of_few,
    is_one_column,
    may_be_rounded,
    multiply_both_experts,
    multiply_one_column,
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
    return normalize(norm, planner, slots, columns_for_next(steps[-1], planner))


# How many nodes behind it a ROPE may be moved over, to be done with another.
_TURN_WINDOW = 8


@fuses(Op.ROPE)
def fuse_rope(t: Tensor, planner: CudaPlanner) -> bool:
    """Fuse ROPE of queries, ROPE of keys, and both SET_ROWS that fill the cache.

    Products lie between the first and the others: it waits for them. Each may be missing but the
    second.
    """
    first = planner.waiting_for(t)
    if first is None:
        other = _turned_with(t, planner)
        if other is not None:
            planner.wait(t, other)
            return True
    chain = planner.chain(Op.SET_ROWS, Op.SET_ROWS)
    kept = chain[0] if chain and _keeps(chain[0], t) else None
    others = [x for x in (first, kept) if x is not None]
    alone = first is not None and not all(_at_once(first, x) for x in (t, *others[1:]))
    if first is not None and alone:
        turn(first, planner)
        planner.absorb([first])
        first, others = None, others[1:]
    values = chain[1] if kept is not None and len(chain) > 1 and _is_of_rows(chain[1]) else None
    if values is not None and all(_at_once(values, x) for x in (t, *others)):
        others.append(values)
    else:
        values = None
    if not others and not alone:
        return False
    planner.absorb(others)
    return turn(t, planner, kept, first, values)


def _turned_with(t: Tensor, planner: CudaPlanner) -> Tensor | None:
    """Return the next ROPE, if it turns by the same angles and ``t`` may be done there as well."""
    for node in islice(planner.ahead(), _TURN_WINDOW):
        if node.op is Op.ROPE:
            alike = (
                node.op_params == t.op_params
                and node.src[1] is t.src[1]
                and node.src[2] is t.src[2]
                and node.ne[0] == t.ne[0]
                and source(node, 0).ne[2] == source(t, 0).ne[2]
            )
            free = planner.waiting_for(node) is None
            return node if alike and free and is_valid(node) else None
        if not _may_be_done_before(node, t):
            return None
    return None


def _keeps(kept: Tensor, t: Tensor) -> bool:
    """Return whether a SET_ROWS behind ROPE ``t`` puts its result into rows, and nothing else."""
    rows, ids = source(kept, 0), source(kept, 1)
    dense = rows.contiguous and t.contiguous
    same = rows.address == t.address and rows.nelements == t.nelements and _f32(rows, t)
    # Of blocks a thread would have to write 32 elements at once.
    if not dense or not same or rows.ne[0] % t.ne[0] or kept.type not in FLOATS:
        return False
    read = [s for s in (*t.src, ids) if s is not None]
    return _independent([kept], [t, *read]) and _independent([t], [ids])


def _is_of_rows(t: Tensor) -> bool:
    """Return whether a SET_ROWS has rows for which a block of threads is worth it, of floats."""
    values = source(t, 0)
    return t.type in FLOATS and values.type in FLOATS and values.ne[0] >= 32


def _at_once(a: Tensor, b: Tensor) -> bool:
    """Return whether the order of two nodes, and of their elements, makes no difference."""
    return _may_be_done_before(a, b) and _may_be_done_before(b, a)


# How many nodes a product may be moved over to its fellows, and how many may go together.
_WINDOW, _MOST_JOINED = 6, 3


def _may_be_done_before(t: Tensor, other: Tensor) -> bool:
    """Return whether ``t``, which comes later, may as well be done before ``other``, or at once."""
    of_t, of_other = OPS.get(t.op), OPS.get(other.op)
    if of_t is None or of_other is None:
        return False
    touched = [other, *(s for s in other.src if s is not None)]
    read = [s for s in t.src if s is not None]
    return all(_apart(x, y) for x, y in product(of_t.written(t), touched)) and all(
        _apart(x, y) for x, y in product(read, of_other.written(other))
    )


@fuses(Op.MUL_MAT)
def fuse_products(t: Tensor, planner: CudaPlanner) -> bool:
    """Fuse products of a token by several matrices of one type.

    These are queries, keys and values; or gate and up, and GLU.
    """
    if not is_one_column(t):
        return False
    joined, passed = [t], planner.waiting()
    gated: Tensor | None = None
    for node in islice(planner.ahead(), _WINDOW):
        if len(joined) == 2 and not passed and _is_glu_of(node, joined) and is_valid(node):
            gated = node
            break
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
    columns = columns_in_scratch(source(t, 0), source(t, 1), planner)
    rounded: tuple[int, ...] = ()
    if gated is None:
        planner.absorb(joined)
    else:
        rounded = _absorb_gated(joined, gated, planner)
    multiply_one_column(joined, planner, columns, gated, rounded)
    return True


def _absorb_gated(joined: Sequence[Tensor], glu: Tensor, planner: CudaPlanner) -> tuple[int, ...]:
    """Count products and GLU as done; where its result goes as columns, if it does."""
    column = source(joined[0], 1)
    planner.absorb([*joined, glu])
    # Where they lie over the column, what is kept of it is no longer: its place may be given away.
    apart = all(_apart(x, column) for x in (*joined, glu))
    return columns_for_next(glu, planner) if apart and may_be_rounded(glu) else ()


@fuses(Op.MUL_MAT_ID)
def fuse_experts(t: Tensor, planner: CudaPlanner) -> bool:
    """Fuse gate and up of the experts of a few tokens, and GLU."""
    chain = planner.chain(Op.MUL_MAT_ID, Op.GLU)
    if len(chain) < 2:
        return False
    other, glu = chain
    weights, others = source(t, 0), source(other, 0)
    alike = (
        other.src[1:3] == t.src[1:3]
        and (others.type, others.ne) == (weights.type, weights.ne)
        and is_of_few(t)
        and is_of_few(other)
    )
    ids = source(t, 2)
    if (
        not alike
        or not _is_glu_of(glu, [t, other])
        or not _at_once(t, other)
        or not all(_apart(x, ids) for x in (t, other, glu))
    ):
        return False
    columns = columns_in_scratch(weights, source(t, 1), planner)
    multiply_both_experts(planner, columns, glu, _absorb_gated([t, other], glu, planner))
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
