"""The loop that runs a plan's records, the barrier at which its threads meet, and where it pauses.

See ``executor``, which calls it on every thread at once. Threads have to pause behind the same
record, or some would wait for the others for ever: who comes to a barrier last decides for all.

Who waits at a barrier spins, since the others are about as far. Then somebody else may have the
core of one of them: who waits offers its own to whoever wants it, and counts how long it waits, by
which the executor decides on how many threads to run.
"""

from __future__ import annotations

import sys
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from rpc_server.devices.cpu.kernels.interface.schedule import StepFlag
from rpc_server.devices.cpu.kernels.interface.sync import (
    AGAIN,
    ARRIVED,
    COUNT,
    ENDS,
    FAILED_AT,
    FIRST,
    GENERATION,
    KERNELS,
    LOST,
    MET,
    NEXT,
    OWN,
    OWN_WORDS,
    PARTS,
    RECORDS,
    REST,
    SHARES,
    STATUS,
    STEPS,
    TIME,
    WAITING_AT,
)
from rpc_server.devices.cpu.kernels.intrinsics import load_i64, store_i64
from rpc_server.native.source import routine


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
def _call_kernel(
    typingctx: Any, address: Any, record: Any, part: Any, parts: Any, thread: Any
) -> Any:
    """Most kernels don't take the thread; all four are passed in registers, by every convention."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        word = ir.IntType(64)
        signature = ir.FunctionType(word, [word] * 4)
        function = builder.inttoptr(args[0], signature.as_pointer())
        return builder.call(function, args[1:])

    return types.int64(*[types.int64] * 5), codegen


# `os.sched_yield` would need the GIL.
_yield_slice = types.ExternalFunction(
    "SwitchToThread" if sys.platform == "win32" else "sched_yield", types.int32()
)


_CLOCK_MONOTONIC = 1
_HAS_CLOCK = sys.platform != "win32"
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))


@numba.njit
def _now(own):  # type: ignore[no-untyped-def]
    """Monotonic nanoseconds; always 0 where there is no such clock."""
    if not _HAS_CLOCK:
        return 0
    _clock_gettime(np.int32(_CLOCK_MONOTONIC), own + TIME * 8)
    return load_i64(own + TIME * 8) * 1_000_000_000 + load_i64(own + TIME * 8 + 8)


@numba.njit
def _wait(sync, generation, own):  # type: ignore[no-untyped-def]
    """Wait until the generation is another one, and count what that took beyond spinning."""
    for _ in range(_SPINS):
        if _atomic_load(sync + GENERATION * 8) != generation:
            return
        _relax()
    since = _now(own)
    while _atomic_load(sync + GENERATION * 8) == generation:
        _yield_slice()
    store_i64(own + LOST * 8, load_i64(own + LOST * 8) + _now(own) - since)


@numba.njit
def _end_at(sync, i, parts, count, pause):  # type: ignore[no-untyped-def]
    """Return whether the run ends behind record ``i``, which all threads have left.

    If so, that is where it goes on.
    """
    if _atomic_load(sync + STATUS * 8) != 0:
        return 1
    unfinished = parts > 0 and _atomic_load(sync + NEXT * 8) < parts
    waiting = _atomic_load(sync + WAITING_AT * 8)
    if waiting >= 0:
        # The first thread has yet to come here; the others have, but for parts of this record.
        _atomic_store(sync + FIRST * 8, waiting)
        _atomic_store(sync + REST * 8, i)
        _atomic_store(sync + MET * 8, 0 if unfinished else 1)
        return 1
    if unfinished:
        at = i
    else:
        if parts > 0:
            _atomic_store(sync + NEXT * 8, 0)
        at = i + 1
        if at == count or _atomic_load(pause) == 0:
            return 0
    _atomic_store(sync + FIRST * 8, at)
    _atomic_store(sync + REST * 8, at)
    _atomic_store(sync + MET * 8, 0)
    return 1


# About 20 us of spinning, the length of a small node; then the scheduler is asked.
_SPINS = 2000


@numba.njit
def _meet(sync, thread, crowd, i, parts, count, pause):  # type: ignore[no-untyped-def]
    """Wait for all threads behind record ``i``; whether the run ends here."""
    generation = _atomic_load(sync + GENERATION * 8)
    if _atomic_add(sync + ARRIVED * 8, 1) == crowd - 1:
        _atomic_store(sync + ARRIVED * 8, 0)
        ends = _end_at(sync, i, parts, count, pause)
        _atomic_store(sync + ENDS * 8, ends)
        _atomic_add(sync + GENERATION * 8, 1)
        return ends
    _wait(sync, generation, sync + (OWN + thread * OWN_WORDS) * 8)
    return _atomic_load(sync + ENDS * 8)


_SERIAL = int(StepFlag.SERIAL)
_BARRIER_AFTER = int(StepFlag.BARRIER_AFTER)


@routine
def run_records(program, thread, crowd, sync, pause):  # type: ignore[no-untyped-def]
    """Run records from where the run was paused, on one of ``crowd`` threads.

    A record that fails ends the run at the next barrier, and so does the word at ``pause``, if it
    isn't 0: all threads pause behind the same record. One that is cut into parts is paused within:
    threads take its parts one by one, and no further ones while they are to pause. Where the crowd
    is smaller than the number of shares that a record has, each thread does several.
    """
    kernels = load_i64(program + KERNELS * 8)
    records = load_i64(program + RECORDS * 8)
    steps = load_i64(program + STEPS * 8)
    cuts = load_i64(program + PARTS * 8)
    count = load_i64(program + COUNT * 8)
    shares = load_i64(program + SHARES * 8)
    # Nobody writes these while a thread may still have to read them: that is done at barriers.
    i = load_i64(sync + (FIRST if thread == 0 else REST) * 8)
    met = thread != 0 and load_i64(sync + MET * 8) != 0
    idle = False
    while i < count:
        step = load_i64(steps + i * 8)
        parts = load_i64(cuts + i * 8)
        status = 0
        if met or idle:
            met = False
        elif parts > 0:
            # One at least, so that a run which is paused all the time goes on too.
            while True:
                part = _atomic_add(sync + NEXT * 8, 1)
                if part >= parts:
                    break
                status = _call_kernel(
                    load_i64(kernels + i * 8), load_i64(records + i * 8), part, parts, thread
                )
                if status != 0 or _atomic_load(pause) != 0:
                    break
        else:
            # A serial record runs whole on the first thread: each one's share after the other's.
            share, end, stride = thread, shares, crowd
            if step & _SERIAL:
                end, stride = shares if thread == 0 else 0, 1
            while share < end and status == 0:
                status = _call_kernel(
                    load_i64(kernels + i * 8), load_i64(records + i * 8), share, shares, thread
                )
                share += stride
        if status != 0:
            idle = True
            if status == AGAIN:
                _atomic_store(sync + WAITING_AT * 8, i)
            else:
                _atomic_store(sync + FAILED_AT * 8, i)
                _atomic_store(sync + STATUS * 8, status)
        if crowd == 1:
            if _end_at(sync, i, parts, count, pause) != 0:
                return 1
        elif step & _BARRIER_AFTER and _meet(sync, thread, crowd, i, parts, count, pause) != 0:
            return 1
        i += 1
    return 0
