"""From the wire's tensor array to linked tensors: references resolved, extents inside buffers.

Everything later (contracts, plans, kernels) relies on what is established here:

* every id that a node or tensor names is present, ids are unique;
* references have no cycle, and a node reads only what earlier nodes or no node computes;
* types and op numbers exist in the dialect, rows are whole blocks;
* ops, and what their op_params say, are those of the newest ggml, whatever the client numbers;
* elements and blocks are aligned, as ggml's are by construction;
* a tensor with an address lies wholly inside a live buffer of this client, counted in Python
  integers; one whose data is not here has address 0;
* the bytes that a tensor's elements would take side by side are not many times those it lies in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from protocol.dialects import Dialect
from protocol.ggml.ops import Op, TensorFlag
from protocol.ggml.types import TYPE_INFO, GgmlType
from protocol.graph_payload import GraphPayload
from protocol.messages import MAX_PARAM_WORDS
from protocol.numbering import canonical_params, padding_behind
from rpc_server.graph.errors import GraphError
from rpc_server.graph.tensor import Tensor

_TYPES = {int(t): t for t in GgmlType}
_COLUMNS = (
    "id", "type", "buffer", "ne", "nb", "op", "op_params", "flags", "data", "name", "use_count",
)  # fmt: skip

# Strides below an element's size make any number of elements out of a few bytes, and a kernel busy
# for days. Windows that overlap, or rows that repeat, are well within this.
_MOST_REPEATED = 64
_REPEATED_FROM = 64 << 20


class BufferLike(Protocol):
    """What parsing needs of a buffer: where it lies on the wire and in memory, in bytes."""

    @property
    def base(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def address(self) -> int: ...


Resolve = Callable[[int], BufferLike | None]


@dataclass(slots=True)
class LinkedGraph:
    """Nodes in execution order, views included; ``dialect`` is the numbering they were read by."""

    nodes: Sequence[Tensor]
    dialect: Dialect


def parse_graph(payload: GraphPayload, dialect: Dialect, resolve: Resolve) -> LinkedGraph:
    """Link and check the graph of a GRAPH_COMPUTE.

    ``resolve`` maps a buffer handle off the wire to the client's buffer, None if it has no such.
    Raises GraphError.
    """
    tensors = parse_tensors(payload.tensors, dialect, resolve)
    node_ids: list[int] = payload.nodes.tolist()
    nodes = [tensor_with_id(tensors, id_) for id_ in node_ids]
    check_order(nodes)
    return LinkedGraph(_to_compute(nodes, dialect), dialect)


def parse_tensors(wire: Any, dialect: Dialect, resolve: Resolve) -> dict[int, Tensor]:
    """Link and check an array of the wire's tensors; they by id. Raises GraphError."""
    ids: list[int] = wire["id"].tolist()
    index = {id_: i for i, id_ in enumerate(ids)}
    if len(index) != len(ids):
        raise GraphError("a tensor id occurs twice in the graph")
    if 0 in index:
        raise GraphError("a tensor has id 0")
    tensors = _read_tensors(wire, dialect, resolve)
    _link(tensors, wire, index)
    if dialect.numbering.pads_behind:
        _say_padding(tensors)
    return dict(zip(ids, tensors, strict=True))


def tensor_with_id(tensors: dict[int, Tensor], id_: int) -> Tensor:
    """The tensor that the graph names as a node. Raises GraphError."""
    tensor = tensors.get(id_)
    if tensor is None:
        raise GraphError(f"node {id_:#x} is not among the graph's tensors")
    return tensor


def _read_tensors(wire: Any, dialect: Dialect, resolve: Resolve) -> list[Tensor]:
    numbering = dialect.numbering
    ops = numbering.ops
    buffers: dict[int, BufferLike | None] = {}
    columns = [wire[name].tolist() for name in _COLUMNS]
    tensors: list[Tensor] = []
    for id_, type_, handle, ne, nb, op, params, flags, data, name, use_count in zip(
        *columns, strict=True
    ):
        label = name.split(b"\0", 1)[0].decode("utf-8", "replace")
        if type_ not in _TYPES:
            raise GraphError(f"tensor '{label}': unknown type {type_}")
        if op >= len(ops):
            raise GraphError(f"tensor '{label}': unknown op {op}, {dialect.name} has {len(ops)}")
        tensor_type = _TYPES[type_]
        if ne[0] % TYPE_INFO[tensor_type].block_size:
            raise GraphError(
                f"tensor '{label}': rows of {ne[0]} {tensor_type.name} are not whole blocks"
            )
        tensor = Tensor(
            id=id_,
            name=label,
            type=tensor_type,
            op=ops[op],
            ne=tuple(ne),
            nb=tuple(nb),
            op_params=canonical_params(numbering, ops[op], tuple(params)),
            flags=flags,
            use_count=use_count,
        )
        if handle or data:
            if handle not in buffers:
                buffers[handle] = resolve(handle) if handle else None
            tensor.address = _locate(tensor, data, buffers[handle])
        tensors.append(tensor)
    return tensors


