"""The readers of both directions: what they make of a stream may not depend on its segments.

An input is ``dialect u8 | seed of the segments u8 | ...``: for requests the client's stream
follows, for answers ``count u8 | what is expected, a byte each | stream``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any
from unittest import mock

from protocol import requests as protocol_requests
from protocol.commands import Command
from protocol.dialects import DIALECTS, Answer, Dialect
from protocol.errors import ProtocolError
from protocol.requests import (
    Hello,
    Limits,
    Request,
    RequestReader,
    UploadChunk,
    UploadEnd,
    UploadStart,
)
from protocol.responses import ResponseReader
from protocol.split import with_split

# The dialects, and those with the commands of the split extension.
SPOKEN: tuple[Dialect, ...] = (*DIALECTS, *map(with_split, DIALECTS))

# An owner refuses uploads that no buffer has room for, before it names their place.
_LARGEST_UPLOAD = 1 << 20
_GRAPH_LIMIT = 1 << 20
_SMALL_PIECE = 100
_SEGMENTS = (1, 2, 3, 7, 8, 9, 24, 100, 4095, 4096, 4097, 64 << 10)


class BrokenPromise(AssertionError):  # noqa: N818
    """The code under test did something that its documentation rules out."""


def promised(holds: bool, what: str) -> None:
    """Raise BrokenPromise unless ``holds``."""
    if not holds:
        raise BrokenPromise(what)


def _segments(seed: int) -> Iterator[int]:
    """Sizes of segments; seed 0: as much as there is room for."""
    if not seed:
        while True:
            yield 1 << 30
    chosen = random.Random(seed)
    few = chosen.sample(_SEGMENTS, chosen.randint(1, 4))
    while True:
        yield chosen.choice(few)


def _feed(reader: RequestReader | ResponseReader, stream: memoryview, size: int) -> int:
    """Hand over the next ``size`` bytes or as many as are there and find room; how many."""
    room = reader.receive_buffer()
    promised(len(room) > 0, "no room although all events were taken")
    n = min(size, len(stream), len(room))
    room[:n] = stream[:n]
    reader.received(n)
    return n


def read_requests(stream: bytes, dialect: Dialect, seed: int) -> list[str]:
    """What a server's reader makes of a client's stream, one text an event, and how it ended."""
    reader = RequestReader(Limits(graph_bytes=_GRAPH_LIMIT))
    left, sizes, parts = memoryview(stream), _segments(seed), random.Random(seed)
    seen: list[str] = []
    upload, given = bytearray(), 0
    try:
        while left:
            left = left[_feed(reader, left, next(sizes)) :]
            while (event := reader.next_event()) is not None:
                if isinstance(event, Hello):
                    reader.dialect = dialect
                    seen.append(f"hello {event.caps!r}")
                elif isinstance(event, Request):
                    graph = None if event.graph is None else bytes(event.graph)
                    seen.append(f"{event.command.name} {event.fields} {graph!r}")
                    if seed % 4 == 3:
                        # As a session does before a program uses the socket by itself.
                        reader.put_back(reader.take_received())
                elif isinstance(event, UploadStart):
                    if event.size > _LARGEST_UPLOAD:
                        return [*seen, "an upload too large"]
                    seen.append(f"upload {event.fields}")
                    upload, given = bytearray(event.size), 0
                if isinstance(event, UploadStart | UploadChunk):
                    # All of it, or parts as a relay's owner names them.
                    n = len(upload) - given
                    if seed % 3 == 2 and n:
                        n = parts.randint(1, n)
                    reader.direct(memoryview(upload)[given : given + n])
                    given += n
                if isinstance(event, UploadEnd):
                    promised(given == len(upload), "an upload ended before its place was full")
                    seen.append(f"uploaded {bytes(upload)!r}")
    except ProtocolError as error:
        return [*seen, f"refused: {error}"]
    return [*seen, f"ended within {reader.within}, boundary {reader.at_boundary}"]


def requests(data: bytes) -> bool:
    """The server's reader."""
    if len(data) < 2:
        return False
    dialect, stream = SPOKEN[data[0] % len(SPOKEN)], data[2:]
    whole = read_requests(stream, dialect, 0)
    # Graphs larger than this grow while they arrive, which must not show either.
    with mock.patch.object(protocol_requests, "_FIRST_PIECE", _SMALL_PIECE):
        split = read_requests(stream, dialect, data[1])
    promised(whole == split, f"{whole} in one piece, {split} in segments")
    return True


Expected = tuple[Command, memoryview | None, bool]


def expectations(codes: bytes, dialect: Dialect) -> list[Expected]:
    """What a client waits for: commands with the place of their data, and if it is unframed."""
    commands = [c for c, spec in dialect.commands.items() if spec.answer is not Answer.NEVER]
    expected: list[Expected] = []
    for code in codes:
        if code >= 0xC0:
            size = (code & 0x3F) * 97 + 1
            expected.append((Command.GET_TENSOR, memoryview(bytearray(size)), True))
            continue
        command = commands[code % len(commands)]
        data = dialect.commands[command].answer is Answer.DATA
        place = memoryview(bytearray(code * 33)) if data else None
        expected.append((command, place, False))
    return expected


def read_answers(stream: bytes, codes: bytes, dialect: Dialect, seed: int) -> list[str]:
    """What a client's reader makes of a server's stream, as read_requests."""
    reader = ResponseReader()
    expected = expectations(codes, dialect)
    for command, place, raw in expected:
        if raw:
            assert place is not None
            reader.expect_raw(command, dialect.commands[command], place)
        else:
            reader.expect(command, dialect.commands[command], place)
    left, sizes = memoryview(stream), _segments(seed)
    seen: list[str] = []
    try:
        while left:
            left = left[_feed(reader, left, next(sizes)) :]
            while (received := reader.next_answer()) is not None:
                answer: Any = received.answer
                if isinstance(answer, memoryview):
                    answer = bytes(answer)
                seen.append(f"{received.command.name} {answer}")
    except ProtocolError as error:
        # How much too much had arrived is a matter of segments.
        if "answer no request" in str(error):
            return [*seen, "refused: more than was asked for"]
        return [*seen, f"refused: {error}"]
    promised(reader.pending == len(expected) - len(seen), "answers got lost")
    return [*seen, f"within {reader.within}"]


def answers(data: bytes) -> bool:
    """The client's reader."""
    if len(data) < 3 or len(data) < 3 + data[2]:
        return False
    dialect, codes, stream = (
        SPOKEN[data[0] % len(SPOKEN)],
        data[3 : 3 + data[2]],
        data[3 + data[2] :],
    )
    whole = read_answers(stream, codes, dialect, 0)
    split = read_answers(stream, codes, dialect, data[1])
    promised(whole == split, f"{whole} in one piece, {split} in segments")
    return True
