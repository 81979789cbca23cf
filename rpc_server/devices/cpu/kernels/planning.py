"""The loops of planning in compiled code: scratch that nodes share, records, where threads meet.

They are given arrays that the planner has made; nothing in them is a client's memory.
"""

from __future__ import annotations

from typing import Any

from rpc_server.devices.cpu.kernels.interface.abi import RECORD_WORDS
from rpc_server.devices.cpu.kernels.interface.planning import (
    BASES,
    KEPT_WORDS,
    MOST_KEPT,
    MOST_SOURCES,
    PIECE_WORDS,
    PIECES,
    PLACE_WORDS,
    REQUEST_WORDS,
    SPAN_WORDS,
    STOPPED,
    WRITTEN_WORDS,
    KindRow,
    KindWord,
    PlanArgument,
    RecordField,
)
from rpc_server.devices.cpu.kernels.interface.schedule import StepFlag
from rpc_server.devices.cpu.kernels.intrinsics import helper, load_i64, store_i64
from rpc_server.native.source import routine

# Enumerations are no constants to the compiler.
_ARGUMENTS = {name: int(word) for name, word in PlanArgument.__members__.items()}
_NODES, _KINDS, _WHICH, _BASES = (_ARGUMENTS[n] for n in ("NODES", "KINDS", "WHICH", "BASES"))
_SLOTS, _KEYS, _LIMIT, _STOP = (_ARGUMENTS[n] for n in ("SLOTS", "KEYS", "LIMIT", "STOP"))
_KEPT, _USES, _USE_BITS, _SECRET = (_ARGUMENTS[n] for n in ("KEPT", "USES", "USE_BITS", "SECRET"))
_FRESH, _NEEDED = (_ARGUMENTS[n] for n in ("FRESH", "NEEDED"))
_NUMBERS, _RECORDS, _POSITIONS = (_ARGUMENTS[n] for n in ("NUMBERS", "WORDS", "POSITIONS"))
_WORK, _PRIVATE, _PARTS = (_ARGUMENTS[n] for n in ("WORK", "PRIVATE", "PARTS"))
_FIRST, _SPANS = (_ARGUMENTS[n] for n in ("FIRST", "SPANS"))
_TABLE, _KERNEL, _KEY = map(int, KindRow)
_KIND_WORDS = len(KindRow)
_IN_KIND = {name: int(word) for name, word in KindWord.__members__.items()}
_K_LOCAL, _K_RECORDS, _K_WORDS_AT = (_IN_KIND[n] for n in ("LOCAL", "RECORDS", "WORDS_AT"))
_K_FIELDS_AT, _K_PLACES_AT, _K_SPANS_AT = (
    _IN_KIND[n] for n in ("FIELDS_AT", "PLACES_AT", "SPANS_AT")
)
_K_WRITTEN, _K_WRITTEN_AT, _K_REQUESTS, _K_REQUESTS_AT = (
    _IN_KIND[n] for n in ("WRITTEN", "WRITTEN_AT", "REQUESTS", "REQUESTS_AT")
)
_K_PIECES, _K_PIECES_AT = (_IN_KIND[n] for n in ("PIECES", "PIECES_AT"))
_F_WORK, _F_PRIVATE, _F_PARTS, _F_FILLING, _F_PLACES, _F_SPANS = map(int, RecordField)
_FIELD_WORDS = len(RecordField)
# Fields of what is kept.
_KEPT_KEY, _KEPT_START, _KEPT_END, _KEPT_UNTIL, _KEPT_USED, _KEPT_SOURCES = range(6)
# Rows of USES.
_USE_WORDS = 2


@helper
def _word(array: Any, i: Any) -> Any:
    return load_i64(array + i * 8)


@helper
def _field(kept: Any, i: Any, field: Any) -> Any:
    return load_i64(kept + (i * KEPT_WORDS + field) * 8)


@helper
def _kind_row(args: Any, node: Any) -> Any:
    """Return where the graph's words for a node's kind are."""
    return _word(args, _KINDS) + _word(_word(args, _WHICH), node) * _KIND_WORDS * 8


@helper
def _rows(table: Any, at: Any) -> Any:
    """Return where the rows of a kind's table begin whose first word it says at ``at``."""
    return table + _word(table, at) * 8


@helper
def _bases(args: Any, node: Any) -> Any:
    return _word(args, _BASES) + node * BASES * 8


@helper
def _address(bases: Any, base_and_offset: Any) -> Any:
    return _word(bases, load_i64(base_and_offset)) + load_i64(base_and_offset + 8)


# -- the last node that reads an address -----------------------------------------------------------


@helper
def _use(args: Any, address: Any) -> Any:
    """Return where the last use of an address is noted, or else may be.

    Who chose the addresses doesn't know by which number they are found.
    """
    uses, bits = _word(args, _USES), _word(args, _USE_BITS)
    most = (1 << bits) - 1
    at = ((address * _word(args, _SECRET)) >> (64 - bits)) & most
    while True:
        entry = uses + at * _USE_WORDS * 8
        found = load_i64(entry)
        if not found or found == address:
            return entry
        at = (at + 1) & most


