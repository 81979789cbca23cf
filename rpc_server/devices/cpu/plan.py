"""A graph made ready for the CPU device: programs of records, and references between them."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

import rpc_server.devices.cpu.lower  # fills the table of lowerings
import rpc_server.ops  # noqa: F401  (fills the op table)
from protocol.dialects import Dialect
from protocol.ggml.ops import Op
from protocol.tensor import Tensor
from rpc_server.devices.base import NotReadyError
from rpc_server.devices.cpu.assembly import (
    NoScratchError,
    PlanStoppedError,
    RecordAssembly,
    RecordTable,
    schedule,
)
from rpc_server.devices.cpu.baseline import (
    as_it_runs,
    costs_without,
    later_kernels,
    stand_ins_for,
)
from rpc_server.devices.cpu.catalog import (
    TRANSFERS,
    Kernel,
    library,
    place_scratch,
    schedule_records,
)
from rpc_server.devices.cpu.executor import PAUSED, Executor, Position, RecordProgram
from rpc_server.devices.cpu.kernels.interface.abi import RECORD_WORDS
from rpc_server.devices.cpu.kernels.interface.schedule import SERIAL_BELOW, StepFlag
from rpc_server.devices.cpu.kinds import CpuKind, KindMaker
from rpc_server.devices.cpu.planner import LOWERINGS, PlanItem, Planner
from rpc_server.devices.cpu.scratch import ScratchArena
from rpc_server.devices.cpu.turns import DeviceShare, Turns
from rpc_server.devices.planning.kinds import (
    KindMemory,
    NodeLabels,
    TooManyKindsError,
    signatures,
    slot_rows,
)
from rpc_server.devices.planning.records import STATUS_TEXT
from rpc_server.graph.errors import GraphError, NodeError
from rpc_server.graph.parse import LinkedGraph
from rpc_server.graph.table import Ints, TensorTable, table_of
from rpc_server.native.routine import NoMemoryNowError
from rpc_server.ops.arrays import ArrayContext
from rpc_server.ops.table import OPS, ContractError

log = logging.getLogger(__name__)

# A prompt may need scratch that later graphs don't; what is above this is given back after it.
_KEEP_SCRATCH = 64 << 20
# What a plan keeps of a record, its label among it, and of a node that runs by its reference.
_RECORD_BYTES = 8 * (RECORD_WORDS + 4) + 128
_NODE_BYTES = 4096


# What the event loop may run by itself: some ten microseconds, a few milliseconds if each byte is a
# comparison of a sort or the argument of a sine.
_BRIEF_RECORDS = 32
_BRIEF_BYTES = 64 << 10

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
    """Return how many elements a node has and reads, those over one another too."""
    return sum(t.nelements for t in (node, *node.src) if t is not None)


def is_long(node: Tensor) -> bool:
    """Return whether a kernel would work through too much of ``node`` before it can pause."""
    most, source = _MOST_AT_ONCE.get(node.op), node.src[0]
    if most is None or source is None:
        return False
    if node.op is Op.SUM:
        return source.nelements > most
    if node.op is Op.GROUP_NORM:
        groups = max(node.param_i32(0), 1)
        return source.ne[0] * source.ne[1] * -(-source.ne[2] // groups) > most
    return source.ne[0] > most


class TimeSlices:
    """The places where the run of a plan may be interrupted.

    This is to let others have the device, or for good.
    """

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


@dataclass(slots=True)
class PlanNeeds:
    """The memory that a plan takes.

    ``scratch`` are peak bytes beside tensors, ``touches`` those in the arena.

    ``interpreted`` says how many nodes of which op run without a kernel. ``work`` is how many bytes
    records read and write; ``others`` is how many of these are for more than one thread.
    """

    records: int = 0
    work: int = 0
    others: int = 0
    scratch: int = 0
    touches: int = 0
    interpreted: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepContext:
    """The things that a plan's programs have in common.

    ``code`` are addresses of kernels by their number, ``label`` names what is at a position.
    """

    code: Ints
    slices: TimeSlices
    label: Callable[[int], str]
    stop: Ints


class CpuPlan:
    """Steps that run a graph from end to end, in ``slices``.

    A step is a program (many nodes in one compiled call) or the array reference of one node.
    """

    shared = False

    def __init__(
        self,
        dialect: Dialect,
        steps: list[Callable[[], None]],
        arena: ScratchArena,
        slices: TimeSlices,
        needs: PlanNeeds,
    ) -> None:
        self.dialect = dialect
        self.steps = steps
        self._slices = slices
        self.scratch = needs.scratch
        self._touches = needs.touches
        self.interpreted = needs.interpreted
        self.nbytes = needs.records * _RECORD_BYTES + sum(self.interpreted.values()) * _NODE_BYTES
        self.brief = (
            not self.interpreted
            and not needs.others
            and needs.records <= _BRIEF_RECORDS
            and max(needs.work, needs.touches) <= _BRIEF_BYTES
        )
        self._arena = arena
        self._better: Callable[[], CpuPlan | None] | None = None
        # What records hold addresses of beside the client's buffers; its maker puts it here.
        self.keep: object = None

    def run(self) -> None:
        """Run every step. Raises GraphError naming the node that failed."""
        self._improve()
        arena = self._arena
        if self._touches > arena.touched:
            arena.touched = self._touches
        try:
            for step in self.steps:
                self._slices.look()
                step()
        finally:
            if self._touches > _KEEP_SCRATCH:
                arena.trim(_KEEP_SCRATCH)

    def for_now(self, needs: PlanNeeds, nodes: int, better: Callable[[], CpuPlan | None]) -> None:
        """Note that some of its kernels are still being compiled: others stand in for them.

        ``better`` makes the plan that this one is to become, None as long as it can't. ``needs``
        are the records and the scratch of that, ``nodes`` the size of the graph.
        """
        self.scratch = max(self.scratch, needs.scratch)
        self.nbytes = max(self.nbytes, needs.records * _RECORD_BYTES) + nodes * _ROW_BYTES
        # To make the other one takes a moment.
        self.brief = False
        self._better = better

    def _improve(self) -> None:
        """Become the better plan, of the same graph, slices and scratch, if it can be made."""
        better = self._better() if self._better is not None else None
        if better is not None:
            self.steps = better.steps
            self.interpreted = better.interpreted
            self._touches = better._touches
            self._better = None

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


# Loops of planning that it can do without: then nodes share no scratch, and threads meet often.
_LOOPS = (place_scratch, schedule_records)

# What is kept of each node of a plan that is to be made once more.
_ROW_BYTES = 512

# A graph has a few dozen kinds of nodes; to decide about one takes longer than many of a kind do.
_MOST_KINDS = 1 << 11


class _Labels:
    """The names in messages of what is at a position of a plan.

    They are all that a plan keeps of its nodes.
    """

    def __init__(self, table: TensorTable, rows: Ints, nodes: Ints, others: Others) -> None:
        self._nodes = nodes
        self._labels = NodeLabels(table, rows)
        self._others = {number: item.label for number, item in others}

    def __call__(self, position: int) -> str:
        other = self._others.get(position)
        if other is not None:
            return other
        return self._labels[int(np.searchsorted(self._nodes, position))]


Others = Sequence[tuple[int, PlanItem]]


class _Positions:
    """The steps of a plan, one after the other: nodes of a table, and what else there is."""

    def __init__(self, table: TensorTable, order: Ints, nodes: Ints, others: Others) -> None:
        """``order`` are the nodes' rows in ``table``, ``nodes`` their positions."""
        self._table = table
        self._rows = slot_rows(table, order)
        self.nodes = nodes
        self.others = others
        self.label = _Labels(table, order, nodes, others)

    @classmethod
    def of_graph(cls, graph: LinkedGraph) -> _Positions:
        return cls(graph.table, graph.order, np.arange(len(graph.order)), ())

    @classmethod
    def of_items(cls, items: Sequence[Tensor | PlanItem]) -> _Positions:
        nodes = [item for item in items if isinstance(item, Tensor)]
        others = [(i, item) for i, item in enumerate(items) if not isinstance(item, Tensor)]
        table, rows = table_of(nodes)
        order = np.array([rows[id(t)] for t in nodes], np.int64)
        there = [i for i, item in enumerate(items) if isinstance(item, Tensor)]
        return cls(table, order, np.array(there, np.int64), others)

    def __len__(self) -> int:
        return len(self.nodes) + len(self.others)

    def signatures(self) -> tuple[list[bytes], Ints, Ints]:
        """Return the signatures of all nodes, the first of each, and each node's.

        Raises GraphError where there are too many.
        """
        try:
            return signatures(self._table, self._rows, _MOST_KINDS)
        except TooManyKindsError as error:
            raise GraphError(
                f"a graph of {error.count} kinds of nodes, no two of them alike; more than "
                f"{_MOST_KINDS} are not planned for"
            ) from None

    @property
    def slots(self) -> Ints:
        """(n, k) addresses of nodes and sources; 0 for what is no node."""
        found = self._table.address[self._rows]
        if not self.others:
            return found
        slots = np.zeros((len(self), found.shape[1]), np.int64)
        slots[self.nodes] = found
        return slots

    def node(self, position: int) -> Tensor:
        """The node at a position, with its sources and nothing behind them."""
        at = int(np.searchsorted(self.nodes, position))
        return self._table.node(int(self._rows[at, 0]))

    def refuse(self, number: int, maker: KindMaker) -> None:
        """Raise what is wrong with node ``number``, as a GraphError."""
        node = self._table.node(int(self._rows[number, 0]))
        try:
            maker.decide(node)
        except ContractError as error:
            raise NodeError(str(error)) from None
        except MemoryError as error:
            raise GraphError(f"{node.label}: {error}") from None


