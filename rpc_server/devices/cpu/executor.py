"""Runs the records of a plan in compiled code, on all threads at once, without Python in between.

One call of ``run_records`` per thread walks the whole array of records; where the schedule says so,
the threads meet at a barrier made of atomics. A thread that waits spins for a bounded time and then
gives its time slice away, so that a machine shared with the client does not stand still.

The threads besides the caller's are started once per executor and sleep between graphs.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np

from rpc_server.devices.cpu.catalog import run_records
from rpc_server.devices.cpu.kernels.interface.schedule import StepFlag
from rpc_server.devices.cpu.kernels.interface.sync import FAILED_AT, STATUS, SYNC_WORDS

# Through ctypes, which lets go of the GIL.
_RUN = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 7)

# The status of a program that was stopped; kernels have smaller ones.
STOPPED = 64

# What stands in for every kernel of a program that is to stop.
_STAND_IN = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 3)(lambda *_: STOPPED)
_STAND_IN_ADDRESS = int(ctypes.cast(_STAND_IN, ctypes.c_void_p).value or 0)


class RecordProgram:
    """Records laid out for the executor: pointers to kernels and to records, and the memory.

    ``steps`` are the records' Step flags; by default all threads run and meet behind each record.
    """

    def __init__(
        self,
        kernels: list[int],
        words: list[np.ndarray[Any, Any]],
        steps: list[int] | None = None,
    ) -> None:
        self.count = len(kernels)
        self._words = np.array(words, np.int64)
        self._kernels = np.array(kernels, np.int64)
        base, stride = self._words.ctypes.data, self._words.strides[0] if words else 0
        self._records = np.array([base + i * stride for i in range(self.count)], np.int64)
        self._steps = np.full(self.count, int(StepFlag.BARRIER_AFTER), np.int64)
        if steps is not None:
            self._steps[:] = steps
        # Whether any record is for more than the first thread.
        self.parallel = bool((self._steps != int(StepFlag.SERIAL)).any())
        self.steps_address = int(self._steps.ctypes.data)
        self.kernels_address = int(self._kernels.ctypes.data)
        self.records_address = int(self._records.ctypes.data)

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        arrays = (self._words, self._kernels, self._records, self._steps)
        return sum(array.nbytes for array in arrays)

    def stop(self) -> None:
        """Let a run end at its next record, with the status STOPPED; from any thread, for good.

        Threads find another function in the place of the next kernel, and it fails: they end as
        after any record that fails, all at the same barrier. Runs cost nothing for that.
        """
        self._kernels[:] = _STAND_IN_ADDRESS


class Executor:
    """The threads of one device. Programs are run one at a time, by one calling thread.

    Waits for the code that runs records; raises CompileError if there is none.
    """

    def __init__(self, n_threads: int) -> None:
        if n_threads < 1:
            raise ValueError("an executor needs at least one thread")
        self.n_threads = n_threads
        self._run_records = _RUN(run_records.address)
        self._sync = np.zeros(SYNC_WORDS + 8, np.int64)
        # Aligned to a cache line so that each word really has one of its own.
        address = int(self._sync.ctypes.data)
        self._sync_address = -(-address // 64) * 64
        self._state = self._sync[(self._sync_address - address) // 8 :]
        self._job: tuple[int, int, int, int] | None = None
        self._go = [threading.Semaphore(0) for _ in range(n_threads - 1)]
        self._done = threading.Semaphore(0)
        self._workers = [
            threading.Thread(target=self._work, args=(i + 1,), name=f"cpu-{i + 1}", daemon=True)
            for i in range(n_threads - 1)
        ]
        for worker in self._workers:
            worker.start()

    def run(self, program: RecordProgram) -> tuple[int, int]:
        """Run a program; (status, index of the record that failed), (0, -1) if all went well."""
        if not program.count:
            return 0, -1
        self._state[STATUS] = 0
        self._job = (
            program.kernels_address,
            program.records_address,
            program.steps_address,
            program.count,
        )
        others = self._go if program.parallel else []
        for go in others:
            go.release()
        self._run_records(*self._job, 0, self.n_threads, self._sync_address)
        for _ in others:
            self._done.acquire()
        status = int(self._state[STATUS])
        return status, int(self._state[FAILED_AT]) if status else -1

    def _work(self, thread: int) -> None:
        while True:
            self._go[thread - 1].acquire()
            job = self._job
            if job is None:
                return
            self._run_records(*job, thread, self.n_threads, self._sync_address)
            self._done.release()

    def close(self) -> None:
        """End the worker threads."""
        self._job = None
        for go in self._go:
            go.release()
        for worker in self._workers:
            worker.join()
