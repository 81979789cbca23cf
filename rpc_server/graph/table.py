"""The tensors of a graph as arrays: a row for each tensor, a column for each of its fields.

A graph has a thousand tensors and a few dozen kinds of them. What is asked of all of them is asked
of the columns, and only what has to be told of one tensor, or done with it alone, makes an object.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.messages import MAX_DIMS, MAX_PARAM_WORDS, MAX_SOURCES
from protocol.tensor import Tensor

Ints = npt.NDArray[np.int64]

# Ops by number, the same whatever the client's numbering.
OPS: tuple[Op, ...] = tuple(Op)
OP_NUMBERS = {op: number for number, op in enumerate(OPS)}


# Rows are told apart by sums with these factors; nobody outside can look for two that are equal,
# and who did would win nothing: rows are compared before they count as equal.
_FACTORS = np.array([secrets.randbits(64) | 1 for _ in range(32)], np.uint64)


def group_rows(rows: Ints) -> tuple[Ints, Ints]:
    """Return (first, which): the first of each group of equal rows, and the group of each row.

    ``rows`` is (n, k), int64, k at most 32. Groups are in the order of their first rows.
    """
    n = len(rows)
    if not n:
        nothing = np.zeros(0, np.int64)
        return nothing, nothing
    sums = rows.view(np.uint64) @ _FACTORS[: rows.shape[1]]
    ordered = np.sort(sums)
    new = np.empty(n, bool)
    new[0] = True
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    which = np.searchsorted(ordered[new], sums)
    first = np.empty(int(new.sum()), np.int64)
    # Of several the last one stays: from behind, that is the first.
    first[which[::-1]] = np.arange(n - 1, -1, -1)
    if not np.array_equal(rows, rows[first[which]]):
        _, first, which = np.unique(rows, axis=0, return_index=True, return_inverse=True)
        which = which.reshape(-1)
    rank = np.argsort(first)
    place = np.empty(len(rank), np.int64)
    place[rank] = np.arange(len(rank))
    return first[rank], place[which]


@dataclass(slots=True)
class TensorTable:
    """Columns of n tensors, int64 all of them; the last row is none.

    A tensor's *description* is what it says of itself: type, ``ne``, ``nb``, op and parameters. A
    graph has few that differ. ``described`` (n + 1) are their numbers; of m descriptions ``shapes``
    (m + 1, 10) are type, nothing, ``ne``, ``nb``, the last one that of none, ``ops`` (m) and
    ``params`` (m, 16).

    Of tensors ``address`` (n + 1) is 0 where the data is not here, ``src`` (n, k) and ``view_src``
    (n) are rows, that of no tensor where there is none; no tensor has more than k sources.
    ``names`` are bytes as on the wire, or strings. ``make`` gives a tensor, linked with all that it
    leads to; ``node`` one with its sources alone.
    """

    described: Ints
    shapes: Ints
    ops: Ints
    params: Ints
    address: Ints
    src: Ints
    view_src: Ints
    names: npt.NDArray[Any]
    make: Callable[[int], Tensor]
    node: Callable[[int], Tensor]

    def __len__(self) -> int:
        return len(self.view_src)

    @property
    def none(self) -> int:
        """The row that is no tensor."""
        return len(self.view_src)


# Columns of TensorTable.shapes. Whether its data is here is no part of a description; in the words
# that a signature has of a tensor it has this place.
TYPE, HERE, NE, NB = 0, 1, 2, 2 + MAX_DIMS
SHAPE_WORDS = 2 + 2 * MAX_DIMS
NO_TYPE = -1


def shape_rows(types: Any, ne: Any, nb: Any) -> Ints:
    """Return rows of TensorTable.shapes for n descriptions, and that of none."""
    n = len(types)
    rows = np.zeros((n + 1, SHAPE_WORDS), np.int64)
    rows[:n, TYPE] = types
    rows[n, TYPE] = NO_TYPE
    rows[:n, NE:NB] = ne
    rows[:n, NB:] = nb
    return rows


def sources_used(there: npt.NDArray[np.bool_]) -> int:
    """Return how many of the columns of sources are needed, given where (n, 10) there is one."""
    (used,) = np.nonzero(there.any(axis=0))
    return int(used[-1]) + 1 if len(used) else 0


def name_of(name: bytes) -> str:
    """Return a tensor's name as it is off the wire as text."""
    return name.split(b"\0", 1)[0].decode("utf-8", "replace")


def with_none(column: Any, none: int = 0) -> Ints:
    """Return a column as int64 with a last row more, that of no tensor."""
    out = np.empty(len(column) + 1, np.int64)
    out[:-1] = column
    out[-1] = none
    return out


def shape_of(words: Iterable[int]) -> tuple[GgmlType, tuple[int, ...], tuple[int, ...]]:
    """Return type, ``ne`` and ``nb`` of a row of TensorTable.shapes."""
    row = list(words)
    return GgmlType(row[TYPE]), tuple(row[NE:NB]), tuple(row[NB:SHAPE_WORDS])


def table_of(tensors: Iterable[Tensor]) -> tuple[TensorTable, dict[int, int]]:
    """Return the table of tensors and their sources, and rows by the tensors' ``id()``."""
    listed: list[Tensor] = []
    rows: dict[int, int] = {}
    for t in tensors:
        for x in (t, *t.src):
            if x is not None and id(x) not in rows:
                rows[id(x)] = len(listed)
                listed.append(x)
    n = len(listed)
    src = np.full((n, MAX_SOURCES), n, np.int64)
    for row, t in enumerate(listed):
        for k, s in enumerate(t.src):
            if s is not None and id(s) in rows:
                src[row, k] = rows[id(s)]
    said = [(int(t.type), *t.ne, *t.nb, OP_NUMBERS[t.op], *t.op_params) for t in listed]
    words = np.array(said, np.int64).reshape(n, 2 + 2 * MAX_DIMS + MAX_PARAM_WORDS)
    first, which = group_rows(words)
    some = words[first]
    ne, nb, op = 1, 1 + MAX_DIMS, 1 + 2 * MAX_DIMS
    table = TensorTable(
        described=with_none(which, len(first)),
        shapes=shape_rows(some[:, 0], some[:, ne:nb], some[:, nb:op]),
        ops=some[:, op],
        params=some[:, op + 1 :],
        address=with_none([t.address for t in listed]),
        src=src[:, : sources_used(src != n)],
        view_src=np.full(n, n, np.int64),
        names=np.array([t.name for t in listed], object),
        make=listed.__getitem__,
        node=listed.__getitem__,
    )
    return table, rows
