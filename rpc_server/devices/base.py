"""What the server needs of a device: memory to give to clients and a thread that runs graphs."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from protocol.dialects import Dialect
from protocol.ggml_types import GgmlType
from protocol.graph_payload import GraphPayload
from rpc_server.graph.parse import BufferLike, Resolve
from rpc_server.graph.tensor import Tensor

T = TypeVar("T")

__all__ = ["BufferLike", "Device", "Plan", "Resolve", "Storage"]


class Storage(Protocol):
    """Memory of one buffer on a device; offsets and sizes are bytes the caller has checked."""

    size: int
    address: int

    def view(self, offset: int, size: int) -> memoryview:
        """Writable host view of the bytes."""
        ...

    def place(self, offset: int, size: int) -> memoryview:
        """Like :meth:`view`, for an upload that is about to write all of it."""
        ...

    def fill(self, offset: int, size: int, value: int) -> None: ...

    def copy_from(self, other: Storage, src_offset: int, dst_offset: int, size: int) -> None: ...

    def close(self) -> None:
        """Give the memory back to the system; views of it must be gone."""
        ...


class Plan(Protocol):
    """A graph made ready; ``dialect`` is the op numbering under which it validated."""

    dialect: Dialect

    def run(self) -> None:
        """Run the whole graph on the calling thread (the device's). Raises GraphError."""
        ...


class Device(Protocol):
    """One device as clients see it. ``alignment`` and ``max_size`` are bytes."""

    name: str
    description: str
    alignment: int
    max_size: int

    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""
        ...

    def allocate(self, size: int) -> Storage:
        """Memory for a buffer, zero-filled. Raises MemoryError."""
        ...

    def alloc_size(self, tensor: Tensor) -> int:
        """Bytes the tensor needs in a buffer of this device (GET_ALLOC_SIZE)."""
        ...

    def prepare(self, payload: GraphPayload, dialects: Sequence[Dialect], resolve: Resolve) -> Plan:
        """Parse, validate and plan a graph; the first dialect that fits is taken.

        Runs on the device's thread. Raises GraphError.
        """
        ...

    def expect_weights(self, type: GgmlType) -> None:
        """Weights of ``type`` are being uploaded: get kernels ready, without blocking."""
        ...

    def submit(self, job: Callable[[], T]) -> concurrent.futures.Future[T]:
        """Run ``job`` on the device's own thread, after the jobs submitted before it."""
        ...

    def close(self) -> None: ...
