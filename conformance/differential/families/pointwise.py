"""Ops that work element by element: arithmetic with broadcasting, unary functions, gated units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from conformance.differential.sketch import Sketch, family
from conformance.differential.type_sets import BF16, DECODABLE, ENCODABLE, F16, F32, FLOATS
from conformance.differential.values import ValueKind
from protocol.ggml.ops import GluOp, Op, UnaryOp
from protocol.ggml.types import TYPE_INFO, GgmlType
from protocol.tensor import Tensor

_NUMBERS = (ValueKind.NORMAL, ValueKind.SPECIAL, ValueKind.UNIFORM, ValueKind.INTEGERS)

Types = tuple[GgmlType, GgmlType]
Triple = tuple[GgmlType, GgmlType, GgmlType]


def _values(s: Sketch, type: GgmlType, ne: tuple[int, ...], layout: str) -> Tensor:
    """Numbers of all sizes and signs, among them NaN and infinities."""
    low, high = s.pick(((-1.0, 1.0), (-3.0, 5.0), (-30.0, 25.0), (0.0, 1.0)))
    return s.leaf(type, ne, _NUMBERS, low, high, layout=layout)


def _same_or(s: Sketch, op: Op, a: Tensor, sources: tuple[Tensor, ...], type: GgmlType) -> Tensor:
    """A node on ``sources``: in the memory of ``a`` now and then, if the type stays."""
    if type is a.type:
        return s.g.like(op, a, sources, inplace=s.flag())
    return s.g.op(op, type, a.ne, sources)


# -- ADD, SUB, MUL, DIV ----------------------------------------------------------------------------

_TRIPLES: tuple[Triple, ...] = (
    (F32, F32, F32),
    *((t, b, made) for t in (F16, BF16) for b, made in ((t, t), (F32, t), (F32, F32))),
)


def _shape(s: Sketch, block: int = 1) -> tuple[int, int, int, int]:
    return s.shape(s.pick((1024, 4096, 20000)), block=block)


def _binary(op: Op) -> Callable[[Sketch, Triple], None]:
    def draws(s: Sketch, types: Triple) -> None:
        ne = _shape(s)
        a = _values(s, types[0], ne, "rows")
        b = _values(s, types[1], s.broadcast_to(ne), "any")
        s.output(_same_or(s, op, a, (a, b), types[2]))

    return draws


for _op in (Op.SUB, Op.MUL, Op.DIV):
    family(_op, variants=_TRIPLES, examples=50)(_binary(_op))

# A quantized type takes F32 of its own shape. IQ1, IQ2 and IQ3 can't be written back: upstream
# would copy floats over their rows.
_QUANTIZED_ADDS: tuple[Triple, ...] = (
    *((t, F32, t) for t in DECODABLE if t in ENCODABLE),
    *((t, F32, F32) for t in DECODABLE),
    (GgmlType.Q4_0, F32, F16),
    (GgmlType.Q6_K, F32, BF16),
    (GgmlType.Q4_K, F32, GgmlType.Q8_0),
)


def _decoded(s: Sketch, t: Tensor) -> None:
    """Compare what was written: of a quantized type its values."""
    s.output(s.g.cast(t, F32) if t.quantized else t)


@family(Op.ADD, variants=_TRIPLES + _QUANTIZED_ADDS, examples=12)
def _add(s: Sketch, types: Triple) -> None:
    if not TYPE_INFO[types[0]].quantized:
        return _binary(Op.ADD)(s, types)
    # Results are whole blocks, too.
    block = max(TYPE_INFO[t].block_size for t in types)
    ne = s.shape(4096, block=block)
    a = s.leaf(types[0], ne, layout="rows")
    b = s.leaf(
        F32, ne, [ValueKind.NORMAL, ValueKind.UNIFORM, ValueKind.CONSTANT], high=0.25, layout="rows"
    )
    if types[2] is a.type and list(a.nb) == sorted(a.nb) and s.flag():
        return _decoded(s, s.g.add_inplace(a, b))
    return _decoded(s, s.g.op(Op.ADD, types[2], ne, (a, b)))


_ADD1: tuple[Types, ...] = ((F32, F32), (F16, F16), (F16, F32), (BF16, BF16), (BF16, F32))


@family(
    Op.ADD1,
    variants=_ADD1 + tuple((t, F32) for t in DECODABLE if t in ENCODABLE),
    examples=12,
)
def _add1(s: Sketch, types: Types) -> None:
    quantized = TYPE_INFO[types[0]].quantized
    # In dimension 3 upstream steps by the wrong stride of a quantized result.
    ne = s.shape(4096, block=TYPE_INFO[types[0]].block_size, rank=3 if quantized else 4)
    a = s.leaf(types[0], ne, ValueKind.NORMAL if quantized else _NUMBERS, layout="even")
    b = s.leaf(types[1], (1,), ValueKind.UNIFORM, -2.0, 2.0, layout="dense")
    _decoded(s, s.g.add1(a, b, inplace=s.flag()))


@family(Op.ADD_ID, examples=200)
def _add_id(s: Sketch, _: str) -> None:
    ne = s.shape(4096)
    rows = s.size(64)
    a = _values(s, F32, ne, "rows")
    b = _values(s, F32, (ne[0], rows), "rows")
    ids = s.indices((ne[1], ne[2]), rows, layout="any")
    s.output(s.g.add_id(a, b, ids))


# -- ACC, SET: source 1 goes into a part of the result ---------------------------------------------


def _part(s: Sketch, type: GgmlType) -> tuple[Tensor, Tensor, tuple[int, int, int, int], bool]:
    """A tensor, a smaller one, its strides and offset within the first, and whether in place."""
    ne = s.shape(4096, empty=False)
    inner = [s.integer(1, n) for n in ne]
    start = [s.integer(0, n - m) for n, m in zip(ne, inner, strict=True)]
    if type is GgmlType.I32:
        a = s.leaf(type, ne, ValueKind.INTEGERS, -1000, 1000, layout="contiguous")
        b = s.leaf(type, inner, ValueKind.INTEGERS, -1000, 1000, layout="rows")
    else:
        a = _values(s, type, ne, "contiguous")
        b = _values(s, type, tuple(inner), "rows")
    offset = sum(i * nb for i, nb in zip(start, a.nb, strict=True))
    return a, b, (a.nb[1], a.nb[2], a.nb[3], offset), s.flag()


@family(Op.ACC, examples=200)
def _acc(s: Sketch, _: str) -> None:
    a, b, where, inplace = _part(s, F32)
    s.output(s.g.acc(a, b, *where, inplace=inplace))


@family(Op.SET, variants=[F32, GgmlType.I32], examples=100)
def _set(s: Sketch, type: GgmlType) -> None:
    a, b, where, inplace = _part(s, type)
    s.output(s.g.set(a, b, *where, inplace=inplace))


# -- functions of one element ----------------------------------------------------------------------

_SAME: tuple[Types, ...] = tuple((t, t) for t in FLOATS)
_TO_F32: tuple[Types, ...] = ((F16, F32), (BF16, F32))


def _function(op: Op) -> Callable[[Sketch, Types], None]:
    def draws(s: Sketch, types: Types) -> None:
        a = _values(s, types[0], _shape(s), "rows")
        s.output(_same_or(s, op, a, (a,), types[1]))

    return draws


for _op in (Op.SQR, Op.SQRT, Op.LOG, Op.SIN, Op.COS):
    family(_op, variants=_SAME + _TO_F32, examples=70)(_function(_op))

# These have code of their own in ggml and keep the source's type.
_TABLED = frozenset({UnaryOp.GELU, UnaryOp.GELU_ERF, UnaryOp.GELU_QUICK, UnaryOp.SILU})


@family(
    Op.UNARY,
    variants=[
        (kind, *types)
        for kind in UnaryOp
        for types in (_SAME if kind in _TABLED else _SAME + _TO_F32)
    ],
    examples=12,
)
def _unary(s: Sketch, variant: tuple[UnaryOp, GgmlType, GgmlType]) -> None:
    kind, type, result = variant
    params: tuple[Any, ...] = (int(kind),)
    layout = "rows"
    if kind is UnaryOp.XIELU:
        layout = "even"
        params += (*(s.real(-2.0, 2.0) for _ in range(3)), s.pick((-1e-6, -1.0, 0.0)))
    a = _values(s, type, _shape(s), layout)
    if result is type:
        s.output(s.g.like(Op.UNARY, a, (a,), params, inplace=s.flag()))
    else:
        s.output(s.g.op(Op.UNARY, result, a.ne, (a,), params))


# -- functions with parameters ---------------------------------------------------------------------


@family(Op.SCALE, variants=[F32, BF16], examples=180)
def _scale(s: Sketch, type: GgmlType) -> None:
    a = _values(s, type, _shape(s), "contiguous")
    factor = s.pick((0.0, 1.0, -1.0, 0.125, s.real(-10, 10)))
    bias = s.pick((0.0, 1.0, s.real(-10, 10)))
    s.output(s.g.scale(a, factor, bias, inplace=s.flag()))


@family(Op.CLAMP, variants=[F32, F16], examples=160)
def _clamp(s: Sketch, type: GgmlType) -> None:
    a = _values(s, type, _shape(s), "even")
    low = s.pick((-0.5, 0.0, float("-inf"), s.real(-5, 5)))
    high = s.pick((0.5, low, float("inf"), s.real(-5, 5)))
    s.output(s.g.clamp(a, low, high, inplace=s.flag()))


@family(Op.LEAKY_RELU, variants=[F32, F16], examples=160)
def _leaky_relu(s: Sketch, type: GgmlType) -> None:
    a = _values(s, type, _shape(s), "even")
    slope = s.pick((0.1, 0.0, 1.0, s.real(-2, 2)))
    s.output(s.g.leaky_relu(a, slope, inplace=s.flag()))


@family(Op.FILL, variants=[F32, F16], examples=130)
def _fill(s: Sketch, type: GgmlType) -> None:
    a = _values(s, type, _shape(s), "contiguous")
    value = s.pick((0.0, 1.0, -0.0, float("-inf"), float("nan"), 1e6, s.real(-100, 100)))
    s.output(s.g.fill(a, value, inplace=s.flag()))


@family(Op.SILU_BACK, variants=[F32, F16], examples=160)
def _silu_back(s: Sketch, type: GgmlType) -> None:
    ne = _shape(s)
    gradient, x = (_values(s, type, ne, "even") for _ in range(2))
    s.output(s.g.silu_back(gradient, x))


# -- GLU -------------------------------------------------------------------------------------------

_GLU_TYPES = {GluOp.SWIGLU_OAI: (F32,), GluOp.SWIGLU_CLAMP: (F32, F16)}
_LIMITED = frozenset(_GLU_TYPES)


@family(
    Op.GLU,
    variants=[
        (kind, form, type)
        for kind in GluOp
        for form in ("halves", "swapped", "split")
        for type in _GLU_TYPES.get(kind, FLOATS)
    ],
    examples=20,
)
def _glu(s: Sketch, variant: tuple[GluOp, str, GgmlType]) -> None:
    kind, form, type = variant
    ne = _shape(s)
    params: tuple[Any, ...] = (int(kind), int(form == "swapped"))
    if kind in _LIMITED:
        params += (s.real(0.0, 2.0), s.pick((7.0, 0.5, s.real(0.0, 10.0))))
    if form == "split":
        a, b = (_values(s, type, ne, "even") for _ in range(2))
        s.output(s.g.op(Op.GLU, type, ne, (a, b), params))
    else:
        # The last element of rows of an odd length takes no part.
        whole = _values(s, type, (2 * ne[0] + int(s.seldom()), *ne[1:]), "even")
        s.output(s.g.op(Op.GLU, type, ne, (whole, None), params))
