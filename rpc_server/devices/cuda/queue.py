"""One client's graphs on a card: a stream of their own, beside those of other clients."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from protocol.dialects import Dialect
from protocol.graph_payload import GraphPayload
from protocol.split import ProgramPayload
from rpc_server.devices.cuda.plan import CudaPlan, CudaPlanBuilder, StatusWord
from rpc_server.graph.errors import GraphError
from rpc_server.graph.parse import BufferLike, Resolve, parse_graph

if TYPE_CHECKING:
    from rpc_server.devices.cpu.streaming.transfer import StreamPeer
    from rpc_server.devices.cuda.device import CudaDevice
    from rpc_server.devices.cuda.storage import CudaStorage

T = TypeVar("T")


class CudaQueue:
    """What graphs of one client are made and run with; one of its jobs runs at a time.

    The card gives it nothing before the first graph; :meth:`leave` gives all of it back.
    """

    def __init__(self, device: CudaDevice) -> None:
        self.device = device
        self.card = device.card
        # Graphs run on it, one after the other.
        self.stream = self.card.stream()
        self._status: StatusWord | None = None
        self._library: int | None = None
        self._builder = CudaPlanBuilder(self)

    @property
    def status(self) -> StatusWord:
        """Where kernels tell what failed. Raises MemoryError."""
        if self._status is None:
            self._status = StatusWord(self.card, self.stream)
        return self._status

    @property
    def library(self) -> int:
        """The handle of cuBLAS for this stream."""
        if self._library is None:
            self._library = self.card.library()
        return self._library

    def prepare(self, payload: GraphPayload, dialect: Dialect, resolve: Resolve) -> CudaPlan:
        """Plan a graph of ``dialect``."""
        storages: dict[int, CudaStorage] = {}

        def watched(handle: int) -> BufferLike | None:
            buffer = resolve(handle)
            storage = getattr(buffer, "storage", None)
            if storage is not None:
                storages[handle] = storage
            return buffer

        return self._builder.build(parse_graph(payload, dialect, watched), list(storages.values()))

    def program(
        self, payload: ProgramPayload, dialect: Dialect, resolve: Resolve, peer: StreamPeer
    ) -> CudaPlan:
        """Nobody asks for it: the extension is not offered, so coordinators send whole graphs."""
        raise GraphError("programs of the split extension don't run on a GPU")

    def submit(self, job: Callable[[], T]) -> concurrent.futures.Future[T]:
        """Run ``job`` on a thread of the device's."""
        return self.device.threads.submit(job)

    def leave(self) -> None:
        """Give back what the card has given; plans must be gone, and nothing may run."""
        self._builder.close()
        if self._status is not None:
            self._status.close()
            self._status = None
        if self._library is not None:
            self.card.close_library(self._library)
            self._library = None
