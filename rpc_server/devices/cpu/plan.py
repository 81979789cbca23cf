"""A graph made ready for the CPU device: programs of records, and references between them."""

from __future__ import annotations

import contextlib
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
from rpc_server.devices.cpu.executor import PAUSED, Executor, Position, RecordProgram
from rpc_server.devices.cpu.kernels.interface.abi import RECORD_WORDS
from rpc_server.devices.cpu.kernels.interface.schedule import SERIAL_BELOW, StepFlag, schedule
from rpc_server.devices.cpu.planner import (
    LOWERINGS,
    Emitted,
    PlanItem,
    Planner,
)
from rpc_server.devices.cpu.scratch import ScratchArena
from rpc_server.devices.cpu.turns import DeviceShare, Turns
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

_NOT_IMPLEMENTED = "this combination is not implemented"

# A prompt may need scratch that later graphs don't; what is above this is given back after it.
_KEEP_SCRATCH = 64 << 20
# What a plan keeps of a record, its label among it, and of a node that runs by its reference.
_RECORD_BYTES = 8 * (RECORD_WORDS + 4) + 128
_NODE_BYTES = 4096


# Array code of so many elements is over in no time.
_FEW_ELEMENTS = 1 << 14
_IN_TURN = contextlib.nullcontext()

# The most elements that a kernel works through in one go: those of a row, a group, or all. Where
# there are more, array code does it, beside what others compute.
_MOST_AT_ONCE: dict[Op, int] = {
    **dict.fromkeys((Op.ARGSORT, Op.TOP_K), 1 << 19),
    **dict.fromkeys((Op.MUL_MAT, Op.MUL_MAT_ID, Op.FLASH_ATTN_EXT), 1 << 22),
    **dict.fromkeys((Op.SUM_ROWS, Op.MEAN, Op.SUM, Op.CUMSUM, Op.ARGMAX, Op.SOFT_MAX), 1 << 24),
    **dict.fromkeys((Op.NORM, Op.RMS_NORM, Op.L2_NORM, Op.GROUP_NORM), 1 << 24),
}


def _elements(node: Tensor) -> int:
    """How many elements a node has and reads, those over one another too."""
    return sum(t.nelements for t in (node, *node.src) if t is not None)


