"""Graphs: built with ggml's names, ordered as ggml orders them, encoded for the wire.

g = GraphBuilder()
x = g.new_tensor_2d(GgmlType.F32, 64, 8)
y = g.rms_norm(g.mul_mat(w, x), 1e-6)
graph = g.build([y])
payload = graph.encode(dialect)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from client.builder.partial import PartialOps
from client.builder.pointwise import PointwiseOps
from client.builder.recurrent import RecurrentOps
from client.builder.signals import SignalOps
from client.builder.training import TrainingOps
from client.builder.windows import WindowOps
from protocol.dialects import USE_COUNT_SINCE, Dialect
from protocol.ggml.ops import Op, TensorFlag
from protocol.graph_payload import GraphPayload, encode_graph
from protocol.messages import RPC_TENSOR_DTYPE
from protocol.numbering import wire_params
from protocol.tensor import Tensor

# As plain numbers, which are quicker than flags.
_PARAM, _COMPUTE = int(TensorFlag.PARAM), int(TensorFlag.COMPUTE)


@dataclass(frozen=True, slots=True)
class Graph:
    """``nodes`` in execution order; ``tensors`` are they and all they refer to, sources first.

    ``use_counts`` has one entry a tensor: how often it is a source.
    """

    nodes: tuple[Tensor, ...]
    tensors: tuple[Tensor, ...]
    use_counts: tuple[int, ...]

    @property
    def leaves(self) -> list[Tensor]:
        """Tensors that nothing computes and that view no other."""
        return [t for t in self.tensors if t.op is Op.NONE and t.view_src is None]

    @property
    def roots(self) -> list[Tensor]:
        """Tensors with memory of their own; all others are views of these."""
        return [t for t in self.tensors if t.view_src is None]

    def payload(self, dialect: Dialect, device: int = 0) -> GraphPayload:
        """Return the graph as arrays. ValueError if the dialect has no such op."""
        rows = [t.fields(uses) for t, uses in zip(self.tensors, self.use_counts, strict=True)]
        tensors = np.zeros(len(rows), RPC_TENSOR_DTYPE)
        for name in RPC_TENSOR_DTYPE.names or ():
            if name == "op":
                tensors[name] = [dialect.op_number(row[name]) for row in rows]
            elif rows and name == "op_params":
                tensors[name] = [
                    wire_params(dialect.numbering, row["op"], row[name]) for row in rows
                ]
            elif rows:
                tensors[name] = [row[name] for row in rows]
        if dialect.version < USE_COUNT_SINCE:
            tensors["use_count"] = 0
        nodes = np.array([t.id for t in self.nodes], np.uint64)
        return GraphPayload(device, nodes, tensors)

    def encode(self, dialect: Dialect, device: int = 0) -> bytes:
        """Return the bytes of a GRAPH_COMPUTE."""
        return encode_graph(self.payload(dialect, device), dialect)


class GraphBuilder(PointwiseOps, PartialOps, TrainingOps, RecurrentOps, WindowOps, SignalOps):
    """ggml's constructors as methods. Each checks its operands as ggml asserts (ShapeError)."""

    def build(self, outputs: Tensor | Iterable[Tensor]) -> Graph:
        """Return the graph that computes ``outputs``, and whatever they need, in ggml's order.

        Marks what is to be computed (GGML_TENSOR_FLAG_COMPUTE) and names what has no name.
        """
        targets = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        visited = _post_order(targets, lambda t: t.src)
        nodes = [t for t in visited if t.op is not Op.NONE or t.flags & _PARAM]
        leaves = [t for t in visited if t.op is Op.NONE and not t.flags & _PARAM]
        for kind, group in (("node", nodes), ("leaf", leaves)):
            for i, tensor in enumerate(group):
                tensor.name = tensor.name or f"{kind}_{i}"
        uses = {id(t): 0 for t in visited}
        for tensor in visited:
            if tensor.op is not Op.NONE:
                tensor.flags |= _COMPUTE
            for source in tensor.src:
                if source is not None:
                    uses[id(source)] += 1
        tensors = _post_order(nodes, lambda t: (*t.src, t.view_src))
        return Graph(tuple(nodes), tuple(tensors), tuple(uses.get(id(t), 0) for t in tensors))


def _post_order(
    targets: Sequence[Tensor], references: Callable[[Tensor], Sequence[Tensor | None]]
) -> list[Tensor]:
    """Targets and all they refer to, each once and behind its references (left to right)."""
    seen: set[int] = set()
    order: list[Tensor] = []
    for target in targets:
        stack: list[tuple[Tensor, bool]] = [(target, False)]
        while stack:
            tensor, complete = stack.pop()
            if complete:
                order.append(tensor)
                continue
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            stack.append((tensor, True))
            stack.extend((r, False) for r in reversed(references(tensor)) if r is not None)
    return order
