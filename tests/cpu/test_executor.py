"""The executor: every record runs on every thread, in order, and a failing one stops all."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Iterator

import numpy as np
import pytest

from rpc_server.devices.cpu.executor import AGAIN, PAUSED, Executor, Position, RecordProgram
from rpc_server.devices.cpu.kernels.interface.schedule import StepFlag
from rpc_server.devices.cpu.kernels.interface.sync import OWN, OWN_WORDS, TIME
from rpc_server.devices.cpu.kernels.intrinsics import (
    DST,
    RECORD_WORDS,
    Status,
    data,
    extra,
    kernel,
    load_i64,
    load_index_64,
    ne,
    store_i64,
)
from rpc_server.devices.cpu.run_times import RunTimes
from rpc_server.devices.cpu.turns import PauseWord
from rpc_server.native.folder import Folder
from rpc_server.native.library import Library
from rpc_server.native.routine import Routine


@kernel
def append_if_predecessor(rec, ith, nth):  # type: ignore[no-untyped-def]
    """Thread t sets word t to extra(0), but only where all threads have finished extra(0) - 1."""
    for t in range(nth):
        if load_i64(data(rec, DST) + t * 8) < extra(rec, 0) - 1:
            return 0
    store_i64(data(rec, DST) + ith * 8, extra(rec, 0))
    return 0


@kernel
def fail_on_thread(rec, ith, nth):  # type: ignore[no-untyped-def]
    if ith == ne(rec, DST, 0):
        return 1
    return 0


@kernel
def count_part(rec, part, n_parts):  # type: ignore[no-untyped-def]
    """Count a part in a word of its own; the one of number extra(0) sets the word at extra(1)."""
    word = data(rec, DST) + part * 8
    store_i64(word, load_i64(word) + 1)
    if part == extra(rec, 0):
        store_i64(extra(rec, 1), 1)
    return 0


@kernel
def wait_for_peer(rec, part, n_parts):  # type: ignore[no-untyped-def]
    """Wait extra(0) times for somebody, in the first word of DST, and count that in the second."""
    if part != 0:
        return 0
    waits = load_i64(data(rec, DST))
    if waits == 0:
        store_i64(data(rec, DST) + 8, load_i64(data(rec, DST) + 8) + 1)
        return 0
    store_i64(data(rec, DST), waits - 1)
    return 65


@kernel
def last_thread_is_held(rec, part, n_parts):  # type: ignore[no-untyped-def]
    """The last thread goes no further before the first word of DST is set."""
    if part == n_parts - 1:
        while load_index_64(data(rec, DST)) == 0:
            pass
    return 0


def record(words: np.ndarray, *, n: int = 0, extra0: int = 0, extra1: int = 0) -> np.ndarray:
    made = np.zeros(RECORD_WORDS, np.int64)
    made[0] = words.ctypes.data
    made[2] = n
    made[128] = extra0
    made[129] = extra1
    return made


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, ...]]:
    """Addresses of the kernels above."""
    library = Library(Folder(tmp_path_factory.mktemp("kernels"), "0"), 2)
    names = (
        "append_if_predecessor", "fail_on_thread", "count_part", "wait_for_peer",
        "last_thread_is_held",
    )  # fmt: skip
    wanted = [Routine(__name__, name) for name in names]
    library.request(wanted)
    yield tuple(library.address(routine) for routine in wanted)
    library.close()


@pytest.fixture
def pause() -> PauseWord:
    return PauseWord()


@pytest.fixture(params=[1, 2, 3])
def executor(request: pytest.FixtureRequest, pause: PauseWord) -> Iterator[Executor]:
    made = Executor(request.param, pause)
    yield made
    made.close()


def test_threads_meet_between_records(executor: Executor, kernels: tuple[int, ...]) -> None:
    words = np.zeros(8, np.int64)
    records = [record(words, extra0=i + 1) for i in range(200)]
    program = RecordProgram([kernels[0]] * 200, records)
    assert executor.run(program) == (0, -1)
    assert words[: executor.n_threads].tolist() == [200] * executor.n_threads


def test_failing_record_stops_the_program(executor: Executor, kernels: tuple[int, ...]) -> None:
    words = np.zeros(8, np.int64)
    last = executor.n_threads - 1
    append, fail = kernels[:2]
    program_kernels = [append] * 3 + [fail] + [append] * 3
    records = [record(words, n=last, extra0=i + 1) for i in range(7)]
    program = RecordProgram(program_kernels, records)
    for _ in range(200):
        words[:] = 0
        assert executor.run(program) == (Status.INDEX_OUT_OF_RANGE, 3)
        assert words.max() == 3
    # The state of the failure is gone with the next program.
    words[:] = 0
    assert executor.run(RecordProgram([append] * 3, records[:3])) == (0, -1)


def test_empty_program_runs(executor: Executor) -> None:
    assert executor.run(RecordProgram([], [])) == (0, -1)


def test_needs_a_thread() -> None:
    with pytest.raises(ValueError, match="at least one thread"):
        Executor(0)


def other_program(kernels: tuple[int, ...], words: np.ndarray) -> RecordProgram:
    """Of somebody else, to run while a program is paused."""
    return RecordProgram([kernels[0]] * 3, [record(words, extra0=i + 1) for i in range(3)])


def test_a_pause_is_behind_the_record_at_hand(
    executor: Executor, pause: PauseWord, kernels: tuple[int, ...]
) -> None:
    n = executor.n_threads
    words = np.zeros((6, 8), np.int64)
    # The third record has the run paused, on the last thread.
    last = [-1, -1, n - 1, -1, -1, -1]
    records = [record(words[i], extra0=last[i], extra1=pause.address) for i in range(6)]
    program = RecordProgram([kernels[2]] * 6, records)
    position, others = Position(), np.zeros(8, np.int64)
    assert executor.advance(program, position) == PAUSED
    assert words[:, :n].tolist() == [[1] * n] * 3 + [[0] * n] * 3
    pause.clear()
    assert executor.run(other_program(kernels, others)) == (0, -1)
    assert executor.advance(program, position) == 0
    assert words[:, :n].tolist() == [[1] * n] * 6


def test_a_run_that_is_always_paused_comes_to_its_end(
    executor: Executor, pause: PauseWord, kernels: tuple[int, ...]
) -> None:
    words = np.zeros((3, 64), np.int64)
    records = [record(words[i], extra0=-1) for i in range(3)]
    program = RecordProgram([kernels[2]] * 3, records, parts=[0, 64, 0])
    position, pauses = Position(), 0
    pause.set()
    while executor.advance(program, position) == PAUSED:
        pauses += 1
    assert words[1].tolist() == [1] * 64
    assert words[::2, : executor.n_threads].tolist() == [[1] * executor.n_threads] * 2
    # A thread that is told to pause does one part more; then there is one behind each record.
    assert pauses >= 64 // executor.n_threads


def test_a_record_is_paused_between_two_of_its_parts(
    executor: Executor, pause: PauseWord, kernels: tuple[int, ...]
) -> None:
    words = np.zeros((3, 64), np.int64)
    records = [
        record(words[i], extra0=(7 if i == 1 else -1), extra1=pause.address) for i in range(3)
    ]
    program = RecordProgram([kernels[2]] * 3, records, parts=[0, 64, 0])
    position, others = Position(), np.zeros(8, np.int64)
    assert executor.advance(program, position) == PAUSED
    done = int(words[1].sum())
    assert 8 <= done < 64
    assert words[1].tolist() == [1] * done + [0] * (64 - done)
    assert not words[2].any()
    pause.clear()
    assert executor.run(other_program(kernels, others)) == (0, -1)
    assert executor.advance(program, position) == 0
    assert words[1].tolist() == [1] * 64
    assert words[2, : executor.n_threads].tolist() == [1] * executor.n_threads


@pytest.mark.parametrize("barrier", [True, False])
@pytest.mark.parametrize("cut", [True, False])
def test_what_waits_for_a_peer_is_called_again_and_nothing_else_is(
    executor: Executor, kernels: tuple[int, ...], barrier: bool, cut: bool
) -> None:
    """Other threads may be further on; what they have done is not done twice."""
    assert AGAIN == 65
    n = executor.n_threads
    peer, words = np.array([3, 0], np.int64), np.zeros((3, 64), np.int64)
    records = [record(words[0], extra0=-1), record(peer)]
    records += [record(words[i], extra0=-1) for i in (1, 2)]
    meets = int(StepFlag.BARRIER_AFTER)
    last = meets if barrier or cut else 0
    steps = [meets, int(StepFlag.SERIAL), 0, last]
    program = RecordProgram(
        [kernels[2], kernels[3], kernels[2], kernels[2]],
        records,
        steps,
        [0, 0, 0, 64 if cut else 0],
    )
    position, others, pauses = Position(), np.zeros(8, np.int64), 0
    while executor.advance(program, position) == PAUSED:
        pauses += 1
        assert executor.run(other_program(kernels, others)) == (0, -1)
    assert pauses == 3
    assert peer.tolist() == [0, 1]
    assert words[:2, :n].tolist() == [[1] * n] * 2
    parts = 64 if cut else n
    assert words[2, :parts].tolist() == [1] * parts


def test_a_part_that_fails_stops_the_program(executor: Executor, kernels: tuple[int, ...]) -> None:
    words = np.zeros((2, 64), np.int64)
    records = [record(words[0], n=9), record(words[1], extra0=-1)]
    program = RecordProgram([kernels[1], kernels[2]], records, parts=[16, 0])
    for _ in range(20):
        assert executor.run(program) == (Status.INDEX_OUT_OF_RANGE, 0)
        assert not words.any()


class _Half(RunTimes):
    """Says that half of the threads are to run it, and keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[bool, float]] = []

    def half(self, now: float) -> bool:
        return True

    def note(self, half: bool, seconds: float, waited: float, now: float) -> None:
        self.noted.append((half, waited))


