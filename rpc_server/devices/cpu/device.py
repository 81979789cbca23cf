"""The CPU as a device: host memory, and threads that clients have by turns."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from protocol.dialects import Dialect
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.graph_payload import GraphPayload
from protocol.split import ProgramPayload, split_status_fields
from protocol.tensor import Tensor
from rpc_server.devices.base import Plan, StopWord
from rpc_server.devices.cpu.instruction_sets import chosen_isa, host_isas
from rpc_server.devices.cpu.machine import available_cores, processor_name, system_memory
from rpc_server.devices.cpu.mapped import MappedStorage
from rpc_server.devices.cpu.scratch import IdleScratch, ScratchArena
from rpc_server.devices.cpu.turns import DeviceShare, Turns
from rpc_server.devices.planning.kinds import KindMemory
from rpc_server.graph.parse import Resolve, parse_graph
from rpc_server.native.routine import CompileError

if TYPE_CHECKING:
    from rpc_server.devices.cpu.executor import Executor
    from rpc_server.devices.cpu.kernels.interface.stream import StreamPeer
    from rpc_server.devices.cpu.kinds import CpuKind
    from rpc_server.devices.cpu.plan import CpuPlan, CpuPlanBuilder
    from rpc_server.devices.cpu.planner import PlanItem
    from rpc_server.devices.planning.group import LinkGroup

T = TypeVar("T")

log = logging.getLogger(__name__)

# Scratch that clients keep between graphs, of all together.
_IDLE_SCRATCH = 64 << 20


class CpuDevice:
    """ggml's CPU backend, served by compiled kernels and array references.

    ``use_kernels=False`` runs every op by its array reference: slow, for comparison. With
    ``baseline`` clients' graphs don't wait until all their kernels are compiled.
    """

    name = "CPU"
    # ggml's CPU buffers are aligned to 32 bytes; a cache line suits our vectors better.
    alignment = 64
    max_size = (1 << 64) - 1
    runs_programs = True
    runs_kernels = True
    no_swaps = ""
    # Processors don't get lost.
    lost = ""

    def __init__(
        self, n_threads: int | None = None, *, use_kernels: bool = True, baseline: bool = False
    ) -> None:
        self.n_threads = n_threads or available_cores()
        self._baseline = baseline
        self.description = processor_name()
        self._use_kernels = use_kernels
        self._threads: Executor | None = None
        self._starting = threading.Lock()
        self._turns = Turns()
        self._queues: weakref.WeakSet[CpuQueue] = weakref.WeakSet()
        # Ops whose kernels could not be compiled.
        self._without: set[Op] = set()
        # What is known of kinds of nodes, whoever's they are.
        self._kinds: KindMemory[CpuKind] = KindMemory()
        self.idle_scratch = IdleScratch(_IDLE_SCRATCH)

    @property
    def n_parts(self) -> int:
        """Weights are kept whole."""
        return 0

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the machine."""
        return system_memory()

    def capacity(self) -> int:
        """Return all that the machine has; memory that nobody has written to looks free to it."""
        return self.memory()[1]

    def allocate(self, size: int, proportions: Sequence[float] = ()) -> MappedStorage:
        """Allocate memory for a buffer; raise MemoryError when the machine has less free."""
        if size > self.memory()[0]:
            raise MemoryError(f"{size} bytes asked for, {self.memory()[0]} free")
        return MappedStorage(size)

    def split_status(self) -> dict[str, Any]:
        """Return empty fields: nothing is split here."""
        return split_status_fields()

    def alloc_size(self, tensor: Tensor) -> int:
        """Return ggml_nbytes: this device pads nothing."""
        return tensor.nbytes

    def queue(self, address: str = "") -> CpuQueue:
        """Return what graphs of one client run by, in turns with those of others.

        Clients of one ``address`` count as one beside those of other addresses.
        """
        made = CpuQueue(self, self._turns.share(address))
        self._queues.add(made)
        return made

    def builder(self, scratch: ScratchArena, share: DeviceShare) -> CpuPlanBuilder:
        """Return what makes plans for one client."""
        from rpc_server.devices.cpu.plan import CpuPlanBuilder

        executor = self._executor()
        return CpuPlanBuilder(
            executor,
            scratch,
            share=share,
            without=self._without,
            kinds=self._kinds,
            baseline=self._baseline,
        )

    def prefetch_kernels(self, type: GgmlType) -> None:
        """Have the kernels of this weight type loaded or compiled, and what most graphs need."""
        if self._use_kernels:
            # Neither the caller nor graphs of other clients are to wait for a compiler.
            threading.Thread(
                target=_request_kernels, args=(type, self._baseline), daemon=True
            ).start()

    def close(self) -> None:
        for queue in list(self._queues):
            queue.close()

    def _executor(self) -> Executor | None:
        # Not before the server listens: it takes a moment, or long if there is much to compile.
        with self._starting:
            if self._use_kernels and self._threads is None:
                from rpc_server.devices.cpu.executor import Executor

                try:
                    host_isas()
                    self._threads = Executor(self.n_threads, self._turns.word)
                except CompileError as error:
                    log.error("running without kernels, which is very slow: %s", error)
                    self._use_kernels = False
            return self._threads


