"""Both directions of one connection, read from outside: requests and the answers paired to them.

For whoever looks at a connection that others have: a capture, a recorder, a report. Nothing here
does input or output. The bytes of each side are fed as they come, in segments of any size and with
the time at which they were seen; what they are comes back as events::

    conversation = Conversation()
    for event in conversation.feed(Side.CLIENT, data, time): ...

Which dialect is spoken follows from the size of HELLO and the version that the server answers. As
a server's answer doesn't say what it answers, it is found by counting: every request tells whether
it is answered and by how many bytes.

Memory is bounded. Messages are kept while their bytes arrive; the data of tensors only up to
``keep`` bytes, what is longer is counted and handed on to ``sink`` piece by piece.

A stream may have holes (:meth:`Conversation.gap`) or begin in the middle (``joined``). In a hole
whose length is known counting goes on where the sizes are known: within a body, and in all of the
server's stream. Elsewhere the next beginning of a request is searched for
(protocol.observe.resync).
"""

from __future__ import annotations

from collections import deque

from protocol.codec import Message, codec
from protocol.commands import Command
from protocol.dialects import (
    DIALECTS,
    Answer,
    Body,
    CommandSpec,
    Dialect,
    Version,
    compatible_dialects,
    dialect_of_version,
)
from protocol.errors import ProtocolError
from protocol.graph_payload import decode_graph
from protocol.names import size_by_frame, size_by_graph, size_by_upload, upload_head_size
from protocol.numbering import fits, tells
from protocol.observe.directions import Direction, ExpectedAnswer, IncomingBody
from protocol.observe.events import (
    Event,
    Failure,
    MessageKind,
    ObservedMessage,
    Side,
    Sink,
    SkippedBytes,
)
from protocol.observe.resync import FrameFinder, finder, guess_dialect
from protocol.requests import FRAME, Limits, check_frame, first_frame
from protocol.responses import SIZE
from protocol.split import (
    caps_version,
    decode_program,
    decode_report,
    report_size,
    step_sizes,
    with_split,
)

__all__ = [
    "Conversation",
    "Event",
    "Failure",
    "MessageKind",
    "ObservedMessage",
    "Side",
    "Sink",
    "SkippedBytes",
    "dialect_of_version",
]

# Bytes of one side that may wait for the other: for the answer to HELLO, or for their request.
_HOLD = 4 << 20
# Where to look for what makes out the dialect of a connection that was joined.
_GUESS_IN = 1 << 20
_UNSEEN = "requests were not seen"
# Requests that may wait for their answers before those are given up.
_MAX_OUTSTANDING = 16384


