"""What leaves hold: kinds of values, made from a seed so that a case is small and repeatable."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from client.tensors import NUMPY_TYPES
from conformance.differential.blocks import Bytes, random_blocks
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor

Values = npt.NDArray[np.float64]


class ValueKind(enum.StrEnum):
    """The way to draw the values of a leaf; ``low`` and ``high`` are the Fill's."""

    NORMAL = "normal"  # standard normal, scaled by high and moved by low
    UNIFORM = "uniform"  # between low and high
    INTEGERS = "integers"  # low..high, both included
    DISTINCT = "distinct"  # a permutation of evenly spaced values in each row: no ties
    RANGE = "range"  # low, low + high, low + 2 high, ...
    CONSTANT = "constant"  # low everywhere
    SPECIAL = "special"  # normal with NaN, infinities, zeros of both signs and tiny values
    INFINITE = "infinite"  # normal with infinities of both signs
    MASK = "mask"  # 0 or -infinity, the first of each row always 0
    HADAMARD = "hadamard"  # a Hadamard matrix over the root of its size, a power of two


@dataclass(frozen=True, slots=True)
class Fill:
    """A kind of values with its parameters. ``row`` is the length of rows where the kind has any.

    Quantized leaves hold random blocks whatever the kind, but for CONSTANT: all bytes zero.
    """

    kind: ValueKind = ValueKind.NORMAL
    seed: int = 0
    low: float = 0.0
    high: float = 1.0


def _normal(fill: Fill, n: int, row: int, random: np.random.Generator) -> Values:
    return random.standard_normal(n) * fill.high + fill.low


def _uniform(fill: Fill, n: int, row: int, random: np.random.Generator) -> Values:
    return random.uniform(fill.low, fill.high, n)


def _integers(fill: Fill, n: int, row: int, random: np.random.Generator) -> Values:
    return random.integers(int(fill.low), int(fill.high) + 1, n).astype(np.float64)


def _distinct(fill: Fill, n: int, row: int, random: np.random.Generator) -> Values:
    rows = np.tile(np.arange(row, dtype=np.float64), (n // row, 1))
    return (random.permuted(rows, axis=1).reshape(-1) - row // 2) * fill.high + fill.low


def _range(fill: Fill, n: int, row: int, random: np.random.Generator) -> Values:
    return fill.low + fill.high * np.arange(n, dtype=np.float64)


def _constant(fill: Fill, n: int, row: int, random: np.random.Generator) -> Values:
    return np.full(n, fill.low)


def _sprinkled(*extra: float) -> Callable[[Fill, int, int, np.random.Generator], Values]:
    def make(fill: Fill, n: int, row: int, random: np.random.Generator) -> Values:
        values = _normal(fill, n, row, random)
        places = random.random(n) < 0.1
        values[places] = random.choice(np.array(extra), int(places.sum()))
        return values

    return make


def _mask(fill: Fill, n: int, row: int, random: np.random.Generator) -> Values:
    values = np.where(random.random((n // row, row)) < 0.4, -np.inf, 0.0)
    values[:, 0] = 0.0
    return values.reshape(-1)


def _hadamard(fill: Fill, n: int, row: int, random: np.random.Generator) -> Values:
    matrix = np.ones((1, 1))
    while len(matrix) < row:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.resize(matrix / np.sqrt(row), n)


_INF = float("inf")
_MAKERS: dict[ValueKind, Callable[[Fill, int, int, np.random.Generator], Values]] = {
    ValueKind.NORMAL: _normal,
    ValueKind.UNIFORM: _uniform,
    ValueKind.INTEGERS: _integers,
    ValueKind.DISTINCT: _distinct,
    ValueKind.RANGE: _range,
    ValueKind.CONSTANT: _constant,
    ValueKind.SPECIAL: _sprinkled(float("nan"), _INF, -_INF, 0.0, -0.0, 1e-40, -1e-40),
    ValueKind.INFINITE: _sprinkled(_INF, -_INF),
    ValueKind.MASK: _mask,
    ValueKind.HADAMARD: _hadamard,
}


def leaf_bytes(t: Tensor, fill: Fill) -> Bytes:
    """Return all bytes of a dense leaf."""
    if not t.nelements:
        return np.empty(0, np.uint8)
    random = np.random.default_rng(fill.seed)
    dtype = NUMPY_TYPES.get(t.type)
    if dtype is None:
        if fill.kind is ValueKind.CONSTANT:
            return np.zeros(t.nbytes, np.uint8)
        count = t.nbytes // t.nb[0]
        return random_blocks(t.type, count, random).reshape(-1)
    values = _MAKERS[fill.kind](fill, t.nelements, t.ne[0], random)
    return _encode(values, t.type, dtype).view(np.uint8)


def flushed(type: GgmlType, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return F32 or BF16 values with 0 of the same sign for those below the normal numbers.

    A processor that flushes takes these for 0. Other types are returned as they are: of F16 all
    values are normal numbers of F32, in which is computed.
    """
    if type is not GgmlType.F32 and type is not GgmlType.BF16:
        return values
    word = np.dtype(np.uint32 if type is GgmlType.F32 else np.uint16)
    words: npt.NDArray[Any] = values.view(word)
    cut = 32 - 8 * word.itemsize
    exponent, sign = (word.type(bits >> cut) for bits in (0x7F80_0000, 0x8000_0000))
    small = np.bitwise_and(words, exponent) == 0
    return np.where(small, np.bitwise_and(words, sign), words).view(values.dtype)


def _encode(values: Values, type: GgmlType, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if type is GgmlType.BF16:
        # Cut, not rounded: any bit pattern is as good as any other here, and NaN stays NaN.
        with np.errstate(over="ignore"):
            return (values.astype(np.float32).view(np.uint32) >> 16).astype(dtype)
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            return values.astype(dtype)
    limits = np.iinfo(dtype)
    finite = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    return np.clip(np.round(finite), limits.min, limits.max).astype(dtype)