class CpuPlanBuilder:
    """Makes plans for one executor, and one client; not shared between threads.

    Without an executor, or with ``use_kernels=False``, every node runs by its array reference. The
    client has the device by turns with those that have other shares of it. ``without`` are ops
    whose kernels could not be compiled; what turns out to be one is added. ``kinds`` is what
    builders of one device remember together. With ``baseline`` a graph that isn't to wait for its
    kernels runs by what ``baseline.py`` says as long as they are compiled.
    """

    def __init__(
        self,
        executor: Executor | None,
        scratch: ScratchArena,
        *,
        use_kernels: bool = True,
        share: DeviceShare | None = None,
        without: set[Op] | None = None,
        kinds: KindMemory[CpuKind] | None = None,
        baseline: bool = False,
    ) -> None:
        self._executor = executor
        self._baseline = baseline
        self._scratch = scratch
        self._share = share or Turns().share()
        self._without = set() if without is None else without
        self._maker = KindMaker(
            executor.n_threads if executor else 1,
            scratch.size,
            # No method: a builder that is let go of is gone, with its scratch.
            _by_kernels if executor is not None and use_kernels else _without_kernels,
            self._share.word.address,
        )
        self._memory: KindMemory[CpuKind] = KindMemory() if kinds is None else kinds

    def build(self, graph: LinkedGraph, *, wait: bool = True, stop: Ints | None = None) -> CpuPlan:
        """Hold each node against its contract and lower it. Raises GraphError.

        Waits for kernels that are being compiled, of this graph alone; with ``wait=False`` does
        without, or raises NotReadyError. Ends with a GraphError as soon as the word ``stop`` is
        not 0.
        """
        return self._build(_Positions.of_graph(graph), graph.dialect, wait, stop)

    def build_items(
        self,
        items: Sequence[Tensor | PlanItem],
        dialect: Dialect,
        *,
        wait: bool = True,
        stop: Ints | None = None,
    ) -> CpuPlan:
        """Do as :meth:`build`, with what else is to be done between nodes."""
        return self._build(_Positions.of_items(items), dialect, wait, stop)

    def _build(
        self, positions: _Positions, dialect: Dialect, wait: bool, stop: Ints | None
    ) -> CpuPlan:
        if not len(positions):
            return CpuPlan(dialect, [], self._scratch, TimeSlices(self._share), PlanNeeds())
        started = time.perf_counter()
        stop = np.zeros(1, np.int64) if stop is None else stop
        kinds, which = self._kinds_of(positions, stop)
        used = kinds if wait else self._used_now(positions, kinds, which)
        chosen = self._with_code(used)
        slices = TimeSlices(self._share)
        try:
            plan = self._assemble(positions, chosen, which, dialect, stop, slices)
            if used is not kinds:
                # What it is to become is counted from now on.
                placed = self._placed(positions, kinds, which, stop)
                scratch = placed.most_scratch if self._lacks(place_scratch) else placed.scratch
                scratch += max(kind.threads for kind in kinds)
                needs = PlanNeeds(placed.most_records, scratch=scratch)
                plan.for_now(
                    needs,
                    len(positions),
                    functools.partial(self._replaced, positions, kinds, which, dialect, slices),
                )
        except PlanStoppedError:
            raise GraphError("was stopped") from None
        log.debug(
            "planned %d nodes of %d kinds as %d steps in %.1f ms, %d KiB of scratch; without "
            "kernels: %s",
            len(which),
            len(kinds),
            len(plan.steps),
            (time.perf_counter() - started) * 1e3,
            plan.scratch >> 10,
            plan.interpreted or "none",
        )
        return plan

    def _kinds_of(self, positions: _Positions, stop: Ints) -> tuple[list[CpuKind], Ints]:
        """The kinds that there are, and the kind of each position. Raises GraphError."""
        keys, first, which = positions.signatures()
        kinds: list[CpuKind] = []
        for key, number in zip(keys, first.tolist(), strict=True):
            if stop[0]:
                raise GraphError("was stopped")
            try:
                kinds.append(self._memory.find(key, self._maker))
            except (ContractError, MemoryError):
                # Not kept with the kind, which has no name: the same of the node itself.
                positions.refuse(number, self._maker)
                raise
        if not positions.others:
            return kinds, which
        numbers = np.empty(len(positions), np.int64)
        numbers[positions.nodes] = which
        for number, item in positions.others:
            if self._executor is None:
                raise GraphError(f"{item.label} can't be reached without kernels")
            numbers[number] = len(kinds)
            kinds.append(self._maker.item(item))
        return kinds, numbers

    def _used_now(self, positions: _Positions, kinds: list[CpuKind], which: Ints) -> list[CpuKind]:
        """Return the kinds as they can run now: ``kinds`` themselves if all kernels are there.

        Raises NotReadyError if they can't.
        """
        wanted = [k for k in _without_code(kinds) if k.op not in self._without]
        if not self._baseline:
            waited = library().pending(_users(wanted), urgent=True)
            if waited:
                raise NotReadyError(lambda: library().addresses(waited))
            return kinds
        absent = later_kernels.absent([*_users(wanted), *_LOOPS])
        if not absent:
            return kinds
        stand_ins, awaited = stand_ins_for(absent, costs_without(kinds, which, positions.node))
        if library().pending(awaited, urgent=True):
            raise NotReadyError(lambda: library().addresses(awaited))
        return [as_it_runs(kind, absent, stand_ins) for kind in kinds]

    def _lacks(self, loop: Kernel) -> bool:
        """Return whether a loop of planning is done without, as it isn't compiled yet."""
        if not self._baseline:
            return False
        return bool(later_kernels.absent([loop])) or library().failed(loop)

    def _with_code(self, kinds: Sequence[CpuKind]) -> list[CpuKind]:
        """Return the kinds with the addresses of their kernels, some of them without kernels."""
        without = set(self._without)
        while True:
            chosen = [k.without_kernel() if k.op in without else k for k in kinds]
            try:
                self._load(chosen)
                return chosen
            except _DeclinedError as declined:
                self._without |= declined.ops - declined.now
                without |= declined.ops

    def _load(self, kinds: Iterable[CpuKind]) -> None:
        """Note in kinds where the code of their kernels is. Raises what :meth:`_addresses` does."""
        missing = _without_code(kinds)
        if missing:
            addresses = self._addresses(_users(missing))
            for kind in missing:
                kind.code = [addresses[kernel] for kernel in kind.kernels]

    def _addresses(self, users: Mapping[Kernel, Iterable[Op | PlanItem]]) -> dict[Kernel, int]:
        """Return where the code of all kernels is. Raises GraphError, _DeclinedError."""
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
                if not isinstance(user, Op):
                    raise GraphError(f"{user.label}: no compiled {kernel.label}: {address}")
                failed.add(user)
                if isinstance(address, NoMemoryNowError):
                    now.add(user)
        if failed:
            raise _DeclinedError(failed, now)
        return found

    def _replaced(
        self,
        positions: _Positions,
        kinds: Sequence[CpuKind],
        which: Ints,
        dialect: Dialect,
        slices: TimeSlices,
    ) -> CpuPlan | None:
        """Return the plan of ``kinds``; None as long as not all of their kernels are there.

        Raises GraphError.
        """
        if later_kernels.absent([*_LOOPS, *_users(_without_code(kinds))]):
            return None
        with self._share.aside():
            chosen = self._with_code(kinds)
            never = np.zeros(1, np.int64)
            return self._assemble(positions, chosen, which, dialect, never, slices)

    def _placed(
        self, positions: _Positions, kinds: Sequence[CpuKind], which: Ints, stop: Ints
    ) -> RecordAssembly:
        """Return what there is of records by now: where scratch lies.

        Raises GraphError, PlanStoppedError.
        """
        assembly = RecordAssembly(kinds, which, positions.slots, stop)
        if self._executor is not None:
            half = self._scratch.size // 2
            threads = self._scratch.address(half, self._scratch.size - half)
            try:
                assembly.place(self._scratch, threads, apart=self._lacks(place_scratch))
            except NoScratchError as error:
                raise GraphError(
                    f"{positions.label(error.position)}: graph needs {error.needed} bytes of "
                    f"scratch, limit {half}"
                ) from None
            except MemoryError as error:
                raise GraphError(str(error)) from None
        return assembly

    def _assemble(
        self,
        positions: _Positions,
        kinds: Sequence[CpuKind],
        which: Ints,
        dialect: Dialect,
        stop: Ints,
        slices: TimeSlices,
    ) -> CpuPlan:
        """Raises GraphError, PlanStoppedError."""
        assembly = self._placed(positions, kinds, which, stop)
        records = assembly.records()
        by_reference = np.array([kind.by_reference for kind in kinds], bool)
        (references,) = np.nonzero(by_reference[which])
        cuts = np.searchsorted(records.positions, references).tolist()
        code = np.array([address for kind in kinds for address in kind.code], np.int64)
        common = StepContext(code, slices, positions.label, stop)
        context = ArrayContext(slices.look)
        steps: list[Callable[[], None]] = []
        needs = PlanNeeds(
            records=len(records),
            work=int(records.work.sum()),
            others=len(records) - int(_alone(records).sum()),
        )

        def program(start: int, end: int) -> None:
            if end > start:
                steps.append(self._program_step(records.part(start, end), common))

        start = 0
        for position, cut in zip(references.tolist(), cuts, strict=True):
            program(start, cut)
            start = cut
            op = kinds[which[position]].op
            assert op is not None
            needs.interpreted[op] = needs.interpreted.get(op, 0) + 1
            steps.append(self._reference_step(positions.node(position), context, slices))
        program(start, len(records))
        # Beside its tensors a node takes scratch, threads' scratch, or arrays of its reference.
        needs.touches = assembly.scratch + max(kind.threads for kind in kinds)
        copies = max((kind.copies for kind in kinds if kind.by_reference), default=0)
        needs.scratch = max(needs.touches, copies)
        return CpuPlan(dialect, steps, self._scratch, slices, needs)

    def _program_step(self, records: RecordTable, common: StepContext) -> Callable[[], None]:
        executor = self._executor
        assert executor is not None
        lacks = self._lacks(schedule_records)
        steps = schedule(_alone(records), records.first, records.spans, common.stop, apart=lacks)
        # Any thread may have done a part: they have to meet.
        steps[records.parts > 0] |= int(StepFlag.BARRIER_AFTER)
        waits = not TRANSFERS.isdisjoint(records.kernels)
        program = RecordProgram(
            common.code[records.numbers], records.words, steps, records.parts, waits=waits
        )
        # Not the spans: a plan is kept, and they are only for the schedule.
        numbers, slices, label = records.positions, common.slices, common.label

        def run() -> None:
            position = Position()
            while (status := executor.advance(program, position)) == PAUSED:
                slices.look()
            if status:
                text = STATUS_TEXT.get(status, f"kernel status {status}")
                raise GraphError(f"{label(int(numbers[position.failed_at]))}: {text}")

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


