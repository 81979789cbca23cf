"""The tensors of a graph as arrays: a row for each tensor, a column for each of its fields.

A graph has a thousand tensors and a few dozen kinds of them. What is asked of all of them is asked
of the columns, and only what has to be told of one tensor, or done with it alone, makes an object.
"""

from __future__ import annotations

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


@dataclass(slots=True)
class TensorTable:
    """Columns of n tensors, int64 all of them; the last row is none.

    ``src`` (n, 10) and ``view_src`` (n) are rows, that of no tensor where there is none. Rows of
    ``shapes`` (n + 1, 10) are type, whether it has an address, ``ne``, ``nb``: what a contract or a
    lowering may ask of a tensor. ``names`` are bytes as on the wire, or strings. ``make`` gives a
    tensor, linked with all that it leads to; ``node`` one with its sources alone.
    """

    shapes: Ints
    address: Ints
    nbytes: Ints
    ops: Ints
    params: Ints
    src: Ints
    view_src: Ints
    names: npt.NDArray[Any]
    make: Callable[[int], Tensor]
    node: Callable[[int], Tensor]

    def __len__(self) -> int:
        return len(self.ops)

    @property
    def none(self) -> int:
        """The row that is no tensor."""
        return len(self.ops)


# Columns of TensorTable.shapes.
TYPE, HERE, NE, NB = 0, 1, 2, 2 + MAX_DIMS
SHAPE_WORDS = 2 + 2 * MAX_DIMS
NO_TYPE = -1


def shape_rows(types: Any, address: Any, ne: Any, nb: Any) -> Ints:
    """Return rows of TensorTable.shapes for n tensors, and that of none."""
    n = len(types)
    rows = np.zeros((n + 1, SHAPE_WORDS), np.int64)
    rows[:n, TYPE] = types
    rows[n, TYPE] = NO_TYPE
    rows[:n, HERE] = address != 0
    rows[:n, NE:NB] = ne
    rows[:n, NB:] = nb
    return rows


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
    address = np.array([t.address for t in listed], np.int64)
    shape = (n, MAX_DIMS)
    table = TensorTable(
        shapes=shape_rows(
            [int(t.type) for t in listed],
            address,
            np.array([t.ne for t in listed], np.int64).reshape(shape),
            np.array([t.nb for t in listed], np.int64).reshape(shape),
        ),
        address=with_none(address),
        nbytes=with_none([min(t.nbytes, 1 << 62) for t in listed]),
        ops=np.array([OP_NUMBERS[t.op] for t in listed], np.int64),
        params=np.array([t.op_params for t in listed], np.int64).reshape(n, MAX_PARAM_WORDS),
        src=src,
        view_src=np.full(n, n, np.int64),
        names=np.array([t.name for t in listed], object),
        make=listed.__getitem__,
        node=listed.__getitem__,
    )
    return table, rows
