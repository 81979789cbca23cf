"""Kernels that send to and receive from a socket, so that an exchange is part of a compiled plan.

A kernel tries again for a while, since the other side answers within microseconds, and then sleeps
in poll(); between two tries it lets others have the core. What a stream is, which words it has and
how patience is counted is told in ``rpc_server.devices.cpu.kernels.interface.stream``.
"""

from __future__ import annotations

import socket

import numpy as np
from numba import types

from rpc_server.devices.cpu.kernels.interface.stream import (
    BYTES_RECEIVED,
    BYTES_SENT,
    CLOSED,
    CONFUSED,
    EARLY_ADDRESS,
    EARLY_LEFT,
    EXCHANGES,
    NS_PER_BYTE,
    PATIENCE_NS,
    POLL,
    RENEWED,
    SILENT,
    SPIN_NS,
    TIME,
    TIMEOUT_MS,
    WAIT_NS,
)
from rpc_server.devices.cpu.kernels.intrinsics import (
    extra,
    helper,
    kernel,
    load_i64,
    memory_copy,
    store_i16,
    store_i32,
    store_i64,
)

_FLAGS = socket.MSG_DONTWAIT | getattr(socket, "MSG_NOSIGNAL", 0)
_DONTWAIT = int(socket.MSG_DONTWAIT)
_POLLIN = 1
_POLLOUT = 4
_CLOCK_MONOTONIC = 1
# A socket that poll() calls ready although nothing can be read is broken.
_MOST_FALSE_ALARMS = 3

_recv = types.ExternalFunction(
    "recv", types.int64(types.int32, types.int64, types.int64, types.int32)
)
_send = types.ExternalFunction(
    "send", types.int64(types.int32, types.int64, types.int64, types.int32)
)
_poll = types.ExternalFunction("poll", types.int32(types.int64, types.int64, types.int32))
# A thread that tries again may be on the core of the one it waits for.
_let_others_run = types.ExternalFunction("sched_yield", types.int32())
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))


@helper
def _now(stream):  # type: ignore[no-untyped-def]
    """Monotonic nanoseconds."""
    _clock_gettime(np.int32(_CLOCK_MONOTONIC), stream + TIME * 8)
    return load_i64(stream + TIME * 8) * 1_000_000_000 + load_i64(stream + TIME * 8 + 8)


@helper
def _count(stream, word, n):  # type: ignore[no-untyped-def]
    store_i64(stream + word * 8, load_i64(stream + word * 8) + n)


@helper
def _moved(stream, n, since):  # type: ignore[no-untyped-def]
    """``n`` bytes were moved, after waiting from ``since`` on (0: without)."""
    left = load_i64(stream + PATIENCE_NS * 8) + n * NS_PER_BYTE
    if since != 0:
        left -= _now(stream) - since
    store_i64(stream + PATIENCE_NS * 8, min(left, load_i64(stream + TIMEOUT_MS * 8) * 1_000_000))


