"""Kinds of nodes: what a contract and a lowering decide is decided once for all that are alike.

Thirty layers have a thousand nodes of some thirty-five kinds, which differ in addresses alone. A
kind is named by its *signature*: the op, its parameters, and of the node and each source type,
shape, strides, whether its data is here, and which of them begin at one address. Whatever is
remembered of a kind is made of the signature's words and of nothing else (:func:`specimen`), so it
can't depend on what a signature leaves out. What the signature doesn't tell is looked at for each
node: that it lies in a buffer of its client (``graph/parse.py``), what it overlaps, and the order.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np

from protocol.messages import MAX_PARAM_WORDS, MAX_SOURCES
from protocol.tensor import Tensor
from rpc_server.graph.table import (
    HERE,
    NO_TYPE,
    OPS,
    SHAPE_WORDS,
    TYPE,
    Ints,
    TensorTable,
    shape_of,
)

# The node itself and its sources.
SLOTS = 1 + MAX_SOURCES

# Where a signature's words are: op, op_params, shapes of all slots, first slots of equal address.
_PARAMS, _SHAPES = 1, 1 + MAX_PARAM_WORDS
_SAME = _SHAPES + SLOTS * SHAPE_WORDS
_WORDS = _SAME + SLOTS

# Rows are told apart by sums with these factors; nobody outside can look for two that are equal,
# and who did would win nothing: rows are compared before they count as equal.
_FACTORS = np.array(
    [secrets.randbits(64) | 1 for _ in range(1 + MAX_PARAM_WORDS + 2 * SLOTS)], np.uint64
)


def group_rows(rows: Ints) -> tuple[Ints, Ints]:
    """Return (first, which): the first of each group of equal rows, and the group of each row.

    ``rows`` is not empty. Groups are in the order of their first rows.
    """
    sums = (rows.view(np.uint64) * _FACTORS[: rows.shape[1]]).sum(axis=1, dtype=np.uint64)
    _, first, which = np.unique(sums, return_index=True, return_inverse=True)
    if not (rows == rows[first][which]).all():
        _, first, which = np.unique(rows, axis=0, return_index=True, return_inverse=True)
        which = which.reshape(-1)
    rank = np.argsort(first)
    place = np.empty(len(rank), np.int64)
    place[rank] = np.arange(len(rank))
    return first[rank], place[which]


def slot_rows(table: TensorTable, order: Ints) -> Ints:
    """Return (n, SLOTS) rows in ``table``: of the nodes in ``order`` and of their sources."""
    rows = np.empty((len(order), SLOTS), np.int64)
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
    if not len(slots):
        nothing = np.zeros(0, np.int64)
        return [], nothing, nothing
    used = _slots_used(table, slots)
    _, shapes = group_rows(table.shapes)
    same = _same_address(table.address[slots[:, :used]])
    own = slots[:, 0]
    first, which = group_rows(
        np.column_stack((table.ops[own], table.params[own], shapes[slots[:, :used]], same))
    )
    if most is not None and len(first) > most:
        # Their signatures alone would take a hundred megabytes.
        raise TooManyKindsError(len(first))
    words = np.empty((len(first), _WORDS), np.int64)
    some = slots[first]
    words[:, 0] = table.ops[some[:, 0]]
    words[:, _PARAMS:_SHAPES] = table.params[some[:, 0]]
    words[:, _SHAPES:_SAME] = table.shapes[some].reshape(len(first), -1)
    words[:, _SAME:] = np.arange(SLOTS)
    words[:, _SAME : _SAME + used] = same[first]
    return [row.tobytes() for row in words], first, which


def _slots_used(table: TensorTable, slots: Ints) -> int:
    """Return how many slots have to be looked at: behind them no node has any source."""
    (used,) = np.nonzero((slots != table.none).any(axis=0))
    return int(used[-1]) + 1 if len(used) else 1


def _same_address(address: Ints) -> Ints:
    """By slot, the first slot of the node at the same address, if that is one."""
    same = np.broadcast_to(np.arange(address.shape[1]), address.shape).copy()
    for slot in range(1, address.shape[1]):
        for other in reversed(range(slot)):
            equal = (address[:, slot] == address[:, other]) & (address[:, slot] != 0)
            same[equal, slot] = other
    return same


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
