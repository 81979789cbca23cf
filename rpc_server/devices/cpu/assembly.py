"""A graph as records: for all nodes of a kind at once, from the columns of its tensors.

Positions are what a plan does one after the other: nodes and other items. Each is of a kind; what
is done here fills in where its tensors and its scratch lie.
"""

from __future__ import annotations

import ctypes
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from rpc_server.devices.cpu.catalog import Kernel, place_scratch, schedule_records
from rpc_server.devices.cpu.kernels.interface.planning import (
    KEPT_WORDS,
    MOST_KEPT,
    MOST_SOURCES,
    MOST_SPANS,
    STOPPED,
    ScratchArgument,
)
from rpc_server.devices.cpu.kernels.interface.schedule import StepFlag
from rpc_server.devices.cpu.kinds import BASES, NOTHING, PIECES, THREADS, CpuKind
from rpc_server.devices.planning.kinds import SLOTS, group_rows
from rpc_server.devices.planning.scratch import Arena
from rpc_server.graph.table import Ints

# Through ctypes, which lets go of the GIL.
_PLACE = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
_SCHEDULE = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 7)


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
    """RecordTable in the order of execution: the kernel of each by number, its words, its position.

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

    ``slots`` (n, SLOTS) are addresses, 0 for items that are no nodes.
    """

    def __init__(self, kinds: Sequence[CpuKind], which: Ints, slots: Ints, stop: Ints) -> None:
        self._kinds = kinds
        self._which = which
        self._stop = stop
        self._bases = np.zeros((len(which), BASES), np.int64)
        self._bases[:, :SLOTS] = slots
        # By position and piece, what its request says; only for kinds that have any.
        self._fresh = np.ones((len(which), PIECES_AT_MOST), bool)
        self.scratch = 0

    def place(self, arena: Arena, threads: int) -> None:
        """Place scratch in the arena; that of threads begins at ``threads``.

        Raises NoScratchError, PlanStoppedError, MemoryError.
        """
        self._bases[:, THREADS] = threads
        kinds, which = self._kinds, self._which
        if not any(kind.pieces for kind in kinds):
            return
        requested = _Requests(kinds, which, self._bases)
        owner, spans = self._expand([kind.written for kind in kinds])
        written = self._spans(owner, spans)
        n = len(which)
        local = np.array([kind.local for kind in kinds], np.int64)[which]
        start = np.zeros(max(len(requested.owner), 1), np.int64)
        fresh, base = start.copy(), np.zeros(n, np.int64)
        kept = np.zeros(MOST_KEPT * KEPT_WORDS, np.int64)
        written_from = _starts(owner, n)
        arrays = {
            ScratchArgument.LOCAL: local,
            ScratchArgument.REQUESTS: _starts(requested.owner, n),
            ScratchArgument.WRITTEN: written_from,
            ScratchArgument.GROUP: requested.group,
            ScratchArgument.SIZE: requested.size,
            ScratchArgument.SOURCES: requested.sources,
            ScratchArgument.UNTIL: requested.until,
            ScratchArgument.SPANS: written,
            ScratchArgument.KEPT: kept,
            ScratchArgument.START: start,
            ScratchArgument.FRESH: fresh,
            ScratchArgument.BASE: base,
            ScratchArgument.STOP: self._stop,
        }
        limit = arena.size // 2
        args = np.zeros(len(ScratchArgument), np.int64)
        args[ScratchArgument.NODES], args[ScratchArgument.LIMIT] = n, limit
        for word, array in arrays.items():
            assert array.flags.c_contiguous
            args[word] = array.ctypes.data
        peak = _PLACE(place_scratch.address)(args.ctypes.data)
        if peak == STOPPED:
            raise PlanStoppedError
        if peak < 0:
            raise NoScratchError(-1 - peak, int(base[-1 - peak]))
        self.scratch = peak
        self._put(arena, requested, start, fresh, base)

    def _put(
        self, arena: Arena, requested: _Requests, start: Ints, fresh: Ints, base: Ints
    ) -> None:
        """Note where the pieces of scratch lie, and what has to be filled."""
        pieces = [
            np.array(
                [(k, p.request, p.offset, p.size) for k, p in enumerate(kind.pieces)], np.int64
            ).reshape(-1, 4)
            for kind in self._kinds
        ]
        owner, piece = self._expand(pieces)
        number, request, offset, size = piece.T
        shared = request >= 0
        at = requested.begin[owner[shared]] + request[shared]
        offset = base[owner] + offset
        offset[shared] = start[at]
        self._fresh[owner[shared], request[shared]] = fresh[at] != 0
        first, which = group_rows(np.column_stack((offset, size)))
        found = [
            arena.address(o, s)
            for o, s in zip(offset[first].tolist(), size[first].tolist(), strict=True)
        ]
        self._bases[owner, PIECES + number] = np.array(found, np.int64)[which]

    def records(self) -> RecordTable:
        """Return all records, with the addresses that they have by now."""
        kinds = self._kinds
        numbers: dict[Kernel, int] = {}
        by_kind = [
            np.array([numbers.setdefault(k, len(numbers)) for k in kind.kernels], np.int64)
            for kind in kinds
        ]
        counts = np.array([len(kind.kernels) for kind in kinds], np.int64)
        begin = np.concatenate(([0], np.cumsum(counts)))
        owner, template = _expanded(begin[:-1], counts, self._which)
        filling = _joined([kind.filling for kind in kinds])[template]
        wanted = (filling < 0) | self._fresh[owner, filling]
        if not wanted.all():
            owner, template = owner[wanted], template[wanted]
        words = np.concatenate([kind.words for kind in kinds])[template]
        places = _numbered([kind.places for kind in kinds], begin)
        record, place = _expanded(*_ranges(places[:, 0], int(begin[-1])), template)
        _, word, base, offset = places[place].T
        words[record, word] = self._bases[owner[record], base] + offset
        listed = _numbered([kind.spans for kind in kinds], begin)
        # Spans of a kind are listed by record: those of one are next to one another.
        record, span = _expanded(*_ranges(listed[:, 0], int(begin[-1])), template)
        _, base, offset, size, writes = listed[span].T
        start = self._bases[owner[record], base] + offset
        return RecordTable(
            list(numbers),
            _joined(by_kind)[template],
            words,
            owner,
            _joined([kind.work for kind in kinds])[template],
            _joined([kind.private for kind in kinds])[template],
            _joined([kind.parts for kind in kinds])[template],
            _starts(record, len(template)),
            np.column_stack((start, start + size, writes)),
        )

    def _expand(self, rows: Sequence[Ints]) -> tuple[Ints, Ints]:
        """Positions, and for each of them all rows of its kind, one after the other."""
        counts = np.array([len(r) for r in rows], np.int64)
        begin = np.concatenate(([0], np.cumsum(counts)))[:-1]
        owner, at = _expanded(begin, counts, self._which)
        return owner, np.concatenate(rows)[at]

    def _spans(self, owner: Ints, spans: Ints) -> Ints:
        """Start and end of spans that are rows of base, offset and bytes."""
        base, offset, size = spans.T
        start = self._bases[owner, base] + offset
        return np.column_stack((start, start + size))


