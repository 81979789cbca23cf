"""Random graphs of many nodes, each made of one number: chained, shared, in place, through views.

A graph is a list of words; each says what the next node (sometimes a few) does with what is there
by then. Operands are counted back from the latest, so a search may leave words out and what remains
is still a graph::

    bits 0-5 op | 6-13 first operand | 14-21 second operand | 22-39 parameters

Values stay finite: of every tensor the largest possible magnitude is kept along, and what would
outgrow it is normalized instead. Nodes run in the order of their words, so what writes into memory
that others read (in place, CPY, SET_ROWS) has one meaning. Only what every server computes to the
same bits is written over, since it can't be read back: of anything else a copy is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from client.builder.graph import GraphBuilder
from client.tensors import dims
from conformance.differential.case import GraphCase
from conformance.differential.compare import Check
from conformance.differential.values import Fill, ValueKind
from protocol.ggml.ops import VIEWS, Op, TensorFlag
from protocol.ggml.types import TYPE_INFO, GgmlType
from protocol.tensor import Dims, Tensor, contiguous_strides

F32, F16, I32, I64 = GgmlType.F32, GgmlType.F16, GgmlType.I32, GgmlType.I64

_SIZES = (4, 1, 2, 3, 5, 8, 16, 31, 32, 33, 64)
_MOST_ELEMENTS = 4096
# Larger values are normalized before they go on; F16 holds up to 65504.
_LARGEST = 1e4
_NORMAL = 6.0
MAX_NODES = 200

# Ops of which results are the same bits everywhere.
_ROUNDED_ONCE = frozenset({
    Op.ADD, Op.SUB, Op.MUL, Op.DIV, Op.SCALE, Op.SQR, Op.SQRT, Op.CLAMP, Op.LEAKY_RELU, Op.REPEAT,
    Op.CONCAT, Op.CPY, Op.CONT, Op.DUP, Op.GET_ROWS, Op.SET_ROWS, Op.PAD, Op.ROLL,
    Op.DIAG_MASK_ZERO, *VIEWS,
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Word:
    """The fields of one word."""

    op: int
    first: int
    second: int
    extra: int

    @classmethod
    def of(cls, word: int) -> Word:
        return cls(word & 63, word >> 6 & 0xFF, word >> 14 & 0xFF, word >> 22)


class GraphProgram:
    """One graph while it is made."""

    def __init__(self) -> None:
        self.g = GraphBuilder()
        self.fills: dict[Tensor, Fill] = {}
        self.nodes: list[Tensor] = []
        # F32 tensors that may be operands, latest last.
        self.pool: list[Tensor] = []
        self._peaks: dict[Tensor, float] = {}
        self._inexact: set[Tensor] = set()

    # -- tensors

    def leaf(
        self,
        ne: Sequence[int],
        seed: int,
        kind: ValueKind = ValueKind.NORMAL,
        low: float = 0.0,
        high: float = 1.0,
        type: GgmlType = F32,
    ) -> Tensor:
        t = self.g.new_tensor(type, ne)
        self.fills[t] = Fill(kind, seed, low, high)
        peak = (
            _NORMAL * abs(high) + abs(low) if kind is ValueKind.NORMAL else max(abs(low), abs(high))
        )
        self._peaks[t] = peak
        return t

    def peak(self, t: Tensor) -> float:
        """Return the largest magnitude that may be in the memory of ``t``."""
        return self._peaks[t if t.view_src is None else t.view_src]

    def add(self, t: Tensor, peak: float = 0.0) -> Tensor:
        """Take in a node; ``peak`` bounds its values (of views it is what they view)."""
        self.nodes.append(t)
        # Without this flag a server may leave out what one other node reads only.
        t.flags |= TensorFlag.OUTPUT
        root = t if t.view_src is None else t.view_src
        self._peaks[root] = max(self._peaks.get(root, 0.0), peak)
        if t.op not in _ROUNDED_ONCE:
            self._inexact.add(root)
        if t.type is F32:
            self.pool.append(t)
        return t

    def operand(self, back: int) -> Tensor:
        return self.pool[-1 - back % len(self.pool)]

    def dense(self, t: Tensor) -> Tensor:
        """Return ``t``, or a contiguous copy of it.

        Strides of dimensions of one element count as well.
        """
        dense = t.nb == contiguous_strides(t.type, t.ne)
        return t if dense else self.add(self.g.cont(t), self.peak(t))

    def rows(self, t: Tensor) -> Tensor:
        """Return ``t`` if rows are dense, or a copy."""
        return t if _stepwise(t) else self.dense(t)

    def add_fused(self, inner: Tensor, t: Tensor, peak: float) -> None:
        """Take in ``t`` and the node before it that nobody else reads."""
        self.nodes.append(inner)
        self.add(t, peak)
        self._inexact.add(t)

    def owned(self, t: Tensor) -> Tensor:
        """Return ``t``, or a copy of it, whose memory may be written over."""
        root = t if t.view_src is None else t.view_src
        return self.add(self.g.dup(t), self.peak(t)) if root in self._inexact else t

    def small(self, t: Tensor) -> Tensor:
        """Return ``t``, or its rows normalized if they may hold large values."""
        if self.peak(t) <= _LARGEST:
            return t
        a = self.rows(t)
        return self.add(self.g.rms_norm(a, 1e-6), math.sqrt(a.ne[0]) + 1)

    def repeatable(self, a: Tensor, w: Word) -> Tensor:
        """Return a tensor that ggml repeats to ``a``: of those that there are, or a new one."""
        fitting = [
            t
            for t in self.pool
            if all(n % m == 0 for n, m in zip(a.ne, t.ne, strict=True)) and self.peak(t) <= _LARGEST
        ]
        if fitting and w.extra & 3:
            return fitting[-1 - w.second % len(fitting)]
        ne = [1 if w.extra >> (4 + i) & 1 else n for i, n in enumerate(a.ne)]
        return self.leaf(ne, w.second)


Makes = Callable[[GraphProgram, Tensor, Word], None]
_OPS: list[Makes] = []


def _op(makes: Makes) -> Makes:
    _OPS.append(makes)
    return makes


def _binary(name: str, bound: Callable[[float, float], float]) -> None:
    @_op
    def makes(p: GraphProgram, a: Tensor, w: Word) -> None:
        a = p.rows(p.small(a))
        b = p.repeatable(a, w)
        p.add(getattr(p.g, name)(a, b), bound(p.peak(a), p.peak(b)))


_binary("add", operator.add)
_binary("mul", operator.mul)
_binary("sub", operator.add)


@_op
def _div(p: GraphProgram, a: Tensor, w: Word) -> None:
    a = p.rows(p.small(a))
    b = p.leaf(a.ne, w.second, ValueKind.UNIFORM, 0.5, 2.0)
    p.add(p.g.div(a, b), 2 * p.peak(a))


@_op
def _inplace(p: GraphProgram, a: Tensor, w: Word) -> None:
    """In the memory of its operand, which others may still read."""
    a = p.owned(p.rows(p.small(a)))
    kind = w.extra >> 8 & 7
    peak = p.peak(a)
    if kind == 0:
        b = p.repeatable(a, w)
        overlapping = b.view_src is not None and b.view_src is (a.view_src or a)
        if overlapping or b is a.view_src:
            # What it reads must not be what it writes.
            b = p.leaf(a.ne, w.second)
        p.add(p.g.add_inplace(a, b), peak + p.peak(b))
    elif kind == 1:
        p.add(p.g.relu_inplace(a), peak)
    elif kind == 2:
        p.add(p.g.neg_inplace(a), peak)
    elif kind == 3:
        p.add(p.g.sqr_inplace(a), peak * peak)
    elif kind == 4:
        a = p.owned(p.dense(a))
        p.add(p.g.clamp(a, -1.0, 2.0, inplace=True), max(p.peak(a), 2.0))
    else:
        a = p.owned(p.dense(a))
        p.add(p.g.scale(a, 0.5, inplace=True), p.peak(a))


@_op
def _scale(p: GraphProgram, a: Tensor, w: Word) -> None:
    factor = (0.5, -1.0, 2.0, 0.0, 1.5)[w.second % 5]
    p.add(p.g.scale(p.dense(a), factor), 2 * p.peak(a))


def _of_small(name: str, bound: Callable[[Tensor, float], float], *, dense: bool = False) -> None:
    @_op
    def makes(p: GraphProgram, a: Tensor, w: Word) -> None:
        a = (p.dense if dense else p.rows)(p.small(a))
        p.add(getattr(p.g, name)(a), bound(a, p.peak(a)))


_of_small("sqr", lambda a, peak: peak**2)


@_op
def _sqrt(p: GraphProgram, a: Tensor, w: Word) -> None:
    magnitude = p.add(p.g.abs(p.rows(a)), p.peak(a))
    p.add(p.g.sqrt(magnitude), p.peak(a) + 1)


def _unary(name: str, bound: Callable[[float], float]) -> None:
    @_op
    def makes(p: GraphProgram, a: Tensor, w: Word) -> None:
        p.add(getattr(p.g, name)(p.rows(a)), bound(p.peak(a)))


for _name in ("neg", "abs", "relu", "silu"):
    _unary(_name, lambda peak: peak)
for _name in ("sgn", "step", "tanh", "sigmoid"):
    _unary(_name, lambda peak: 1.0)


@_op
def _exp(p: GraphProgram, a: Tensor, w: Word) -> None:
    bounded = p.add(p.g.clamp(p.dense(a), -20.0, 6.0), 20.0)
    p.add(p.g.exp(bounded), math.exp(6.0))


@_op
def _clamp(p: GraphProgram, a: Tensor, w: Word) -> None:
    p.add(p.g.clamp(p.dense(a), -float(w.second % 4), 2.5), 3.0)


@_op
def _leaky_relu(p: GraphProgram, a: Tensor, w: Word) -> None:
    p.add(p.g.leaky_relu(p.dense(a), 0.25), p.peak(a))


_of_small("sum_rows", lambda a, peak: a.ne[0] * peak)
_unary("mean", lambda peak: peak)
_of_small("sum", lambda a, peak: a.nelements * peak)
_of_small("cumsum", lambda a, peak: a.ne[0] * peak, dense=True)


@_op
def _repeat(p: GraphProgram, a: Tensor, w: Word) -> None:
    a = p.rows(a)
    times = [1 + (w.extra >> (2 * i) & 1) for i in range(4)]
    ne = [n * t for n, t in zip(a.ne, times, strict=True)]
    if math.prod(ne) <= _MOST_ELEMENTS:
        p.add(p.g.repeat(a, *ne), p.peak(a))
    else:
        _scale(p, a, w)


@_op
def _concat(p: GraphProgram, a: Tensor, w: Word) -> None:
    dim = w.extra & 3
    fitting = [
        t
        for t in p.pool
        if all(i == dim or t.ne[i] == a.ne[i] for i in range(4))
        and t.nelements + a.nelements <= _MOST_ELEMENTS
    ]
    if fitting:
        b = fitting[-1 - w.second % len(fitting)]
        p.add(p.g.concat(a, b, dim), max(p.peak(a), p.peak(b)))
    else:
        _scale(p, a, w)


@_op
def _norm(p: GraphProgram, a: Tensor, w: Word) -> None:
    a = p.rows(p.small(a))
    p.add(p.g.norm(a, 1e-3), math.sqrt(a.ne[0]) + 1)


@_op
def _rms_norm(p: GraphProgram, a: Tensor, w: Word) -> None:
    a = p.rows(a)
    p.add(p.g.rms_norm(a, 1e-6), math.sqrt(a.ne[0]) + 1)


@_op
def _norm_and_scale(p: GraphProgram, a: Tensor, w: Word) -> None:
    """As models have it: upstream's server makes one of the two nodes."""
    a = p.rows(a)
    inner = p.g.rms_norm(a, 1e-6)
    factors = p.leaf((a.ne[0],), w.second)
    p.add_fused(inner, p.g.mul(inner, factors), _NORMAL * (math.sqrt(a.ne[0]) + 1))