class Conversation:
    """Decodes one connection. ``dialect`` is what it speaks where its HELLO isn't seen.

    ``joined`` says that the beginning of the connection may be missing; without a dialect the
    newest one is taken in which what is seen makes sense. ``keep`` is how many bytes of a tensor's
    data are kept with a message; ``limits`` bound graphs.
    """

    def __init__(
        self,
        dialect: Dialect | None = None,
        *,
        joined: bool = False,
        keep: int = 64 << 10,
        limits: Limits | None = None,
        sink: Sink | None = None,
    ) -> None:
        self.dialect: Dialect | None = None
        # The version that the server answered HELLO with.
        self.version: Version | None = None
        # Dialects that the client may be speaking, likeliest first: they differ in op numbers.
        self.dialects: tuple[Dialect, ...] = ()
        # Whether a request has told how long the names of tensors are.
        self._names_known = False
        self._given = dialect
        self._joined = joined or dialect is not None
        self._keep = keep
        self._limits = limits or Limits()
        self._sink = sink
        self._client = Direction(Side.CLIENT)
        self._server = Direction(Side.SERVER)
        self._hello: ObservedMessage | None = None
        self._count = 0
        self._outstanding: deque[ExpectedAnswer] = deque()
        # The last one that is known to be the next of its kind, where requests after it were lost.
        self._last_certain: ExpectedAnswer | None = None
        # Whether answers were found again by their size, which may have been others' by chance.
        self._paired_by_size = False
        # Whether the next answer is such a one.
        self._doubtful = False
        # By device and number: the sizes of the steps, and whether there are swaps.
        self._programs: dict[tuple[int, int], tuple[list[tuple[int, int]], bool]] = {}
        # Steps of a SPLIT_RUN whose inputs are to come.
        self._inputs: deque[ExpectedAnswer] = deque()
        # The SPLIT_JOIN that has made this a link, from where on there are swaps alone.
        self._join: ObservedMessage | None = None
        self._finder: FrameFinder | None = None
        self._guessed_at = 0
        self._events: list[Event] = []

    # -- what goes in ---------------------------------------------------------------------------

    def feed(
        self, side: Side, data: bytes | bytearray | memoryview, time: float | None = None
    ) -> list[Event]:
        """Take the next bytes of one side; return what they complete, on either side."""
        half = self._client if side is Side.CLIENT else self._server
        n = len(data)
        body = half.body
        if body is not None and n < body.left and not half.buffer:
            # Most bytes of a connection come here.
            if body.sink is None and body.kept is None:
                body.left -= n
            else:
                body.add(data)
            half.pass_over(n, time)
            return []
        if half.dead or not n:
            half.position += n
            return []
        half.add(data, time)
        return self._advance()

    def gap(self, side: Side, size: int, time: float | None = None) -> list[Event]:
        """Pass over ``size`` bytes of one side that were not seen; return what that completes."""
        half = self._half(side)
        while size and not half.dead:
            if self._join is not None and half.body is None:
                start = half.position
                half.pass_over(size, time)
                self._skip(half, start, half.position, f"{size} bytes were not seen")
                return self._advance()
            body = half.body or self._begin_unframed(half, whole=False)
            if body is not None:
                if half.buffer:
                    # Less than it takes to tell outputs from a report.
                    self._read_body(half)
                n = min(size, body.left)
                body.miss(n)
                half.pass_over(n, time)
                size -= n
                if not body.left:
                    self._end_body(half)
            elif side is Side.SERVER and self._outstanding and not half.lost:
                size -= self._miss_answer(half, size, time)
            elif side is Side.CLIENT and self._begin_damaged(half):
                pass
            else:
                self._lose(half, f"{size} bytes were not seen", size, time)
                size = 0
        half.position += size
        return self._advance()

    def close(self) -> list[Event]:
        """End both streams; return what that leaves incomplete."""
        if self.dialect is None and self._hello is not None and self._client.buffer:
            # Seen from one side only.
            self._guess(self._hello.spec)
            self._advance_both()
        for half in (self._client, self._server):
            if half.dead:
                continue
            if half.body is not None:
                message, left = half.body.message, half.body.left
                text = f"the stream ends within {message.name}, {left} bytes before its end"
                half.body.miss(left)
                self._end_body(half)
                self._fail(half, text)
            elif half.lost and half.end > half.lost_at:
                self._skip(half, half.lost_at, half.end, half.lost)
            elif half.buffer:
                self._fail(half, f"the stream ends {len(half.buffer)} bytes into a message")
            half.dead = True
        events, self._events = self._events, []
        return events

    @property
    def unanswered(self) -> list[ObservedMessage]:
        """Requests whose answers haven't come."""
        return [e.request for e in self._outstanding if not e.raw]

    # -- reading on -----------------------------------------------------------------------------

    def _half(self, side: Side) -> Direction:
        return self._client if side is Side.CLIENT else self._server

    def _advance(self) -> list[Event]:
        self._advance_both()
        events, self._events = self._events, []
        return events

    def _advance_both(self) -> None:
        while self._read(Side.CLIENT) or self._read(Side.SERVER):
            pass

    def _read(self, side: Side) -> bool:
        """Read one thing of a side; False if that takes more bytes."""
        half = self._half(side)
        if half.dead or not half.buffer:
            return False
        if self._join is not None and half.body is None:
            self._begin_swaps(half, self._join)
        if half.body is not None or self._begin_unframed(half) is not None:
            return self._read_body(half)
        if self._reports_next(half):
            # What comes first of an output with a size isn't all there yet.
            return False
        return self._read_client(half) if side is Side.CLIENT else self._read_server(half)

    def _read_client(self, half: Direction) -> bool:
        if self.dialect is None and not self._settle_dialect(half):
            return False
        if half.lost and not self._find_request(half):
            return False
        if len(half.buffer) < FRAME.size or self._is_joining(half):
            return False
        try:
            message = self._request_in(half)
        except ProtocolError as error:
            self._fail(half, str(error))
            return False
        if message.spec.body is Body.DATA and not self._names_known:
            _, size = FRAME.unpack_from(half.buffer)
            needed = FRAME.size + upload_head_size(message.dialect, size)
            if len(half.buffer) < needed:
                return False
            start = half.buffer[FRAME.size : needed]
            self._settle_names(size_by_upload(message.dialect, size, start))
            message = self._request_in(half)
        head = codec(message.spec.request)
        if len(half.buffer) < FRAME.size + head.size:
            return False
        self._count += 1
        message.head = half.take(FRAME.size + head.size)
        message.fields = head.parse(message.head, FRAME.size)
        self._begin_body(half, message)
        return True

    def _is_joining(self, half: Direction) -> bool:
        """Return whether what comes next is a request or swaps is still to be told by an answer."""
        last = self._outstanding[-1] if self._outstanding else None
        joins = last is not None and last.request.command is Command.SPLIT_JOIN
        return joins and len(half.buffer) <= _HOLD

    def _request_in(self, half: Direction) -> ObservedMessage:
        """The request whose frame comes next. ProtocolError if there can't be such a one."""
        number, size = FRAME.unpack_from(half.buffer)
        dialect = self.dialect
        if dialect is None:
            command, spec = first_frame(number, size)
            dialect = next(d for d in DIALECTS if d.hello_size == size)
        else:
            if not self._names_known:
                self._settle_names(size_by_frame(dialect, number, size))
            dialect = self.dialect
            assert dialect is not None
            command, spec = check_frame(dialect, number, size, self._limits)
        return ObservedMessage(
            MessageKind.REQUEST, Side.CLIENT, command, dialect, spec, self._count,
            half.position, half.time_of(half.position),
            body_size=size - codec(spec.request).size,
        )  # fmt: skip

    def _read_server(self, half: Direction) -> bool:
        if half.lost and not self._find_answer(half):
            return False
        if not self._outstanding:
            self._await_request(half)
            return False
        expected = self._outstanding[0]
        if len(half.buffer) < SIZE.size:
            return False
        (size,) = SIZE.unpack_from(half.buffer)
        request = expected.request
        if expected.size is None:
            expected.size = size
        if size != expected.size:
            text = f"the answer to {request.command.name} has {size} bytes, not {expected.size}"
            if self._paired_by_size:
                # It was taken for the answer to another request.
                self._lose(half, text)
            else:
                self._fail(half, text)
            return False
        if request.spec.answer is not Answer.DATA and len(half.buffer) < expected.whole:
            return False
        message = self._answer_to(expected, half)
        if request.spec.answer is Answer.DATA:
            message.head = half.take(SIZE.size)
            message.fields = Message()
            message.body_size = size
        else:
            message.head = half.take(expected.whole)
            message.fields = codec(request.spec.response).parse(message.head, SIZE.size)
        self._begin_body(half, message)
        return True

    def _answer_to(self, expected: ExpectedAnswer, half: Direction) -> ObservedMessage:
        request = expected.request
        kind = MessageKind.ANSWER
        if expected.raw:
            kind = MessageKind.INPUTS if half is self._client else MessageKind.OUTPUTS
        doubtful = self._doubtful and half is self._server
        if doubtful:
            self._doubtful = False
        return ObservedMessage(
            kind, half.side, request.command, request.dialect, request.spec, request.number,
            half.position, half.time_of(half.position), request=request, step=expected.step,
            problem="taken for the answer by its size" if doubtful else "",
        )  # fmt: skip

    # -- bodies ---------------------------------------------------------------------------------

    def _begin_body(self, half: Direction, message: ObservedMessage) -> None:
        """Take the ``body_size`` bytes that follow."""
        keep = message.body_size <= self._keep
        if message.kind is MessageKind.REQUEST:
            data = message.spec.body is Body.DATA
            keep = keep or not data
        else:
            data = message.spec.answer is Answer.DATA or message.kind is not MessageKind.ANSWER
        half.body = IncomingBody(message, keep, self._sink if data else None)
        if not message.body_size:
            self._end_body(half)

    def _begin_unframed(self, half: Direction, *, whole: bool = True) -> IncomingBody | None:
        """Begin what a step of a SPLIT_RUN has on the wire next, if it is in one.

        What may be a report begins only when that can be told, unless it is not ``whole``.
        """
        steps = self._inputs if half is self._client else self._outstanding
        if not steps or not steps[0].raw or half.lost:
            return None
        size = steps[0].size or 0
        if self._reports_next(half):
            if whole and len(half.buffer) < SIZE.size:
                return None
            size = report_size(half.buffer) or size
        message = self._answer_to(steps[0], half)
        message.body_size = size
        self._begin_body(half, message)
        return half.body

    def _reports_next(self, half: Direction) -> bool:
        """Return whether outputs come next that may be a report instead, of why there are none."""
        if half is self._client or half.body is not None or half.lost or not self._outstanding:
            return False
        return self._outstanding[0].may_report

    def _begin_swaps(self, half: Direction, join: ObservedMessage) -> None:
        """Begin what has come on a link, all of it."""
        message = ObservedMessage(
            MessageKind.SWAPS, half.side, join.command, join.dialect, join.spec, join.number,
            half.position, half.time_of(half.position), request=join,
            body_size=len(half.buffer),
        )  # fmt: skip
        self._begin_body(half, message)

    def _read_body(self, half: Direction) -> bool:
        body = half.body
        assert body is not None
        n = min(body.left, len(half.buffer))
        with memoryview(half.buffer) as view, view[:n] as chunk:
            body.add(chunk)
        half.drop(n)
        if body.left:
            return False
        self._end_body(half)
        return True

    def _end_body(self, half: Direction) -> None:
        body, half.body = half.body, None
        assert body is not None
        message = body.message
        message.body = body.kept
        if message.fields is None:
            # Its fixed part has a hole: what there is of it.
            message.head += body.start
        message.end = half.position
        message.ended = half.time_of(half.position - 1)
        if message.kind is MessageKind.REQUEST:
            self._requested(message)
        elif message.kind is MessageKind.INPUTS:
            self._inputs.popleft()
            self._events.append(message)
        else:
            self._events.append(message)
            due = bool(self._outstanding) and self._outstanding[0].request is message.request
            if due and self._outstanding[0].may_report:
                self._reported(message)
            if due and self._outstanding.popleft() is self._last_certain:
                self._last_certain = None
                self._lose(half, _UNSEEN)
            if message.command is Command.HELLO:
                self._agreed(message)
            if message.command is Command.SPLIT_JOIN and message.fields and message.fields.result:
                self._join = message.request

    def _reported(self, outputs: ObservedMessage) -> None:
        """Outputs have come that may be a report: then there are no more of that program."""
        report = decode_report(bytes(outputs.body or b""))
        if report:
            outputs.problem = f"the program failed: {report}"
            while len(self._outstanding) > 1 and self._outstanding[1].request is outputs.request:
                del self._outstanding[1]

    # -- requests -------------------------------------------------------------------------------

    def _requested(self, message: ObservedMessage) -> None:
        """A whole request has come: what the server may send for it."""
        self._events.append(message)
        spec, fields = message.spec, message.fields
        if message.command is Command.HELLO:
            self._hello = message
        if spec.body is Body.GRAPH:
            self._decode(message)
        if spec.answer is Answer.FIXED:
            self._outstanding.append(ExpectedAnswer(message, codec(spec.response).size))
        elif spec.answer is Answer.DATA:
            self._outstanding.append(
                ExpectedAnswer(message, None if fields is None else fields.size)
            )
        if message.command is Command.SPLIT_RUN:
            self._run(message)
        if len(self._outstanding) > _MAX_OUTSTANDING:
            self._outstanding.clear()
            self._last_certain = None
            self._lose(self._server, f"{_MAX_OUTSTANDING} requests without an answer")

    def _decode(self, message: ObservedMessage) -> None:
        fields = message.fields
        if message.command is Command.SPLIT_PROGRAM:
            # It takes the place of one with its number, whether it can be read or not.
            if fields is None:
                self._programs.clear()
            else:
                self._programs.pop((fields.device, fields.program), None)
        if message.body is None or fields is None:
            return
        try:
            if message.command is Command.SPLIT_PROGRAM:
                program = decode_program(message.body)
                message.graph = program
                found = step_sizes(program), bool(program.swaps)
                self._programs[fields.device, fields.program] = found
                return
            if not self._names_known:
                self._settle_names(size_by_graph(message.dialect, message.body))
                message.dialect = self.dialect or message.dialect
            graph = decode_graph(message.body, message.dialect)
        except ProtocolError as error:
            message.problem = str(error)
            return
        message.graph = graph
        if len(self.dialects) > 1 and tells(graph.tensors, self.dialects):
            # Clients of versions that number ops differently can't be told apart before.
            left = tuple(d for d in self.dialects if fits(graph.tensors, d))
            self.dialects = left or self.dialects
            self.dialect = message.dialect = self.dialects[0]

    def _run(self, message: ObservedMessage) -> None:
        fields = message.fields
        program = fields and self._programs.get((fields.device, fields.program))
        if program is None:
            message.problem = "the steps of the program were not seen"
            self._lose(self._client, "the bytes of a program whose steps were not seen")
            return
        steps, has_swaps = program
        for i, (taken, given) in enumerate(steps, 1):
            if taken:
                self._inputs.append(ExpectedAnswer(message, taken, i))
            if given:
                self._outstanding.append(ExpectedAnswer(message, given, i, may_report=has_swaps))

    # -- the dialect ----------------------------------------------------------------------------

    def _settle_dialect(self, half: Direction) -> bool:
        """Return whether the client's bytes can be read on: by a dialect, or as HELLO."""
        if self._hello is not None:
            # What follows HELLO depends on its answer.
            if len(half.buffer) > _HOLD:
                self._guess(self._hello.spec)
            return self.dialect is not None
        if not half.position and not half.lost:
            if not self._joined:
                return True
            if len(half.buffer) < FRAME.size:
                return False
            try:
                first_frame(*FRAME.unpack_from(half.buffer))
            except ProtocolError:
                half.lost = "the beginning of the connection was not seen"
                if self._server.buffer:
                    self._lose(self._server, _UNSEEN)
            else:
                return True
        self._guess()
        return self.dialect is not None

    def _guess(self, hello: CommandSpec | None = None) -> None:
        """Settle the dialect without the server's answer to HELLO."""
        half = self._client
        size = len(half.buffer)
        if self._given is not None:
            self._speak(self._given)
            return
        if hello is None and size < self._guessed_at:
            return
        hello_size = None if hello is None else codec(hello.request).size
        dialect = guess_dialect(half.buffer, hello_size)
        if dialect is not None:
            self._speak(dialect)
        elif hello is not None:
            self._fail(half, "the answer to HELLO was not seen, and no known version fits")
        else:
            # Nothing yet: look again when there is twice as much, in a bounded part of it.
            if size > _GUESS_IN:
                half.drop(size - _GUESS_IN // 2)
            self._guessed_at = 2 * len(half.buffer)

    def _settle_names(self, size: int | None) -> None:
        """From here on the names of tensors have ``size`` bytes, unless that is None."""
        if size is None or self.dialect is None:
            return
        self._names_known = True
        self.dialects = tuple(d.with_names(size) for d in self.dialects)
        self.dialect = self.dialect.with_names(size)

    def _speak(self, dialect: Dialect) -> None:
        self.dialects = tuple(compatible_dialects(dialect))
        self.dialect = dialect

    def _agreed(self, answer: ObservedMessage) -> None:
        """HELLO is answered: the version there decides what the connection speaks."""
        hello, fields = self._hello, answer.fields
        assert hello is not None
        # The version comes first, so that it may be known though the rest has a hole.
        seen = answer.head[SIZE.size :][:3] if fields is None else b""
        if fields is None and len(seen) < len(("major", "minor", "patch")):
            self._guess(hello.spec)
            return
        version = (
            (seen[0], seen[1], seen[2]) if seen else (fields.major, fields.minor, fields.patch)
        )
        self.version = version
        dialect = dialect_of_version(version, codec(hello.spec.request).size)
        if dialect is None:
            name = ".".join(map(str, version))
            for half in (self._client, self._server):
                self._fail(half, f"the server speaks protocol {name}, which is not known here")
            return
        self._speak(dialect)
        extension = min(caps_version(getattr(f, "conn_caps", b"")) for f in (hello.fields, fields))
        if extension:
            self.dialects = tuple(with_split(d, extension) for d in self.dialects)
            self.dialect = self.dialects[0]
        hello.dialect = answer.dialect = self.dialects[0]

    # -- holes ----------------------------------------------------------------------------------

    def _miss_answer(self, half: Direction, size: int, time: float | None) -> int:
        """``size`` bytes are missing where an answer is due; how many of them this dealt with."""
        expected = self._outstanding[0]
        if expected.size is None:
            self._lose(half, f"{size} bytes were not seen", size, time)
            return size
        # The size that an answer begins with is known.
        have = len(half.buffer)
        n = min(size, max(0, SIZE.size - have))
        half.add(SIZE.pack(expected.size)[have : have + n], time)
        if n == size or not expected.size:
            self._read(Side.SERVER)
            return n
        message = self._answer_to(expected, half)
        message.head = half.take(SIZE.size)
        message.body_size = expected.size
        self._begin_body(half, message)
        if half.buffer:
            self._read_body(half)
        return n

    def _begin_damaged(self, half: Direction) -> bool:
        """Read a request on of which only the frame is whole: it tells how long it is."""
        waits = self._hello is not None and self.dialect is None
        if half.lost or waits or len(half.buffer) < FRAME.size:
            return False
        try:
            message = self._request_in(half)
        except ProtocolError:
            return False
        self._count += 1
        (_, size) = FRAME.unpack_from(half.buffer)
        message.head = half.take(len(half.buffer))
        half.body = IncomingBody(message, False, None)
        half.body.left = FRAME.size + size - len(message.head)
        return True

    def _lose(self, half: Direction, why: str, size: int = 0, time: float | None = None) -> None:
        """It isn't known any more where a message begins; ``size`` bytes were not seen."""
        if not half.lost:
            half.lost, half.lost_at = why, half.position
        half.drop(len(half.buffer))
        half.pass_over(size, time)
        if half is self._client:
            # How many answers come after those that are due is unknown, too.
            self._inputs.clear()
            if self._server.lost:
                self._outstanding.clear()
            elif not self._outstanding:
                self._lose(self._server, _UNSEEN)
            elif self._last_certain is None:
                self._last_certain = self._outstanding[-1]

    def _find_request(self, half: Direction) -> bool:
        assert self.dialect is not None
        if self._finder is None or self._finder.dialect is not self.dialect:
            self._finder = finder(self.dialect)
        at, found = self._finder.find(half.buffer, half.begins())
        half.drop(at)
        if found:
            self._found(half)
        return found

    def _find_answer(self, half: Direction) -> bool:
        """Look for an answer where a segment begins, as answers do."""
        for at in sorted(half.begins()):
            if at + SIZE.size > len(half.buffer):
                break
            (size,) = SIZE.unpack_from(half.buffer, at)
            for i, expected in enumerate(self._outstanding):
                if expected.size == size and not expected.raw:
                    half.drop(at)
                    self._paired_by_size = self._doubtful = True
                    for _ in range(i):
                        self._outstanding.popleft()
                    self._found(half)
                    return True
        half.drop(len(half.buffer))
        return False

    def _found(self, half: Direction) -> None:
        if half.position > half.lost_at:
            self._skip(half, half.lost_at, half.position, half.lost)
        half.lost = ""

    def _await_request(self, half: Direction) -> None:
        """Bytes of the server came that no request is known for, yet."""
        if self._client.dead:
            self._fail(half, f"{len(half.buffer)} bytes that answer no request that was read")
        elif self._client.lost or (self._joined and len(half.buffer) > _HOLD):
            self._lose(half, _UNSEEN)
        elif len(half.buffer) > _HOLD:
            self._fail(half, f"{len(half.buffer)} bytes that answer no request")

    def _skip(self, half: Direction, start: int, end: int, text: str) -> None:
        self._events.append(SkippedBytes(half.side, start, end, half.time_of(end), text))

    def _fail(self, half: Direction, text: str) -> None:
        if half.dead:
            return
        half.dead = True
        self._events.append(Failure(half.side, half.position, half.time_of(half.position), text))
        half.drop(len(half.buffer))
