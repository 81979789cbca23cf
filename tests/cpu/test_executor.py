"""The executor: every record runs on every thread, in order, and a failing one stops all."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from rpc_server.devices.cpu.executor import Executor, RecordProgram
from rpc_server.devices.cpu.kernels.intrinsics import (
    DST,
    RECORD_WORDS,
    Status,
    data,
    extra,
    kernel,
    load_i64,
    ne,
    store_i64,
)
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


def record(words: np.ndarray, *, n: int = 0, extra0: int = 0) -> np.ndarray:
    made = np.zeros(RECORD_WORDS, np.int64)
    made[0] = words.ctypes.data
    made[2] = n
    made[128] = extra0
    return made


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int]]:
    """Addresses of the two kernels above."""
    library = Library(Folder(tmp_path_factory.mktemp("kernels"), "0"), 2)
    wanted = [Routine(__name__, name) for name in ("append_if_predecessor", "fail_on_thread")]
    library.request(wanted)
    yield library.address(wanted[0]), library.address(wanted[1])
    library.close()


@pytest.fixture(params=[1, 2, 3])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    made = Executor(request.param)
    yield made
    made.close()


def test_threads_meet_between_records(executor: Executor, kernels: tuple[int, int]) -> None:
    words = np.zeros(8, np.int64)
    records = [record(words, extra0=i + 1) for i in range(200)]
    program = RecordProgram([kernels[0]] * 200, records)
    assert executor.run(program) == (0, -1)
    assert words[: executor.n_threads].tolist() == [200] * executor.n_threads


def test_failing_record_stops_the_program(executor: Executor, kernels: tuple[int, int]) -> None:
    words = np.zeros(8, np.int64)
    last = executor.n_threads - 1
    append, fail = kernels
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
