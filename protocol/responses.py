"""The client's reader: bytes of one connection in, answers out.

An answer is ``size u64 | payload`` and doesn't say what it answers: answers come in the order of
the requests, so the owner announces each answer (:meth:`ResponseReader.expect`) before its request
is sent. As in the server's reader a large payload is never copied: the bytes of a GET_TENSOR are
received straight into the place that was announced with it.

Use::

    reader.expect(command, spec, destination)
    view = reader.receive_buffer()      # the transport fills it
    reader.received(n)
    while (answer := reader.next_answer()) is not None: ...
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass
from typing import Any

from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import Answer, CommandSpec
from protocol.errors import ProtocolError

_SIZE = struct.Struct("<Q")
# Fixed answers are some 30 bytes: this holds all that a client has in flight, as a rule.
_STAGING = 64 << 10
# A body whose rest is shorter is received through staging, together with what follows it.
_DIRECT_FROM = 4 << 10


@dataclass(frozen=True, slots=True)
class Received:
    """One answer: a Record, or for GET_TENSOR the filled destination."""

    command: Command
    answer: Any


@dataclass(frozen=True, slots=True)
class _Expected:
    command: Command
    spec: CommandSpec
    destination: memoryview
    size: int


class ResponseReader:
    """Reads the answers of one connection, in the order in which they were announced."""

    def __init__(self) -> None:
        self._expected: deque[_Expected] = deque()
        self._staging = bytearray(_STAGING)
        self._view = memoryview(self._staging)
        self._start = 0
        self._end = 0
        self._in_body = False
        self._filled = 0

    def expect(
        self, command: Command, spec: CommandSpec, destination: memoryview | None = None
    ) -> None:
        """Announce the next answer; ``destination`` takes the bytes of a DATA answer.

        Its length is the size that was asked for. ValueError for a command without an answer or a
        destination where there are no data (and the other way round).
        """
        if spec.answer is Answer.NEVER:
            raise ValueError(f"{command.name} has no answer")
        if (spec.answer is Answer.DATA) != (destination is not None):
            raise ValueError(f"{command.name} answers with {spec.answer.value}")
        if destination is None:
            size = codec(spec.response).size
            target = memoryview(bytearray())
        else:
            target = destination.cast("B")
            size = len(target)
        self._expected.append(_Expected(command, spec, target, size))

    @property
    def pending(self) -> int:
        """How many announced answers have not been read."""
        return len(self._expected)

    @property
    def within(self) -> str:
        """What the reader is waiting for or in the middle of, for messages."""
        if not self._expected:
            return "nothing"
        first = self._expected[0]
        if self._in_body:
            got = self._filled or self._end - self._start
            return f"the answer to {first.command.name} ({got} of {first.size} bytes)"
        return f"the answer to {first.command.name}"

    @property
    def _receives_directly(self) -> bool:
        if not self._in_body or self._start != self._end:
            return False
        return len(self._expected[0].destination) - self._filled >= _DIRECT_FROM

    def receive_buffer(self) -> memoryview:
        """Where the next bytes of the stream belong; not empty once all answers are taken."""
        if self._receives_directly:
            return self._expected[0].destination[self._filled :]
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start > _STAGING // 2:
            staged = self._end - self._start
            self._staging[:staged] = self._staging[self._start : self._end]
            self._start, self._end = 0, staged
        return self._view[self._end :]

    def received(self, n: int) -> None:
        """``n`` bytes were written to the start of :meth:`receive_buffer`."""
        if self._receives_directly:
            self._filled += n
        else:
            self._end += n

    def next_answer(self) -> Received | None:
        """The next answer, None if more bytes are needed.

        Raises ProtocolError for an answer of another size than announced, or to no request.
        """
        if not self._in_body and not self._read_size():
            return None
        first = self._expected[0]
        if first.spec.answer is Answer.DATA:
            return self._continue_data(first)
        if self._end - self._start < first.size:
            return None
        record = codec(first.spec.response).parse(self._staging, self._start)
        self._start += first.size
        return self._complete(first, record)

    def _read_size(self) -> bool:
        if self._start == self._end:
            return False
        if not self._expected:
            raise ProtocolError(f"{self._end - self._start} bytes that answer no request")
        if self._end - self._start < _SIZE.size:
            return False
        (size,) = _SIZE.unpack_from(self._staging, self._start)
        first = self._expected[0]
        if size != first.size:
            raise ProtocolError(
                f"the answer to {first.command.name} has {size} bytes, not {first.size}"
            )
        self._start += _SIZE.size
        self._in_body = True
        self._filled = 0
        return True

    def _continue_data(self, first: _Expected) -> Received | None:
        target = first.destination
        n = min(len(target) - self._filled, self._end - self._start)
        if n:
            target[self._filled : self._filled + n] = self._view[self._start : self._start + n]
            self._filled += n
            self._start += n
        if self._filled < len(target):
            return None
        return self._complete(first, target)

    def _complete(self, first: _Expected, answer: Any) -> Received:
        self._expected.popleft()
        self._in_body = False
        return Received(first.command, answer)