class _All(_Half):
    """Says that all threads are to run it."""

    def half(self, now: float) -> bool:
        return False


def test_half_of_the_threads_do_the_shares_of_all(
    executor: Executor, pause: PauseWord, kernels: tuple[int, ...]
) -> None:
    n = executor.n_threads
    words = np.zeros((4, 64), np.int64)
    records = [
        record(words[i], extra0=(7 if i == 1 else -1), extra1=pause.address) for i in range(4)
    ]
    serial = int(StepFlag.SERIAL)
    program = RecordProgram([kernels[2]] * 4, records, [2, 2, serial, 2], parts=[0, 64, 0, 0])
    program.times = times = _Half()
    position = Position()
    assert executor.advance(program, position) == PAUSED
    pause.clear()
    # Whoever goes on with it.
    assert executor.advance(program, position) == 0
    assert words[1].tolist() == [1] * 64
    for i in (0, 2, 3):
        assert words[i].tolist() == [1] * n + [0] * (64 - n)
    assert not times.noted
    words[:] = 0
    pause.clear()
    program._words[1, 128] = -1
    assert executor.run(program) == (0, -1)
    assert words.sum(axis=1).tolist() == [n, 64, n, n]
    assert [half for half, _ in times.noted] == ([True] if n > 1 else [])


