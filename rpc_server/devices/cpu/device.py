"""The CPU as a device: host memory, one thread that runs graphs with the executor's help."""

from __future__ import annotations

import concurrent.futures
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from protocol.dialects import Dialect
from protocol.ggml_types import GgmlType
from protocol.graph_payload import GraphPayload
from protocol.split import ProgramPayload, split_status_fields
from rpc_server.devices.cpu.storage import HostStorage
from rpc_server.graph.errors import GraphError
from rpc_server.graph.parse import Resolve, parse_graph
from rpc_server.graph.tensor import Tensor

if TYPE_CHECKING:
    from rpc_server.devices.cpu.plan import CpuPlan, PlanBuilder
    from rpc_server.split.device import SplitPlan
    from rpc_server.split.exchange import Peer

T = TypeVar("T")


class CpuDevice:
    """ggml's CPU backend, served by numba kernels and array references.

    ``use_kernels=False`` runs every op by its array reference: slow, for comparison.
    """

    name = "CPU"
    # ggml's CPU buffers are aligned to 32 bytes; a cache line suits our vectors better.
    alignment = 64
    max_size = (1 << 64) - 1

    def __init__(self, n_threads: int | None = None, *, use_kernels: bool = True) -> None:
        self.n_threads = n_threads or available_cores()
        self.description = processor_name()
        self._use_kernels = use_kernels
        self._builder: PlanBuilder | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="cpu-0")

    @property
    def n_parts(self) -> int:
        """Weights are kept whole."""
        return 0

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the machine."""
        return system_memory()

    def allocate(self, size: int, proportions: Sequence[float] = ()) -> HostStorage:
        """Raises MemoryError when more is asked for than the machine has free."""
        if size > self.memory()[0]:
            raise MemoryError(f"{size} bytes asked for, {self.memory()[0]} free")
        return HostStorage(size)

    def split_status(self) -> dict[str, Any]:
        """Nothing is split here."""
        return split_status_fields()

    def alloc_size(self, tensor: Tensor) -> int:
        """Same as ggml_nbytes: this device pads nothing."""
        return tensor.nbytes

    def prepare(
        self, payload: GraphPayload, dialects: Sequence[Dialect], resolve: Resolve
    ) -> CpuPlan | SplitPlan:
        """Plan under the first of ``dialects`` whose op numbering makes the graph valid."""
        first: GraphError | None = None
        for dialect in dialects:
            try:
                return self._plans().build(parse_graph(payload, dialect, resolve))
            except GraphError as error:
                first = first or error
        raise first or GraphError("no dialect to read the graph by")

    def program(
        self, payload: ProgramPayload, dialect: Dialect, resolve: Resolve, peer: Peer
    ) -> CpuPlan | SplitPlan:
        """A program of the split extension. Raises GraphError."""
        from rpc_server.split.worker import program_items

        items = program_items(payload, dialect, resolve, peer)
        return self._plans().build_items(items, dialect)

    def submit(self, job: Callable[[], T]) -> concurrent.futures.Future[T]:
        return self._thread.submit(job)

    def expect_weights(self, type: GgmlType) -> None:
        """Compile (or load) the kernels of this weight type, and at first what all graphs need."""

        def compile_kernels() -> None:
            self._plans()
            if self._use_kernels:
                from rpc_server.devices.cpu.lower.matmul import warm

                warm([type])

        self.submit(compile_kernels)

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    def _plans(self) -> PlanBuilder:
        # numba takes half a second to import: not before the server listens.
        if self._builder is None:
            from rpc_server.devices.cpu.executor import Executor
            from rpc_server.devices.cpu.plan import PlanBuilder
            from rpc_server.devices.cpu.scratch import ScratchArena

            Executor.compile()
            self._builder = PlanBuilder(
                Executor(self.n_threads), ScratchArena(), use_kernels=self._use_kernels
            )
        return self._builder


def available_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def system_memory() -> tuple[int, int]:
    """Available and total bytes of RAM."""
    try:
        fields = {}
        for line in Path("/proc/meminfo").read_text().splitlines():
            key, _, rest = line.partition(":")
            fields[key] = int(rest.split()[0]) * 1024
        return fields["MemAvailable"], fields["MemTotal"]
    except (OSError, KeyError, ValueError):
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return free, pages
