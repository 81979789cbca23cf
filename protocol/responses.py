"""The client's reader: bytes of one connection in, answers out.

An answer is ``size u64 | payload`` and doesn't say what it answers: answers come in the order of
the requests, so the owner announces each answer (:meth:`ResponseReader.expect`) before its request
is sent. As in the server's reader a large payload is never copied: the bytes of a GET_TENSOR are
received straight into the place that was announced with it.

Where an extension lets a server send bytes without a frame (the outputs of a SPLIT_RUN), the owner
announces where they belong by :meth:`ResponseReader.expect_raw`, in the same order as answers.

Use::

    reader.expect(command, spec, destination)
    view = reader.receive_buffer()      # the transport fills it
    reader.received(n)
    while (answer := reader.next_answer()) is not None: ...
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from protocol.codec import Message, codec
from protocol.commands import Command
from protocol.dialects import Answer, CommandSpec
from protocol.errors import ProtocolError
from protocol.receive_buffer import ReceiveBuffer

SIZE = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Received:
    """One answer: a Message, or for GET_TENSOR the filled destination."""

    command: Command
    answer: Any


@dataclass(frozen=True, slots=True)
class _Expected:
    command: Command
    spec: CommandSpec
    destination: memoryview
    size: int
    # Whether the payload comes without its size before it.
    raw: bool = False

    @property
    def in_place(self) -> bool:
        """Return whether the payload goes to the destination, rather than being parsed."""
        return self.raw or self.spec.answer is Answer.DATA


def encode_size(size: int) -> bytes:
    """Return what an answer begins with: the bytes that follow."""
    return SIZE.pack(size)


def encode_answer(spec: CommandSpec, fields: Mapping[str, Any] | Message) -> bytes:
    """Return a whole answer of fields. Raises KeyError for a missing field."""
    body = codec(spec.response).build(fields)
    return encode_size(len(body)) + body


class ResponseReader:
    """Reads the answers of one connection, in the order in which they were announced."""

    def __init__(self) -> None:
        self._expected: deque[_Expected] = deque()
        self._received = ReceiveBuffer()
        self._in_answer = False

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

    def expect_raw(self, command: Command, spec: CommandSpec, destination: memoryview) -> None:
        """Announce bytes that come next without a frame and fill ``destination``.

        ``command`` is what makes the server send them. Not to be called between receive_buffer and
        received: the first of them may belong elsewhere from here on. ValueError for no bytes.
        """
        target = destination.cast("B")
        if not len(target):
            raise ValueError(f"{command.name} without bytes to expect")
        self._expected.append(_Expected(command, spec, target, len(target), raw=True))
        self._begin_raw()

    @property
    def pending(self) -> int:
        """Return how many announced answers have not been read."""
        return len(self._expected)

    @property
    def within(self) -> str:
        """Return what the reader is waiting for or in the middle of, for messages."""
        if not self._expected:
            return "nothing"
        first = self._expected[0]
        if self._in_answer:
            got = self._received.filled if self._received.in_body else len(self._received)
            return f"the answer to {first.command.name} ({got} of {first.size} bytes)"
        return f"the answer to {first.command.name}"

    def receive_buffer(self) -> memoryview:
        """Return where the next bytes of the stream belong; not empty once all answers are
        taken.
        """
        return self._received.receive_buffer()

    def received(self, n: int) -> None:
        """Take the ``n`` bytes that were written to the start of :meth:`receive_buffer`."""
        self._received.received(n)

    def next_answer(self) -> Received | None:
        """Return the next answer, None if more bytes are needed.

        Raises ProtocolError for an answer of another size than announced, or to no request.
        """
        if not self._in_answer and not self._read_size():
            return None
        first = self._expected[0]
        if first.in_place:
            return self._complete(first, first.destination) if self._received.fill() else None
        if len(self._received) < first.size:
            return None
        return self._complete(first, self._received.parse(codec(first.spec.response)))

    def _read_size(self) -> bool:
        if not self._received:
            return False
        if not self._expected:
            raise ProtocolError(f"{len(self._received)} bytes that answer no request")
        if len(self._received) < SIZE.size:
            return False
        (size,) = self._received.unpack(SIZE)
        first = self._expected[0]
        if size != first.size:
            raise ProtocolError(
                f"the answer to {first.command.name} has {size} bytes, not {first.size}"
            )
        self._in_answer = True
        if first.spec.answer is Answer.DATA:
            self._received.begin(first.destination)
        return True

    def _complete(self, first: _Expected, answer: Any) -> Received:
        self._expected.popleft()
        self._in_answer = False
        self._begin_raw()
        return Received(first.command, answer)

    def _begin_raw(self) -> None:
        """Let bytes that are due without a frame go straight to their place."""
        if not self._in_answer and self._expected and self._expected[0].raw:
            self._in_answer = True
            self._received.begin(self._expected[0].destination)