def _is_long(node: Tensor) -> bool:
    """Whether a kernel would work through too much of ``node`` before it can pause."""
    most, source = _MOST_AT_ONCE.get(node.op), node.src[0]
    if most is None or source is None:
        return False
    if node.op is Op.SUM:
        return source.nelements > most
    if node.op is Op.GROUP_NORM:
        groups = max(node.param_i32(0), 1)
        return source.ne[0] * source.ne[1] * -(-source.ne[2] // groups) > most
    return source.ne[0] > most


# Records that are scheduled together: each is held against all since the last barrier, and a graph
# may have a million.
_TOGETHER = 512


def _steps(records: list[Emitted]) -> list[int]:
    """The Step flags of records, scheduled in pieces with a barrier between them."""
    if all(r.work < SERIAL_BELOW and not r.private and not r.parts for r in records):
        return [int(StepFlag.SERIAL)] * len(records)
    steps: list[int] = []
    for at in range(0, len(records), _TOGETHER):
        if steps:
            steps[-1] |= StepFlag.BARRIER_AFTER
        steps += schedule(records[at : at + _TOGETHER])
    for i, record in enumerate(records):
        if record.parts:
            # Any thread may have done a part: they have to meet.
            steps[i] = steps[i] & ~StepFlag.SERIAL | StepFlag.BARRIER_AFTER
    return steps


class TimeSlices:
    """Where the run of a plan may be interrupted: to let others have the device, or for good."""

    def __init__(self, share: DeviceShare) -> None:
        self._share = share
        self._stopped = False

    def look(self) -> None:
        """Let others go first whose turn it is. Raises GraphError once the run was stopped."""
        self._share.give_way()
        if self._stopped:
            raise GraphError("was stopped")

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """Let others have the device, and compute beside them."""
        return self._share.aside()

    def stop(self) -> None:
        """Let :meth:`look` raise, and what is compiled come to it soon; from any thread."""
        self._stopped = True
        self._share.word.set()


class CpuPlan:
    """Steps that run a graph from end to end, in ``slices``.

    A step is a program (many nodes in one compiled call) or the array reference of one node.
    """

    shared = False

    def __init__(
        self,
        dialect: Dialect,
        steps: list[Callable[[], None]],
        planner: Planner,
        arena: ScratchArena,
        parts: PlanSteps[Emitted],
        slices: TimeSlices,
    ) -> None:
        self.dialect = dialect
        self._steps = steps
        self._slices = slices
        # Peak bytes beside tensors, those of them in the arena, and how many nodes of which op run
        # without a kernel.
        self.scratch = planner.peak
        self._touches = planner.scratch_touched
        self.interpreted = parts.interpreted
        self.nbytes = (
            sum(map(len, parts.runs())) * _RECORD_BYTES
            + sum(self.interpreted.values()) * _NODE_BYTES
        )
        self._arena = arena
        # What records hold addresses of beside the client's buffers; its maker puts it here.
        self.keep: object = None

    def run(self) -> None:
        """Run every step. Raises GraphError naming the node that failed."""
        arena = self._arena
        arena.touched = max(arena.touched, self._touches)
        try:
            for step in self._steps:
                self._slices.look()
                step()
        finally:
            if self._touches > _KEEP_SCRATCH:
                arena.trim(_KEEP_SCRATCH)

    def stop(self) -> None:
        """Let a run end within a slice, with a GraphError; from any thread, for good."""
        self._slices.stop()


class _DeclinedError(Exception):
    """Kernels of these ops can't be had; the graph is to be lowered without them.

    Those of ``now`` may be there for the next graph.
    """

    def __init__(self, ops: set[Op], now: set[Op]) -> None:
        super().__init__(ops, now)
        self.ops = ops
        self.now = now


class CpuPlanBuilder:
    """Makes plans for one executor, and one client; not shared between threads.

    Without an executor, or with ``use_kernels=False``, every node runs by its array reference. The
    client has the device by turns with those that have other shares of it. ``without`` are ops
    whose kernels could not be compiled; what turns out to be one is added.
    """

    def __init__(
        self,
        executor: Executor | None,
        scratch: ScratchArena,
        *,
        use_kernels: bool = True,
        share: DeviceShare | None = None,
        without: set[Op] | None = None,
    ) -> None:
        self._executor = executor
        self._scratch = scratch
        self._use_kernels = use_kernels
        self._share = share or Turns().share()
        self._without = set() if without is None else without

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
        planner = Planner(n_threads, self._scratch, items, self._share.word.address)
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
        slices = TimeSlices(self._share)
        context = ArrayContext(slices.look)
        steps = parts.steps(
            lambda node: self._reference_step(node, context, slices),
            lambda run: self._program_step(run, addresses, slices),
        )
        log.debug(
            "planned %d nodes as %d steps in %.1f ms, %d KiB of scratch; without kernels: %s",
            len(items),
            len(steps),
            (time.perf_counter() - started) * 1e3,
            planner.peak >> 10,
            parts.interpreted or "none",
        )
        return CpuPlan(
            dialect,
            steps,
            planner,
            self._scratch,
            parts,
            slices,
        )

    def _lower(self, node: Tensor, planner: Planner) -> bool:
        lowering = LOWERINGS.get(node.op)
        if lowering is None or self._executor is None or not self._use_kernels:
            return False
        if _is_long(node):
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
        with self._share.away():
            waited = library().addresses(users)
        found: dict[Kernel, int] = {}
        failed: set[Op] = set()
        now: set[Op] = set()
        for kernel, address in waited.items():
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
        self, records: list[Emitted], addresses: dict[Kernel, int], slices: TimeSlices
    ) -> Callable[[], None]:
        executor = self._executor
        assert executor is not None
        program = RecordProgram(
            [addresses[r.kernel] for r in records],
            [r.words for r in records],
            _steps(records),
            [r.parts for r in records],
        )
        # Not the nodes: of several plans they would take more memory than the records.
        labels = [r.node.label for r in records]

        def run() -> None:
            position = Position()
            while (status := executor.advance(program, position)) == PAUSED:
                slices.look()
            if status:
                text = STATUS_TEXT.get(status, f"kernel status {status}")
                raise GraphError(f"{labels[position.failed_at]}: {text}")

        return run

    def _reference_step(
        self, node: Tensor, context: ArrayContext, slices: TimeSlices
    ) -> Callable[[], None]:
        reference = OPS[node.op].reference
        assert reference is not None
        # Nobody can tell how long array code takes, nor interrupt it within a call.
        long = _elements(node) > _FEW_ELEMENTS

        def run() -> None:
            # Infinities and NaNs travel through graphs as data, they are no reason to warn.
            try:
                with np.errstate(all="ignore"), slices.aside() if long else _IN_TURN:
                    reference(context, node)
            except (ContractError, MemoryError) as error:
                raise GraphError(f"{node.label}: {error or 'out of memory'}") from None

        return run