def _alone(records: RecordTable) -> Ints:
    """Return 1 for each record that the first thread runs without the others, else 0."""
    alone = (records.work < SERIAL_BELOW) & (records.private == 0) & (records.parts == 0)
    return alone.astype(np.int64)


def _without_kernels(node: Tensor, planner: Planner) -> bool:
    """Lower nothing."""
    return False


def _by_kernels(node: Tensor, planner: Planner) -> bool:
    """Emit the records of ``node``; False where there is no kernel for it."""
    lowering = LOWERINGS.get(node.op)
    if lowering is None or is_long(node):
        return False
    before = len(planner.records)
    if lowering(node, planner):
        return True
    if len(planner.records) != before:
        raise RuntimeError(f"lowering of {node.op} declined a node after emitting records")
    return False


def _without_code(kinds: Iterable[CpuKind]) -> list[CpuKind]:
    return [kind for kind in kinds if len(kind.code) < len(kind.kernels)]


def _users(kinds: Iterable[CpuKind]) -> dict[Kernel, list[Op | PlanItem]]:
    """By kernel, what can't run without it."""
    users: dict[Kernel, list[Op | PlanItem]] = {}
    for kind in kinds:
        for kernel in kind.kernels:
            users.setdefault(kernel, []).append(kind.user)
    return users
