"""Runs the records of a plan in compiled code, on all threads at once, without Python in between.

One call of :func:`_run_records` per thread walks the whole array of records; where the schedule
says so, the threads meet at a barrier made of atomics. A thread that waits spins for a bounded time
and then gives its time slice away, so that a machine shared with the client does not stand still.

The threads besides the caller's are started once per executor and sleep between graphs.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from rpc_server.devices.cpu.schedule import Step

# Words of the shared state, each on a cache line of its own.
_ARRIVED = 0
_GENERATION = 8
_STATUS = 16
_FAILED_AT = 24
_SYNC_WORDS = 32

# About 20 us of spinning, the length of a small node; then the scheduler is asked.
_SPINS = 2000

# The symbol must be known to the JIT; `os.sched_yield` would need the GIL.
binding.add_symbol(
    "rpc_server_yield", ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value
)


def _word(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.IntType(64).as_pointer())


@intrinsic
def _atomic_add(typingctx: Any, address: Any, value: Any) -> Any:
    """Add and return what was there before."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _word(builder, args[0]), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _atomic_load(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(_word(builder, args[0]), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _atomic_store(typingctx: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _word(builder, args[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _relax(typingctx: Any) -> Any:
    """Tell the processor that this is a spin loop."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        machine = binding.get_process_triple().split("-", 1)[0]
        name = {"x86_64": "llvm.x86.sse2.pause"}.get(machine)
        if name is not None:
            signature = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, signature, name), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _call_kernel(typingctx: Any, address: Any, record: Any, thread: Any, n_threads: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        word = ir.IntType(64)
        signature = ir.FunctionType(word, [word, word, word])
        function = builder.inttoptr(args[0], signature.as_pointer())
        return builder.call(function, args[1:])

    return types.int64(*[types.int64] * 4), codegen


_yield_slice = types.ExternalFunction("rpc_server_yield", types.int32())


@numba.njit(nogil=True, cache=True)
def _barrier(sync, n_threads):  # type: ignore[no-untyped-def]
    generation = _atomic_load(sync + _GENERATION * 8)
    if _atomic_add(sync + _ARRIVED * 8, 1) == n_threads - 1:
        _atomic_store(sync + _ARRIVED * 8, 0)
        _atomic_add(sync + _GENERATION * 8, 1)
        return
    spins = 0
    while _atomic_load(sync + _GENERATION * 8) == generation:
        if spins < _SPINS:
            spins += 1
            _relax()
        else:
            _yield_slice()


_RUN_SIGNATURE = types.void(*[types.int64] * 7)
_SERIAL = int(Step.SERIAL)
_BARRIER_AFTER = int(Step.BARRIER_AFTER)


@numba.njit(nogil=True, cache=True)
def _run_records(kernels, records, steps, count, thread, n_threads, sync):  # type: ignore[no-untyped-def]
    """Run ``count`` records; stops at the barrier behind the first that returned a status."""
    failed = False
    for i in range(count):
        step = _atomic_load(steps + i * 8)
        # A serial record runs whole on the first thread: each thread's part, one after the other.
        part, end = thread, thread + 1
        if step & _SERIAL:
            part, end = 0, n_threads if thread == 0 else 0
        while part < end and not failed:
            status = _call_kernel(
                _atomic_load(kernels + i * 8), _atomic_load(records + i * 8), part, n_threads
            )
            if status != 0:
                failed = True
                _atomic_store(sync + _FAILED_AT * 8, i)
                _atomic_store(sync + _STATUS * 8, status)
            part += 1
        if not step & _BARRIER_AFTER:
            continue
        if n_threads > 1:
            _barrier(sync, n_threads)
        # A faster thread may have failed in the next record already: everybody must stop behind the
        # same one, or the others would wait for it at a barrier for ever.
        if _atomic_load(sync + _STATUS * 8) != 0 and _atomic_load(sync + _FAILED_AT * 8) <= i:
            return


class Program:
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
        self._steps = np.full(self.count, _BARRIER_AFTER, np.int64)
        if steps is not None:
            self._steps[:] = steps
        self.steps_address = int(self._steps.ctypes.data)
        self.kernels_address = int(self._kernels.ctypes.data)
        self.records_address = int(self._records.ctypes.data)


class Executor:
    """The threads of one device. Programs are run one at a time, by one calling thread."""

    def __init__(self, n_threads: int) -> None:
        if n_threads < 1:
            raise ValueError("an executor needs at least one thread")
        self.n_threads = n_threads
        self._sync = np.zeros(_SYNC_WORDS + 8, np.int64)
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

    @staticmethod
    def compile() -> None:
        """Compile (or load) the interpreter ahead of the first graph."""
        _run_records.compile(_RUN_SIGNATURE)

    def run(self, program: Program) -> tuple[int, int]:
        """Run a program; (status, index of the record that failed), (0, -1) if all went well."""
        if not program.count:
            return 0, -1
        self._state[_STATUS] = 0
        self._job = (
            program.kernels_address,
            program.records_address,
            program.steps_address,
            program.count,
        )
        for go in self._go:
            go.release()
        _run_records(*self._job, 0, self.n_threads, self._sync_address)
        for _ in self._workers:
            self._done.acquire()
        status = int(self._state[_STATUS])
        return status, int(self._state[_FAILED_AT]) if status else -1

    def _work(self, thread: int) -> None:
        while True:
            self._go[thread - 1].acquire()
            job = self._job
            if job is None:
                return
            _run_records(*job, thread, self.n_threads, self._sync_address)
            self._done.release()

    def close(self) -> None:
        """End the worker threads."""
        self._job = None
        for go in self._go:
            go.release()
        for worker in self._workers:
            worker.join()
