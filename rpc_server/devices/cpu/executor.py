"""Runs the records of a plan in compiled code, on all threads at once, without Python in between.

One call of ``run_records`` per thread walks the whole array of records; where the schedule says so,
the threads meet at a barrier made of atomics. A thread that waits spins for a bounded time and then
gives its time slice away, so that a machine shared with the client does not stand still.

The threads besides the caller's are started once per executor and sleep between graphs. Where other
programs keep interrupting them, half of them do the work of all (``run_times``): by the same shares
of it, so that results are the same.

A run can be paused: once the word that the executor was given is set, :meth:`Executor.advance`
returns behind the records at hand, or between two parts of one. Where it goes on is in a
:class:`Position`, so that threads run programs of others meanwhile.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rpc_server.devices.cpu.catalog import run_records
from rpc_server.devices.cpu.kernels.interface.schedule import StepFlag
from rpc_server.devices.cpu.kernels.interface.sync import (
    AGAIN,
    ENDS,
    FAILED_AT,
    FIRST,
    LOST,
    MET,
    NEXT,
    OWN,
    OWN_WORDS,
    PAUSED,
    PROGRAM_WORDS,
    REST,
    STATUS,
    WAITING_AT,
    sync_words,
)
from rpc_server.devices.cpu.run_times import RunTimes
from rpc_server.devices.cpu.turns import PauseWord

__all__ = ["AGAIN", "PAUSED", "Executor", "Position", "RecordProgram"]

# Through ctypes, which lets go of the GIL.
_RUN = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 5)


class RecordProgram:
    """Records laid out for the executor: pointers to kernels and to records, and the memory.

    ``steps`` are the records' Step flags; by default all threads run and meet behind each record.
    ``parts`` say into how many parts each is cut, between which a run may pause; 0: one a thread.
    Behind those that are cut threads have to meet. ``waits`` is whether a record waits for a peer:
    how long a run takes tells nothing of the threads then.
    """

    def __init__(
        self,
        kernels: Sequence[int] | np.ndarray[Any, Any],
        words: Sequence[np.ndarray[Any, Any] | Sequence[int]] | np.ndarray[Any, Any],
        steps: Sequence[int] | np.ndarray[Any, Any] | None = None,
        parts: Sequence[int] | np.ndarray[Any, Any] | None = None,
        *,
        waits: bool = False,
    ) -> None:
        self.count = len(kernels)
        # Not copied if they are one array already: they take most of a plan's memory.
        self._words = np.ascontiguousarray(words, np.int64)
        self._kernels = np.array(kernels, np.int64)
        base, stride = self._words.ctypes.data, self._words.strides[0] if self.count else 0
        self._records = base + stride * np.arange(self.count, dtype=np.int64)
        self._steps = np.full(self.count, int(StepFlag.BARRIER_AFTER), np.int64)
        if steps is not None:
            self._steps[:] = steps
        self._parts = np.zeros(self.count, np.int64)
        if parts is not None:
            self._parts[:] = parts
        # Whether any record is for more than the first thread.
        self.parallel = bool((self._steps != int(StepFlag.SERIAL)).any())
        self.times = None if waits else RunTimes()
        self._program = np.zeros(PROGRAM_WORDS, np.int64)
        self._shares = 0
        self.address = int(self._program.ctypes.data)

    def divide(self, n_threads: int) -> None:
        """Let records that are not cut be shared by ``n_threads``."""
        if self._shares == n_threads:
            return
        self._shares = n_threads
        arrays = (self._kernels, self._records, self._steps, self._parts)
        self._program[:] = (*(int(a.ctypes.data) for a in arrays), self.count, n_threads)


@dataclass(slots=True)
class Position:
    """The place where a run goes on: see ``kernels/interface/sync.py``."""

    # The record that failed, if one did.
    failed_at: int = -1
    first: int = 0
    rest: int = 0
    met: int = 0
    part: int = 0

    @property
    def is_start(self) -> bool:
        """True where nothing has been done yet."""
        return not (self.first or self.rest or self.met or self.part)


class Executor:
    """The threads of one device. Programs are run one at a time, by one calling thread.

    ``pause`` is the word by which a run is paused. Waits for the code that runs records; raises
    CompileError if there is none.
    """

    def __init__(self, n_threads: int, pause: PauseWord | None = None) -> None:
        if n_threads < 1:
            raise ValueError("an executor needs at least one thread")
        self.n_threads = n_threads
        self._pause = pause or PauseWord()
        self._run_records = _RUN(run_records.address)
        self._sync = np.zeros(sync_words(n_threads) + 8, np.int64)
        # Aligned to a cache line so that each word really has one of its own.
        address = int(self._sync.ctypes.data)
        self._sync_address = -(-address // 64) * 64
        self._state = self._sync[(self._sync_address - address) // 8 :]
        # The same, for one word at a time: numpy takes twice as long.
        self._words = self._state.data
        # Of each thread, how long it has waited, nanoseconds.
        self._lost = self._state[OWN + LOST :: OWN_WORDS][:n_threads]
        # Address of the program, and how many threads run it.
        self._job: tuple[int, int] | None = None
        # Locked but for a moment, when a thread is to begin, and when it is done.
        self._go = [_locked() for _ in range(n_threads - 1)]
        self._done = [_locked() for _ in range(n_threads - 1)]
        self._workers = [
            threading.Thread(target=self._work, args=(i + 1,), name=f"cpu-{i + 1}", daemon=True)
            for i in range(n_threads - 1)
        ]
        for worker in self._workers:
            worker.start()

    def run(self, program: RecordProgram) -> tuple[int, int]:
        """Run a program; (status, index of the record that failed), (0, -1) if all went well."""
        position = Position()
        while (status := self.advance(program, position)) == PAUSED:
            pass
        return status, position.failed_at

    def advance(self, program: RecordProgram, position: Position) -> int:
        """Run a program from ``position`` on, until its end or a pause.

        Returns 0 at its end, PAUSED, or the status of the record that failed.
        """
        if not program.count:
            return 0
        times = program.times if program.parallel and position.is_start else None
        if times is None or self.n_threads == 1:
            return self._advance(program, position, self.n_threads if program.parallel else 1)
        started = time.perf_counter()
        half = times.half(started)
        self._lost[:] = 0
        status = self._advance(program, position, -(-self.n_threads // (1 + half)))
        if status == 0:
            # Who comes last waits for nobody.
            waited = float(self._lost.sum()) * 1e-9 / (self.n_threads - 1)
            now = time.perf_counter()
            times.note(half, now - started, waited, now)
        return status

    def _advance(self, program: RecordProgram, position: Position, crowd: int) -> int:
        """Do what :meth:`advance` says, on so many threads."""
        state = self._words
        program.divide(self.n_threads)
        state[STATUS] = state[ENDS] = 0
        state[WAITING_AT] = -1
        state[FIRST], state[REST], state[MET] = position.first, position.rest, position.met
        state[NEXT] = position.part
        self._job = program.address, crowd
        for go in self._go[: crowd - 1]:
            go.release()
        paused = self._run_records(
            program.address, 0, crowd, self._sync_address, self._pause.address
        )
        for done in self._done[: crowd - 1]:
            done.acquire()
        if status := state[STATUS]:
            position.failed_at = state[FAILED_AT]
            return status
        if not paused and state[WAITING_AT] >= 0:
            # No barrier was left at which the others could have waited.
            state[FIRST], state[REST], state[MET] = state[WAITING_AT], program.count, 0
            paused = 1
        if not paused:
            return 0
        position.first, position.rest = state[FIRST], state[REST]
        position.met, position.part = state[MET], state[NEXT]
        return PAUSED

    def _work(self, thread: int) -> None:
        while True:
            self._go[thread - 1].acquire()
            job = self._job
            if job is None:
                return
            address, crowd = job
            self._run_records(address, thread, crowd, self._sync_address, self._pause.address)
            self._done[thread - 1].release()

    def close(self) -> None:
        """End the worker threads."""
        self._job = None
        for go in self._go:
            go.release()
        for worker in self._workers:
            worker.join()


def _locked() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock
