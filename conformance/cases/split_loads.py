"""10: the split extension (protocol/split.py): slices of what a server has on its own disk.

What it has there is known of one thing only: what its tensor cache was given.
"""

from __future__ import annotations

import os
from typing import Any

from conformance.cases.groups import SPLIT
from conformance.cases.split import SOURCE, parts_of
from conformance.suite import Context, Peer, RemoteBuffer
from conformance.suite.probe import cacheable
from conformance.suite.refusals import Refusal, Send, declare
from protocol.commands import Command
from protocol.ggml.types import GgmlType

_LOAD = (Command.SPLIT_LOAD,)
_TAIL = 240
# What a buffer has before: what a slice doesn't belong to has to stay that.
_BEFORE = b"\xa5"
_ROOM = 4096


def _kept(c: Context) -> tuple[bytes, int]:
    """Have the server keep a content; return it and its hash."""
    content, digest = cacheable(c.dialect, os.urandom(_TAIL))
    peer = c.connect("uploads")
    tensor = peer.alloc(len(content)).leaf(1, (len(content),), type=GgmlType.I8)
    peer.set(tensor, content, cache_flag=1)
    peer.ping()
    peer.close()
    return content, digest


def _target(c: Context, name: str = "loads") -> tuple[Peer, RemoteBuffer]:
    """Open a connection with a buffer whose bytes are known. Skips where it is split itself."""
    peer = c.connect(name, split=True)
    if parts_of(peer) > 1:
        c.skip("a server that splits over others has no slices of its own")
    buffer = peer.alloc(_ROOM)
    peer.set(buffer.whole(), _BEFORE * _ROOM)
    return peer, buffer


def _request(buffer: RemoteBuffer, at: int, **fields: Any) -> dict[str, Any]:
    """Return the fields of a request for one run of bytes, changed by ``fields``."""
    run = {"start": 0, "size": 64, "distance": 64, "count": 1, "whole": 0}
    place = {"remote_ptr": buffer.handle, "address": buffer.base + at}
    return {**place, "hash": 1, "nbytes": 1 << 20, **run, **fields}


@SPLIT.case(60, source=SOURCE, needs=_LOAD, split=True, cache=True)
def slice_of_what_is_there(c: Context) -> None:
    """A part has some rows of a weight, or some columns of each row.

    Sends: SPLIT_LOAD of slices of a content that was kept: all of it, one run, several apart
    Expects: result 1, the runs side by side at the address, every other byte as it was
    """
    content, digest = _kept(c)
    first = len(content) - _TAIL
    for at, (start, size, distance, count), whole in (
        (0, (first, _TAIL, _TAIL, 1), 0),
        (128, (first, _TAIL, _TAIL, 1), 1),
        (513, (first + 7, 100, 100, 1), 0),
        (1000, (first + 3, 16, 40, 5), 0),
        (1000, (first + 3, 16, 40, 5), 1),
        (77, (first + 10, 20, 20, 11), 0),
        (_ROOM - 3, (len(content) - 1, 1, 1, 1), 0),
        (_ROOM - 48, (first, 24, _TAIL - 24, 2), 0),
    ):
        peer, buffer = _target(c)
        runs = {"start": start, "size": size, "distance": distance, "count": count, "whole": whole}
        fields = _request(buffer, at, hash=digest, nbytes=len(content), **runs)
        what = f"{count} runs of {size} from {start} on, {distance} apart, whole {whole}"
        c.equal(peer.call(Command.SPLIT_LOAD, **fields).result, 1, what)
        wanted = b"".join(content[start + i * distance :][:size] for i in range(count))
        expected = _BEFORE * at + wanted + _BEFORE * (_ROOM - at - len(wanted))
        c.equal(peer.get(buffer.whole(), _ROOM), expected, f"the buffer after {what}")
        peer.close()


@SPLIT.case(61, source=SOURCE, needs=_LOAD, split=True)
def slice_of_what_is_not_there(c: Context) -> None:
    """Then it comes over the network; a server that says otherwise computes with what is not there.

    Sends: SPLIT_LOAD by a hash of nothing, and by one that is there, of a content of another size
    Expects: result 0; bytes beside the slice's place as they were; the connection goes on
    """
    known = [(int.from_bytes(os.urandom(8), "little"), 1 << 20)]
    if c.facts.cache:
        content, digest = _kept(c)
        known += [(digest, len(content) + 1), (digest, len(content) - 1)]
    peer, buffer = _target(c)
    for digest, nbytes in known:
        fields = _request(buffer, 1024, hash=digest, nbytes=nbytes)
        answer = peer.call(Command.SPLIT_LOAD, **fields)
        c.equal(answer.result, 0, f"of {nbytes} bytes by the hash {digest:016x}")
    left = peer.get(buffer.whole(), _ROOM)
    c.equal(left[:1024], _BEFORE * 1024, "what lies before the place of the slice")
    c.equal(left[1088:], _BEFORE * (_ROOM - 1088), "what lies behind it")


def _bad(*changes: dict[str, int]) -> tuple[Send, ...]:
    """Return what sends a request that is sound but for these fields, each by itself."""

    def sends(change: dict[str, int]) -> Send:
        def send(c: Context, peer: Peer) -> None:
            fields = dict(change)
            at = fields.pop("at", 0)
            request = _request(peer.alloc(_ROOM), at, **fields)
            peer.send(Command.SPLIT_LOAD, **request)

        return send

    return tuple(sends(change) for change in changes)


def _row(number: int, name: str, sends: str, *changes: dict[str, int]) -> Refusal:
    return Refusal(
        number, name, f"SPLIT_LOAD {sends}", _bad(*changes), Command.SPLIT_LOAD, needs=_LOAD
    )


declare(
    SPLIT,
    (
        _row(
            62, "slice-outside-of-its-content", "of runs that end behind the content",
            {"nbytes": 63}, {"start": (1 << 20) - 63}, {"distance": 1 << 19, "count": 3},
        ),
        _row(
            63, "slice-of-runs-that-overlap", "of runs that begin before the last one has ended",
            {"distance": 63, "count": 2},
        ),
        _row(
            64, "slice-of-nothing", "of no runs, and of runs of no bytes",
            {"count": 0}, {"size": 0},
        ),
        _row(
            65, "slice-outside-of-its-buffer", "to places that begin before the buffer or end "
            "behind it", {"at": -1}, {"at": _ROOM - 63},
        ),
        _row(
            66, "slice-into-no-buffer", "with a handle that nobody was given",
            {"remote_ptr": 0x5EED},
        ),
    ),
    why="A slice is written to memory by numbers that a client sends.",
    source=SOURCE,
    split=True,
)  # fmt: skip
