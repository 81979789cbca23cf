"""A client of any ggml RPC server: connections, graphs, tensors; see docs/python.md.

Names are loaded when they are first asked for: who needs a connection alone loads no more.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from client.backend import Backend as Backend
    from client.backend import PreparedGraph as PreparedGraph
    from client.builder.graph import Graph as Graph
    from client.builder.graph import GraphBuilder as GraphBuilder
    from client.connection import Connection as Connection
    from client.connection import connect as connect
    from client.connection import connect_any as connect_any
    from client.errors import AllocationFailed as AllocationFailed
    from client.errors import ConnectionLost as ConnectionLost
    from client.errors import GraphFailed as GraphFailed
    from client.errors import ServerLost as ServerLost
    from client.errors import UnsupportedCommand as UnsupportedCommand
    from client.errors import VersionMismatch as VersionMismatch
    from client.gguf_file import load_gguf as load_gguf
    from client.gguf_file import read_tensors as read_tensors
    from client.split.backend import SplitBackend as SplitBackend
    from client.split.backend import SplitProduct as SplitProduct
    from client.split.backend import SplitWeight as SplitWeight
    from client.tensors import ShapeError as ShapeError
    from protocol.ggml.ops import Op as Op
    from protocol.ggml.types import GgmlType as GgmlType
    from protocol.tensor import Tensor as Tensor

# Where each name is defined.
_HOMES = {
    "AllocationFailed": "client.errors",
    "Backend": "client.backend",
    "Connection": "client.connection",
    "ConnectionLost": "client.errors",
    "GgmlType": "protocol.ggml.types",
    "Graph": "client.builder.graph",
    "GraphBuilder": "client.builder.graph",
    "GraphFailed": "client.errors",
    "Op": "protocol.ggml.ops",
    "PreparedGraph": "client.backend",
    "ServerLost": "client.errors",
    "ShapeError": "client.tensors",
    "SplitBackend": "client.split.backend",
    "SplitProduct": "client.split.backend",
    "SplitWeight": "client.split.backend",
    "Tensor": "protocol.tensor",
    "UnsupportedCommand": "client.errors",
    "VersionMismatch": "client.errors",
    "connect": "client.connection",
    "connect_any": "client.connection",
    "load_gguf": "client.gguf_file",
    "read_tensors": "client.gguf_file",
}

__all__ = [
    "AllocationFailed",
    "Backend",
    "Connection",
    "ConnectionLost",
    "GgmlType",
    "Graph",
    "GraphBuilder",
    "GraphFailed",
    "Op",
    "PreparedGraph",
    "ServerLost",
    "ShapeError",
    "SplitBackend",
    "SplitProduct",
    "SplitWeight",
    "Tensor",
    "UnsupportedCommand",
    "VersionMismatch",
    "connect",
    "connect_any",
    "load_gguf",
    "read_tensors",
]


def __getattr__(name: str) -> Any:
    """Load a public name. Raises AttributeError for any other."""
    if name not in _HOMES:
        raise AttributeError(f"module 'client' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