@helper
def _ready(stream, events, since):  # type: ignore[no-untyped-def]
    """Sleep until the socket is ready; 0, or the status if it isn't in time.

    The caller has waited from ``since`` on.
    """
    left = load_i64(stream + PATIENCE_NS * 8) - (_now(stream) - since)
    if left <= 0:
        return SILENT
    poll = stream + POLL * 8
    store_i32(poll, load_i64(stream))
    store_i16(poll + 4, events)
    store_i16(poll + 6, 0)
    n = _poll(poll, 1, np.int32(left // 1_000_000 + 1))
    if n == 0:
        return SILENT
    return 0 if n > 0 else CLOSED


@helper
def _send_all(stream, address, size):  # type: ignore[no-untyped-def]
    fd = np.int32(load_i64(stream))
    sent = 0
    since = 0
    alarms = 0
    while sent < size:
        n = _send(fd, address + sent, size - sent, np.int32(_FLAGS))
        if n > 0:
            # What went out before a failure counts too: it tells a stream that is in order.
            _count(stream, BYTES_SENT, n)
            _moved(stream, n, since)
            sent += n
            since = 0
            alarms = 0
            continue
        if since == 0:
            since = _now(stream)
        alarms += 1
        if alarms > _MOST_FALSE_ALARMS:
            return CLOSED
        status = _ready(stream, _POLLOUT, since)
        if status != 0:
            return status
    return 0


@helper
def _receive_all(stream, address, size):  # type: ignore[no-untyped-def]
    got = min(load_i64(stream + EARLY_LEFT * 8), size)
    if got > 0:
        memory_copy(address, load_i64(stream + EARLY_ADDRESS * 8), got)
        _count(stream, EARLY_ADDRESS, got)
        _count(stream, EARLY_LEFT, -got)
    fd = np.int32(load_i64(stream))
    since = 0
    alarms = 0
    while got < size:
        n = _recv(fd, address + got, size - got, np.int32(_DONTWAIT))
        if n > 0:
            _moved(stream, n, since)
            got += n
            since = 0
            alarms = 0
            continue
        if n == 0:
            return CLOSED
        if since == 0:
            since = _now(stream)
        if _now(stream) - since <= load_i64(stream + SPIN_NS * 8):
            _let_others_run()
            continue
        alarms += 1
        if alarms > _MOST_FALSE_ALARMS:
            return CLOSED
        status = _ready(stream, _POLLIN, since)
        if status != 0:
            return status
    _count(stream, BYTES_RECEIVED, size)
    return 0


@kernel
def stream_send(rec, thread, n_threads):  # type: ignore[no-untyped-def]
    """Send a prefix, rows of a tensor, and a suffix, small ones in one call.

    Extra words: stream | prefix address, bytes | data address, bytes of a row, rows in dimensions 1
    to 3, strides of dimensions 1 to 3 | suffix address, bytes | staging address, bytes | 1 if it
    completes a step.
    """
    if thread != 0:
        return 0
    stream = extra(rec, 0)
    row = extra(rec, 4)
    staging = extra(rec, 13)
    room = extra(rec, 14)
    n1, n2, n3 = extra(rec, 5), extra(rec, 6), extra(rec, 7)
    dense = extra(rec, 8) == row and extra(rec, 9) == row * n1 and extra(rec, 10) == row * n1 * n2
    size, pieces = (row * n1 * n2 * n3, 1) if dense else (row, n1 * n2 * n3)
    used = 0
    for i in range(-1, pieces + 1):
        if i == -1:
            address, n = extra(rec, 1), extra(rec, 2)
        elif i == pieces:
            address, n = extra(rec, 11), extra(rec, 12)
        else:
            rest = i // n1
            address = extra(rec, 3) + (i % n1) * extra(rec, 8)
            address += (rest % n2) * extra(rec, 9) + (rest // n2) * extra(rec, 10)
            n = size
        if n == 0:
            continue
        if used + n > room and used > 0:
            status = _send_all(stream, staging, used)
            if status != 0:
                return status
            used = 0
        if n > room:
            status = _send_all(stream, address, n)
            if status != 0:
                return status
        else:
            memory_copy(staging + used, address, n)
            used += n
    _count(stream, EXCHANGES, extra(rec, 15))
    status = 0
    if used > 0:
        status = _send_all(stream, staging, used)
    if extra(rec, 15) != 0 and load_i64(stream + RENEWED * 8) != 0:
        store_i64(stream + PATIENCE_NS * 8, load_i64(stream + TIMEOUT_MS * 8) * 1_000_000)
    return status


@kernel
def stream_receive(rec, thread, n_threads):  # type: ignore[no-untyped-def]
    """Receive runs of bytes to equally spaced places.

    Extra words: stream | bytes of framing before the data (0, or 8 that hold their size) | address
    of the first place, bytes of a run, runs, distance of the places | staging address, bytes.
    """
    if thread != 0:
        return 0
    stream = extra(rec, 0)
    head = extra(rec, 1)
    place = extra(rec, 2)
    run = extra(rec, 3)
    runs = extra(rec, 4)
    distance = extra(rec, 5)
    staging = extra(rec, 6)
    room = extra(rec, 7)
    started = _now(stream)
    if head > 0:
        status = _receive_all(stream, staging, head)
        if status != 0:
            return status
        if load_i64(staging) != run * runs:
            return CONFUSED
    status = 0
    if runs == 1 or distance == run:
        status = _receive_all(stream, place, run * runs)
    elif run > room:
        for i in range(runs):
            status = _receive_all(stream, place + i * distance, run)
            if status != 0:
                break
    else:
        batch = room // run
        done = 0
        while done < runs and status == 0:
            n = min(batch, runs - done)
            status = _receive_all(stream, staging, run * n)
            if status == 0:
                for i in range(n):
                    memory_copy(place + (done + i) * distance, staging + i * run, run)
            done += n
    _count(stream, WAIT_NS, _now(stream) - started)
    return status