def test_a_failure_ends_a_run_of_half_of_them(executor: Executor, kernels: tuple[int, ...]) -> None:
    words = np.zeros((2, 8), np.int64)
    records = [record(words[0], n=executor.n_threads - 1), record(words[1], extra0=-1)]
    program = RecordProgram([kernels[1], kernels[2]], records)
    program.times = _Half()
    assert executor.run(program) == (Status.INDEX_OUT_OF_RANGE, 0)
    assert not words.any()


def test_waits_of_threads_are_noted(executor: Executor, kernels: tuple[int, ...]) -> None:
    """The last thread is held until the others have waited for it, and longer than they spin."""
    n = executor.n_threads
    words = np.zeros((2, 8), np.int64)
    program = RecordProgram(
        [kernels[4], kernels[2]], [record(words[0]), record(words[1], extra0=-1)]
    )
    program.times = times = _All()
    with concurrent.futures.ThreadPoolExecutor(1) as caller:
        run = caller.submit(executor.run, program)
        try:
            # Whoever reads the clock has spun in vain.
            while not all(executor._state[OWN + TIME :: OWN_WORDS][: n - 1]):
                assert not run.done()
                time.sleep(0.001)
        finally:
            words[0, 0] = 1
        assert run.result(60) == (0, -1)
    assert words[1, :n].tolist() == [1] * n
    if n > 1:
        ((half, waited),) = times.noted
        assert waited > 0
        assert not half
