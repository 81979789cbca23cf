"""A GPU as a device: memory of its own, and for each client a queue that its graphs run on."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from collections.abc import Sequence
from typing import Any

from protocol.ggml.types import GgmlType
from protocol.split import split_status_fields
from protocol.tensor import Tensor
from rpc_server.devices.cuda.card import Card
from rpc_server.devices.cuda.kinds import LaunchMemory
from rpc_server.devices.cuda.lower.matmul import products_of
from rpc_server.devices.cuda.queue import CudaQueue
from rpc_server.devices.cuda.resources import StreamResources
from rpc_server.devices.cuda.storage import CudaStorage, PinnedPool
from rpc_server.devices.planning.transfers import TransfersOf

log = logging.getLogger(__name__)

# Graphs that the card has at a time: for each a thread gives it work and waits for it.
_AT_A_TIME = 8


class CudaDevice:
    """GPU number ``index``. Raises CardError if it can't be used.

    ``allow_host_ops`` lets ops run on the host that have no kernel here. ``transfers`` are by which
    programs of the split extension reach their clients; without, it runs none.
    """

    # As ggml's CUDA backend.
    alignment = 128
    max_size = (1 << 64) - 1
    # It has kernels and a compiler of its own.
    runs_kernels = False
    no_swaps = "a GPU exchanges nothing with other parts"

    def __init__(
        self, index: int, *, allow_host_ops: bool = False, transfers: TransfersOf | None = None
    ) -> None:
        self.card = Card(index)
        self.name = f"CUDA{index}"
        major, minor = divmod(self.card.capability, 10)
        self.description = f"{self.card.name} (compute capability {major}.{minor})"
        self.allow_host_ops = allow_host_ops
        self._transfers = transfers
        self.runs_programs = transfers is not None
        self.pinned = PinnedPool(self.card)
        self._patterns = LaunchMemory(self.card.multiprocessors, self.card.capability)
        self.threads = concurrent.futures.ThreadPoolExecutor(
            _AT_A_TIME, thread_name_prefix=self.name
        )

    @property
    def lost(self) -> str:
        """The reason why nothing more can be done with the card, as Device.lost."""
        return self.card.lost

    @property
    def n_parts(self) -> int:
        """Weights are kept whole."""
        return 0

    def split_status(self) -> dict[str, Any]:
        """Return empty fields: nothing is split here."""
        return split_status_fields()

    def memory(self) -> tuple[int, int]:
        """Return bytes that clients may still have, and all bytes of the card."""
        return self.card.memory()

    def capacity(self) -> int:
        """Return all that the card has."""
        return self.card.memory()[1]

    def allocate(self, size: int, proportions: Sequence[float] = ()) -> CudaStorage:
        """Allocate memory for a buffer. Raises MemoryError."""
        return CudaStorage(self.card, self.pinned, size)

    def alloc_size(self, tensor: Tensor) -> int:
        """Return ggml_nbytes: this device pads nothing."""
        return tensor.nbytes

    def queue(self, address: str = "") -> CudaQueue:
        """Return a queue for graphs of one client, beside those of others."""
        resources = StreamResources(
            self.name,
            self.card,
            self.pinned,
            self._patterns,
            allow_host_ops=self.allow_host_ops,
        )
        return CudaQueue(resources, self.threads, self._transfers)

    def prefetch_kernels(self, type: GgmlType) -> None:
        """Have the kernels of this weight type compiled while weights are uploading."""
        threading.Thread(target=self._get_ready, args=(type,), daemon=True).start()

    def _get_ready(self, type: GgmlType) -> None:
        try:
            for kernel in products_of(type, self.card.capability):
                self.card.function(kernel)
        except Exception as error:
            # The first graph that needs it tells its client.
            log.debug("no kernels of %s ahead of the first graph: %s", type.name, error)

    def close(self) -> None:
        self.threads.shutdown(wait=True)
