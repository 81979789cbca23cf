"""A graph as records: for all nodes, from the tables of their kinds and the columns of tensors.

Positions are what a plan does one after the other: nodes and other items. Each is of a kind; what
is done here, in compiled loops (``kernels/planning.py``), fills in where its tensors and its
scratch lie.
"""

from __future__ import annotations

import ctypes
import secrets
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from rpc_server.devices.cpu.catalog import (
    Kernel,
    fill_records,
    place_scratch,
    schedule_records,
)
from rpc_server.devices.cpu.kernels.interface.abi import RECORD_WORDS
from rpc_server.devices.cpu.kernels.interface.planning import (
    BASES,
    KEPT_WORDS,
    MOST_KEPT,
    MOST_SOURCES,
    MOST_SPANS,
    NOTHING,
    PIECES,
    STOPPED,
    THREADS,
    KindRow,
    PlanArgument,
)
from rpc_server.devices.cpu.kernels.interface.schedule import StepFlag
from rpc_server.devices.cpu.kinds import CpuKind
from rpc_server.devices.planning.scratch import Arena
from rpc_server.graph.table import Ints

# Through ctypes, which lets go of the GIL.
_LOOP = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
_SCHEDULE = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 7)

# By which addresses are found: a client that knew it could choose those that take long.
_SECRET = secrets.randbits(62) | 1


class PlanStoppedError(Exception):
    """Planning was told to stop."""


class NoScratchError(Exception):
    """A node needs more scratch than there is: its position, and how much it needs."""

    def __init__(self, position: int, needed: int) -> None:
        super().__init__(position, needed)
        self.position = position
        self.needed = needed


@dataclass(slots=True)
class RecordTable:
    """Records in the order of execution: the kernel of each by number, its words, its position.

    ``first`` (n + 1) is where its rows of ``spans`` begin: start, end, whether it is written.
    """

    kernels: list[Kernel]
    numbers: Ints
    words: Ints
    positions: Ints
    work: Ints
    private: Ints
    parts: Ints
    first: Ints
    spans: Ints

    def __len__(self) -> int:
        return len(self.numbers)

    def part(self, start: int, end: int) -> RecordTable:
        """Return records ``start`` to ``end``."""
        at = slice(start, end)
        first = self.first[start : end + 1]
        return RecordTable(
            self.kernels,
            self.numbers[at],
            self.words[at],
            self.positions[at],
            self.work[at],
            self.private[at],
            self.parts[at],
            first - first[0],
            self.spans[first[0] : first[-1]],
        )


