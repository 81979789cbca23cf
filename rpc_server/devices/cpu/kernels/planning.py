"""The loops of planning in compiled code: scratch that nodes share, and where threads meet.

They are given arrays that the planner has made; nothing in them is a client's memory.
"""

from __future__ import annotations

from typing import Any

from rpc_server.devices.cpu.kernels.interface.planning import (
    KEPT_WORDS,
    MOST_KEPT,
    MOST_SOURCES,
    STOPPED,
    ScratchArgument,
)
from rpc_server.devices.cpu.kernels.interface.schedule import StepFlag
from rpc_server.devices.cpu.kernels.intrinsics import helper, load_i64, store_i64
from rpc_server.native.source import routine

# Enumerations are no constants to the compiler.
_ARGUMENTS = {name: int(word) for name, word in ScratchArgument.__members__.items()}
_NODES, _LIMIT, _STOP = (_ARGUMENTS[name] for name in ("NODES", "LIMIT", "STOP"))
_LOCAL, _REQUESTS, _WRITTEN = (_ARGUMENTS[name] for name in ("LOCAL", "REQUESTS", "WRITTEN"))
_GROUP, _SIZE, _SOURCES, _UNTIL = (
    _ARGUMENTS[name] for name in ("GROUP", "SIZE", "SOURCES", "UNTIL")
)
_SPANS, _KEPT, _START, _FRESH, _BASE = (
    _ARGUMENTS[name] for name in ("SPANS", "KEPT", "START", "FRESH", "BASE")
)
# Fields of what is kept.
_K_GROUP, _K_START, _K_END, _K_UNTIL, _K_USED, _K_SOURCES = range(6)
_SOURCE_WORDS = 2 * MOST_SOURCES


@helper
def _word(array: Any, i: Any) -> Any:
    return load_i64(array + i * 8)


@helper
def _field(kept: Any, i: Any, field: Any) -> Any:
    return load_i64(kept + (i * KEPT_WORDS + field) * 8)


@helper
def _drop(kept: Any, i: Any, count: Any) -> Any:
    """Take entry ``i`` out; those behind it keep their order."""
    for word in range(i * KEPT_WORDS, (count - 1) * KEPT_WORDS):
        store_i64(kept + word * 8, load_i64(kept + (word + KEPT_WORDS) * 8))
    return count - 1


@helper
def _gap(kept: Any, count: Any, size: Any) -> Any:
    """The first place where ``size`` bytes fit beside what is kept."""
    at = 0
    while True:
        following = -1
        for i in range(count):
            start = _field(kept, i, _K_START)
            if start < at or _field(kept, i, _K_END) == start:
                continue
            if following < 0 or start < _field(kept, following, _K_START):
                following = i
        if following < 0 or _field(kept, following, _K_START) - at >= size:
            return at
        at = _field(kept, following, _K_END)


@helper
def _shared_end(kept: Any, count: Any) -> Any:
    end = 0
    for i in range(count):
        end = max(end, _field(kept, i, _K_END))
    return end


@helper
def _forget(kept: Any, count: Any, node: Any) -> Any:
    """Let go of what no node has used for longest; of nothing that the node at hand uses."""
    oldest = 0
    for i in range(count):
        if _field(kept, i, _K_USED) < _field(kept, oldest, _K_USED):
            oldest = i
    if _field(kept, oldest, _K_USED) < node:
        return _drop(kept, oldest, count)
    return count


@helper
def _keep(kept: Any, count: Any, args: Any, request: Any, start: Any, node: Any) -> Any:
    at = kept + count * KEPT_WORDS * 8
    store_i64(at + _K_GROUP * 8, _word(_word(args, _GROUP), request))
    store_i64(at + _K_START * 8, start)
    store_i64(at + _K_END * 8, start + _word(_word(args, _SIZE), request))
    store_i64(at + _K_UNTIL * 8, _word(_word(args, _UNTIL), request))
    store_i64(at + _K_USED * 8, node)
    for i in range(_SOURCE_WORDS):
        word = _word(_word(args, _SOURCES), request * _SOURCE_WORDS + i)
        store_i64(at + (_K_SOURCES + i) * 8, word)
    return count + 1


@helper
def _made_of(kept: Any, i: Any, start: Any, end: Any) -> Any:
    """Return whether what is kept was made of any of these bytes."""
    for k in range(MOST_SOURCES):
        first, last = _field(kept, i, _K_SOURCES + 2 * k), _field(kept, i, _K_SOURCES + 2 * k + 1)
        if first < end and start < last:
            return True
    return False


