"""Ops that reduce, accumulate or order rows; and ARANGE, which makes one."""

from __future__ import annotations

import numpy as np

from conformance.differential.compare import EXACT, Check, Equality
from conformance.differential.sketch import Draws, Sketch, family
from conformance.differential.type_sets import BF16, F16, F32, I32
from conformance.differential.values import ValueKind
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Dims, Tensor


def _shape(s: Sketch) -> Dims:
    return s.shape(s.pick((512, 4096, 20000)))


def _addends(s: Sketch, type: GgmlType, ne: Dims) -> Tensor:
    kinds = (
        ValueKind.UNIFORM,
        ValueKind.NORMAL,
        ValueKind.SPECIAL,
        ValueKind.INTEGERS,
        ValueKind.INFINITE,
    )
    low, high = s.pick(((0.0, 1.0), (-1.0, 2.0)))
    return s.leaf(type, ne, kinds, low, high, layout="rows")


# -- SUM, SUM_ROWS, MEAN, CUMSUM, COUNT_EQUAL ------------------------------------------------------


@family(Op.SUM, variants=[F32, F16, BF16], examples=100)
def _sum(s: Sketch, type: GgmlType) -> None:
    s.output(s.g.sum(_addends(s, type, _shape(s))))


def _along_rows(op: Op) -> Draws:
    def draws(s: Sketch, _: str) -> None:
        s.output(getattr(s.g, op.name.lower())(_addends(s, F32, _shape(s))))

    return draws


for _op in (Op.SUM_ROWS, Op.MEAN, Op.CUMSUM):
    family(_op, examples=300)(_along_rows(_op))


@family(Op.COUNT_EQUAL, examples=300)
def _count_equal(s: Sketch, _: str) -> None:
    # Beyond matrices upstream computes wrong addresses, of memory outside the tensors, too.
    ne = s.shape(8192, rank=2)
    most = s.pick((0, 1, 3, 100))
    a, b = (s.leaf(I32, ne, ValueKind.INTEGERS, -most, most, layout="any") for _ in range(2))
    s.output(s.g.count_equal(a, b), EXACT)


# -- ARGMAX, ARGSORT, TOP_K ------------------------------------------------------------------------


@family(Op.ARGMAX, examples=350)
def _argmax(s: Sketch, _: str) -> None:
    # Of equals the last counts, so ties are exact.
    kinds = (
        ValueKind.NORMAL,
        ValueKind.INTEGERS,
        ValueKind.SPECIAL,
        ValueKind.CONSTANT,
        ValueKind.INFINITE,
    )
    ne = s.shape(8192, rank=2)
    s.output(s.g.argmax(s.leaf(F32, ne, kinds, -2.0, 3.0, layout="rows")), EXACT)


# Without NaN: std::sort has no order for them.
_ORDERED = (
    ValueKind.NORMAL,
    ValueKind.DISTINCT,
    ValueKind.INTEGERS,
    ValueKind.INFINITE,
    ValueKind.CONSTANT,
    ValueKind.RANGE,
)


@family(Op.ARGSORT, variants=["ascending", "descending"], examples=160)
def _argsort(s: Sketch, order: str) -> None:
    a = s.leaf(F32, _shape(s), _ORDERED, -3.0, 4.0, layout="even")
    s.output(s.g.argsort(a, order == "descending"), Check(Equality.ORDER, of=a))


@family(Op.TOP_K, examples=300)
def _top_k(s: Sketch, _: str) -> None:
    a = s.leaf(F32, _shape(s), _ORDERED, -3.0, 4.0, layout="even")
    n = a.ne[0]
    k = s.pick((1, 2, n, s.integer(1, n))) if n else 0
    s.output(s.g.top_k(a, min(k, n)), Check(Equality.SET, of=a))


# -- ARANGE ----------------------------------------------------------------------------------------


@family(Op.ARANGE, examples=260)
def _arange(s: Sketch, _: str) -> None:
    start = s.pick((0.0, 1.0, s.real(-100, 100)))
    step = s.pick((1.0, 2.0, 0.25, s.real(0.125, 3)))
    stop = start + step * s.size(2000) + s.pick((0.0, step / 2))
    s.output(s.g.arange(start, float(np.float32(stop)), step))