@_op
def _l2_norm(p: GraphProgram, a: Tensor, w: Word) -> None:
    p.add(p.g.l2_norm(p.dense(a), 1e-6), 1.01)


@_op
def _soft_max(p: GraphProgram, a: Tensor, w: Word) -> None:
    a = p.dense(a)
    mask = None
    if w.extra & 1:
        mask = p.leaf((a.ne[0], a.ne[1]), w.second, ValueKind.MASK)
    p.add(p.g.soft_max_ext(a, mask, 0.5, 0.0), 1.01)


@_op
def _mul_mat(p: GraphProgram, a: Tensor, w: Word) -> None:
    """A weight of F32 or F16 times an earlier result."""
    a = p.dense(p.small(a))
    rows = _SIZES[w.second % len(_SIZES)]
    if rows * a.ne[1] * a.ne[2] * a.ne[3] > _MOST_ELEMENTS:
        rows = 1
    type = (F32, F16)[w.extra & 1]
    weight = p.leaf((a.ne[0], rows), w.second, type=type, high=0.25)
    p.add(p.g.mul_mat(weight, a), a.ne[0] * p.peak(a) * p.peak(weight))


@_op
def _mul_mat_both(p: GraphProgram, a: Tensor, w: Word) -> None:
    """Two earlier results, as attention does with keys and queries."""
    a = p.dense(p.small(a))
    fitting = [
        t
        for t in p.pool
        if t.ne[0] == a.ne[0]
        and all(a.ne[i] % t.ne[i] == 0 for i in (2, 3))
        and t.ne[1] * a.ne[1] * a.ne[2] * a.ne[3] <= _MOST_ELEMENTS
        and _stepwise(t)
        and p.peak(t) <= _LARGEST
        and t.nb[1] >= t.nb[0]
    ]
    if not fitting:
        _mul_mat(p, a, w)
        return
    b = fitting[-1 - w.second % len(fitting)]
    p.add(p.g.mul_mat(b, a), a.ne[0] * p.peak(a) * p.peak(b))


