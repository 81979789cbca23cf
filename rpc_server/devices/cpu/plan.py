"""A graph made ready for the CPU device: programs of records, and references between them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

import numpy as np

import rpc_server.devices.cpu.lower  # fills the table of lowerings
import rpc_server.ops  # noqa: F401  (fills the op table)
from protocol.dialects import Dialect
from protocol.ggml.ops import Op
from rpc_server.devices.base import NotReadyError
from rpc_server.devices.cpu.catalog import Kernel, library
from rpc_server.devices.cpu.executor import STOPPED, Executor, RecordProgram
from rpc_server.devices.cpu.kernels.interface.schedule import SERIAL_BELOW, StepFlag, schedule
from rpc_server.devices.cpu.planner import (
    LOWERINGS,
    Emitted,
    PlanItem,
    Planner,
)
from rpc_server.devices.cpu.scratch import ScratchArena
from rpc_server.devices.planning.nodes import PlanSteps, lower_node
from rpc_server.devices.planning.records import STATUS_TEXT
from rpc_server.devices.planning.scratch import Labelled
from rpc_server.graph.errors import GraphError
from rpc_server.graph.parse import LinkedGraph
from rpc_server.graph.tensor import Tensor
from rpc_server.native.routine import NoMemoryNowError
from rpc_server.ops.arrays import ArrayContext
from rpc_server.ops.table import OPS, ContractError, OpSpec, require

log = logging.getLogger(__name__)

STATUS_TEXT[STOPPED] = "was stopped"

_NOT_IMPLEMENTED = "this combination is not implemented"

# A prompt may need scratch that later graphs don't; what is above this is given back after it.
_KEEP_SCRATCH = 64 << 20
# What a plan keeps of a record beside its words, and of a node that runs by its reference.
_LABEL_BYTES = 128
_NODE_BYTES = 4096


# Records that are scheduled together: each is held against all since the last barrier, and a graph
# may have a million.
_TOGETHER = 512


def _steps(records: list[Emitted]) -> list[int]:
    """The Step flags of records, scheduled in pieces with a barrier between them."""
    if all(r.work < SERIAL_BELOW and not r.private for r in records):
        return [int(StepFlag.SERIAL)] * len(records)
    steps: list[int] = []
    for at in range(0, len(records), _TOGETHER):
        if steps:
            steps[-1] |= StepFlag.BARRIER_AFTER
        steps += schedule(records[at : at + _TOGETHER])
    return steps


class CpuPlan:
    """Steps that run a graph from end to end.

    A step is a program (many nodes in one compiled call) or the array reference of one node.
    """

    shared = False

    def __init__(
        self,
        dialect: Dialect,
        steps: list[Callable[[], None]],
        scratch: int,
        arena: ScratchArena,
        interpreted: dict[str, int],
        programs: Sequence[RecordProgram] = (),
    ) -> None:
        self.dialect = dialect
        self._steps = steps
        self._programs = programs
        self._stopped = False
        # Peak bytes of scratch, and how many nodes of which op run without a kernel.
        self.scratch = scratch
        self.nbytes = (
            sum(program.nbytes + program.count * _LABEL_BYTES for program in programs)
            + sum(interpreted.values()) * _NODE_BYTES
        )
        self._arena = arena
        self.interpreted = interpreted
        # What records hold addresses of beside the client's buffers; its maker puts it here.
        self.keep: object = None

    def run(self) -> None:
        """Run every step. Raises GraphError naming the node that failed."""
        try:
            for step in self._steps:
                if self._stopped:
                    raise GraphError("was stopped")
                step()
        finally:
            if self.scratch > _KEEP_SCRATCH:
                self._arena.trim(_KEEP_SCRATCH)

    def stop(self) -> None:
        """Let a run end behind the node it is at, with a GraphError; from any thread, for good."""
        self._stopped = True
        for program in self._programs:
            program.stop()


class _DeclinedError(Exception):
    """Kernels of these ops can't be had; the graph is to be lowered without them.

    Those of ``now`` may be there for the next graph.
    """

    def __init__(self, ops: set[Op], now: set[Op]) -> None:
        super().__init__(ops, now)
        self.ops = ops
        self.now = now


class CpuPlanBuilder:
    """Makes plans for one executor; not shared between threads.

    Without an executor, or with ``use_kernels=False``, every node runs by its array reference.
    """

    def __init__(
        self, executor: Executor | None, scratch: ScratchArena, *, use_kernels: bool = True
    ) -> None:
        self._executor = executor
        self._scratch = scratch
        self._use_kernels = use_kernels
        self._context = ArrayContext()
        # Ops whose kernels could not be compiled.
        self._without: set[Op] = set()

    def build(self, graph: LinkedGraph, *, wait: bool = True) -> CpuPlan:
        """Hold each node against its contract and lower it. Raises GraphError.

        Waits for kernels that are being compiled, of this graph alone; with ``wait=False`` raises
        NotReadyError instead.
        """
        return self.build_items(graph.nodes, graph.dialect, wait=wait)

    def build_items(
        self, items: Sequence[Tensor | PlanItem], dialect: Dialect, *, wait: bool = True
    ) -> CpuPlan:
        """Like :meth:`build`, with what else is to be done between nodes."""
        without = set(self._without)
        while True:
            try:
                return self._build(items, dialect, wait, without)
            except _DeclinedError as declined:
                self._without |= declined.ops - declined.now
                without |= declined.ops

    def _build(
        self,
        items: Sequence[Tensor | PlanItem],
        dialect: Dialect,
        wait: bool,
        without: AbstractSet[Op],
    ) -> CpuPlan:
        """Raises GraphError, NotReadyError, _DeclinedError."""
        started = time.perf_counter()
        n_threads = self._executor.n_threads if self._executor else 1
        planner = Planner(n_threads, self._scratch, items)
        parts: PlanSteps[Emitted] = PlanSteps()

        def decline(node: Tensor, spec: OpSpec) -> None:
            require(spec.reference is not None, f"{node.label}: {_NOT_IMPLEMENTED}")
            planner.works_on_copies(node)
            parts.without_kernel(planner.take(), node)

        def lower(node: Tensor) -> bool:
            return node.op not in without and self._lower(node, planner)

        for item in items:
            if isinstance(item, Tensor):
                lower_node(item, planner, lower, decline)
                continue
            if self._executor is None:
                raise GraphError(f"{item.label} can't be reached without kernels")
            planner.begin(item)
            item.emit(planner)
        parts.append(planner.take())
        addresses = self._addresses(parts, wait)
        programs: list[RecordProgram] = []
        steps = parts.steps(
            self._reference_step, lambda run: self._program_step(run, addresses, programs)
        )
        log.debug(
            "planned %d nodes as %d steps in %.1f ms, %d KiB of scratch; without kernels: %s",
            len(items),
            len(steps),
            (time.perf_counter() - started) * 1e3,
            planner.peak >> 10,
            parts.interpreted or "none",
        )
        return CpuPlan(dialect, steps, planner.peak, self._scratch, parts.interpreted, programs)

    def _lower(self, node: Tensor, planner: Planner) -> bool:
        lowering = LOWERINGS.get(node.op)
        if lowering is None or self._executor is None or not self._use_kernels:
            return False
        before = len(planner.records)
        if lowering(node, planner):
            return True
        if len(planner.records) != before:
            raise RuntimeError(f"lowering of {node.op} declined a node after emitting records")
        return False

    def _addresses(self, parts: PlanSteps[Emitted], wait: bool) -> dict[Kernel, int]:
        """Where the code of all kernels is. Raises GraphError, NotReadyError, _DeclinedError."""
        users: dict[Kernel, list[Labelled]] = {}
        for run in parts.runs():
            for record in run:
                users.setdefault(record.kernel, []).append(record.node)
        if not wait and not library().ready(users):
            raise NotReadyError(lambda: library().addresses(users))
        found: dict[Kernel, int] = {}
        failed: set[Op] = set()
        now: set[Op] = set()
        for kernel, address in library().addresses(users).items():
            if isinstance(address, int):
                found[kernel] = address
                continue
            for user in users[kernel]:
                if not isinstance(user, Tensor):
                    raise GraphError(f"{user.label}: no compiled {kernel.label}: {address}")
                failed.add(user.op)
                if isinstance(address, NoMemoryNowError):
                    now.add(user.op)
        if failed:
            raise _DeclinedError(failed, now)
        return found

    def _program_step(
        self, records: list[Emitted], addresses: dict[Kernel, int], programs: list[RecordProgram]
    ) -> Callable[[], None]:
        """The program goes to ``programs`` too."""
        executor = self._executor
        assert executor is not None
        program = RecordProgram(
            [addresses[r.kernel] for r in records], [r.words for r in records], _steps(records)
        )
        programs.append(program)
        # Not the nodes: of several plans they would take more memory than the records.
        labels = [r.node.label for r in records]

        def run() -> None:
            status, at = executor.run(program)
            if status:
                text = STATUS_TEXT.get(status, f"kernel status {status}")
                raise GraphError(f"{labels[at]}: {text}")

        return run

    def _reference_step(self, node: Tensor) -> Callable[[], None]:
        reference, context = OPS[node.op].reference, self._context
        assert reference is not None

        def run() -> None:
            # Infinities and NaNs travel through graphs as data, they are no reason to warn.
            try:
                with np.errstate(all="ignore"):
                    reference(context, node)
            except (ContractError, MemoryError) as error:
                raise GraphError(f"{node.label}: {error or 'out of memory'}") from None

        return run