class RecordAssembly:
    """Positions with their kinds (numbers in ``kinds``), and where slots of nodes lie.

    ``slots`` (n, k) are addresses of nodes and their sources, 0 for items that are no nodes. As
    soon as the word ``stop`` isn't 0, planning ends.
    """

    def __init__(self, kinds: Sequence[CpuKind], which: Ints, slots: Ints, stop: Ints) -> None:
        self._kinds = kinds
        self._bases = np.zeros((len(which), BASES), np.int64)
        self._bases[:, : slots.shape[1]] = slots
        # Of positions, by what there is of each kind: records, requests, spans.
        counts = np.array([(len(k.kernels), len(k.keys), k.n_spans) for k in kinds], np.int64)
        each = np.bincount(which, minlength=len(kinds))
        self._records, self._requests, self._spans = (each @ counts).tolist()
        self._args = np.zeros(len(PlanArgument), np.int64)
        self._args[PlanArgument.NODES] = len(which)
        self._args[PlanArgument.SLOTS] = slots.shape[1]
        self._args[PlanArgument.SECRET] = _SECRET
        begin = [list(accumulate(column, initial=0)) for column in counts[:, :2].T.tolist()]
        rows: dict[KindRow, Sequence[int]] = {
            KindRow.TABLE: [kind.address for kind in kinds],
            KindRow.KERNEL: begin[0][:-1],
            KindRow.KEY: begin[1][:-1],
        }
        known: dict[Hashable, int] = {}
        keys = [known.setdefault(key, len(known)) for kind in kinds for key in kind.keys]
        # What arguments are addresses of.
        self._given: dict[PlanArgument, Ints] = {}
        self._give(
            {
                PlanArgument.KINDS: np.array([rows[word] for word in KindRow], np.int64).T,
                PlanArgument.WHICH: which,
                PlanArgument.BASES: self._bases,
                PlanArgument.KEYS: np.array(keys, np.int64),
                PlanArgument.STOP: stop,
                PlanArgument.FRESH: np.ones(self._requests, np.int64),
            }
        )
        self.scratch = 0

    @property
    def most_records(self) -> int:
        """The number of records at most."""
        return int(self._records)

    @property
    def most_scratch(self) -> int:
        """The bytes that scratch takes where nodes share it, about and at most."""
        return (MOST_KEPT + 1) * max((kind.scratch_alone()[1] for kind in self._kinds), default=0)

    def _give(self, arrays: Mapping[PlanArgument, Ints]) -> None:
        for word, array in arrays.items():
            given = self._given[word] = np.ascontiguousarray(array)
            self._args[word] = given.ctypes.data

    def place(self, arena: Arena, threads: int, *, apart: bool = False) -> None:
        """Place scratch in the arena; that of threads begins at ``threads``.

        With ``apart`` by arrays, until the loop is compiled: nodes share nothing. Raises
        NoScratchError, PlanStoppedError, MemoryError.
        """
        self._bases[:, THREADS] = threads
        if not any(kind.has_scratch for kind in self._kinds):
            return
        limit = arena.size // 2
        if apart:
            self.scratch = self._place_apart(limit)
        else:
            self.scratch = self._place_shared(limit)
        self._bases[:, PIECES:NOTHING] += arena.address(0, self.scratch)

    def _place_apart(self, limit: int) -> int:
        """Set bases of scratch pieces, of each node as if it were alone; the most it takes."""
        peak = 0
        for number, kind in enumerate(self._kinds):
            pieces, needed = kind.scratch_alone()
            if not needed:
                continue
            (nodes,) = np.nonzero(self._given[PlanArgument.WHICH] == number)
            if needed > limit:
                raise NoScratchError(int(nodes[0]), needed)
            for piece, offset in pieces:
                self._bases[nodes, PIECES + piece] = offset
            peak = max(peak, needed)
        return peak

    def _place_shared(self, limit: int) -> int:
        """Set bases of scratch pieces; the most that is used at once."""
        bits = (2 * MOST_SOURCES * self._requests + 1).bit_length()
        self._args[PlanArgument.LIMIT] = limit
        self._args[PlanArgument.USE_BITS] = bits
        self._give(
            {
                PlanArgument.KEPT: np.zeros(MOST_KEPT * KEPT_WORDS, np.int64),
                PlanArgument.USES: np.zeros((1 << bits, 2), np.int64),
            }
        )
        peak = _LOOP(place_scratch.address)(self._args.ctypes.data)
        if peak == STOPPED:
            raise PlanStoppedError
        if peak < 0:
            raise NoScratchError(-1 - peak, int(self._args[PlanArgument.NEEDED]))
        return peak

    def records(self) -> RecordTable:
        """Return all records, with the addresses that they have by now."""
        n = self._records
        # At most: what is there already isn't filled again.
        numbers, positions, work, private, parts = (np.empty(n, np.int64) for _ in range(5))
        made = RecordTable(
            [kernel for kind in self._kinds for kernel in kind.kernels],
            numbers,
            np.empty((n, RECORD_WORDS), np.int64),
            positions,
            work,
            private,
            parts,
            np.empty(n + 1, np.int64),
            np.empty((self._spans, 3), np.int64),
        )
        if not n:
            made.first[0] = 0
            return made
        self._give(
            {
                PlanArgument.NUMBERS: made.numbers,
                PlanArgument.WORDS: made.words,
                PlanArgument.POSITIONS: made.positions,
                PlanArgument.WORK: made.work,
                PlanArgument.PRIVATE: made.private,
                PlanArgument.PARTS: made.parts,
                PlanArgument.FIRST: made.first,
                PlanArgument.SPANS: made.spans,
            }
        )
        count = _LOOP(fill_records.address)(self._args.ctypes.data)
        return made if count == n else made.part(0, count)


def schedule(
    alone: Ints,
    first: Ints,
    spans: Ints,
    stop: Ints,
    most_spans: int = MOST_SPANS,
    *,
    apart: bool = False,
) -> Ints:
    """Return the Step flags of records, as of ``kernels/planning.py``. Raises PlanStoppedError.

    With ``apart`` without the loop, until that is compiled: threads meet behind each record.
    """
    n = len(alone)
    if alone.all():
        return np.full(n, int(StepFlag.SERIAL), np.int64)
    if apart:
        return alone * int(StepFlag.SERIAL) | int(StepFlag.BARRIER_AFTER)
    steps = np.zeros(n, np.int64)
    arrays = [np.ascontiguousarray(a, np.int64) for a in (alone, first, spans)]
    status = _SCHEDULE(schedule_records.address)(
        n, *(a.ctypes.data for a in arrays), most_spans, steps.ctypes.data, stop.ctypes.data
    )
    if status == STOPPED:
        raise PlanStoppedError
    return steps
