"""The client's reader against answers of every command of every version."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import DIALECTS
from protocol.errors import ProtocolError
from protocol.responses import Received, ResponseReader
from protocol.split import SPLIT_COMMANDS

NEWEST = DIALECTS[0]


def feed(reader: ResponseReader, stream: bytes, cuts: list[int]) -> list[Received]:
    """Give ``stream`` to the reader in segments that end at ``cuts``."""
    answers = []
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        segment = stream[start:stop]
        while segment:
            place = reader.receive_buffer()
            n = min(len(place), len(segment))
            assert n > 0
            place[:n] = segment[:n]
            reader.received(n)
            segment = segment[n:]
            while (answer := reader.next_answer()) is not None:
                answers.append(answer)
    return answers


def framed(payload: bytes) -> bytes:
    return struct.pack("<Q", len(payload)) + payload


def test_large_data_are_received_where_they_belong() -> None:
    reader = ResponseReader()
    destination = bytearray(1 << 20)
    reader.expect(Command.GET_TENSOR, NEWEST.commands[Command.GET_TENSOR], memoryview(destination))
    feed(reader, struct.pack("<Q", 1 << 20), [])
    place = reader.receive_buffer()
    assert len(place) == 1 << 20
    place[0] = 77
    assert destination[0] == 77


@pytest.mark.parametrize("wrong", [0, 7, 9, 2**63])
def test_an_answer_of_another_size_is_refused(wrong: int) -> None:
    reader = ResponseReader()
    reader.expect(Command.GET_ALIGNMENT, NEWEST.commands[Command.GET_ALIGNMENT])
    with pytest.raises(ProtocolError, match=f"GET_ALIGNMENT has {wrong} bytes, not 8"):
        feed(reader, struct.pack("<Q", wrong), [])


def test_an_answer_to_nothing_is_refused() -> None:
    reader = ResponseReader()
    with pytest.raises(ProtocolError, match="answer no request"):
        feed(reader, b"\0", [])
    reader = ResponseReader()
    reader.expect(Command.GET_ALIGNMENT, NEWEST.commands[Command.GET_ALIGNMENT])
    with pytest.raises(ProtocolError, match="1 bytes that answer no request"):
        feed(reader, framed(bytes(8)) + b"\0", [])


def test_what_is_due_is_told() -> None:
    reader = ResponseReader()
    destination = memoryview(bytearray(10000))
    reader.expect(Command.GET_TENSOR, NEWEST.commands[Command.GET_TENSOR], destination)
    assert reader.within == "the answer to GET_TENSOR"
    feed(reader, framed(bytes(10000))[:5008], [])
    assert reader.within == "the answer to GET_TENSOR (5000 of 10000 bytes)"


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_bytes_without_a_frame_between_answers(data: st.DataObject) -> None:
    spec, fixed = NEWEST.commands[Command.GET_TENSOR], NEWEST.commands[Command.GET_ALIGNMENT]
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    reader = ResponseReader()
    stream, due = b"", []
    for kind in data.draw(st.lists(st.sampled_from(["raw", "data", "fixed"]), max_size=8)):
        size = 8 if kind == "fixed" else data.draw(st.sampled_from([1, 100, 5000, 70_000]))
        payload, destination = rng.bytes(size), memoryview(bytearray(size))
        if kind == "raw":
            reader.expect_raw(Command.SPLIT_RUN, SPLIT_COMMANDS[Command.SPLIT_RUN], destination)
        elif kind == "data":
            reader.expect(Command.GET_TENSOR, spec, destination)
        else:
            reader.expect(Command.GET_ALIGNMENT, fixed)
        stream += payload if kind == "raw" else framed(payload)
        due.append((kind, payload))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    answers = feed(reader, stream, cuts)
    assert len(answers) == len(due)
    for received, (kind, payload) in zip(answers, due, strict=True):
        if kind == "fixed":
            assert codec(fixed.response).build(received.answer) == payload
        else:
            assert bytes(received.answer) == payload
    assert reader.within == "nothing"


def test_large_bytes_without_a_frame_are_received_where_they_belong() -> None:
    reader = ResponseReader()
    destination = bytearray(1 << 20)
    spec = SPLIT_COMMANDS[Command.SPLIT_RUN]
    reader.expect_raw(Command.SPLIT_RUN, spec, memoryview(destination))
    assert reader.within == "the answer to SPLIT_RUN (0 of 1048576 bytes)"
    place = reader.receive_buffer()
    assert len(place) == 1 << 20
    place[0] = 77
    assert destination[0] == 77
    with pytest.raises(ValueError, match="without bytes"):
        reader.expect_raw(Command.SPLIT_RUN, spec, memoryview(b""))


def test_announcements_fit_the_command() -> None:
    reader = ResponseReader()
    with pytest.raises(ValueError, match="no answer"):
        reader.expect(Command.SET_TENSOR, NEWEST.commands[Command.SET_TENSOR])
    with pytest.raises(ValueError, match="bytes of a tensor"):
        reader.expect(Command.GET_TENSOR, NEWEST.commands[Command.GET_TENSOR])
    with pytest.raises(ValueError, match="a fixed struct"):
        reader.expect(Command.COPY_TENSOR, NEWEST.commands[Command.COPY_TENSOR], memoryview(b""))
