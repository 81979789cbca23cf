"""A graph made ready for the CPU device: programs of records, and references between them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np

import rpc_server.devices.cpu.lower  # fills the table of lowerings
import rpc_server.ops  # noqa: F401  (fills the op table)
from protocol.dialects import Dialect
from rpc_server.devices.cpu.executor import Executor, Program
from rpc_server.devices.cpu.planner import LOWERINGS, STATUS_TEXT, Emitted, PlanItem, Planner
from rpc_server.devices.cpu.schedule import schedule
from rpc_server.devices.cpu.scratch import ScratchArena
from rpc_server.graph.errors import GraphError
from rpc_server.graph.parse import Graph
from rpc_server.graph.tensor import Tensor
from rpc_server.ops.arrays import ArrayContext
from rpc_server.ops.table import ContractError, OpSpec, check

log = logging.getLogger(__name__)

# A prompt may need scratch that later graphs don't; what is above this is given back after it.
_KEEP_SCRATCH = 64 << 20


class CpuPlan:
    """Steps that run a graph from end to end.

    A step is a program (many nodes in one compiled call) or the array reference of one node.
    """

    def __init__(
        self,
        dialect: Dialect,
        steps: list[Callable[[], None]],
        scratch: int,
        arena: ScratchArena,
        interpreted: dict[str, int],
    ) -> None:
        self.dialect = dialect
        self._steps = steps
        # Peak bytes of scratch, and how many nodes of which op run without a kernel.
        self.scratch = scratch
        self._arena = arena
        self.interpreted = interpreted
        # What records hold addresses of beside the client's buffers; its maker puts it here.
        self.keep: object = None

    def run(self) -> None:
        """Run every step. Raises GraphError naming the node that failed."""
        for step in self._steps:
            step()
        if self.scratch > _KEEP_SCRATCH:
            self._arena.trim(_KEEP_SCRATCH)


class PlanBuilder:
    """Makes plans for one executor; not shared between threads."""

    def __init__(
        self, executor: Executor, scratch: ScratchArena, *, use_kernels: bool = True
    ) -> None:
        self._executor = executor
        self._scratch = scratch
        self._use_kernels = use_kernels
        self._context = ArrayContext()

    def build(self, graph: Graph) -> CpuPlan:
        """Hold each node against its contract and lower it. Raises GraphError."""
        return self.build_items(graph.nodes, graph.dialect)

    def build_items(self, items: Sequence[Tensor | PlanItem], dialect: Dialect) -> CpuPlan:
        """Like :meth:`build`, with what else is to be done between nodes."""
        started = time.perf_counter()
        planner = Planner(self._executor.n_threads, self._scratch)
        steps: list[Callable[[], None]] = []
        interpreted: dict[str, int] = {}
        for node in items:
            if not isinstance(node, Tensor):
                planner.begin(node)
                node.emit(planner)
                continue
            try:
                spec = check(node)
                if spec.is_view or node.empty:
                    continue
                planner.begin(node)
                if not self._lower(node, planner):
                    self._flush(planner, steps)
                    steps.append(self._reference_step(node, spec))
                    interpreted[node.op] = interpreted.get(node.op, 0) + 1
                planner.finish(node)
            except ContractError as error:
                raise GraphError(str(error)) from None
            except MemoryError as error:
                raise GraphError(f"{node.label}: {error}") from None
        self._flush(planner, steps)
        log.debug(
            "planned %d nodes as %d steps in %.1f ms, %d KiB of scratch; without kernels: %s",
            len(items),
            len(steps),
            (time.perf_counter() - started) * 1e3,
            planner.scratch_peak >> 10,
            interpreted or "none",
        )
        return CpuPlan(dialect, steps, planner.scratch_peak, self._scratch, interpreted)

    def _lower(self, node: Tensor, planner: Planner) -> bool:
        lowering = LOWERINGS.get(node.op)
        if lowering is None or not self._use_kernels:
            return False
        before = len(planner.records)
        if lowering(node, planner):
            return True
        if len(planner.records) != before:
            raise RuntimeError(f"lowering of {node.op} declined a node after emitting records")
        return False

    def _flush(self, planner: Planner, steps: list[Callable[[], None]]) -> None:
        if planner.records:
            steps.append(self._program_step(planner.records))
            planner.records = []

    def _program_step(self, records: list[Emitted]) -> Callable[[], None]:
        program = Program(
            [r.kernel.address for r in records], [r.words for r in records], schedule(records)
        )
        nodes = [r.node for r in records]
        executor = self._executor

        def run() -> None:
            status, at = executor.run(program)
            if status:
                text = STATUS_TEXT.get(status, f"kernel status {status}")
                raise GraphError(f"{nodes[at].label}: {text}")

        return run

    def _reference_step(self, node: Tensor, spec: OpSpec) -> Callable[[], None]:
        reference, context = spec.reference, self._context
        if reference is None:
            raise ContractError(f"{node.label}: this combination is not implemented")

        def run() -> None:
            # Infinities and NaNs travel through graphs as data, they are no reason to warn.
            try:
                with np.errstate(all="ignore"):
                    reference(context, node)
            except (ContractError, MemoryError) as error:
                raise GraphError(f"{node.label}: {error or 'out of memory'}") from None

        return run
