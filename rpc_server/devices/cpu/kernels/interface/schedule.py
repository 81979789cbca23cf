"""Which records run on one thread, and between which the threads have to meet.

A decode step of a small model is a thousand records of about a microsecond each, and a barrier
costs as much (far more on a machine that is busy with something else). So a record with little to
do runs on the first thread alone, and threads meet only where a record touches what another thread
may still be working on.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

# Below this many bytes read and written a record isn't worth a second thread.
SERIAL_BELOW = 24 << 10

# A half-open range of addresses.
Span = tuple[int, int]


class StepFlag(enum.IntFlag):
    """How the executor runs a record."""

    SERIAL = 1
    BARRIER_AFTER = 2


class Touching(Protocol):
    """What scheduling needs of a record: memory it reads and writes, and bytes of work.

    A ``private`` record has scratch for each thread that is not among what it writes; the first
    thread can't do the others' parts, they may be using theirs.
    """

    @property
    def reads(self) -> Sequence[Span]: ...
    @property
    def writes(self) -> Sequence[Span]: ...
    @property
    def work(self) -> int: ...
    @property
    def private(self) -> bool: ...


@dataclass(slots=True)
class _Touched:
    """Memory touched since the last barrier."""

    reads: list[Span] = field(default_factory=list)
    writes: list[Span] = field(default_factory=list)

    def conflicts(self, record: Touching) -> bool:
        return (
            _overlap(record.writes, self.writes)
            or _overlap(record.writes, self.reads)
            or _overlap(record.reads, self.writes)
        )

    def add(self, record: Touching) -> None:
        self.reads.extend(record.reads)
        self.writes.extend(record.writes)


def _overlap(some: Iterable[Span], others: Sequence[Span]) -> bool:
    return any(a < d and c < b for a, b in some for c, d in others)


def schedule(records: Sequence[Touching]) -> list[int]:
    """The Step flags of each record, for a run by several threads."""
    steps = [StepFlag(0)] * len(records)
    serial, parallel = _Touched(), _Touched()
    for i, record in enumerate(records):
        alone = record.work < SERIAL_BELOW and not record.private
        # Records of the first thread keep their order among themselves without meeting anybody.
        meets = parallel.conflicts(record) or (not alone and serial.conflicts(record))
        if meets:
            steps[i - 1] |= StepFlag.BARRIER_AFTER
            serial, parallel = _Touched(), _Touched()
        if alone:
            steps[i] |= StepFlag.SERIAL
        (serial if alone else parallel).add(record)
    return [int(step) for step in steps]