def _locate(tensor: Tensor, data: int, buffer: BufferLike | None) -> int:
    """Host address of a tensor's data; 0 where it has none here.

    Up to protocol 6 clients name buffers that they have on other servers, for sources that nothing
    here reads; a node that does read them is refused by its contract.
    """
    if buffer is None or not data:
        return 0
    # Where a GPU loads words of 4 bytes an odd address ends all work of the card, of all clients.
    alignment = TYPE_INFO[tensor.type].alignment
    if alignment > 1:
        strides = [nb for ne, nb in zip(tensor.ne, tensor.nb, strict=True) if ne > 1]
        if any(n % alignment for n in (data, *strides)):
            raise GraphError(f"tensor '{tensor.name}': {tensor.type.name} that is not aligned")
    offset = data - buffer.base
    if offset < 0 or offset + tensor.nbytes > buffer.size:
        raise GraphError(
            f"tensor '{tensor.name}': bytes [{offset}, {offset + tensor.nbytes}) lie outside "
            f"its buffer of {buffer.size}"
        )
    dense = tensor.row_size * tensor.nrows
    if dense > _REPEATED_FROM and dense > _MOST_REPEATED * tensor.nbytes:
        raise GraphError(
            f"tensor '{tensor.name}': {dense} bytes of elements lie in {tensor.nbytes} bytes"
        )
    return buffer.address + offset


def _link(tensors: list[Tensor], wire: Any, index: dict[int, int]) -> None:
    sources: list[list[int]] = wire["src"].tolist()
    views: list[int] = wire["view_src"].tolist()
    ordered = True
    for i, (tensor, source_ids, view_id) in enumerate(zip(tensors, sources, views, strict=True)):
        linked: list[Tensor | None] = []
        for k, id_ in enumerate((*source_ids, view_id)):
            if id_ == 0:
                linked.append(None)
                continue
            at = index.get(id_)
            if at is None:
                raise GraphError(f"tensor '{tensor.name}': source {id_:#x} is not in the graph")
            if at == i and k == 1 and tensor.op is Op.CPY:
                # ggml_cast: a copy whose destination is its own result.
                linked.append(None)
                continue
            ordered = ordered and at < i
            linked.append(tensors[at])
        tensor.view_src = linked.pop()
        tensor.src = tuple(linked)
    # Clients write tensors after what they refer to, which rules cycles out; only another order
    # needs the search.
    if not ordered:
        _refuse_cycles(tensors)


def _say_padding(tensors: list[Tensor]) -> None:
    """Give each PAD the op_params that it has in newer releases."""
    for tensor in tensors:
        source = tensor.src[0]
        if tensor.op is Op.PAD and source is not None:
            tensor.op_params = padding_behind(tensor.ne, source.ne, MAX_PARAM_WORDS)


def _refuse_cycles(tensors: list[Tensor]) -> None:
    done: set[int] = set()
    for root in tensors:
        if id(root) in done:
            continue
        path: set[int] = set()
        stack: list[tuple[Tensor, bool]] = [(root, False)]
        while stack:
            tensor, leaving = stack.pop()
            key = id(tensor)
            if leaving:
                path.discard(key)
                done.add(key)
                continue
            if key in path:
                raise GraphError(f"tensor '{tensor.name}' depends on itself")
            if key in done:
                continue
            path.add(key)
            stack.append((tensor, True))
            for other in (*tensor.src, tensor.view_src):
                if other is not None and id(other) not in done:
                    if id(other) in path:
                        raise GraphError(f"tensor '{other.name}' depends on itself")
                    stack.append((other, False))


def check_order(nodes: list[Tensor]) -> None:
    """Raises GraphError if a node reads what a later one computes."""
    position = {id(node): i for i, node in enumerate(nodes)}
    for i, node in enumerate(nodes):
        for source in (*node.src, node.view_src):
            if source is not None and position.get(id(source), -1) > i:
                raise GraphError(f"{node.label}: source '{source.name}' is computed after it")


def _to_compute(nodes: list[Tensor], dialect: Dialect) -> list[Tensor]:
    # The flag came in 2026-01; clients of protocol 3.6 exist with and without it.
    chosen = [node for node in nodes if node.flags & TensorFlag.COMPUTE]
    if not chosen and not dialect.always_flags:
        return nodes
    return chosen


def label_of_message(message: Any) -> str:
    """The name that an rpc_tensor message gives, however it is written."""
    text: str = message.name.split(b"\0", 1)[0].decode("utf-8", "replace")
    return text


def check_message(message: Any) -> GgmlType:
    """The type of an rpc_tensor message; GraphError if it is unknown or a row is broken blocks."""
    type_ = _TYPES.get(message.type)
    if type_ is None:
        raise GraphError(f"tensor '{label_of_message(message)}': unknown type {message.type}")
    if message.ne[0] % TYPE_INFO[type_].block_size:
        raise GraphError(
            f"tensor '{label_of_message(message)}': rows of {message.ne[0]} {type_.name} are not "
            "whole blocks"
        )
    return type_


def tensor_of_message(message: Any, dialect: Dialect) -> Tensor:
    """A tensor from a single rpc_tensor message (GET_ALLOC_SIZE), without data and sources.

    Raises GraphError for an unknown type, op or a row of broken blocks.
    """
    type_ = check_message(message)
    op = dialect.ops[message.op] if message.op < len(dialect.ops) else Op.NONE
    return Tensor(
        id=message.id,
        name=label_of_message(message),
        type=type_,
        op=op,
        ne=tuple(message.ne),
        nb=tuple(message.nb),
        op_params=tuple(message.op_params),
        flags=message.flags,
    )
