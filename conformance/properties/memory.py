"""A model of what a server keeps for one client: its buffers' bytes, and its last graph.

Graphs are chains of a few F32 nodes whose results are exact (each is one rounding at most), so the
model and any server agree to the bit, but for the bits of NaN.

A word of a graph (Step.words) makes a node: which op, which sources, where the result goes::

    bits 0-2 op | 3-5 first source | 6-8 second source | 9 in place | 10-23 where
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from client.tensors import encode_params
from protocol.dialects import Dialect
from protocol.ggml.ops import Op, TensorFlag, UnaryOp
from protocol.ggml.types import GgmlType
from protocol.graph_payload import GraphPayload, encode_graph
from protocol.messages import MAX_SOURCES, RPC_TENSOR_DTYPE
from protocol.numbering import wire_params

F32 = npt.NDArray[np.float32]

_FACTORS = (0.5, -1.0, 2.0, 0.75, 3.0, 0.0, 1.0, -0.125)


@dataclass(slots=True)
class ModelBuffer:
    """One buffer: what the server calls it, and what must be in it."""

    handle: int
    base: int
    data: bytearray
    # Elements that a graph has made not-a-number: their bits are the server's business.
    nan: npt.NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.nan = np.zeros(len(self.data), np.bool_)

    def write(self, at: int, content: bytes) -> None:
        self.data[at : at + len(content)] = content
        self.nan[at : at + len(content)] = False

    def part(self, at: int, size: int) -> ModelBuffer:
        """Return a copy of some of it, as it is now."""
        copy = ModelBuffer(self.handle, self.base + at, self.data[at : at + size])
        copy.nan = self.nan[at : at + size].copy()
        return copy

    def difference(self, actual: bytes) -> str:
        """Return what is wrong with the bytes that the server gave for all of it.

        The text is empty if nothing is.
        """
        if len(actual) != len(self.data):
            return f"{len(actual)} bytes instead of {len(self.data)}"
        if actual == self.data:
            return ""
        got, want = np.frombuffer(actual, np.uint8), np.frombuffer(self.data, np.uint8)
        wrong = got != want
        # Runs of NaN begin on multiples of 4 bytes of their buffer.
        for at in (4 * np.flatnonzero(self.nan[::4])).tolist():
            if at + 4 <= len(actual) and np.isnan(np.frombuffer(actual, "<f4", 1, at)[0]):
                wrong[at : at + 4] = False
        places = np.flatnonzero(wrong)
        if not len(places):
            return ""
        first, last = int(places[0]), int(places[-1])
        return (
            f"byte {first} is {actual[first]:#04x}, expected {self.data[first]:#04x} "
            f"({len(places)} of {len(actual)} bytes differ, up to byte {last})"
        )

    def adopt(self, actual: bytes) -> None:
        """Take over the server's bits of what is no number: they must stay."""
        self.data[:] = actual
        self.nan[:] = False


@dataclass(frozen=True, slots=True)
class Range:
    """``n`` F32 at byte ``at`` of a buffer."""

    buffer: ModelBuffer
    at: int
    n: int

    @property
    def address(self) -> int:
        return self.buffer.base + self.at

    def load(self) -> F32:
        return np.frombuffer(bytes(self.buffer.data[self.at : self.at + 4 * self.n]), "<f4")

    def store(self, values: F32) -> None:
        end = self.at + 4 * self.n
        self.buffer.data[self.at : end] = values.astype("<f4").tobytes()
        self.buffer.nan[self.at : end] = np.repeat(np.isnan(values), 4)

    def apart(self, other: Range) -> bool:
        """Return whether no byte is in both."""
        if self.buffer is not other.buffer:
            return True
        return self.at + 4 * self.n <= other.at or other.at + 4 * other.n <= self.at


@dataclass(frozen=True, slots=True)
class _Kind:
    """An op of the model: how many sources, its parameters, what it computes."""

    op: Op
    sources: int
    compute: Callable[[F32, F32, float], F32]
    params: Callable[[float], Sequence[int | float]] = lambda factor: ()


_KINDS = (
    _Kind(Op.ADD, 2, lambda x, y, f: x + y),
    _Kind(Op.MUL, 2, lambda x, y, f: x * y),
    _Kind(Op.SCALE, 1, lambda x, y, f: x * np.float32(f), lambda f: (f, 0.0)),
    _Kind(Op.CPY, 2, lambda x, y, f: x),
    _Kind(Op.SUB, 2, lambda x, y, f: x - y),
    _Kind(Op.SQR, 1, lambda x, y, f: x * x),
    _Kind(Op.UNARY, 1, lambda x, y, f: -x, lambda f: (int(UnaryOp.NEG),)),
    _Kind(Op.CONT, 1, lambda x, y, f: x),
)


