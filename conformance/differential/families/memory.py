"""Ops that copy, join, repeat, pad and roll; and views, which compute nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from conformance.differential import type_sets
from conformance.differential.compare import EXACT
from conformance.differential.sketch import Sketch, family
from conformance.differential.type_sets import BF16, F16, F32, FLOATS, I32
from conformance.differential.values import ValueKind
from protocol.ggml.ops import Op
from protocol.ggml.types import TYPE_INFO, GgmlType
from protocol.tensor import Dims, Tensor

_PLAIN = tuple(t for t in type_sets.ALL if t not in type_sets.QUANTIZED)
# What CONCAT takes element by element, from any strides; and REPEAT, by rows.
_ELEMENTS = (F32, I32, F16, BF16, GgmlType.I16, GgmlType.I8)
_REPEATED = (F32, I32, F16, BF16, GgmlType.I16)

Pair = tuple[GgmlType, GgmlType]


def _block(*types: GgmlType) -> int:
    return max(TYPE_INFO[t].block_size for t in types)


def _leaf(s: Sketch, type: GgmlType, ne: Sequence[int], layout: str) -> Tensor:
    """Values that tell each element from its neighbours, and are not NaN to integers."""
    if type in FLOATS or TYPE_INFO[type].quantized:
        return s.leaf(type, ne, [ValueKind.NORMAL, ValueKind.SPECIAL], layout=layout)
    return s.leaf(type, ne, ValueKind.INTEGERS, -(1 << 20), 1 << 20, layout=layout)


def _compare(s: Sketch, t: Tensor) -> None:
    """Quantized results by their values where these decode."""
    if t.type in type_sets.DECODABLE:
        s.output(s.g.cast(t, F32))
    else:
        s.output(t, EXACT if t.type in type_sets.QUANTIZED else None)


def _other_shape(s: Sketch, ne: Dims, block: int) -> Dims:
    """As many elements in other dimensions; rows stay whole blocks."""
    sizes = [n for n in ne if n != 1]
    row = ne[0] // block
    left, out = ne[1] * ne[2] * ne[3], [ne[0]]
    if not left or not sizes:
        return ne
    if s.flag() and row:
        # Some of the row goes to dimension 1.
        part = s.pick([d for d in range(1, row + 1) if row % d == 0])
        out = [ne[0] // part]
        left *= part
    for _ in range(2):
        n = s.pick([d for d in range(1, min(left, 64) + 1) if left % d == 0])
        out.append(n)
        left //= n
    return out[0], out[1], out[2], left


# -- CPY -------------------------------------------------------------------------------------------

_SAME: tuple[Pair, ...] = tuple((t, t) for t in type_sets.ALL)
_PLAIN_PAIRS: tuple[Pair, ...] = (
    *((a, b) for a in FLOATS for b in FLOATS if a is not b),
    (F32, I32),
    (I32, F32),
)
_TO_BLOCKS: tuple[Pair, ...] = tuple((a, b) for b in type_sets.ENCODABLE for a in FLOATS)
_FROM_BLOCKS: tuple[Pair, ...] = tuple((t, F32) for t in type_sets.DECODABLE)


def _target(s: Sketch, type: GgmlType, ne: Sequence[int], layout: str) -> Tensor:
    """Memory to copy into: its old values are seen where a copy leaves something out."""
    return s.leaf(type, ne, ValueKind.CONSTANT, 7.0, layout=layout)


@family(Op.CPY, variants=_SAME + _PLAIN_PAIRS + _TO_BLOCKS + _FROM_BLOCKS, examples=10)
def _cpy(s: Sketch, types: Pair) -> None:
    source, result = types
    if TYPE_INFO[result].quantized and source is not result:
        return _encode(s, source, result)
    block = _block(*types)
    ne = s.shape(s.pick((1024, 4096, 12000)), block=block)
    if source is result and TYPE_INFO[source].quantized:
        # Into contiguous memory of another shape, upstream counts elements as if they were bytes.
        a, to = _leaf(s, source, ne, "any"), ne
        if a.contiguous and s.flag():
            to = _other_shape(s, ne, block)
    elif TYPE_INFO[source].quantized:
        a = _leaf(s, source, ne, "rows")
        to = _other_shape(s, ne, block) if s.flag() else ne
        if s.flag():
            return s.output(s.g.cast(a, result))
        return s.output(s.g.cpy(a, _target(s, result, to, "rows")))
    else:
        if (source, result) == (F32, I32):
            # What is out of range is undefined in C.
            a = s.leaf(F32, ne, ValueKind.UNIFORM, -1e6, 1e6, layout="any")
        else:
            a = _leaf(s, source, ne, "any")
        to = _other_shape(s, ne, 1) if s.flag() else ne
    if source is not result and s.flag():
        return s.output(s.g.cast(a, result))
    return _compare(s, s.g.cpy(a, _target(s, result, to, "any")))


def _encode(s: Sketch, source: GgmlType, result: GgmlType) -> None:
    """Only from dense rows into contiguous memory; there is no conversion of a stride.

    Rows of the result are not shorter than the source's: upstream's work space is made for them.
    """
    ne = s.shape(s.pick((512, 4096)), block=_block(result))
    kinds = [ValueKind.NORMAL, ValueKind.UNIFORM, ValueKind.INTEGERS, ValueKind.DISTINCT]
    if result is not GgmlType.Q8_K:
        # Of blocks of zeros in Q8_K upstream leaves the sums as they were.
        kinds.append(ValueKind.CONSTANT)
    low, high = s.pick(((0.0, 1.0), (-3.0, 100.0), (-8.0, 8.0)))
    a = s.leaf(source, ne, kinds, low, high, layout="rows")
    if s.flag():
        return _compare(s, s.g.cast(a, result))
    to = ne
    if a.nelements and s.flag():
        to = (ne[0] * ne[1], 1, ne[2], ne[3])
    return _compare(s, s.g.cpy(a, _target(s, result, to, "contiguous")))


# -- DUP, CONT -------------------------------------------------------------------------------------


@family(Op.DUP, variants=type_sets.ALL, examples=10)
def _dup(s: Sketch, type: GgmlType) -> None:
    a = _leaf(s, type, s.shape(4096, block=_block(type)), "any")
    _compare(s, s.g.dup(a, inplace=s.flag()))


@family(Op.CONT, variants=type_sets.ALL, examples=10)
def _cont(s: Sketch, type: GgmlType) -> None:
    block = _block(type)
    ne = s.shape(s.pick((1024, 12000)), block=block)
    a = _leaf(s, type, ne, "any")
    # As in CPY, quantized blocks change their shape only where they lie one behind another.
    if s.flag() and (block == 1 or a.contiguous):
        _compare(s, s.g.cont(a, *_other_shape(s, ne, block)))
    else:
        _compare(s, s.g.cont(a))


# -- CONCAT, REPEAT, REPEAT_BACK -------------------------------------------------------------------


@family(Op.CONCAT, variants=type_sets.ALL, examples=12)
def _concat(s: Sketch, type: GgmlType) -> None:
    block, layout = _block(type), "any" if type in _ELEMENTS else "rows"
    ne = list(s.shape(2048, block=block))
    dim = s.integer(0, 3)
    other = list(ne)
    other[dim] = s.size(max(8, 2 * block), multiple=block if dim == 0 else 1)
    if s.seldom():
        other[dim] = 0
    a, b = (_leaf(s, type, n, layout) for n in (ne, other))
    if s.flag():
        a, b = b, a
    _compare(s, s.g.concat(a, b, dim))


def _copies(s: Sketch, ne: Dims) -> list[int]:
    """Some whole copies of ``ne`` in each dimension, not too many in all."""
    left, out = 4, []
    for n in ne:
        times = s.integer(1, left)
        left = max(left // times, 1)
        out.append(n * times)
    return out


@family(Op.REPEAT, variants=_REPEATED, examples=50)
def _repeat(s: Sketch, type: GgmlType) -> None:
    ne = s.shape(4096)
    s.output(s.g.repeat(_leaf(s, type, ne, "rows"), *_copies(s, ne)))


@family(Op.REPEAT_BACK, examples=200)
def _repeat_back(s: Sketch, _: str) -> None:
    ne = s.shape(4096, empty=False)
    a = _leaf(s, F32, _copies(s, ne), "rows")
    s.output(s.g.repeat_back(a, s.g.new_tensor(F32, ne)))


# -- PAD, ROLL -------------------------------------------------------------------------------------


@family(Op.PAD, variants=["zeros", "circular"], examples=140)
def _pad(s: Sketch, form: str) -> None:
    circular = form == "circular"
    ne = s.shape(2048, empty=not circular)
    before = [s.integer(0, 4) for _ in ne]
    after = [s.integer(0, 4) for _ in ne]
    if circular:
        # Upstream's wraps around once.
        before = [min(p, n) for p, n in zip(before, ne, strict=True)]
        after = [min(p, n) for p, n in zip(after, ne, strict=True)]
    if s.flag():
        before = [0, 0, 0, 0]
    a = _leaf(s, F32, ne, "any")
    s.output(
        s.g.pad_ext(
            a,
            (before[0], before[1], before[2], before[3]),
            (after[0], after[1], after[2], after[3]),
            circular=circular,
        )
    )


@family(Op.ROLL, examples=280)
def _roll(s: Sketch, _: str) -> None:
    ne = s.shape(4096, empty=False)
    shifts = [s.integer(1 - n, n - 1) if s.flag() else 0 for n in ne]
    s.output(s.g.roll(_leaf(s, F32, ne, "rows"), *shifts))


# -- views: chains of them, with a node that reads through the last --------------------------------


def _reshape(s: Sketch, a: Tensor) -> Tensor:
    if not a.contiguous:
        a = s.g.cont(a)
    return s.g.reshape(a, *_other_shape(s, a.ne, TYPE_INFO[a.type].block_size))


def _view(s: Sketch, a: Tensor) -> Tensor:
    """A box within ``a``."""
    info = TYPE_INFO[a.type]
    if a.nb[0] != info.type_size:
        # Views are of dense rows.
        a = s.g.cont(a)
    blocks = a.ne[0] // info.block_size
    most = [blocks, *a.ne[1:]]
    ne = [s.integer(1, n) for n in most]
    # ggml wants the dense size of the box to end within what it views.
    start = [s.integer(0, n - m) for n, m in zip(most, ne, strict=True)]
    root = a if a.view_src is None else a.view_src
    dense = ne[0] * info.type_size * ne[1] * ne[2] * ne[3]
    offset = sum(i * nb for i, nb in zip(start, a.nb, strict=True))
    if offset + a.view_offs + dense > root.nbytes:
        offset = 0
    if offset + a.view_offs + dense > root.nbytes:
        return a
    ne[0] *= info.block_size
    return s.g.view_4d(a, ne[0], ne[1], ne[2], ne[3], a.nb[1], a.nb[2], a.nb[3], offset)


def _permute(s: Sketch, a: Tensor) -> Tensor:
    if a.quantized:
        return s.g.permute(a, 0, *s.pick(((1, 2, 3), (2, 1, 3), (3, 1, 2), (1, 3, 2))))
    order = s.pick(((1, 0, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (3, 2, 1, 0), (1, 2, 0, 3)))
    return s.g.permute(a, *order)


def _transpose(s: Sketch, a: Tensor) -> Tensor:
    return s.g.transpose(a) if not a.quantized else _permute(s, a)


_VIEWS: dict[Op, Callable[[Sketch, Tensor], Tensor]] = {
    Op.RESHAPE: _reshape,
    Op.VIEW: _view,
    Op.PERMUTE: _permute,
    Op.TRANSPOSE: _transpose,
}
_VIEWED = (*_PLAIN, GgmlType.Q4_0, GgmlType.Q6_K)


def _chain(op: Op) -> Callable[[Sketch, GgmlType], None]:
    def draws(s: Sketch, type: GgmlType) -> None:
        ne = s.shape(4096, block=_block(type), empty=False)
        a = _leaf(s, type, ne, "contiguous")
        if type in FLOATS and s.flag():
            a = s.g.sqr(a)
        a = _VIEWS[op](s, a)
        for _ in range(s.integer(0, 3)):
            a = _VIEWS[s.pick(tuple(_VIEWS))](s, a)
        # Of rows of one element, too, ggml wants the stride within.
        if type in FLOATS and a.nb[0] == TYPE_INFO[type].type_size and s.flag():
            s.output(s.g.sqr(a))
        else:
            _compare(s, s.g.cont(a))

    return draws


for _op in _VIEWS:
    family(_op, variants=_VIEWED, examples=25)(_chain(_op))
