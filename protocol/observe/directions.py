"""One side of a connection that is read from outside: its bytes, their offsets and times."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from protocol.observe.events import ObservedMessage, Side, Sink
from protocol.responses import SIZE


class IncomingBody:
    """The body of ``message`` while it arrives."""

    __slots__ = ("kept", "left", "message", "sink", "start")

    def __init__(self, message: ObservedMessage, keep: bool, sink: Sink | None) -> None:
        self.message = message
        self.left = message.body_size
        self.kept = bytearray() if keep else None
        self.sink = sink
        # What came of a kept body before its first hole.
        self.start = b""

    def add(self, chunk: bytes | bytearray | memoryview) -> None:
        if self.sink is not None:
            self.sink(self.message, self.message.body_size - self.left, chunk)
        if self.kept is not None:
            self.kept += chunk
        self.left -= len(chunk)

    def miss(self, n: int) -> None:
        self.message.missing += n
        if self.kept is not None:
            self.start, self.kept = bytes(self.kept), None
        self.left -= n


class Direction:
    """The bytes of one side that arrived and were not read yet."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.buffer = bytearray()
        # Offset in the stream of the buffer's first byte.
        self.position = 0
        self.body: IncomingBody | None = None
        # Where segments begin and when they came: that of the last byte read and all after it.
        self.marks: deque[tuple[int, float | None]] = deque()
        # When the last byte came that went past the buffer.
        self.passed: float | None = None
        self.dead = False
        # Why it isn't known where messages begin, and since which offset.
        self.lost = ""
        self.lost_at = 0

    @property
    def end(self) -> int:
        """Offset behind the last byte that arrived."""
        return self.position + len(self.buffer)

    def add(self, data: bytes | bytearray | memoryview, time: float | None) -> None:
        self.marks.append((self.end, time))
        self.buffer += data

    def pass_over(self, n: int, time: float | None) -> None:
        """Count ``n`` bytes that never were in the buffer.

        They came and were read, or didn't come.
        """
        self.position += n
        self.passed = time
        if self.marks:
            self.marks.clear()

    def drop(self, n: int) -> None:
        del self.buffer[:n]
        self.position += n

    def take(self, n: int) -> bytes:
        taken = bytes(memoryview(self.buffer)[:n])
        self.drop(n)
        return taken

    def time_of(self, offset: int) -> float | None:
        """Return when the byte there came; not for offsets before the last byte read."""
        marks = self.marks
        while len(marks) > 1 and marks[1][0] <= offset:
            marks.popleft()
        return marks[0][1] if marks and marks[0][0] <= offset else self.passed

    def begins(self) -> set[int]:
        """Return positions in the buffer where segments begin."""
        return {start - self.position for start, _ in self.marks if start >= self.position}


@dataclass(slots=True)
class ExpectedAnswer:
    """An answer that a request lets the server send.

    ``size`` bytes, in a frame or for a step without; of a step that ``may_report`` there may be a
    report instead, of why there are none.
    """

    request: ObservedMessage
    # None until the answer says so, if the request was not seen whole.
    size: int | None
    step: int = 0
    may_report: bool = False

    @property
    def raw(self) -> bool:
        return self.step > 0

    @property
    def whole(self) -> int:
        """Bytes on the wire."""
        assert self.size is not None
        return self.size if self.raw else SIZE.size + self.size