class CpuQueue:
    """A queue for graphs of one client, on a thread of its own.

    It takes nothing before the first graph; :meth:`leave` gives all of it back.
    """

    def __init__(self, device: CpuDevice, share: DeviceShare) -> None:
        self._device = device
        self._share = share
        self._thread: concurrent.futures.ThreadPoolExecutor | None = None
        self._scratch: ScratchArena | None = None
        self._builder: CpuPlanBuilder | None = None

    @property
    def share(self) -> DeviceShare:
        """The client's part in the device."""
        return self._share

    def prepare(
        self, payload: GraphPayload, dialect: Dialect, resolve: Resolve, stop: StopWord | None
    ) -> CpuPlan:
        """Do what Queue says."""
        return self.plan_here(payload, dialect, resolve, wait=False, stop=stop)

    def plan_here(
        self,
        payload: GraphPayload,
        dialect: Dialect,
        resolve: Resolve,
        *,
        wait: bool = True,
        stop: StopWord | None = None,
    ) -> CpuPlan:
        """Plan for this machine alone; ``wait`` for kernels that are being compiled.

        Runs on the queue's thread, beside those that have the device meanwhile: planning uses
        nothing of it. Raises GraphError; NotReadyError when it is not to wait.
        """
        plans = self._plans()
        with self._share.aside():
            return plans.build(parse_graph(payload, dialect, resolve), wait=wait, stop=stop)

    def program(
        self,
        payload: ProgramPayload,
        dialect: Dialect,
        resolve: Resolve,
        peer: StreamPeer,
        group: LinkGroup | None = None,
    ) -> CpuPlan:
        """Return a program of the split extension. Raises GraphError."""
        from rpc_server.devices.cpu.streaming.program import program_items
        from rpc_server.devices.planning.program import linked_steps

        with self._share.aside():
            items = program_items(linked_steps(payload, dialect, resolve, group), peer, group)
            plan = self.plan_items(items, dialect)
        plan.keep = [item.held for item in items if not isinstance(item, Tensor)], group
        return plan

    def plan_items(self, items: Sequence[Tensor | PlanItem], dialect: Dialect) -> CpuPlan:
        """Return a plan of nodes and of what else is to be done between them.

        Waits for kernels that are being compiled. Raises GraphError.
        """
        return self._plans().build_items(items, dialect)

    def submit(self, job: Callable[[], T]) -> concurrent.futures.Future[T]:
        """Run ``job`` on the queue's thread, once it is the client's turn. Raises MemoryError."""
        if self._thread is None:
            self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="cpu-0")
        try:
            return self._thread.submit(self._run, job)
        except RuntimeError as error:
            # The next one is to try again.
            self._thread = None
            raise MemoryError(f"no thread for a client's graphs: {error}") from None

    def at_once(self, plan: Plan) -> bool:
        """Do what Queue says."""
        if plan.scratch:
            return self._share.at_once(lambda: self._with_scratch(plan.run))
        return self._share.at_once(plan.run)

    def _run(self, job: Callable[[], T]) -> T:
        with self._share.turn():
            return self._with_scratch(job)

    def _with_scratch(self, job: Callable[[], T]) -> T:
        """Do a job that may use scratch, which nobody gives back to the system meanwhile."""
        idle = self._device.idle_scratch
        if self._scratch is not None:
            idle.leave(self._scratch)
        try:
            return job()
        finally:
            if self._scratch is not None:
                idle.enter(self._scratch)

    def waited(self, now: float) -> float:
        """Return how long its jobs have waited for their turns until ``now``, in seconds."""
        return self._share.waited(now)

    def leave(self) -> None:
        """Give back its thread and its scratch; plans must be gone, and nothing may run."""
        if self._scratch is not None:
            self._device.idle_scratch.leave(self._scratch)
        self._scratch = self._builder = None
        if self._thread is not None:
            self._thread.shutdown(wait=False)

    def close(self) -> None:
        """Wait until what is under way is done, and end the thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)

    def _plans(self) -> CpuPlanBuilder:
        if self._builder is None:
            self._scratch = ScratchArena()
            self._builder = self._device.builder(self._scratch, self._share)
        return self._builder


def _request_kernels(type_: GgmlType, baseline: bool) -> None:
    from rpc_server.devices.cpu.baseline import later_kernels
    from rpc_server.devices.cpu.catalog import baseline_of_weights, kernels_of_weights, library

    try:
        compiled, isa = library(), chosen_isa()
        kernels = kernels_of_weights(type_, isa)
        if not baseline:
            compiled.request(kernels)
            return
        # What is compiled in the background gives its processors back at once.
        compiled.interrupt()
        if compiled.missing(kernels[:1]):
            # By these the first graph can run: sooner than all that is asked for below.
            compiled.pending(baseline_of_weights(type_, isa), urgent=True)
        later_kernels.absent(kernels, urgent=False)
    except (CompileError, ValueError) as error:
        # The first graph that needs them tells its client.
        log.debug("no kernels ahead of the first graph: %s", error)