PIECES_AT_MOST = NOTHING - PIECES


class _Requests:
    """Requests for shared scratch of all positions, in order, with what each is made of."""

    def __init__(self, kinds: Sequence[CpuKind], which: Ints, bases: Ints) -> None:
        known: dict[Hashable, int] = {}
        rows = [
            np.array(
                [
                    (known.setdefault(r.key, len(known)), r.size, *_padded(r.sources))
                    for r in kind.requests
                ],
                np.int64,
            ).reshape(-1, 2 + 3 * MOST_SOURCES)
            for kind in kinds
        ]
        counts = np.array([len(r) for r in rows], np.int64)
        begin = np.concatenate(([0], np.cumsum(counts)))[:-1]
        self.owner, at = _expanded(begin, counts, which)
        # Where those of each position begin.
        self.begin = _starts(self.owner, len(which))
        table = np.concatenate(rows)[at]
        key, self.size = table[:, 0], np.ascontiguousarray(table[:, 1])
        base, offset, size = (table[:, 2 + i :: 3] for i in range(3))
        start = bases[self.owner[:, None], base] + offset
        if len(self.owner):
            _, self.group = group_rows(np.column_stack((key, start)))
        else:
            self.group = key
        ends = np.stack((start, start + size), axis=2)
        self.sources = ends.reshape(len(start), 2 * MOST_SOURCES)
        self.until = self._last_uses(start, bases)

    def _last_uses(self, start: Ints, bases: Ints) -> Ints:
        """The last position that reads what any of the sources lies at."""
        if not len(start):
            return np.zeros(0, np.int64)
        addresses, inverse = np.unique(start, return_inverse=True)
        read = bases[:, 1:SLOTS].reshape(-1)
        at = np.minimum(np.searchsorted(addresses, read), len(addresses) - 1)
        (hit,) = np.nonzero(addresses[at] == read)
        last = np.zeros(len(addresses), np.int64)
        # In order: the last one stays.
        last[at[hit]] = hit // (SLOTS - 1)
        last[addresses == 0] = -1
        until: Ints = last[inverse.reshape(start.shape)].max(axis=1)
        return until


