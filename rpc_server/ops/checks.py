"""What contracts have in common: requirements on types, shapes and strides of single tensors.

All raise ContractError. ``what`` is how the message calls the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.ops import table
from rpc_server.ops.table import refuse, require

F32_ONLY: frozenset[GgmlType] = frozenset({GgmlType.F32})
I32_ONLY: frozenset[GgmlType] = frozenset({GgmlType.I32})

# Strides of 0 make a tensor of any number of elements fit anywhere; array modules count in int64.
_MAX_ELEMENTS = 1 << 48


def of_type(t: Tensor, types: Collection[GgmlType], what: str) -> None:
    if t.type not in types:
        refuse(f"{what} must not be {t.type.name}")


def shape(t: Tensor, ne: Sequence[int], what: str) -> None:
    if t.ne != tuple(ne):
        expected, actual = ("x".join(map(str, dims)) for dims in (ne, t.ne))
        refuse(f"{what} must be {expected}, is {actual}")


def whole_copies(n: int, m: int, what: str) -> None:
    """Require that dimension ``n`` is a whole number of repetitions of ``m``.

    0 is a repetition of 0 only.
    """
    require(n % m == 0 if m else n == 0, f"{what}: {n} is not a multiple of {m}")


def dense_rows(t: Tensor, what: str) -> None:
    """Require that rows can be walked element by element, or block by block.

    Between rows there may be any stride.
    """
    require(t.contiguous_rows, f"{what} must have dense rows")
    blocks(t, what)


def contiguous(t: Tensor, what: str) -> None:
    dense_rows(t, what)
    require(t.contiguous, f"{what} must be contiguous")


def blocks(t: Tensor, what: str) -> None:
    """Require blocks that follow one another; a quantized tensor's extent is counted so."""
    require(not t.quantized or t.nb[0] == t.type_size, f"{what} must have dense rows of blocks")
    # Array modules multiply the other sizes of an array that has none, too.
    require(math.prod(n or 1 for n in t.ne) <= _MAX_ELEMENTS, f"{what} has too many elements")


def distinct(t: Tensor, what: str) -> None:
    """Require that there is memory for each element, so that work is bounded by memory.

    Rules out strides that lay elements on one another; ggml's own views never have these where
    they are written.
    """
    blocks(t, what)
    require(t.empty or t.row_size * t.nrows <= t.nbytes, f"elements of {what} overlap")


def source(t: Tensor, i: int, types: Collection[GgmlType], *, dense: bool = True) -> Tensor:
    """Return source ``i``: one of ``types``, with dense rows unless ``dense`` is False."""
    s, what = table.source(t, i), f"source {i}"
    of_type(s, types, what)
    if dense:
        dense_rows(s, what)
    else:
        blocks(s, what)
    return s


def result(t: Tensor, types: Collection[GgmlType], *, dense: bool = True) -> None:
    """Require of the node's own memory one of ``types``, an element for each place, dense rows."""
    of_type(t, types, "the result")
    if dense:
        dense_rows(t, "the result")
    distinct(t, "the result")
