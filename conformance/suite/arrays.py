"""Graphs with numpy arrays in and out, over a Peer: for cases about what is computed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from client.builder.graph import Graph, GraphBuilder
from client.tensors import NUMPY_TYPES, from_bytes
from conformance.differential.blocks import random_blocks
from conformance.differential.compare import nmse
from conformance.suite.context import Context
from conformance.suite.errors import Failed
from conformance.suite.peer import Peer
from conformance.suite.tensors import RemoteBuffer
from protocol.commands import Command
from protocol.ggml.types import TYPE_INFO, GgmlType
from protocol.tensor import Tensor

Array = npt.NDArray[Any]
_GAP = 64
# The bounds of ggml's test-backend-ops: for all ops, and for products.
BOUND = 1e-7
PRODUCT_BOUND = 5e-4
PLAIN_TYPES = (GgmlType.F32, GgmlType.F16, GgmlType.BF16)


class Bench:
    """Leaves with values, nodes made by ``g``, results read back; all on one connection.

    ``buffers``: how many buffers the tensors are spread over, in turn.
    """

    def __init__(self, peer: Peer, *, buffers: int = 1) -> None:
        self.peer = peer
        self.g = GraphBuilder()
        self.places: list[RemoteBuffer] = []
        self._count = buffers
        self._values: dict[Tensor, bytes] = {}

    def leaf(
        self, values: Any, type: GgmlType = GgmlType.F32, ne: Sequence[int] | None = None
    ) -> Tensor:
        """Return a leaf with these values; ``ne`` is that of the array, but for bytes of blocks."""
        if isinstance(values, bytes):
            assert ne is not None
            t = self.g.new_tensor(type, ne)
            data = values
        else:
            array = np.ascontiguousarray(values, NUMPY_TYPES[type])
            t = self.g.new_tensor(type, ne or tuple(reversed(array.shape)))
            data = array.tobytes()
        assert len(data) == t.nbytes, f"{len(data)} bytes for {t!r}"
        self._values[t] = data
        return t

    def place(self, graph: Graph) -> None:
        """Give what has no place one, and upload the values of leaves that are new."""
        new = [t for t in graph.roots if not t.placed]
        groups = [new[i :: self._count] for i in range(self._count)]
        for group in filter(None, groups):
            sizes = [-(-max(t.nbytes, 1) // _GAP) * _GAP + _GAP for t in group]
            buffer = self.peer.alloc(sum(sizes))
            self.places.append(buffer)
            at = 0
            for t, size in zip(group, sizes, strict=True):
                t.place(buffer.handle, buffer.base + at)
                at += size
                # What a node finds is no number in any type: what it doesn't write shows.
                self.set(t, self._values.get(t, b"\xff" * t.nbytes))

    def set(self, t: Tensor, values: Any) -> None:
        """Write all of a contiguous tensor."""
        if not isinstance(values, bytes):
            values = np.ascontiguousarray(values, NUMPY_TYPES[t.type]).tobytes()
        if values:
            self.peer.set(self._wire(t), values)

    def get(self, t: Tensor) -> Array:
        """Return the values of a tensor, in the shape of its ne reversed without leading ones."""
        raw = np.frombuffer(self.peer.get(self._wire(t), t.nbytes), np.uint8)
        array: Array = from_bytes(t, raw)
        while array.ndim > 1 and array.shape[0] == 1:
            array = array[0]
        return array

    def _wire(self, t: Tensor) -> dict[str, Any]:
        return {**t.fields(), "op": self.peer.op(t.op)}

    def build(self, outputs: Iterable[Tensor]) -> Graph:
        graph = self.g.build(outputs)
        self.place(graph)
        return graph

    def compute(self, *outputs: Tensor) -> list[Array]:
        """Run the graph of ``outputs`` and read them back."""
        self.send(self.build(outputs).encode(self.peer.dialect))
        return [self.get(t) for t in outputs]

    def send(self, payload: bytes) -> None:
        """Run a graph given as bytes. Fails the case where that is answered with a failure."""
        self.peer.send(Command.GRAPH_COMPUTE, payload)
        answer = self.peer.answer(Command.GRAPH_COMPUTE)
        if answer is not None and answer.result:
            raise Failed(f"GRAPH_COMPUTE is answered {answer.result}, not GGML_STATUS_SUCCESS")


def values(*shape: int, seed: int = 0) -> Array:
    """Return F32 of ordinary size, outermost dimension first."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(c: Context, actual: Array, expected: Array, what: str, bound: float = BOUND) -> None:
    """Fail unless the error's norm is within ``bound`` of the values'."""
    wanted = np.asarray(expected, np.float64).reshape(actual.shape)
    error = nmse(wanted, actual.astype(np.float64))
    if error > bound:
        at = np.unravel_index(int(np.abs(actual - wanted).argmax()), actual.shape)
        c.fail(
            f"{what}: normalized error {error:.3g}, at most {bound:g}; "
            f"{actual[at]} instead of {wanted[at]} at {[int(i) for i in reversed(at)]}"
        )


def same(c: Context, actual: Array, expected: Any, what: str) -> None:
    """Fail unless all values are equal."""
    wanted = np.asarray(expected, actual.dtype).reshape(actual.shape)
    if not np.array_equal(actual, wanted):
        at = tuple(np.argwhere(actual != wanted)[0])
        c.fail(f"{what}: {actual[at]} instead of {wanted[at]} at {[int(i) for i in reversed(at)]}")


def weights(type: GgmlType, cols: int, rows: int, seed: int) -> tuple[bytes, Array]:
    """Return random weights of a type as bytes, and the numbers that they are: (rows, cols)."""
    if type in PLAIN_TYPES:
        numbers = values(rows, cols, seed=seed)
        if type is GgmlType.F32:
            return numbers.tobytes(), numbers
        if type is GgmlType.F16:
            halves = numbers.astype(np.float16)
            return halves.tobytes(), halves.astype(np.float32)
        bits = (numbers.view(np.uint32) >> 16).astype(np.uint16)
        return bits.tobytes(), (bits.astype(np.uint32) << 16).view(np.float32)
    # Who reads quantized weights has this package; importing it takes a while.
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    count = rows * cols // TYPE_INFO[type].block_size
    raw = random_blocks(type, count, np.random.default_rng(seed)).reshape(rows, -1)
    return raw.tobytes(), dequantize(raw, GGMLQuantizationType(int(type)))
