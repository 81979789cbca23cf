"""Kinds of nodes: what a contract and a lowering decide is decided once for all that are alike.

Thirty layers have a thousand nodes of some thirty-five kinds, which differ in addresses alone. A
kind is named by its *signature*: the op, its parameters, and of the node and each source type,
shape, strides, whether its data is here, and which of them begin at one address. Whatever is
remembered of a kind is made of the signature's words and of nothing else (:func:`specimen`), so it
can't depend on what a signature leaves out. What the signature doesn't tell is looked at for each
node: that it lies in a buffer of its client (``graph/parse.py``), what it overlaps, and the order.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np

from protocol.messages import MAX_PARAM_WORDS, MAX_SOURCES
from protocol.tensor import Tensor, label_of
from rpc_server.graph.table import (
    HERE,
    NO_TYPE,
    OPS,
    SHAPE_WORDS,
    TYPE,
    Ints,
    TensorTable,
    group_rows,
    name_of,
    shape_of,
)

# The node itself and its sources.
SLOTS = 1 + MAX_SOURCES

# Where a signature's words are: op, op_params, shapes of all slots, first slots of equal address.
_PARAMS, _SHAPES = 1, 1 + MAX_PARAM_WORDS
_SAME = _SHAPES + SLOTS * SHAPE_WORDS
_WORDS = _SAME + SLOTS


def slot_rows(table: TensorTable, order: Ints) -> Ints:
    """Return (n, k) rows in ``table``: of the nodes in ``order`` and of their sources.

    k is at most SLOTS: behind them no node has any source.
    """
    rows = np.empty((len(order), 1 + table.src.shape[1]), np.int64)
    rows[:, 0] = order
    rows[:, 1:] = table.src[order]
    return rows


class TooManyKindsError(Exception):
    """There are more kinds of nodes than are planned for; the argument is how many."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.count = count


def signatures(
    table: TensorTable, slots: Ints, most: int | None = None
) -> tuple[list[bytes], Ints, Ints]:
    """Return the signatures of nodes (rows of slot_rows), the first of each, and each node's.

    Raises TooManyKindsError where there are more than ``most``.
    """
    own, used = slots[:, 0], slots.shape[1]
    _, shapes = group_rows(table.shapes)
    shapes = 2 * shapes[table.described] + (table.address != 0)
    address = table.address[slots]
    rows = np.empty((len(slots), used + 2), np.int64)
    rows[:, 0] = table.described[own]
    rows[:, 1] = _sameness(address)
    rows[:, 2:] = shapes[slots]
    first, which = group_rows(rows)
    if most is not None and len(first) > most:
        # Their signatures alone would take a hundred megabytes.
        raise TooManyKindsError(len(first))
    words = np.zeros((len(first), _WORDS), np.int64)
    some, described = slots[first], rows[first, 0]
    words[:, 0] = table.ops[described]
    words[:, _PARAMS:_SHAPES] = table.params[described]
    shapes = np.empty((len(first), SLOTS, SHAPE_WORDS), np.int64)
    shapes[:] = table.shapes[-1]
    shapes[:, :used] = table.shapes[table.described[some]]
    shapes[:, :used, HERE] = address[first] != 0
    words[:, _SHAPES:_SAME] = shapes.reshape(len(first), _SAME - _SHAPES)
    words[:, _SAME:] = np.arange(SLOTS)
    words[:, _SAME : _SAME + used] = _first_at(address[first])
    return [row.tobytes() for row in words], first, which


# Rows whose pairs of slots are looked at together, 55 a row: some megabytes.
_AT_ONCE = 4096


@functools.cache
def _pairs(count: int) -> tuple[Ints, Ints, Ints]:
    """All pairs of so many slots, and a bit for each."""
    one, other = np.tril_indices(count, -1)
    return one, other, np.int64(1) << np.arange(len(one))


def _sameness(address: Ints) -> Ints:
    """By row a number that tells which of its addresses (n, k) are equal."""
    one, other, bits = _pairs(address.shape[1])
    told = np.empty(len(address), np.int64)
    for at in range(0, len(address), _AT_ONCE):
        some = address[at : at + _AT_ONCE]
        told[at : at + _AT_ONCE] = (some[:, one] == some[:, other]) @ bits
    return told


def _first_at(address: Ints) -> Ints:
    """By slot (n, k), the first slot of the node at the same address, if that is one."""
    first = (address[:, :, None] == address[:, None, :]).argmax(axis=2)
    return np.where(address != 0, first, np.arange(address.shape[1]))


def specimen(signature: bytes, addresses: Sequence[int]) -> Tensor:
    """Return a node of this signature whose slots lie at these addresses."""
    words = np.frombuffer(signature, np.int64).tolist()
    made: list[Tensor | None] = []
    for slot in range(SLOTS):
        at = _SHAPES + slot * SHAPE_WORDS
        shape = words[at : at + SHAPE_WORDS]
        if shape[TYPE] == NO_TYPE:
            made.append(None)
            continue
        type_, ne, nb = shape_of(shape)
        t = Tensor(slot, type_, ne, nb)  # type: ignore[arg-type]
        t.address = addresses[words[_SAME + slot]] if shape[HERE] else 0
        made.append(t)
    node = made[0]
    assert node is not None
    node.op = OPS[words[0]]
    node.op_params = tuple(words[_PARAMS:_SHAPES])
    node.src = tuple(made[1:])
    return node


class NodeLabels:
    """The names of nodes in messages, by number: all that is kept of them, no tensor's data.

    ``rows`` are where the nodes are in ``table``.
    """

    def __init__(self, table: TensorTable, rows: Ints) -> None:
        self._names = table.names[rows]
        self._described = table.described[rows]
        self._ops, self._shapes = table.ops, table.shapes

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, number: int, /) -> str:
        """Return what to call node ``number``."""
        description = int(self._described[number])
        type_, ne, _ = shape_of(self._shapes[description].tolist())
        name = self._names[number]
        if isinstance(name, bytes):
            name = name_of(name)
        return label_of(OPS[self._ops[description]], name, type_, ne)


class Kind(Protocol):
    """The state that is kept of a kind."""

    @property
    def nbytes(self) -> int: ...


K = TypeVar("K", bound=Kind)


class KindMemory(Generic[K]):
    """The kinds that came up last, by signature; bounded, as clients may make up any number.

    For any thread. What makes kinds has to make the same of one signature each time.
    """

    def __init__(self, most_bytes: int = 8 << 20) -> None:
        self._most_bytes = most_bytes
        self._kinds: dict[bytes, K] = {}
        self._lock = threading.Lock()
        self.nbytes = 0

    def find(self, signature: bytes, make: Callable[[bytes], K]) -> K:
        """Return the kind, made now if it is not known; it becomes the newest.

        What ``make`` raises is not remembered.
        """
        with self._lock:
            kind = self._kinds.pop(signature, None)
            if kind is not None:
                self._kinds[signature] = kind
                return kind
        kind = make(signature)
        with self._lock:
            if signature not in self._kinds:
                self.nbytes += len(signature) + kind.nbytes
                self._kinds[signature] = kind
            while self.nbytes > self._most_bytes:
                oldest = next(iter(self._kinds))
                self.nbytes -= len(oldest) + self._kinds.pop(oldest).nbytes
        return kind