@helper
def _find(kept: Any, count: Any, group: Any) -> Any:
    for i in range(count):
        if _field(kept, i, _K_GROUP) == group:
            return i
    return -1


@helper
def _written(kept: Any, count: Any, args: Any, node: Any) -> Any:
    """Drop what was made of what ``node`` writes over: it is no longer good."""
    spans = _word(args, _SPANS)
    for w in range(_word(_word(args, _WRITTEN), node), _word(_word(args, _WRITTEN), node + 1)):
        i = 0
        while i < count:
            if _made_of(kept, i, _word(spans, 2 * w), _word(spans, 2 * w + 1)):
                count = _drop(kept, i, count)
            else:
                i += 1
    return count


@routine
def place_scratch(args):  # type: ignore[no-untyped-def]
    """Place scratch for the nodes of a graph: the most that is used at once, in bytes.

    Where a node needs more than the limit the result is -1 less its number, and its BASE is how
    much it needs. See ``ScratchArgument``.
    """
    kept, limit = _word(args, _KEPT), _word(args, _LIMIT)
    requests, sizes = _word(args, _REQUESTS), _word(args, _SIZE)
    count, peak = 0, 0
    for node in range(_word(args, _NODES)):
        if node & 255 == 0 and load_i64(_word(args, _STOP)) != 0:
            return STOPPED
        i = 0
        while i < count:
            if _field(kept, i, _K_UNTIL) < node:
                count = _drop(kept, i, count)
            else:
                i += 1
        for r in range(_word(requests, node), _word(requests, node + 1)):
            found = _find(kept, count, _word(_word(args, _GROUP), r))
            if found >= 0:
                store_i64(kept + (found * KEPT_WORDS + _K_USED) * 8, node)
                store_i64(_word(args, _START) + r * 8, _field(kept, found, _K_START))
                store_i64(_word(args, _FRESH) + r * 8, 0)
                continue
            if count >= MOST_KEPT:
                count = _forget(kept, count, node)
            start = _gap(kept, count, _word(sizes, r))
            if start + _word(sizes, r) > limit:
                store_i64(_word(args, _BASE) + node * 8, start + _word(sizes, r))
                return -1 - node
            count = _keep(kept, count, args, r, start, node)
            store_i64(_word(args, _START) + r * 8, start)
            store_i64(_word(args, _FRESH) + r * 8, 1)
        end = _shared_end(kept, count)
        used = end + _word(_word(args, _LOCAL), node)
        if used > limit:
            store_i64(_word(args, _BASE) + node * 8, used)
            return -1 - node
        store_i64(_word(args, _BASE) + node * 8, end)
        peak = max(peak, used)
        count = _written(kept, count, args, node)
    return peak


# -- the schedule ----------------------------------------------------------------------------------

_SERIAL = int(StepFlag.SERIAL)
_BARRIER_AFTER = int(StepFlag.BARRIER_AFTER)


@helper
def _conflict(spans: Any, a: Any, a_end: Any, b: Any, b_end: Any) -> Any:
    """Return whether spans from ``a`` on and spans from ``b`` on meet where one is written."""
    for i in range(a, a_end):
        start, end, writes = _word(spans, 3 * i), _word(spans, 3 * i + 1), _word(spans, 3 * i + 2)
        for j in range(b, b_end):
            if not (writes or _word(spans, 3 * j + 2)):
                continue
            if start < _word(spans, 3 * j + 1) and _word(spans, 3 * j) < end:
                return True
    return False


@routine
def schedule_records(count, alone, first, spans, most, steps, stop):  # type: ignore[no-untyped-def]
    """Fill in the Step flags of ``count`` records; 0, or STOPPED.

    ``alone`` has a word for each record, whether it runs on the first thread; ``first`` where its
    spans begin (with an end). Spans are start, end and whether they are written. ``most`` is how
    many of them a record is held against.
    """
    since = 0
    for i in range(count):
        if i & 255 == 0 and load_i64(stop) != 0:
            return STOPPED
        by_itself, own, end = _word(alone, i), _word(first, i), _word(first, i + 1)
        meets = end - _word(first, since) > most
        j = since
        while j < i and not meets:
            # Records of the first thread keep their order among themselves without meeting anybody.
            if not (by_itself and _word(alone, j)):
                meets = _conflict(spans, own, end, _word(first, j), _word(first, j + 1))
            j += 1
        if meets and i > 0:
            store_i64(steps + (i - 1) * 8, _word(steps, i - 1) | _BARRIER_AFTER)
            since = i
        store_i64(steps + i * 8, _SERIAL if by_itself else 0)
    return 0