@helper
def _note_uses(args: Any) -> Any:
    """Note the last node that reads what a request of any node is made of; 0, or STOPPED."""
    nodes, stop = _word(args, _NODES), _word(args, _STOP)
    wanted = 0
    for node in range(nodes):
        table = _word(_kind_row(args, node), _TABLE)
        request = _rows(table, _K_REQUESTS_AT)
        for _ in range(_word(table, _K_REQUESTS)):
            for i in range(MOST_SOURCES):
                address = _address(_bases(args, node), request + (2 + 3 * i) * 8)
                if address != 0:
                    store_i64(_use(args, address), address)
                    wanted += 1
            request += REQUEST_WORDS * 8
    if wanted == 0:
        return 0
    slots = _word(args, _SLOTS)
    for node in range(nodes):
        if node & 255 == 0 and load_i64(stop) != 0:
            return STOPPED
        for slot in range(1, slots):
            address = _word(_bases(args, node), slot)
            if address != 0:
                entry = _use(args, address)
                if load_i64(entry) == address:
                    store_i64(entry + 8, node)
    return 0


@helper
def _last_use(args: Any, bases: Any, request: Any) -> Any:
    """Return the last node that has use for a request."""
    last = -1
    for i in range(MOST_SOURCES):
        address = _address(bases, request + (2 + 3 * i) * 8)
        if address != 0:
            last = max(last, load_i64(_use(args, address) + 8))
    return last


# -- scratch ---------------------------------------------------------------------------------------


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
            start = _field(kept, i, _KEPT_START)
            if start < at or _field(kept, i, _KEPT_END) == start:
                continue
            if following < 0 or start < _field(kept, following, _KEPT_START):
                following = i
        if following < 0 or _field(kept, following, _KEPT_START) - at >= size:
            return at
        at = _field(kept, following, _KEPT_END)


@helper
def _shared_end(kept: Any, count: Any) -> Any:
    end = 0
    for i in range(count):
        end = max(end, _field(kept, i, _KEPT_END))
    return end


@helper
def _forget(kept: Any, count: Any, node: Any) -> Any:
    """Let go of what no node has used for longest; of nothing that the node at hand uses."""
    oldest = 0
    for i in range(count):
        if _field(kept, i, _KEPT_USED) < _field(kept, oldest, _KEPT_USED):
            oldest = i
    if _field(kept, oldest, _KEPT_USED) < node:
        return _drop(kept, oldest, count)
    return count


@helper
def _keep(
    kept: Any, count: Any, key: Any, bases: Any, request: Any, start: Any, until: Any, node: Any
) -> Any:
    at = kept + count * KEPT_WORDS * 8
    store_i64(at + _KEPT_KEY * 8, key)
    store_i64(at + _KEPT_START * 8, start)
    store_i64(at + _KEPT_END * 8, start + load_i64(request))
    store_i64(at + _KEPT_UNTIL * 8, until)
    store_i64(at + _KEPT_USED * 8, node)
    for i in range(MOST_SOURCES):
        source = request + (2 + 3 * i) * 8
        first = _address(bases, source)
        store_i64(at + (_KEPT_SOURCES + 2 * i) * 8, first)
        store_i64(at + (_KEPT_SOURCES + 2 * i + 1) * 8, first + load_i64(source + 16))
    return count + 1


@helper
def _made_of(kept: Any, i: Any, start: Any, end: Any) -> Any:
    """Return whether what is kept was made of any of these bytes."""
    for k in range(MOST_SOURCES):
        first = _field(kept, i, _KEPT_SOURCES + 2 * k)
        last = _field(kept, i, _KEPT_SOURCES + 2 * k + 1)
        if first < end and start < last:
            return True
    return False


@helper
def _find(kept: Any, count: Any, key: Any, bases: Any, request: Any) -> Any:
    """Return the entry with the same key that is made of what lies at the same places."""
    for i in range(count):
        same = _field(kept, i, _KEPT_KEY) == key
        for k in range(MOST_SOURCES):
            first = _address(bases, request + (2 + 3 * k) * 8)
            same = same and _field(kept, i, _KEPT_SOURCES + 2 * k) == first
        if same:
            return i
    return -1


@helper
def _written(kept: Any, count: Any, bases: Any, table: Any) -> Any:
    """Drop what was made of what a node writes over: it is no longer good."""
    written = _rows(table, _K_WRITTEN_AT)
    for _ in range(_word(table, _K_WRITTEN)):
        start = _address(bases, written)
        end = start + load_i64(written + 16)
        i = 0
        while i < count:
            if _made_of(kept, i, start, end):
                count = _drop(kept, i, count)
            else:
                i += 1
        written += WRITTEN_WORDS * 8
    return count


