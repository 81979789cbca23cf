"""The loop that runs a plan's records, and the barrier at which its threads meet.

See ``executor``, which calls it on every thread at once.
"""

from __future__ import annotations

import sys
from typing import Any

import numba
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from rpc_server.devices.cpu.kernels.interface.schedule import StepFlag
from rpc_server.devices.cpu.kernels.interface.sync import (
    ARRIVED,
    FAILED_AT,
    GENERATION,
    STATUS,
)
from rpc_server.native.source import routine

# About 20 us of spinning, the length of a small node; then the scheduler is asked.
_SPINS = 2000


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


# `os.sched_yield` would need the GIL.
_yield_slice = types.ExternalFunction(
    "SwitchToThread" if sys.platform == "win32" else "sched_yield", types.int32()
)


@numba.njit
def _barrier(sync, n_threads):  # type: ignore[no-untyped-def]
    generation = _atomic_load(sync + GENERATION * 8)
    if _atomic_add(sync + ARRIVED * 8, 1) == n_threads - 1:
        _atomic_store(sync + ARRIVED * 8, 0)
        _atomic_add(sync + GENERATION * 8, 1)
        return
    spins = 0
    while _atomic_load(sync + GENERATION * 8) == generation:
        if spins < _SPINS:
            spins += 1
            _relax()
        else:
            _yield_slice()


_SERIAL = int(StepFlag.SERIAL)
_BARRIER_AFTER = int(StepFlag.BARRIER_AFTER)


@routine
def run_records(kernels, records, steps, count, thread, n_threads, sync):  # type: ignore[no-untyped-def]
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
                _atomic_store(sync + FAILED_AT * 8, i)
                _atomic_store(sync + STATUS * 8, status)
            part += 1
        if not step & _BARRIER_AFTER:
            continue
        if n_threads > 1:
            _barrier(sync, n_threads)
        # A faster thread may have failed in the next record already: everybody must stop behind the
        # same one, or the others would wait for it at a barrier for ever.
        if _atomic_load(sync + STATUS * 8) != 0 and _atomic_load(sync + FAILED_AT * 8) <= i:
            return 0
    return 0
