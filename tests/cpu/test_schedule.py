"""The schedule: any run of threads that keeps its barriers gives what one thread gives."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpc_server.devices.cpu.assembly import PlanStoppedError, schedule
from rpc_server.devices.cpu.kernels.interface.planning import MOST_SPANS
from rpc_server.devices.cpu.kernels.interface.schedule import SERIAL_BELOW, StepFlag

Span = tuple[int, int]


@dataclass
class Record:
    reads: list[Span]
    writes: list[Span]
    work: int = SERIAL_BELOW
    private: bool = False


def steps(*records: Record, most_spans: int = MOST_SPANS, stopped: bool = False) -> list[StepFlag]:
    alone = np.array([r.work < SERIAL_BELOW and not r.private for r in records], np.int64)
    touched = [[(*s, 0) for s in r.reads] + [(*s, 1) for s in r.writes] for r in records]
    first = np.cumsum([0, *map(len, touched)])
    spans = np.array([s for some in touched for s in some], np.int64).reshape(-1, 3)
    stop = np.array([stopped], np.int64)
    return [StepFlag(int(s)) for s in schedule(alone, first, spans, stop, most_spans)]


BIG, SMALL = SERIAL_BELOW, 10


def test_products_that_share_their_input_do_not_meet() -> None:
    x = (0, 10)
    q, k, v = (Record([x], [(20 + 10 * i, 30 + 10 * i)]) for i in range(3))
    after = Record([(20, 50)], [(100, 110)])
    barrier = StepFlag.BARRIER_AFTER
    assert steps(q, k, v, after) == [StepFlag(0), StepFlag(0), barrier, StepFlag(0)]


def test_small_records_stay_on_one_thread_without_meeting() -> None:
    chain = [Record([(i, i + 1)], [(i + 1, i + 2)], SMALL) for i in range(3)]
    assert steps(*chain) == [StepFlag.SERIAL] * 3
    wide = Record([(3, 4)], [(50, 60)])
    assert steps(*chain, wide) == [StepFlag.SERIAL] * 2 + [
        StepFlag.SERIAL | StepFlag.BARRIER_AFTER,
        StepFlag(0),
    ]


def test_writing_over_what_is_still_read_waits() -> None:
    reader, writer = Record([(0, 10)], [(20, 30)]), Record([(40, 50)], [(5, 6)])
    assert steps(reader, writer) == [StepFlag.BARRIER_AFTER, StepFlag(0)]


def test_scratch_of_a_thread_is_used_by_that_thread() -> None:
    assert steps(Record([(0, 1)], [(1, 2)], SMALL, private=True)) == [StepFlag(0)]


def test_nothing_to_do() -> None:
    assert steps() == []


def test_a_record_is_held_against_a_bounded_number_of_others() -> None:
    """Behind so many spans all meet; records in front of that are no longer looked at."""
    apart = [Record([(0, 1)], [(10 * i, 10 * i + 1)]) for i in range(1, 13)]
    assert not any(steps(*apart))
    assert [bool(s) for s in steps(*apart, most_spans=8)] == [i % 4 == 3 for i in range(11)] + [
        False
    ]
    # What reads the result of the first: they have met since, or meet now.
    apart[6] = Record([(10, 11)], [(70, 71)])
    assert [i for i, s in enumerate(steps(*apart, most_spans=8)) if s] == [3, 7]
    assert [i for i, s in enumerate(steps(*apart)) if s] == [5]


def test_scheduling_can_be_stopped() -> None:
    with pytest.raises(PlanStoppedError):
        steps(Record([(0, 1)], [(1, 2)]), stopped=True)


spans = st.tuples(st.integers(0, 12), st.integers(1, 4)).map(lambda s: (s[0], s[0] + s[1]))
records = st.builds(
    Record,
    st.lists(spans, max_size=2),
    st.lists(spans, min_size=1, max_size=1),
    st.sampled_from([SMALL, BIG]),
)


def run(
    listed: list[Record], flags: list[StepFlag], n_threads: int, choose: random.Random
) -> list[int]:
    """Threads advance in a random order; a record's part takes a hash of what it reads.

    Each thread does its part of a parallel record: here, one thread's part is the record.
    """
    memory = list(range(20))
    at = [0] * n_threads
    generation = [0] * n_threads
    while any(i < len(listed) for i in at):
        ready = [
            t for t in range(n_threads) if at[t] < len(listed) and generation[t] == min(generation)
        ]
        t = choose.choice(ready)
        i = at[t]
        owner = 0 if flags[i] & StepFlag.SERIAL else i % n_threads
        if owner == t:
            value = hash((i, *(memory[p] for a, b in listed[i].reads for p in range(a, b))))
            for a, b in listed[i].writes:
                memory[a:b] = [value] * (b - a)
        at[t] += 1
        if flags[i] & StepFlag.BARRIER_AFTER or at[t] == len(listed):
            generation[t] += 1
    return memory


@given(st.lists(records, max_size=12), st.integers(1, 3), st.integers(0, 1 << 32))
def test_threads_give_what_one_gives(listed: list[Record], n_threads: int, seed: int) -> None:
    flags = steps(*listed)
    # A record that races with itself would be the kernel's fault, not the schedule's.
    expected = run(listed, [StepFlag.BARRIER_AFTER] * len(listed), 1, random.Random(0))
    assert run(listed, flags, n_threads, random.Random(seed)) == expected