@_op
def _get_rows(p: GraphProgram, a: Tensor, w: Word) -> None:
    a = p.rows(a)
    count = min(_SIZES[w.second % len(_SIZES)], max(_MOST_ELEMENTS // a.nelements, 1))
    ne = (count, a.ne[2], a.ne[3])
    ids = p.leaf(ne, w.second, ValueKind.INTEGERS, 0, a.ne[1] - 1, type=I32)
    p.add(p.g.get_rows(a, ids), p.peak(a))


@_op
def _get_rows_sorted(p: GraphProgram, a: Tensor, w: Word) -> None:
    """Rows in the order of an ARGSORT: indices that are computed."""
    a = p.rows(a)
    keys = p.leaf((a.ne[1], a.ne[2], a.ne[3]), w.second, ValueKind.DISTINCT)
    order = p.add(p.g.argsort(keys, bool(w.extra & 1)))
    p.add(p.g.get_rows(a, order), p.peak(a))


@_op
def _set_rows(p: GraphProgram, a: Tensor, w: Word) -> None:
    """Some rows written into memory that others read."""
    a = p.owned(p.rows(a))
    count = 1 + w.second % a.ne[1]
    values = p.leaf((a.ne[0], count, a.ne[2], a.ne[3]), w.second)
    wide = p.leaf(
        (a.ne[1],), w.second, ValueKind.DISTINCT, a.ne[1] // 2, 1.0, (I64, I32)[w.extra & 1]
    )
    ids = p.g.view_1d(wide, count)
    p.nodes.append(ids)
    p.add(p.g.set_rows(a, values, ids), _NORMAL)


@_op
def _copy_into(p: GraphProgram, a: Tensor, w: Word) -> None:
    """Into part of what is there, as a KV cache is filled."""
    fitting = [
        t for t in p.pool if t.nelements >= a.nelements and t.contiguous and not _shares(t, a)
    ]
    if not fitting:
        p.add(p.g.dup(a), p.peak(a))
        return
    cache = p.owned(fitting[-1 - w.second % len(fitting)])
    start = (w.extra * 4) % (4 * (cache.nelements - a.nelements) + 4)
    place = p.g.view_1d(cache, a.nelements, start & ~3)
    p.nodes.append(place)
    p.add(p.g.cpy(a, place), p.peak(a))


@_op
def _cont(p: GraphProgram, a: Tensor, w: Word) -> None:
    p.add(p.g.cont(p.g.transpose(a) if w.extra & 1 else a), p.peak(a))


@_op
def _dup(p: GraphProgram, a: Tensor, w: Word) -> None:
    p.add(p.g.dup(a), p.peak(a))


@_op
def _through_f16(p: GraphProgram, a: Tensor, w: Word) -> None:
    a = p.small(a)
    half = p.add(p.g.cast(a, F16), p.peak(a))
    if w.extra & 1:
        ids = p.leaf((half.ne[1], half.ne[2], half.ne[3]), w.second, ValueKind.INTEGERS, 0,
                     half.ne[1] - 1, type=I32)  # fmt: skip
        p.add(p.g.get_rows(half, ids), p.peak(a))
    else:
        p.add(p.g.cast(half, F32), p.peak(a))


@_op
def _view(p: GraphProgram, a: Tensor, w: Word) -> None:
    """Some rows and columns of it."""
    a = p.rows(a)
    columns = 1 + w.second % a.ne[0]
    rows = 1 + (w.extra & 0xF) % a.ne[1]
    first = (w.extra >> 4 & 0xF) % (a.ne[1] - rows + 1)
    skip = (w.extra >> 8 & 0xF) % (a.ne[0] - columns + 1)
    offset = first * a.nb[1] + skip * a.nb[0]
    p.add(p.g.view_4d(a, columns, rows, a.ne[2], a.ne[3], *a.nb[1:], offset))


@_op
def _reshape(p: GraphProgram, a: Tensor, w: Word) -> None:
    a = p.dense(a)
    ne0 = _divisor(a.nelements, w.second)
    ne1 = _divisor(a.nelements // ne0, w.extra)
    p.add(p.g.reshape(a, ne0, ne1, a.nelements // ne0 // ne1))


@_op
def _permute(p: GraphProgram, a: Tensor, w: Word) -> None:
    axes = [0, 1, 2, 3]
    i, k = w.second & 3, w.second >> 2 & 3
    axes[i], axes[k] = axes[k], axes[i]
    i, k = w.second >> 4 & 3, w.second >> 6 & 3
    axes[i], axes[k] = axes[k], axes[i]
    p.add(p.g.permute(a, *axes))


@_op
def _transpose(p: GraphProgram, a: Tensor, w: Word) -> None:
    p.add(p.g.transpose(a))


@_op
def _swiglu(p: GraphProgram, a: Tensor, w: Word) -> None:
    a = p.dense(p.small(a))
    if a.ne[0] % 2:
        b = p.leaf(a.ne, w.second)
        p.add(p.g.reglu_split(a, b), p.peak(a) * p.peak(b))
    else:
        p.add((p.g.swiglu if w.extra & 1 else p.g.reglu_swapped)(a), p.peak(a) ** 2)


@_op
def _pad(p: GraphProgram, a: Tensor, w: Word) -> None:
    a = p.dense(a)
    more = [w.extra >> (2 * i) & 1 for i in range(4)]
    if math.prod(n + m for n, m in zip(a.ne, more, strict=True)) <= _MOST_ELEMENTS:
        p.add(p.g.pad(a, *more), p.peak(a))
    else:
        _scale(p, a, w)


@_op
def _roll(p: GraphProgram, a: Tensor, w: Word) -> None:
    a = p.dense(a)
    p.add(p.g.roll(a, *((w.extra >> (2 * i) & 3) % n for i, n in enumerate(a.ne))), p.peak(a))


@_op
def _diag_mask_zero(p: GraphProgram, a: Tensor, w: Word) -> None:
    a = p.dense(a)
    p.add(p.g.diag_mask_zero(a, w.second % (a.ne[0] + 1)), p.peak(a))


def _stepwise(t: Tensor) -> bool:
    """Return whether elements of a row are side by side, even where there is but one."""
    return t.nb[0] == TYPE_INFO[t.type].type_size


def _shares(a: Tensor, b: Tensor) -> bool:
    """Return whether both lie in the same memory."""
    return (a if a.view_src is None else a.view_src) is (b if b.view_src is None else b.view_src)


def _divisor(n: int, choice: int) -> int:
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return divisors[choice % len(divisors)]


def build(words: Sequence[int], most: int = MAX_NODES) -> GraphCase:
    """Return the graph of ``words``, no more than about ``most`` nodes; every node is an output."""
    p = GraphProgram()
    for seed, ne in enumerate(((16, 8), (4, 3, 2), (32,))):
        p.pool.append(p.leaf(ne, seed))
    for number in words:
        if len(p.nodes) >= most:
            break
        if not number:
            # A search takes a node out by making it 0.
            continue
        w = Word.of(number)
        if w.op == 63:
            p.pool.append(p.leaf(_shape(w), w.first))
            continue
        _OPS[w.op % len(_OPS)](p, p.operand(w.first), w)
    outputs = [(t, Check()) for t in p.nodes] or [(p.g.scale(p.pool[0], 1.0), Check())]
    return GraphCase.of(outputs, p.fills)


def _shape(w: Word) -> Dims:
    ne = [_SIZES[w.second % len(_SIZES)]]
    for i in range(3):
        ne.append(_SIZES[(w.extra >> (5 * i) & 31) % len(_SIZES)] if w.extra >> (15 + i) & 1 else 1)
        if math.prod(ne) > _MOST_ELEMENTS // 4:
            ne[-1] = 1
    return dims(ne)


def programs(most: int = MAX_NODES) -> st.SearchStrategy[tuple[int, ...]]:
    """Return words of graphs of up to ``most`` nodes; half of them have more than 40."""
    lengths = [n for n in (10, 1, 20, 40, 70, 100, 150, 190) if n < most]
    return st.sampled_from(lengths).flatmap(
        lambda least: st.lists(
            st.integers(0, (1 << 40) - 1), min_size=least, max_size=least + 10
        ).map(tuple)
    )