@routine
def place_scratch(args):  # type: ignore[no-untyped-def]
    """Place scratch for the nodes of a graph: the most that is used at once, in bytes.

    Bases of its pieces are set, counted from the begin of scratch. Where a node needs more than the
    limit the result is -1 less its number, and NEEDED is how much it needs. See ``PlanArgument``.
    """
    if _note_uses(args) != 0:
        return STOPPED
    kept, limit = _word(args, _KEPT), _word(args, _LIMIT)
    count, peak, number = 0, 0, 0
    for node in range(_word(args, _NODES)):
        if node & 255 == 0 and load_i64(_word(args, _STOP)) != 0:
            return STOPPED
        kind = _kind_row(args, node)
        table, bases = _word(kind, _TABLE), _bases(args, node)
        i = 0
        while i < count:
            if _field(kept, i, _KEPT_UNTIL) < node:
                count = _drop(kept, i, count)
            else:
                i += 1
        request = _rows(table, _K_REQUESTS_AT)
        for r in range(_word(table, _K_REQUESTS)):
            key = _word(_word(args, _KEYS), _word(kind, _KEY) + r)
            found = _find(kept, count, key, bases, request)
            if found >= 0:
                store_i64(kept + (found * KEPT_WORDS + _KEPT_USED) * 8, node)
                start = _field(kept, found, _KEPT_START)
            else:
                if count >= MOST_KEPT:
                    count = _forget(kept, count, node)
                start = _gap(kept, count, load_i64(request))
                if start + load_i64(request) > limit:
                    store_i64(args + _NEEDED * 8, start + load_i64(request))
                    return -1 - node
                until = _last_use(args, bases, request)
                count = _keep(kept, count, key, bases, request, start, until, node)
            store_i64(_word(args, _FRESH) + number * 8, 1 if found < 0 else 0)
            store_i64(bases + (PIECES + load_i64(request + 8)) * 8, start)
            number += 1
            request += REQUEST_WORDS * 8
        end = _shared_end(kept, count)
        used = end + _word(table, _K_LOCAL)
        if used > limit:
            store_i64(args + _NEEDED * 8, used)
            return -1 - node
        piece = _rows(table, _K_PIECES_AT)
        for _ in range(_word(table, _K_PIECES)):
            store_i64(bases + (PIECES + load_i64(piece)) * 8, end + load_i64(piece + 8))
            piece += PIECE_WORDS * 8
        peak = max(peak, used)
        count = _written(kept, count, bases, table)
    return peak


# -- records ---------------------------------------------------------------------------------------


@routine
def fill_records(args):  # type: ignore[no-untyped-def]
    """Fill in the records of all nodes in their order; how many there are. See ``PlanArgument``."""
    made, n_spans, request = 0, 0, 0
    for node in range(_word(args, _NODES)):
        kind = _kind_row(args, node)
        table, bases = _word(kind, _TABLE), _bases(args, node)
        words, fields = _rows(table, _K_WORDS_AT), _rows(table, _K_FIELDS_AT)
        places, spans = _rows(table, _K_PLACES_AT), _rows(table, _K_SPANS_AT)
        for i in range(_word(table, _K_RECORDS)):
            own = fields + i * _FIELD_WORDS * 8
            following = own + _FIELD_WORDS * 8
            filling = _word(own, _F_FILLING)
            if filling >= 0 and _word(_word(args, _FRESH), request + filling) == 0:
                continue
            record = _word(args, _RECORDS) + made * RECORD_WORDS * 8
            for word in range(RECORD_WORDS):
                store_i64(record + word * 8, load_i64(words + (i * RECORD_WORDS + word) * 8))
            for p in range(_word(own, _F_PLACES), _word(following, _F_PLACES)):
                place = places + p * PLACE_WORDS * 8
                store_i64(record + load_i64(place) * 8, _address(bases, place + 8))
            store_i64(_word(args, _FIRST) + made * 8, n_spans)
            for s in range(_word(own, _F_SPANS), _word(following, _F_SPANS)):
                span = spans + s * SPAN_WORDS * 8
                start, at = _address(bases, span), _word(args, _SPANS) + n_spans * 3 * 8
                store_i64(at, start)
                store_i64(at + 8, start + _word(span, 2))
                store_i64(at + 16, _word(span, 3))
                n_spans += 1
            store_i64(_word(args, _NUMBERS) + made * 8, _word(kind, _KERNEL) + i)
            store_i64(_word(args, _POSITIONS) + made * 8, node)
            store_i64(_word(args, _WORK) + made * 8, _word(own, _F_WORK))
            store_i64(_word(args, _PRIVATE) + made * 8, _word(own, _F_PRIVATE))
            store_i64(_word(args, _PARTS) + made * 8, _word(own, _F_PARTS))
            made += 1
        request += _word(table, _K_REQUESTS)
    store_i64(_word(args, _FIRST) + made * 8, n_spans)
    return made


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
