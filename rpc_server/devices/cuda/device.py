"""A GPU as a device: memory of its own, a stream for graphs, a thread that gives it work."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from protocol.dialects import Dialect
from protocol.ggml_types import GgmlType
from protocol.graph_payload import GraphPayload
from protocol.split import ProgramPayload, split_status_fields
from rpc_server.devices.cuda.card import Card
from rpc_server.devices.cuda.kernels import kernel_of_weights
from rpc_server.devices.cuda.plan import CudaPlan, PlanBuilder, StatusWord
from rpc_server.devices.cuda.storage import CudaStorage, StagingPool
from rpc_server.devices.planning import under_first_dialect
from rpc_server.graph.errors import GraphError
from rpc_server.graph.parse import Resolve, parse_graph
from rpc_server.graph.tensor import Tensor

if TYPE_CHECKING:
    from rpc_server.split.exchange import Peer

T = TypeVar("T")

log = logging.getLogger(__name__)


class CudaDevice:
    """GPU number ``index``. Raises CardError if it can't be used.

    ``allow_host_ops`` lets ops run on the host that have no kernel here.
    """

    # As ggml's CUDA backend.
    alignment = 128
    max_size = (1 << 64) - 1
    # A GPU can't read a socket.
    runs_programs = False

    def __init__(self, index: int, *, allow_host_ops: bool = False) -> None:
        self.card = Card(index)
        self.name = f"CUDA{index}"
        major, minor = divmod(self.card.capability, 10)
        self.description = f"{self.card.name} (compute capability {major}.{minor})"
        self.allow_host_ops = allow_host_ops
        # What graphs run on.
        self.stream = self.card.stream()
        self.staging = StagingPool(self.card)
        self.status = StatusWord(self.card, self.stream)
        self._builder = PlanBuilder(self)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix=self.name)
        # Buffers that something is on its way to, on streams of their own.
        self._written: set[CudaStorage] = set()
        self._lock = threading.Lock()

    @property
    def n_parts(self) -> int:
        """Weights are kept whole."""
        return 0

    def split_status(self) -> dict[str, Any]:
        """Nothing is split here."""
        return split_status_fields()

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the card."""
        return self.card.memory()

    def allocate(self, size: int, proportions: Sequence[float] = ()) -> CudaStorage:
        """Raises MemoryError."""
        return CudaStorage(self, size)

    def alloc_size(self, tensor: Tensor) -> int:
        """Same as ggml_nbytes: this device pads nothing."""
        return tensor.nbytes

    def prepare(
        self, payload: GraphPayload, dialects: Sequence[Dialect], resolve: Resolve
    ) -> CudaPlan:
        """Plan under the first of ``dialects`` whose op numbering makes the graph valid."""
        return under_first_dialect(
            dialects, lambda d: self._builder.build(parse_graph(payload, d, resolve))
        )

    def program(
        self, payload: ProgramPayload, dialect: Dialect, resolve: Resolve, peer: Peer
    ) -> CudaPlan:
        """Nobody asks for it: the extension is not offered, so coordinators send whole graphs."""
        raise GraphError("programs of the split extension don't run on a GPU")

    def expect_weights(self, type: GgmlType) -> None:
        """Have the kernels of this weight type compiled while weights are uploading."""
        threading.Thread(target=self._get_ready, args=(type,), daemon=True).start()

    def _get_ready(self, type: GgmlType) -> None:
        try:
            self.card.function(kernel_of_weights("matvec", "multiply_1", type))
        except Exception as error:
            # The first graph that needs it tells its client.
            log.debug("no kernels of %s ahead of the first graph: %s", type.name, error)

    def submit(self, job: Callable[[], T]) -> concurrent.futures.Future[T]:
        return self._thread.submit(job)

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        self.stream.synchronize()
        self.status.close()

    # -- order between transfers and graphs ----------------------------------------------------

    def written(self, storage: CudaStorage) -> None:
        """Something is on its way to ``storage``: graphs have to come after it."""
        with self._lock:
            self._written.add(storage)

    def forget(self, storage: CudaStorage) -> None:
        with self._lock:
            self._written.discard(storage)

    def finish_writes(self) -> None:
        """What the stream of graphs is given from here on comes after all that was written."""
        with self._lock:
            written, self._written = self._written, set()
        for storage in written:
            self.stream.wait_event(self.card.mark(storage.stream))
