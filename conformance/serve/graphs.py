"""A graph as a client sent it: what is wrong with it, and where its results belong."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

from conformance.serve.memory import Block
from conformance.serve.rules import Notes
from conformance.serve.tensors import TensorView, name_of
from protocol.dialects import Dialect
from protocol.ggml.ops import Op
from protocol.ggml.types import is_contiguous
from protocol.graph_payload import GraphPayload
from protocol.messages import RPC_TENSOR_DTYPE

_COMPUTE = 16
# Ops that compute nothing: their tensor is another view of its source's bytes.
_VIEWS = frozenset({Op.NONE, Op.RESHAPE, Op.VIEW, Op.PERMUTE, Op.TRANSPOSE})


class Checked(Protocol):
    """The session that a graph belongs to: its buffers, and what was asked for its tensors."""

    dialect: Dialect
    notes: Notes

    def require(self, rule: str, kept: bool, what: str) -> None: ...
    def tensor(self, record: Any) -> TensorView: ...
    def find_block(self, what: str, handle: int) -> Block: ...
    def check_place(self, what: str, tensor: TensorView, block: Block) -> None: ...
    def asked(self, device: int, tensor: TensorView) -> int: ...


@dataclass(slots=True)
class GraphState:
    """The last graph of a device: the places of its results."""

    results: list[tuple[Block, int, int]]

    def clear_results(self) -> None:
        """Clear every result, in place of computing it."""
        for block, start, size in self.results:
            block.data[start : start + size] = 0


def check_graph(session: Checked, graph: GraphPayload) -> GraphState:
    """Check a graph by every rule; raises Refused where a server can't compute it."""
    notes = session.notes
    rows = [_record(values) for values in graph.tensors.tolist()]
    by_id = {row.id: row for row in rows}
    nodes = [int(id) for id in graph.nodes.tolist()]
    session.require("graph/ids", len(by_id) == len(rows), "two tensors of a graph have the same id")
    missing = [node for node in nodes if node not in by_id]
    session.require("graph/ids", not missing, f"{len(missing)} nodes are not among the tensors")
    position = {node: at for at, node in enumerate(nodes)}
    ops = session.dialect.ops
    views: dict[int, TensorView] = {}
    for row in rows:
        name = name_of(row)
        needed = [id for id in (*row.src, row.view_src) if id]
        lost = [id for id in needed if id not in by_id]
        session.require(
            "graph/ids", not lost, f"a source of {name!r} ({lost[:1]}) is not in the graph"
        )
        session.require("graph/op", row.op < len(ops), f"{name!r} has op number {row.op}")
        at = position.get(row.id)
        if at is not None:
            late = [id for id in needed if position.get(id, -1) >= at]
            session.require(
                "graph/order", not late, f"{name!r} comes before {_names(by_id, late)} it reads"
            )
        views[row.id] = session.tensor(row)
    placed = {id: _place(session, tensor) for id, tensor in views.items()}
    for node in nodes:
        row, block = by_id[node], placed[node]
        if block is None or ops[row.op] in _VIEWS:
            continue
        _check_spare(session, views[node], block, [views[id] for id in row.src if id])
    notes.check("graph/order", True, "")
    return GraphState(_results(nodes, by_id, views, placed, ops))


def _record(values: tuple[Any, ...]) -> Any:
    return SimpleNamespace(**dict(zip(RPC_TENSOR_DTYPE.names or (), values, strict=True)))


def _names(by_id: dict[int, Any], ids: list[int]) -> str:
    return ", ".join(repr(name_of(by_id[id])) for id in ids)


def _place(session: Checked, tensor: TensorView) -> Block | None:
    """The buffer that a tensor of a graph lies in, None where it has no data here."""
    if not tensor.buffer:
        return None
    what = f"graph, {tensor.name!r}"
    block = session.find_block(what, tensor.buffer)
    session.check_place(what, tensor, block)
    return block


def _check_spare(
    session: Checked, tensor: TensorView, block: Block, sources: list[TensorView]
) -> None:
    """The room that a node has behind its result holds none of what it reads."""
    room = session.asked(block.device, tensor)
    if room <= tensor.nbytes:
        return
    start, end = tensor.data + tensor.nbytes, tensor.data + room
    for source in sources:
        overlap = source.data < end and start < source.data + source.nbytes
        session.notes.check(
            "tensor/alloc-size",
            not overlap,
            f"graph, {tensor.name!r}: the room asked for holds its source {source.name!r}",
        )


def _results(
    nodes: list[int],
    by_id: dict[int, Any],
    views: dict[int, TensorView],
    placed: dict[int, Block | None],
    ops: tuple[Op, ...],
) -> list[tuple[Block, int, int]]:
    found = []
    for node in nodes:
        row, tensor, block = by_id[node], views[node], placed[node]
        if block is None or ops[row.op] in _VIEWS or not row.flags & _COMPUTE:
            continue
        # Of a part with holes in it the bytes between don't belong to the result.
        if is_contiguous(tensor.type, tensor.ne, tensor.nb):
            found.append((block, tensor.data - block.base, tensor.nbytes))
    return found
