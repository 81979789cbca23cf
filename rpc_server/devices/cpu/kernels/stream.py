"""Kernels that send to and receive from a socket, so that an exchange is part of a compiled plan.

A kernel tries again for a while, since the other side answers within microseconds, and then sleeps
in poll(). Between two tries it lets others have the core; where they keep it, it sleeps at once for
a while. What a stream is, which words it has and how patience is counted is told in
``rpc_server.devices.cpu.kernels.interface.stream``.
"""

from __future__ import annotations

import socket

import numpy as np
from numba import types

from rpc_server.devices.cpu.kernels.interface.stream import (
    AWAITED_SINCE,
    BYTES_RECEIVED,
    BYTES_SENT,
    CLOSED,
    CONFUSED,
    EARLY_ADDRESS,
    EARLY_LEFT,
    EXCHANGES,
    NS_PER_BYTE,
    PATIENCE_NS,
    PAUSED_AT,
    PEER_CLOSED,
    PEER_SILENT,
    PIECES,
    POLL,
    RENEWED,
    SILENT,
    SLEEP_NS,
    SLEEPS_UNTIL,
    SPIN_NS,
    SWAP_ALARMS,
    SWAP_GOT,
    SWAP_PEER_WORDS,
    SWAP_SENT,
    TAKEN_NS,
    TIME,
    TIMEOUT_MS,
    WAIT_NS,
    WAITS_SINCE,
    WITHIN,
)
from rpc_server.devices.cpu.kernels.interface.sync import AGAIN
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
# How often one that sleeps looks whether others want the device, milliseconds.
_LOOK_MS = 5

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
def _moved(stream, n, waited):  # type: ignore[no-untyped-def]
    """``n`` bytes were moved, after waiting ``waited`` nanoseconds."""
    left = load_i64(stream + PATIENCE_NS * 8) + n * NS_PER_BYTE - waited
    store_i64(stream + PATIENCE_NS * 8, min(left, load_i64(stream + TIMEOUT_MS * 8) * 1_000_000))


@helper
def _paused(stream, since, done):  # type: ignore[no-untyped-def]
    """Others have the device now: note what the next call begins with, its status."""
    store_i64(stream + WITHIN * 8, done)
    store_i64(stream + WAITS_SINCE * 8, since)
    store_i64(stream + PAUSED_AT * 8, _now(stream))
    return AGAIN


@helper
def _resumed(stream):  # type: ignore[no-untyped-def]
    """Return how many bytes of the piece at hand were moved before a pause.

    It does so once.
    """
    done = load_i64(stream + WITHIN * 8)
    store_i64(stream + WITHIN * 8, 0)
    return done


@helper
def _resumed_wait(stream):  # type: ignore[no-untyped-def]
    """Since when the transfer waits that was paused, 0 if it doesn't; once."""
    since = load_i64(stream + WAITS_SINCE * 8)
    store_i64(stream + WAITS_SINCE * 8, 0)
    return since


@helper
def _waited(stream, since):  # type: ignore[no-untyped-def]
    """Nanoseconds waited for what has just come; not those for which the device was others'."""
    paused = load_i64(stream + PAUSED_AT * 8)
    store_i64(stream + PAUSED_AT * 8, 0)
    if since == 0:
        return 0
    return (paused if paused != 0 else _now(stream)) - since