def _padded(sources: Ints) -> list[int]:
    words: list[int] = sources.reshape(-1).tolist()
    return words + [NOTHING, 0, 0] * (MOST_SOURCES - len(sources))


def _joined(columns: Sequence[Ints]) -> Ints:
    return np.concatenate([np.zeros(0, np.int64), *columns])


def _numbered(rows: Sequence[Ints], begin: Ints) -> Ints:
    """Rows of all kinds whose first column is a record, counted over all kinds."""
    joined = np.concatenate(rows)
    joined[:, 0] += np.repeat(begin[:-1], [len(r) for r in rows])
    return joined


def _ranges(owners: Ints, count: int) -> tuple[Ints, Ints]:
    """Return where the rows of each of ``count`` owners begin, and how many there are.

    They are sorted.
    """
    begin = _starts(owners, count)
    return begin[:-1], np.diff(begin)


def _starts(owners: Ints, count: int) -> Ints:
    """(count + 1) where the rows of each owner begin, given the sorted owners of rows."""
    return np.searchsorted(owners, np.arange(count + 1)).astype(np.int64)


def _expanded(begin: Ints, counts: Ints, which: Ints) -> tuple[Ints, Ints]:
    """For each of ``which``, a number of a range, all of that range: (index of it, what is in it).

    Ranges are ``counts`` long from ``begin`` on.
    """
    each = counts[which]
    owner = np.repeat(np.arange(len(which)), each)
    ends = np.cumsum(each)
    within = np.arange(len(owner)) - np.repeat(ends - each, each)
    return owner, begin[which][owner] + within


def schedule(
    alone: Ints, first: Ints, spans: Ints, stop: Ints, most_spans: int = MOST_SPANS
) -> Ints:
    """Return the Step flags of records, as of ``kernels/planning.py``. Raises PlanStoppedError."""
    n = len(alone)
    if alone.all():
        return np.full(n, int(StepFlag.SERIAL), np.int64)
    steps = np.zeros(n, np.int64)
    arrays = [np.ascontiguousarray(a, np.int64) for a in (alone, first, spans)]
    status = _SCHEDULE(schedule_records.address)(
        n, *(a.ctypes.data for a in arrays), most_spans, steps.ctypes.data, stop.ctypes.data
    )
    if status == STOPPED:
        raise PlanStoppedError
    return steps
