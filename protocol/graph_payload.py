"""The payload of GRAPH_COMPUTE: node ids in execution order and the array of tensors.

Layout (from protocol 3.0; before, ``device`` is missing), little-endian and packed::

    device u32 | n_nodes u32 | nodes u64[n_nodes] | n_tensors u32 | rpc_tensor[n_tensors]
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.dialects import Dialect
from protocol.errors import ProtocolError
from protocol.messages import NAME_SIZES, RPC_TENSOR_DTYPES


@dataclass(slots=True)
class GraphPayload:
    """A graph as it was sent: ``nodes`` uint64[n_nodes], ``tensors`` rpc_tensor rows [n]."""

    device: int
    nodes: npt.NDArray[np.uint64]
    tensors: npt.NDArray[Any]


def graph_device(payload: bytes | bytearray | memoryview, dialect: Dialect) -> int:
    """Return the number of the device that a payload is for.

    Raises ProtocolError if it ends before that.
    """
    if not dialect.graph_device:
        return 0
    if len(payload) < 4:
        raise ProtocolError(f"graph of {len(payload)} bytes ends within a count")
    return int(struct.unpack_from("<I", payload)[0])


def decode_graph(payload: bytes | bytearray | memoryview, dialect: Dialect) -> GraphPayload:
    """Read a payload without copying it; raises ProtocolError if its counts don't fill it."""
    size = len(payload)
    at = 0

    def word() -> int:
        nonlocal at
        if at + 4 > size:
            raise ProtocolError(f"graph of {size} bytes ends within a count")
        value: int = struct.unpack_from("<I", payload, at)[0]
        at += 4
        return value

    device = word() if dialect.graph_device else 0
    n_nodes = word()
    if at + 8 * n_nodes > size:
        raise ProtocolError(f"graph of {size} bytes can't hold {n_nodes} nodes")
    nodes = np.frombuffer(payload, "<u8", n_nodes, at)
    at += 8 * n_nodes
    n_tensors = word()
    taken = dialect.tensor_size * n_tensors
    if at + taken != size:
        raise ProtocolError(
            f"graph of {size} bytes: {n_tensors} tensors take {taken}, {size - at} are left"
        )
    tensors = np.frombuffer(payload, dialect.tensor_dtype, n_tensors, at)
    return GraphPayload(device, nodes, tensors)


def graph_name_sizes(payload: bytes | bytearray | memoryview, dialect: Dialect) -> list[int]:
    """Return the sizes of names with which the counts of a payload fill it; all for no tensors."""
    at = 4 if dialect.graph_device else 0
    if at + 4 > len(payload):
        return []
    at += 4 + 8 * int(struct.unpack_from("<I", payload, at)[0])
    if at + 4 > len(payload):
        return []
    (n_tensors,) = struct.unpack_from("<I", payload, at)
    left = len(payload) - at - 4
    return [n for n in NAME_SIZES if n_tensors * RPC_TENSOR_DTYPES[n].itemsize == left]


def encode_graph(graph: GraphPayload, dialect: Dialect) -> bytes:
    """Return the payload's bytes; ``device`` must be 0 where the dialect has no room for it.

    Raises ValueError where it is another.
    """
    if graph.device and not dialect.graph_device:
        raise ValueError(f"protocol {dialect.name} has one device, not number {graph.device}")
    head = struct.pack("<I", graph.device) if dialect.graph_device else b""
    nodes = np.ascontiguousarray(graph.nodes, "<u8")
    tensors = np.ascontiguousarray(graph.tensors, dialect.tensor_dtype)
    return b"".join(
        (
            head,
            struct.pack("<I", len(nodes)),
            nodes.tobytes(),
            struct.pack("<I", len(tensors)),
            tensors.tobytes(),
        )
    )