@helper
def _ready(stream, events, since, alarms, pause, done):  # type: ignore[no-untyped-def]
    """Sleep until the socket is ready; 0, AGAIN, or the status if it isn't in time.

    The caller has waited from ``since`` on, ``alarms`` times; ``done`` bytes were moved before.
    """
    if alarms > _MOST_FALSE_ALARMS:
        return CLOSED
    poll = stream + POLL * 8
    # What was waited while others had the device counts, as nothing has come.
    store_i64(stream + PAUSED_AT * 8, 0)
    while True:
        left = load_i64(stream + PATIENCE_NS * 8) - (_now(stream) - since)
        if left <= 0:
            return SILENT
        if load_i64(pause) != 0:
            return _paused(stream, since, done)
        store_i32(poll, load_i64(stream))
        store_i16(poll + 4, events)
        store_i16(poll + 6, 0)
        n = _poll(poll, 1, np.int32(min(left // 1_000_000 + 1, _LOOK_MS)))
        if n != 0:
            return 0 if n > 0 else CLOSED


@helper
def _send_all(stream, address, size, pause):  # type: ignore[no-untyped-def]
    fd = np.int32(load_i64(stream))
    sent = _resumed(stream)
    since = _resumed_wait(stream)
    alarms = 0
    while sent < size:
        n = _send(fd, address + sent, size - sent, np.int32(_FLAGS))
        if n > 0:
            # What went out before a failure counts too: it tells a stream that is in order.
            _count(stream, BYTES_SENT, n)
            _moved(stream, n, _waited(stream, since))
            sent += n
            since = alarms = 0
            continue
        if since == 0:
            since = _now(stream)
        alarms += 1
        status = _ready(stream, _POLLOUT, since, alarms, pause, sent)
        if status != 0:
            return status
    return 0


@helper
def _tries_again(stream, since, pause):  # type: ignore[no-untyped-def]
    """Let others run, and return 1; 0 if a thread that waits from ``since`` on is to sleep now."""
    now = _now(stream)
    if now - since > load_i64(stream + SPIN_NS * 8) or load_i64(pause) != 0:
        return 0
    if now < load_i64(stream + SLEEPS_UNTIL * 8):
        return 0
    _let_others_run()
    after = _now(stream)
    if after - now > TAKEN_NS:
        store_i64(stream + SLEEPS_UNTIL * 8, after + SLEEP_NS)
    return 1


@helper
def _receive_all(stream, address, size, pause):  # type: ignore[no-untyped-def]
    got = _resumed(stream)
    since = _resumed_wait(stream)
    early = min(load_i64(stream + EARLY_LEFT * 8), size - got)
    if early > 0:
        memory_copy(address + got, load_i64(stream + EARLY_ADDRESS * 8), early)
        _count(stream, EARLY_ADDRESS, early)
        _count(stream, EARLY_LEFT, -early)
        got += early
    fd = np.int32(load_i64(stream))
    alarms = 0
    while got < size:
        n = _recv(fd, address + got, size - got, np.int32(_DONTWAIT))
        if n > 0:
            _moved(stream, n, _waited(stream, since))
            got += n
            since = alarms = 0
            continue
        if n == 0:
            return CLOSED
        if since == 0:
            since = _now(stream)
        if _tries_again(stream, since, pause) != 0:
            continue
        alarms += 1
        status = _ready(stream, _POLLIN, since, alarms, pause, got)
        if status != 0:
            return status
    _count(stream, BYTES_RECEIVED, size)
    return 0


@helper
def _flush(stream, number, address, size, pause):  # type: ignore[no-untyped-def]
    """Send piece ``number`` of a transfer, unless it was sent before the transfer was paused."""
    if number < load_i64(stream + PIECES * 8):
        return 0
    status = _send_all(stream, address, size, pause)
    if status == 0:
        _count(stream, PIECES, 1)
    return status


@kernel
def stream_send(rec, thread, n_threads):  # type: ignore[no-untyped-def]
    """Send a prefix, rows of a tensor, and a suffix, small ones in one call.

    Extra words: stream | prefix address, bytes | data address, bytes of a row, rows in dimensions 1
    to 3, strides of dimensions 1 to 3 | suffix address, bytes | staging address, bytes | 1 if it
    completes a step | address of the word by which it is told to pause | how many times as long as
    one exchange the answer to a step may take.
    """
    if thread != 0:
        return 0
    stream = extra(rec, 0)
    row = extra(rec, 4)
    staging = extra(rec, 13)
    room = extra(rec, 14)
    pause = extra(rec, 16)
    n1, n2, n3 = extra(rec, 5), extra(rec, 6), extra(rec, 7)
    dense = extra(rec, 8) == row and extra(rec, 9) == row * n1 and extra(rec, 10) == row * n1 * n2
    size, pieces = (row * n1 * n2 * n3, 1) if dense else (row, n1 * n2 * n3)
    used = 0
    # One that was paused gathers again what it has sent, up to where it was.
    number = 0
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
            status = _flush(stream, number, staging, used, pause)
            if status != 0:
                return status
            number += 1
            used = 0
        if n > room:
            status = _flush(stream, number, address, n, pause)
            if status != 0:
                return status
            number += 1
        else:
            memory_copy(staging + used, address, n)
            used += n
    status = 0
    if used > 0:
        status = _flush(stream, number, staging, used, pause)
    if status == AGAIN:
        return status
    store_i64(stream + PIECES * 8, 0)
    _count(stream, EXCHANGES, extra(rec, 15))
    if extra(rec, 15) != 0 and load_i64(stream + RENEWED * 8) != 0:
        patience = load_i64(stream + TIMEOUT_MS * 8) * 1_000_000 * extra(rec, 17)
        store_i64(stream + PATIENCE_NS * 8, patience)
    return status


@helper
def _receive_pieces(rec):  # type: ignore[no-untyped-def]
    """Do what ``stream_receive`` does, but for counting.

    Pieces that are done are passed over.
    """
    stream = extra(rec, 0)
    head = extra(rec, 1)
    place = extra(rec, 2)
    run = extra(rec, 3)
    runs = extra(rec, 4)
    distance = extra(rec, 5)
    staging = extra(rec, 6)
    room = extra(rec, 7)
    pause = extra(rec, 8)
    if load_i64(stream + PIECES * 8) == 0:
        if head > 0:
            status = _receive_all(stream, staging, head, pause)
            if status != 0:
                return status
            if load_i64(staging) != run * runs:
                return CONFUSED
        store_i64(stream + PIECES * 8, 1)
    if runs == 1 or distance == run:
        return _receive_all(stream, place, run * runs, pause)
    batch = 1 if run > room else room // run
    done = (load_i64(stream + PIECES * 8) - 1) * batch
    while done < runs:
        n = min(batch, runs - done)
        status = _receive_all(
            stream, staging if run <= room else place + done * distance, run * n, pause
        )
        if status != 0:
            return status
        if run <= room:
            for i in range(n):
                memory_copy(place + (done + i) * distance, staging + i * run, run)
        _count(stream, PIECES, 1)
        done += n
    return 0


@kernel
def stream_receive(rec, thread, n_threads):  # type: ignore[no-untyped-def]
    """Receive runs of bytes to equally spaced places.

    Extra words: stream | bytes of framing before the data (0, or 8 that hold their size) | address
    of the first place, bytes of a run, runs, distance of the places | staging address, bytes |
    address of the word by which it is told to pause.
    """
    if thread != 0:
        return 0
    stream = extra(rec, 0)
    started = _now(stream)
    if load_i64(stream + AWAITED_SINCE * 8) == 0:
        store_i64(stream + AWAITED_SINCE * 8, started)
    status = _receive_pieces(rec)
    _count(stream, WAIT_NS, _now(stream) - started)
    if status == 0:
        store_i64(stream + AWAITED_SINCE * 8, 0)
        store_i64(stream + PIECES * 8, 0)
    return status


@helper
def _swap_some(stream, address, size, place, expected):  # type: ignore[no-untyped-def]
    """Send and receive what goes without waiting; the bytes that moved, -1 if the peer hung up."""
    fd = np.int32(load_i64(stream))
    moved = 0
    sent = load_i64(stream + SWAP_SENT * 8)
    if sent < size:
        n = _send(fd, address + sent, size - sent, np.int32(_FLAGS))
        # A failure shows when something is to come.
        if n > 0:
            _count(stream, SWAP_SENT, n)
            _count(stream, BYTES_SENT, n)
            moved += n
    got = load_i64(stream + SWAP_GOT * 8)
    if got < expected:
        n = _recv(fd, place + got, expected - got, np.int32(_DONTWAIT))
        if n == 0:
            return -1
        if n > 0:
            _count(stream, SWAP_GOT, n)
            _count(stream, BYTES_RECEIVED, n)
            moved += n
    since = load_i64(stream + WAITS_SINCE * 8)
    if moved > 0:
        _moved(stream, moved, _waited(stream, since))
        store_i64(stream + WAITS_SINCE * 8, 0)
        store_i64(stream + SWAP_ALARMS * 8, 0)
        return moved
    # What was waited while others had the device counts, as nothing has come.
    store_i64(stream + PAUSED_AT * 8, 0)
    if since == 0:
        store_i64(stream + WAITS_SINCE * 8, _now(stream))
    return 0


@helper
def _swap_left(stream, size, expected):  # type: ignore[no-untyped-def]
    """The bytes that are still to go or to come."""
    sent = load_i64(stream + SWAP_SENT * 8)
    return size - sent + expected - load_i64(stream + SWAP_GOT * 8)


@helper
def _swap_sleep(table, peers, size, pause):  # type: ignore[no-untyped-def]
    """Sleep until a socket is ready; 0, AGAIN, or the status if one isn't in time."""
    fds = table + peers * SWAP_PEER_WORDS * 8
    least = np.int64(_LOOK_MS)
    for i in range(peers):
        peer = table + i * SWAP_PEER_WORDS * 8
        stream, expected = load_i64(peer), load_i64(peer + 16)
        # Those that are done are passed over: poll() does so for numbers below 0.
        store_i32(fds + i * 8, -1)
        store_i16(fds + i * 8 + 4, 0)
        store_i16(fds + i * 8 + 6, 0)
        if _swap_left(stream, size, expected) == 0:
            continue
        now = _now(stream)
        waited = now - load_i64(stream + WAITS_SINCE * 8)
        left = load_i64(stream + PATIENCE_NS * 8) - waited
        if left <= 0:
            return PEER_SILENT + load_i64(peer + 24)
        if load_i64(pause) != 0:
            store_i64(stream + PAUSED_AT * 8, now)
        least = min(least, left // 1_000_000 + 1)
        events = 0
        if load_i64(stream + SWAP_SENT * 8) < size:
            events |= _POLLOUT
        if load_i64(stream + SWAP_GOT * 8) < expected:
            events |= _POLLIN
        store_i32(fds + i * 8, load_i64(stream))
        store_i16(fds + i * 8 + 4, events)
    if load_i64(pause) != 0:
        return AGAIN
    if _poll(fds, peers, np.int32(least)) <= 0:
        return 0
    for i in range(peers):
        peer = table + i * SWAP_PEER_WORDS * 8
        # The third field of a pollfd, what has come about, is its upper quarter.
        if load_i64(fds + i * 8) >> 48 != 0:
            _count(load_i64(peer), SWAP_ALARMS, 1)
            if load_i64(load_i64(peer) + SWAP_ALARMS * 8) > _MOST_FALSE_ALARMS:
                return PEER_CLOSED + load_i64(peer + 24)
    return 0


@helper
def _swap_all(table, peers, address, size, pause):  # type: ignore[no-untyped-def]
    """Do what ``stream_swap`` does, but for counting."""
    spins_since = np.int64(0)
    while True:
        left, moved = np.int64(0), np.int64(0)
        for i in range(peers):
            peer = table + i * SWAP_PEER_WORDS * 8
            stream, expected = load_i64(peer), load_i64(peer + 16)
            if _swap_left(stream, size, expected) == 0:
                continue
            n = _swap_some(stream, address, size, load_i64(peer + 8), expected)
            if n < 0:
                return PEER_CLOSED + load_i64(peer + 24)
            moved += n
            left += _swap_left(stream, size, expected)
        if left == 0:
            return 0
        if moved > 0:
            spins_since = np.int64(0)
            continue
        stream = load_i64(table)
        if spins_since == 0:
            spins_since = _now(stream)
        if _tries_again(stream, spins_since, pause) != 0:
            continue
        status = _swap_sleep(table, peers, size, pause)
        if status != 0:
            return status


@kernel
def stream_swap(rec, thread, n_threads):  # type: ignore[no-untyped-def]
    """Send the same bytes to several peers, and receive some from each, at the same time.

    Extra words: address of the table of peers, how many there are | address and bytes of what is
    sent | address of the word by which it is told to pause.
    """
    if thread != 0:
        return 0
    table, peers = extra(rec, 0), extra(rec, 1)
    started = _now(load_i64(table))
    status = _swap_all(table, peers, extra(rec, 2), extra(rec, 3), extra(rec, 4))
    waited = _now(load_i64(table)) - started
    for i in range(peers):
        stream = load_i64(table + i * SWAP_PEER_WORDS * 8)
        _count(stream, WAIT_NS, waited)
        if status == 0:
            _count(stream, EXCHANGES, 1)
            store_i64(stream + SWAP_SENT * 8, 0)
            store_i64(stream + SWAP_GOT * 8, 0)
            store_i64(stream + PATIENCE_NS * 8, load_i64(stream + TIMEOUT_MS * 8) * 1_000_000)
    return status
