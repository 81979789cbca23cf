"""Routines for tests of the library, and some that go wrong while they are compiled."""

from __future__ import annotations

import math
import os
import time

import numpy as np

from rpc_server.devices.cpu.kernels.intrinsics import (
    inline_helper,
    load_f32,
    memory_copy,
    store_f32,
)
from rpc_server.native.source import routine

TABLE = np.array([3, 1, 4, 1, 5, 9, 2, 6], np.int64)


@routine
def add(a, b):  # type: ignore[no-untyped-def]
    return a + b


@routine
def nothing():  # type: ignore[no-untyped-def]
    return -1


@inline_helper
def _twice(x):  # type: ignore[no-untyped-def]
    return x + x


def scaled_table(factor: int):  # type: ignore[no-untyped-def]
    """Constants in the code, and one that the function is made with."""

    @routine
    def look_up(i):  # type: ignore[no-untyped-def]
        return TABLE[i] * factor + _twice(i)

    return look_up


def noted(factor: int):  # type: ignore[no-untyped-def]
    """Tells in a file that it is compiled, and takes its time."""
    with open(os.environ["NATIVE_SOURCES_NOTES"], "a") as notes:
        notes.write(f"{factor}\n")
    time.sleep(1.0)

    @routine
    def multiplied(i):  # type: ignore[no-untyped-def]
        return i * factor

    return multiplied


@routine
def exponentials(address, n):  # type: ignore[no-untyped-def]
    """Calls the C library; ``n`` F32 are overwritten."""
    for i in range(n):
        store_f32(address + 4 * i, math.exp(load_f32(address + 4 * i)))
    return n


@routine
def copied(to, source, n):  # type: ignore[no-untyped-def]
    memory_copy(to, source, n)
    return 0


@routine
def wrong(a):  # type: ignore[no-untyped-def]
    return a + "one"


def not_marked(a: int) -> int:
    return a


def ends_its_process(status: int):  # type: ignore[no-untyped-def]
    os._exit(status)


def takes_long(seconds: int):  # type: ignore[no-untyped-def]
    time.sleep(seconds)
    return add


def __getattr__(name: str):  # type: ignore[no-untyped-def]
    """``own_priority`` tells the compiler's priority as the reason why it can't be compiled."""
    if name == "own_priority":
        policy = os.sched_getscheduler(0)
        raise LookupError(f"nice {os.getpriority(os.PRIO_PROCESS, 0)}, policy {policy}")
    raise AttributeError(name)
