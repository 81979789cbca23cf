"""Tensors as the wire's fields, for cases that send what no client library would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from client.tensors import dims
from protocol.dialects import Dialect
from protocol.ggml.ops import Op, TensorFlag
from protocol.ggml.types import GgmlType
from protocol.graph_payload import GraphPayload, encode_graph
from protocol.messages import MAX_PARAM_WORDS, MAX_SOURCES, RPC_TENSOR_DTYPE
from protocol.numbering import wire_params
from protocol.tensor import contiguous_strides

Fields = dict[str, Any]


def tensor(
    id: int,
    ne: Sequence[int],
    *,
    type: GgmlType = GgmlType.F32,
    buffer: int = 0,
    data: int = 0,
    **fields: Any,
) -> Fields:
    """Return the fields of a contiguous rpc_tensor, any of them replaced by ``fields``."""
    full = dims(ne)
    return {
        "id": id,
        "type": int(type),
        "buffer": buffer,
        "ne": list(full),
        "nb": [n & 0xFFFFFFFF for n in contiguous_strides(type, full)],
        "op": 0,
        "op_params": [0] * MAX_PARAM_WORDS,
        "flags": 0,
        "src": [0] * MAX_SOURCES,
        "view_src": 0,
        "view_offs": 0,
        "data": data,
        "name": f"t{id}".encode(),
        "use_count": 0,
        **fields,
    }


NO_TENSOR: Mapping[str, Any] = {
    **tensor(0, (0,)),
    "ne": [0] * 4,
    "nb": [0] * 4,
    "name": b"",
}


def sources(*ids: int) -> list[int]:
    """Return ten source ids, filled up with none."""
    return [*ids, *[0] * (MAX_SOURCES - len(ids))]


def sources_of(*tensors: Fields) -> list[Mapping[str, Any]]:
    """Return the ten sources of a GET_ALLOC_SIZE."""
    return [*tensors, *[NO_TENSOR] * (MAX_SOURCES - len(tensors))]


@dataclass(frozen=True, slots=True)
class RemoteBuffer:
    """A buffer on the server: its handle, address and size as the server told them."""

    handle: int
    base: int
    size: int
    dialect: Dialect

    def leaf(
        self,
        id: int,
        ne: Sequence[int],
        at: int = 0,
        type: GgmlType = GgmlType.F32,
        **fields: Any,
    ) -> Fields:
        """Return a tensor ``at`` bytes into the buffer."""
        place = {"buffer": self.handle, "data": self.base + at}
        return tensor(id, ne, type=type, **{**place, **fields})

    def node(
        self,
        id: int,
        ne: Sequence[int],
        op: Op,
        *src: int,
        at: int = 0,
        type: GgmlType = GgmlType.F32,
        **fields: Any,
    ) -> Fields:
        """Return a tensor that a graph computes by ``op`` from the tensors with ids ``src``."""
        computed = {
            "op": self.dialect.op_number(op),
            "src": sources(*src),
            "flags": TensorFlag.COMPUTE,
        }
        if "op_params" in fields:
            params = wire_params(self.dialect.numbering, op, fields["op_params"])
            fields["op_params"] = list(params)
        return self.leaf(id, ne, at, type, **{**computed, **fields})

    def whole(self) -> Fields:
        """Return a tensor of bytes that covers the buffer."""
        return self.leaf(0x7FFF_FFFF, (self.size,), type=GgmlType.I8)


def tensor_array(tensors: Sequence[Mapping[str, Any]]) -> Any:
    """Return RPC_TENSOR_DTYPE[n] of tensors given as fields."""
    array = np.zeros(len(tensors), RPC_TENSOR_DTYPE)
    for row, fields in zip(array, tensors, strict=True):
        for name, value in fields.items():
            row[name] = value
    return array


def graph_bytes(
    dialect: Dialect,
    nodes: Sequence[Fields],
    leaves: Sequence[Fields] = (),
    device: int = 0,
    ids: Sequence[int] | None = None,
) -> bytes:
    """Return the payload of a GRAPH_COMPUTE: tensors are the leaves and then the nodes.

    ``ids`` are what it names as nodes, those of ``nodes`` unless given.
    """
    named = [node["id"] for node in nodes] if ids is None else list(ids)
    payload = GraphPayload(device, np.array(named, np.uint64), tensor_array([*leaves, *nodes]))
    return encode_graph(payload, dialect)
