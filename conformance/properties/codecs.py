"""Properties of whoever reads and writes the wire format, and this project's own readers in them.

To hold another implementation against them, give its functions the shape of
:class:`CodecUnderTest`::

    from hypothesis import given
    from conformance.properties import codecs, messages

    @given(messages.requests(NEWEST))
    def test_round_trip(request):
        codecs.check_request_round_trip(MyCodec(), NEWEST, request)

Every ``check_`` raises AssertionError for what does not hold. What a codec may raise for bytes that
are no message is ProtocolError; anything else is a mistake.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hypothesis import strategies as st

from conformance.properties.messages import DrawnRequest, Reply
from protocol.codec import Message
from protocol.commands import Command
from protocol.dialects import Answer, Dialect
from protocol.errors import ProtocolError
from protocol.requests import Hello, Limits, RequestReader, UploadChunk, UploadEnd, UploadStart
from protocol.requests import Request as RequestEvent
from protocol.responses import ResponseReader

# More than any drawn message has; what announces more is refused, as a server does that has no
# buffer of that size.
_LARGEST_BODY = 1 << 20


@dataclass(frozen=True, slots=True)
class Seen:
    """One message as it was read: its command, the values of its fields, what follows them."""

    command: Command
    fields: Any
    body: bytes = b""


class CodecUnderTest(Protocol):
    """Reads and writes the messages of one connection, segment by segment."""

    def write_request(self, dialect: Dialect, request: DrawnRequest) -> bytes:
        """Return the bytes of a request."""

    def read_requests(self, dialect: Dialect, segments: Iterable[bytes]) -> list[Seen]:
        """Return what a server reads after HELLO. Raises ProtocolError for what is no request."""

    def read_replies(
        self, dialect: Dialect, due: Sequence[tuple[Command, int]], segments: Iterable[bytes]
    ) -> list[Seen]:
        """Return what a client reads.

        ``due`` are the requests, with the bytes asked for of GET_TENSOR.
        """


class OwnCodec:
    """The readers and writers of ``protocol/``."""

    def write_request(self, dialect: Dialect, request: DrawnRequest) -> bytes:
        return request.encode(dialect)

    def read_requests(self, dialect: Dialect, segments: Iterable[bytes]) -> list[Seen]:
        reader = RequestReader(Limits(graph_bytes=_LARGEST_BODY))
        reader.dialect = dialect
        seen: list[Seen] = []
        upload: list[tuple[Any, bytearray]] = []

        def take() -> None:
            while (event := reader.next_event()) is not None:
                if isinstance(event, UploadStart):
                    if event.size > _LARGEST_BODY:
                        raise ProtocolError(f"an upload of {event.size} bytes")
                    upload.append((event.fields, bytearray(event.size)))
                    reader.direct(memoryview(upload[-1][1]))
                elif isinstance(event, UploadEnd):
                    fields, data = upload[-1]
                    seen.append(Seen(Command.SET_TENSOR, plain(fields), bytes(data)))
                elif isinstance(event, RequestEvent):
                    body = bytes(event.graph or b"")
                    seen.append(Seen(event.command, plain(event.fields), body))
                else:
                    assert not isinstance(event, Hello | UploadChunk), event

        for segment in segments:
            _feed(reader, segment, take)
        return seen

    def read_replies(
        self, dialect: Dialect, due: Sequence[tuple[Command, int]], segments: Iterable[bytes]
    ) -> list[Seen]:
        reader = ResponseReader()
        seen: list[Seen] = []
        for command, size in due:
            spec = dialect.commands[command]
            if spec.answer is Answer.DATA:
                reader.expect(command, spec, memoryview(bytearray(size)))
            elif spec.answer is Answer.FIXED:
                reader.expect(command, spec)

        def take() -> None:
            while (received := reader.next_answer()) is not None:
                if dialect.commands[received.command].answer is Answer.DATA:
                    seen.append(Seen(received.command, {}, bytes(received.answer)))
                else:
                    seen.append(Seen(received.command, plain(received.answer)))

        for segment in segments:
            _feed(reader, segment, take)
        return seen


def _feed(reader: Any, segment: bytes, take: Any) -> None:
    """Give a segment to a reader as a transport does."""
    while segment:
        place = reader.receive_buffer()
        n = min(len(place), len(segment))
        assert n > 0, "a reader that takes no bytes"
        place[:n] = segment[:n]
        reader.received(n)
        segment = segment[n:]
        take()


def plain(value: Any) -> Any:
    """Return records and tuples as dicts and lists, to compare."""
    if isinstance(value, Message):
        return {k: plain(v) for k, v in value.__dict__.items()}
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


# -- segments and damage ---------------------------------------------------------------------------


def segmentations() -> st.SearchStrategy[tuple[int, ...]]:
    """Return lengths of segments, taken in turn."""
    return st.lists(st.integers(1, 9) | st.integers(1, 30_000), min_size=1, max_size=8).map(tuple)


def cut(stream: bytes, lengths: Sequence[int]) -> list[bytes]:
    """Cut ``stream`` into segments of these lengths, in turn, to its end."""
    segments, at, i = [], 0, 0
    while at < len(stream):
        # Many short ones cost time and show nothing that a hundred don't.
        n = lengths[i % len(lengths)] if i < 100 else len(stream)
        segments.append(stream[at : at + n])
        at += n
        i += 1
    return segments


@dataclass(frozen=True, slots=True)
class Damage:
    """A change to a stream: the ``kind`` at a place given by a number of any size."""

    kind: str
    at: int
    value: int = 0

    def apply(self, stream: bytes) -> bytes:
        if not stream:
            return stream
        at = self.at % len(stream)
        match self.kind:
            case "truncate":
                return stream[:at]
            case "flip":
                flipped = stream[at] ^ (1 << (self.value & 7))
                return stream[:at] + bytes([flipped]) + stream[at + 1 :]
            case "remove":
                return stream[:at] + stream[at + 1 + self.value % 16 :]
            case "insert":
                return stream[:at] + bytes([self.value & 0xFF]) * (1 + self.value % 9) + stream[at:]
            case "repeat":
                return stream[:at] + stream[max(0, at - 40) :]
        raise ValueError(f"no damage '{self.kind}'")


def damages() -> st.SearchStrategy[tuple[Damage, ...]]:
    """Return one to three damages, most in the first bytes, where frames and heads are."""
    one = st.builds(
        Damage,
        st.sampled_from(("flip", "truncate", "remove", "insert", "repeat")),
        st.integers(0, 400) | st.integers(0, 1 << 20),
        st.integers(0, 255),
    )
    return st.lists(one, min_size=1, max_size=3).map(tuple)


# -- properties ------------------------------------------------------------------------------------


def check_request_round_trip(
    codec_: CodecUnderTest, dialect: Dialect, request: DrawnRequest
) -> None:
    """Check that what is written is read."""
    data = codec_.write_request(dialect, request)
    expected = [Seen(request.command, plain(request.fields), request.body)]
    assert codec_.read_requests(dialect, [data]) == expected


def check_reply_round_trip(codec_: CodecUnderTest, dialect: Dialect, reply: Reply) -> None:
    """Check that an answer as the tables have it is read."""
    due = [(reply.command, len(reply.data))]
    expected = [Seen(reply.command, plain(reply.fields), reply.data)]
    assert codec_.read_replies(dialect, due, [reply.encode(dialect)]) == expected


def check_request_segments(
    codec_: CodecUnderTest,
    dialect: Dialect,
    requests: Sequence[DrawnRequest],
    lengths: Sequence[int],
) -> None:
    """Check that the requests are the same however the stream arrives."""
    stream = b"".join(codec_.write_request(dialect, r) for r in requests)
    expected = [Seen(r.command, plain(r.fields), r.body) for r in requests]
    assert codec_.read_requests(dialect, cut(stream, lengths)) == expected


def check_reply_segments(
    codec_: CodecUnderTest, dialect: Dialect, replies: Sequence[Reply], lengths: Sequence[int]
) -> None:
    """Check that the answers are the same however the stream arrives."""
    stream = b"".join(r.encode(dialect) for r in replies)
    due = [(r.command, len(r.data)) for r in replies]
    expected = [Seen(r.command, plain(r.fields), r.data) for r in replies]
    assert codec_.read_replies(dialect, due, cut(stream, lengths)) == expected


def check_damaged_requests(
    codec_: CodecUnderTest,
    dialect: Dialect,
    requests: Sequence[DrawnRequest],
    damage: Sequence[Damage],
    lengths: Sequence[int],
) -> None:
    """Check that damaged bytes are other requests or a ProtocolError, however they arrive."""
    stream = b"".join(codec_.write_request(dialect, r) for r in requests)
    for one in damage:
        stream = one.apply(stream)
    outcomes = []
    for segments in ([stream], cut(stream, lengths)):
        try:
            outcomes.append((codec_.read_requests(dialect, segments), ""))
        except ProtocolError as error:
            outcomes.append(([], str(error)))
    assert outcomes[0] == outcomes[1]


def check_damaged_replies(
    codec_: CodecUnderTest,
    dialect: Dialect,
    replies: Sequence[Reply],
    damage: Sequence[Damage],
    lengths: Sequence[int],
) -> None:
    """Check that damaged bytes are other answers or a ProtocolError."""
    stream = b"".join(r.encode(dialect) for r in replies)
    for one in damage:
        stream = one.apply(stream)
    due = [(r.command, len(r.data)) for r in replies]
    try:
        seen = codec_.read_replies(dialect, due, cut(stream, lengths))
    except ProtocolError:
        return
    assert [s.command for s in seen] == [command for command, _ in due][: len(seen)]