class _Node(NamedTuple):
    """``target`` becomes what ``kind`` makes of the sources; numbers of sources are positions."""

    kind: _Kind
    sources: tuple[int, ...]
    target: Range
    factor: float
    view_of: int | None


class ModelGraph:
    """Leaves and nodes in memory of one client."""

    def __init__(self, leaves: Sequence[Range], words: Sequence[int]) -> None:
        """``leaves`` (at least one) have the same size; ``words`` are the nodes."""
        self._leaves = list(leaves)
        self._nodes: list[_Node] = []
        tensors = list(leaves)
        for word in words:
            node = self._node(word, tensors)
            self._nodes.append(node)
            tensors.append(node.target)

    def _root(self, position: int) -> int:
        """Return what a view of the tensor at ``position`` is a view of, as ggml has it."""
        node = position - len(self._leaves)
        view_of = None if node < 0 else self._nodes[node].view_of
        return position if view_of is None else view_of

    def _node(self, word: int, tensors: Sequence[Range]) -> _Node:
        kind = _KINDS[word & 7]
        first = (word >> 3 & 7) % len(tensors)
        second = (word >> 6 & 7) % len(tensors)
        where, factor = word >> 10, _FACTORS[word >> 10 & 7]
        x, y = tensors[first], tensors[second]
        if kind.op is Op.CPY:
            # Its result is its second source, which must not lie across the first.
            if x != y and not x.apart(y):
                second, y = first, x
            return _Node(kind, (first, second), y, factor, self._root(second))
        sources = (first, second)[: kind.sources]
        used = [tensors[i] for i in sources]
        if not word >> 9 & 1:
            room = (len(x.buffer.data) - 4 * x.n) // 4
            target = Range(x.buffer, 4 * (where % (room + 1)), x.n)
            if all(target.apart(r) for r in used):
                return _Node(kind, sources, target, factor, None)
        # In place, unless that would lie across the other source.
        if len(used) == 2 and x != y and not x.apart(y):
            sources = (first, first)
        return _Node(kind, sources, x, factor, self._root(first))

    def run(self) -> None:
        """Compute all nodes in the model's memory."""
        with np.errstate(all="ignore"):
            tensors = [*self._leaves, *(node.target for node in self._nodes)]
            for node in self._nodes:
                x = tensors[node.sources[0]].load()
                y = tensors[node.sources[-1]].load()
                node.target.store(node.kind.compute(x, y, node.factor))

    def uses(self, buffer: ModelBuffer) -> bool:
        return any(r.buffer is buffer for r in (*self._leaves, *(n.target for n in self._nodes)))

    def payload(self, dialect: Dialect) -> bytes:
        """Return the body of the GRAPH_COMPUTE."""
        return encode_graph(self._wire(dialect), dialect)

    def _wire(self, dialect: Dialect) -> GraphPayload:
        count = len(self._leaves) + len(self._nodes)
        tensors = np.zeros(count, RPC_TENSOR_DTYPE)
        for i, leaf in enumerate(self._leaves):
            _fill(tensors[i], i + 1, leaf)
        for k, node in enumerate(self._nodes, len(self._leaves)):
            row = tensors[k]
            _fill(row, k + 1, node.target)
            row["op"] = dialect.op_number(node.kind.op)
            row["flags"] = TensorFlag.COMPUTE
            params = encode_params(node.kind.params(node.factor))
            row["op_params"] = wire_params(dialect.numbering, node.kind.op, params)
            ids = [i + 1 for i in node.sources]
            row["src"] = ids + [0] * (MAX_SOURCES - len(ids))
            if node.view_of is not None:
                row["view_src"] = node.view_of + 1
            for i in node.sources:
                tensors[i]["use_count"] += 1
        ids_of_nodes = np.arange(len(self._leaves) + 1, count + 1, dtype=np.uint64)
        return GraphPayload(0, ids_of_nodes, tensors)


def _fill(row: Any, id_: int, place: Range) -> None:
    row["id"] = id_
    row["type"] = GgmlType.F32
    row["buffer"] = place.buffer.handle
    row["data"] = place.address
    row["ne"] = (place.n, 1, 1, 1)
    row["nb"] = (4, 4 * place.n, 4 * place.n, 4 * place.n)
    row["name"] = f"t{id_}".encode()


def content(seed: int, size: int) -> bytes:
    """Return bytes that look like numbers: F32 of ordinary size, cut to ``size``."""
    values = np.random.default_rng(seed).standard_normal(size // 4 + 1).astype("<f4")
    return values.tobytes()[:size]
