"""The request reader: any cut of the byte stream into segments gives the same events."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import DIALECTS, Body, Dialect
from protocol.errors import ProtocolError
from protocol.requests import (
    Hello,
    Limits,
    Request,
    RequestReader,
    UploadEnd,
    UploadStart,
    encode_frame,
    encode_request,
)
from protocol.responses import encode_answer
from tests.protocol.turns import request, small_graph, tensor_fields

NEWEST = DIALECTS[0]


def frame(command: int, payload: bytes) -> bytes:
    return struct.pack("<BQ", command, len(payload)) + payload


def message(command: Command, dialect: Dialect, body: bytes = b"") -> bytes:
    """A request whose head is all zeros."""
    return frame(command, bytes(codec(dialect.commands[command].request).size) + body)


def hello(dialect: Dialect) -> bytes:
    return frame(Command.HELLO, bytes(dialect.hello_size))


class Peer:
    """Feeds a reader as a transport would and takes all events."""

    def __init__(self, dialect: Dialect | None = NEWEST, limits: Limits | None = None) -> None:
        self.reader = RequestReader(limits)
        self.dialect = dialect
        self.seen: list[tuple[str, bytes | int]] = []
        self.upload = bytearray()

    def feed(self, data: bytes) -> None:
        while data:
            view = self.reader.receive_buffer()
            assert len(view) > 0
            n = min(len(view), len(data))
            view[:n] = data[:n]
            self.reader.received(n)
            data = data[n:]
            self.take()

    def take(self) -> None:
        while (event := self.reader.next_event()) is not None:
            if isinstance(event, Hello):
                self.reader.dialect = self.dialect
                self.seen.append(("HELLO", len(event.caps)))
            elif isinstance(event, UploadStart):
                # A server bounds an upload by the buffer that it goes to.
                if event.size > 1 << 20:
                    raise ProtocolError("too large for its buffer")
                self.upload = bytearray(event.size)
                self.reader.direct(memoryview(self.upload))
            elif isinstance(event, UploadEnd):
                self.seen.append(("upload", bytes(self.upload)))
            else:
                assert isinstance(event, Request)
                self.seen.append((event.command.name, bytes(event.graph or b"")))


def test_a_session_of_every_command_in_every_dialect() -> None:
    for dialect in DIALECTS:
        peer = Peer(dialect)
        peer.feed(hello(dialect))
        expected: list[tuple[str, bytes | int]] = [("HELLO", dialect.hello_size)]
        for command, spec in dialect.commands.items():
            if command is Command.HELLO:
                continue
            body = b"" if spec.body is Body.NONE else b"0123456789"
            peer.feed(message(command, dialect, body))
            expected.append(("upload" if spec.body is Body.DATA else command.name, body))
        assert peer.seen == expected
        assert peer.reader.at_boundary


def test_an_upload_is_received_into_its_place() -> None:
    peer = Peer()
    peer.feed(hello(NEWEST))
    upload = message(Command.SET_TENSOR, NEWEST, bytes(100_000))
    # With the first upload the reader waits for the longest head that there is.
    peer.feed(upload[: 64 - 100_000])
    view = peer.reader.receive_buffer()
    assert len(view) == 100_000 - 64
    assert view.obj is peer.upload


def test_events_may_wait_while_bytes_arrive() -> None:
    """An owner that takes no events fills the receive buffer and no more."""
    reader = RequestReader()
    while not reader.full:
        view = reader.receive_buffer()
        view[:] = bytes(len(view))
        reader.received(len(view))
    assert not reader.at_boundary


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (frame(Command.ALLOC_BUFFER, bytes(12)), "instead of HELLO"),
        (frame(Command.HELLO, bytes(7)), "HELLO of 7 bytes"),
        (frame(Command.HELLO, b"")[:1] + b"\xff" * 8, "HELLO of"),
        (hello(NEWEST) + hello(NEWEST), "a second HELLO"),
        (hello(NEWEST) + frame(99, b""), "unknown command 99"),
        (hello(NEWEST) + frame(Command.ALLOC_BUFFER, bytes(11)), "it takes 12"),
        (hello(NEWEST) + frame(Command.ALLOC_BUFFER, bytes(13)), "it takes 12"),
        (hello(NEWEST) + frame(Command.SET_TENSOR, bytes(304)), "it takes 305 and more"),
        (
            hello(NEWEST) + struct.pack("<BQ", Command.GRAPH_COMPUTE, 1 << 62),
            "the limit is",
        ),
    ],
)
def test_what_no_client_sends_is_refused(stream: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        Peer().feed(stream)


def test_a_command_of_a_later_version_is_refused() -> None:
    older = next(d for d in DIALECTS if d.version == (4, 0, 0))
    peer = Peer(older)
    peer.feed(hello(older))
    with pytest.raises(ProtocolError, match=r"MEMSET_TENSOR is no command of protocol 4\.0\.0"):
        peer.feed(message(Command.MEMSET_TENSOR, NEWEST))


def test_graph_limit_is_the_owners() -> None:
    peer = Peer(limits=Limits(graph_bytes=1000))
    peer.feed(hello(NEWEST))
    peer.feed(message(Command.GRAPH_COMPUTE, NEWEST, bytes(1000)))
    with pytest.raises(ProtocolError, match="the limit is 1000"):
        peer.feed(message(Command.GRAPH_COMPUTE, NEWEST, bytes(1001)))


@given(st.binary(max_size=400))
def test_garbage_is_an_error_or_waits(data: bytes) -> None:
    """Whatever bytes come after HELLO: events, a ProtocolError, or waiting for more."""
    peer = Peer(limits=Limits(graph_bytes=4096))
    peer.feed(hello(NEWEST))
    try:
        peer.feed(data)
    except ProtocolError:
        return


def test_truncation_is_seen_at_the_end() -> None:
    peer = Peer()
    stream = message(Command.BUFFER_CLEAR, NEWEST)
    peer.feed(hello(NEWEST) + stream[:-1])
    assert not peer.reader.at_boundary
    assert peer.reader.within == "BUFFER_CLEAR"
    peer.feed(stream[-1:])
    assert peer.reader.at_boundary


@pytest.mark.parametrize("size", [(1 << 20) - 1, 1 << 20, (1 << 20) + 1, 9 << 20])
def test_a_graph_gets_memory_as_it_comes(size: int) -> None:
    graph = bytes(range(251)) * (size // 251 + 1)
    peer = Peer()
    peer.feed(hello(NEWEST))
    peer.feed(struct.pack("<BQ", Command.GRAPH_COMPUTE, size))
    assert len(peer.reader.receive_buffer()) <= 1 << 20
    peer.feed(graph[:size])
    peer.feed(message(Command.DEVICE_COUNT, NEWEST))
    assert peer.seen[1:] == [("GRAPH_COMPUTE", graph[:size]), ("DEVICE_COUNT", b"")]


# -- names of 64 or 128 bytes --------------------------------------------------------------------


def _wide(dialect: Dialect) -> Dialect:
    return dialect.with_names(128)


def _upload(dialect: Dialect, size: int, *, name: bytes = b"w", offset: int = 0) -> bytes:
    """A SET_TENSOR of ``size`` bytes of a tensor of F32 with 1024 elements."""
    tensor = tensor_fields(dialect, "w", (1024, 1, 1, 1))
    tensor["name"] = name
    fields = {"tensor": tensor, "offset": offset, "cache_flag": 0}
    return request(dialect, Command.SET_TENSOR, fields, bytes(size))[1]


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: d.name)
@pytest.mark.parametrize("size", [64, 128])
def test_any_request_with_a_tensor_tells_how_long_names_are(dialect: Dialect, size: int) -> None:
    spoken = dialect.with_names(size)
    tensor = tensor_fields(spoken, "w", (1024, 1, 1, 1))
    first: list[tuple[Command, dict[str, Any], bytes]] = [
        (Command.INIT_TENSOR, {"tensor": tensor}, b""),
        (Command.GET_TENSOR, {"tensor": tensor, "offset": 0, "size": 4}, b""),
        (Command.COPY_TENSOR, {"src": tensor, "dst": tensor}, b""),
        (Command.GET_ALLOC_SIZE, {"tensor": tensor, "device": 0, "srcs": [tensor] * 10}, b""),
        (Command.GRAPH_COMPUTE, {}, small_graph(spoken)),
        (Command.SET_TENSOR, {"tensor": tensor, "offset": 0, "cache_flag": 0}, b"\xab" * 4096),
    ]
    if size == 64:
        part = {"tensor": tensor, "offset": 4000, "cache_flag": 0}
        first.append((Command.SET_TENSOR, part, bytes(96)))
    for command, fields, body in first:
        peer = Peer(dialect)
        peer.feed(hello(dialect))
        # What carries no tensor tells nothing.
        peer.feed(request(dialect, Command.BUFFER_GET_BASE, {"remote_ptr": 1})[1])
        turn = request(spoken, command, fields, body)[1]
        for i in range(0, len(turn), 100):
            peer.feed(turn[i : i + 100])
        assert peer.reader.dialect is spoken, command
        assert peer.reader.at_boundary
        assert peer.seen[-1][1] == body
        # And the connection is held to it.
        other = dialect.with_names(192 - size)
        with pytest.raises(ProtocolError, match="INIT_TENSOR of"):
            peer.feed(request(other, Command.INIT_TENSOR, {"tensor": tensor})[1])


def test_a_long_name_is_read_whole() -> None:
    wide = _wide(NEWEST)
    peer = Peer(NEWEST)
    peer.feed(hello(NEWEST))
    peer.feed(_upload(wide, 4096, name=b"n" * 100))
    assert peer.reader.dialect is wide


def test_an_upload_that_may_be_either_is_taken_as_most_are_and_held_to_it() -> None:
    """A part of a tensor, all zeros: nothing in it says how long its name is."""
    peer = Peer(NEWEST)
    peer.feed(hello(NEWEST))
    peer.feed(_upload(NEWEST, 512))
    assert peer.reader.dialect is NEWEST
    with pytest.raises(ProtocolError, match="names of 128 bytes, after uploads"):
        peer.feed(_upload(_wide(NEWEST), 4096, name=b"n" * 100))


def test_what_is_written_is_what_is_read() -> None:
    """One writer for all clients; HELLO is read before the dialect is known."""
    for dialect in DIALECTS:
        reader = RequestReader()
        reader.dialect = dialect
        command = Command.GET_MAX_SIZE
        data = encode_request(command, dialect.commands[command], {"device": 0})
        view = reader.receive_buffer()
        view[: len(data)] = data
        reader.received(len(data))
        event = reader.next_event()
        assert isinstance(event, Request)
        assert event.command is command
        assert reader.at_boundary
    spec = NEWEST.commands[Command.GET_MAX_SIZE]
    answer = encode_answer(spec, {"max_size": 258})
    assert answer == (8).to_bytes(8, "little") + (258).to_bytes(8, "little")
    assert encode_frame(7, 300) == bytes([7, 44, 1, 0, 0, 0, 0, 0, 0])
