"""The split extension on the wire: capabilities, programs, uploads in parts, taking the stream."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import DIALECTS
from protocol.errors import ProtocolError
from protocol.messages import CONN_CAPS_SIZE, RPC_TENSOR_DTYPE, RPC_TENSOR_SIZE
from protocol.requests import (
    Event,
    Request,
    RequestReader,
    UploadChunk,
    UploadEnd,
    UploadStart,
)
from protocol.split import (
    MAX_PARTS,
    MOST_REPORT,
    SPLIT_COMMANDS,
    VERSION,
    ProgramStep,
    ProgramSwap,
    SplitStatusResponse,
    caps_version,
    decode_program,
    decode_report,
    encode_program,
    encode_report,
    split_caps,
    split_part_fields,
    split_status_fields,
    with_split,
)

NEWEST = DIALECTS[0]

# -- capabilities


def test_capabilities_say_the_version() -> None:
    assert len(split_caps()) == CONN_CAPS_SIZE
    assert caps_version(split_caps()) == VERSION
    assert caps_version(split_caps(7)) == 7


@given(st.binary(min_size=CONN_CAPS_SIZE, max_size=CONN_CAPS_SIZE))
def test_other_capabilities_are_none_of_ours(caps: bytes) -> None:
    """All zeros (no RDMA) or an RDMA peer's bytes."""
    assert caps_version(caps) == 0
    assert caps_version(bytes(CONN_CAPS_SIZE)) == 0


@pytest.mark.parametrize("size", [0, 1, CONN_CAPS_SIZE - 1, CONN_CAPS_SIZE + 1])
def test_capabilities_of_another_size(size: int) -> None:
    assert caps_version((split_caps() * 2)[:size]) == 0


def test_commands_are_added_to_a_dialect() -> None:
    extended = with_split(NEWEST)
    assert extended.commands.keys() == NEWEST.commands.keys() | SPLIT_COMMANDS.keys()
    assert not NEWEST.commands.keys() & SPLIT_COMMANDS.keys()
    assert min(SPLIT_COMMANDS) >= 0x80, "upstream counts its own commands up from 0"


def test_a_status_has_its_parts() -> None:
    part = split_part_fields("host:1" * 20, rows=3, bytes=4, exchanges=5, wait_seconds=0.5)
    wire = codec(SplitStatusResponse)
    got = wire.parse(wire.build(split_status_fields([part], graphs=2, tokens=9)))
    assert (got.n_parts, got.graphs, got.tokens) == (1, 2, 9)
    assert len(got.parts) == MAX_PARTS
    first = got.parts[0]
    assert (first.rows, first.bytes, first.exchanges, first.wait_seconds) == (3, 4, 5, 0.5)
    assert first.name[-1] == 0, "a name that is too long is cut and ends"


# -- programs

ids = st.lists(st.integers(0, 2**64 - 1), max_size=5).map(tuple)
steps = st.lists(st.builds(ProgramStep, ids, ids, ids), max_size=4)


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[ProgramStep], np.ndarray]:
    count = draw(st.integers(0, 3))
    raw = np.random.default_rng(draw(st.integers(0, 99))).bytes(count * RPC_TENSOR_SIZE)
    return draw(steps), np.frombuffer(raw, RPC_TENSOR_DTYPE)


@st.composite
def swaps_of(draw: st.DrawFn, n_steps: int) -> list[ProgramSwap]:
    n_parts = draw(st.integers(2, MAX_PARTS))
    named = st.lists(st.integers(0, 2**64 - 1), min_size=n_parts, max_size=n_parts).map(tuple)
    steps = draw(st.lists(st.integers(0, n_steps - 1), max_size=4)) if n_steps else []
    return [ProgramSwap(step, draw(named)) for step in sorted(steps)]


@given(programs(), st.data())
def test_a_program_is_what_was_sent(
    program: tuple[list[ProgramStep], np.ndarray], data: st.DataObject
) -> None:
    sent, tensors = program
    swaps = data.draw(swaps_of(len(sent)))
    got = decode_program(encode_program(sent, tensors, swaps))
    assert list(got.steps) == sent
    assert got.tensors.tobytes() == tensors.tobytes()
    assert list(got.swaps) == swaps


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        (struct.pack("<I", 1), "end within a count"),
        (struct.pack("<II", 0, 2), "for 0 swaps"),
        (struct.pack("<II", 1, 1) + bytes(12), "among 1,"),
        (struct.pack("<II", 1, 17) + bytes(140), "among 17,"),
        (struct.pack("<II", 2, 2) + bytes(39), "39 bytes for 2 swaps"),
        (struct.pack("<II", 2**32 - 1, 2) + bytes(20), "20 bytes for"),
        (struct.pack("<IIIQQ", 1, 2, 1, 5, 6), "out of order or behind them"),
        (struct.pack("<II", 2, 2) + struct.pack("<IQQ", 1, 5, 6) + bytes(20), "out of order"),
    ],
)
def test_swaps_that_can_not_be(tail: bytes, said: str) -> None:
    n_steps = 2 if said == "out of order" else 1
    whole = encode_program([ProgramStep((), (), ())] * n_steps, np.zeros(0, RPC_TENSOR_DTYPE))
    with pytest.raises(ProtocolError, match=said):
        decode_program(whole + tail)


def test_reports_are_read_as_far_as_they_came() -> None:
    """And nothing else is taken for one: a size, or numbers."""
    report = encode_report("part 1 hung up")
    assert decode_report(report) == "part 1 hung up"
    assert decode_report(report + b"more") == "part 1 hung up"
    assert decode_report(report[:12]) == "part"
    assert decode_report(report[:7]) == ""
    assert len(encode_report("x" * 9999)) <= 8 + MOST_REPORT
    for size in (0, 4096, 2**32 + 5, 2**64 - 1):
        assert decode_report(struct.pack("<Q", size) + bytes(600)) == ""


@given(programs(), st.data())
def test_a_program_cut_short_or_too_long(
    program: tuple[list[ProgramStep], np.ndarray], data: st.DataObject
) -> None:
    whole = encode_program(*program)
    with pytest.raises(ProtocolError):
        decode_program(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ProtocolError):
        decode_program(whole + data.draw(st.binary(min_size=1, max_size=400)))


@given(st.binary(max_size=700))
def test_bytes_that_are_no_program(payload: bytes) -> None:
    try:
        got = decode_program(payload)
    except ProtocolError:
        return
    assert encode_program(got.steps, got.tensors, got.swaps) == payload


@given(programs(), st.data())
def test_a_program_with_a_few_bytes_changed(
    program: tuple[list[ProgramStep], np.ndarray], data: st.DataObject
) -> None:
    payload = bytearray(encode_program(*program))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        got = decode_program(payload)
    except ProtocolError:
        return
    assert encode_program(got.steps, got.tensors, got.swaps) == payload


@pytest.mark.parametrize("count", [1, 2**31, 2**32 - 1])
def test_counts_that_the_payload_cannot_hold(count: int) -> None:
    for payload in (
        struct.pack("<I", count),
        struct.pack("<IIII", 1, count, count, count) + bytes(16),
        struct.pack("<II", 0, count),
    ):
        with pytest.raises(ProtocolError, match="can't hold"):
            decode_program(payload)


# -- the reader


def reader_with(data: bytes) -> RequestReader:
    reader = RequestReader()
    reader.dialect = with_split(NEWEST)
    feed(reader, data)
    return reader


def feed(reader: RequestReader, data: bytes, most: int = 1 << 30) -> int:
    """Bytes taken until the reader has no room."""
    at = 0
    while at < len(data) and not reader.full:
        view = reader.receive_buffer()
        n = min(len(view), len(data) - at, most)
        view[:n] = data[at : at + n]
        reader.received(n)
        at += n
    return at


def set_tensor(data: bytes) -> bytes:
    head = NEWEST.commands[Command.SET_TENSOR].request.sizeof()
    return struct.pack("<BQ", Command.SET_TENSOR, head + len(data)) + bytes(head) + data


def run_program(number: int) -> bytes:
    return struct.pack("<BQII", Command.SPLIT_RUN, 8, 0, number)


@given(st.lists(st.integers(1, 9000), max_size=6), st.integers(1, 20000), st.integers(0, 20))
def test_an_upload_goes_to_its_places_part_by_part(
    sizes: list[int], most: int, behind: int
) -> None:
    """Whatever arrives at once: parts of any size, and the next request behind the last one."""
    content = np.random.default_rng(1).bytes(sum(sizes))
    stream = set_tensor(content) + run_program(behind)
    reader = reader_with(b"")
    places = [bytearray(n) for n in sizes]
    given_so_far = 0
    events: list[Event] = []
    at = 0
    while len(events) < len(sizes) + 2 + (not sizes):
        event = reader.next_event()
        if event is None:
            assert at < len(stream), "the reader wants more than there is"
            at += feed(reader, stream[at : at + most])
            continue
        events.append(event)
        if isinstance(event, UploadStart | UploadChunk):
            place = places[given_so_far] if places else bytearray()
            given_so_far += 1
            reader.direct(memoryview(place))
    kinds = [type(e) for e in events]
    assert kinds == [UploadStart, *[UploadChunk] * (len(sizes) - 1), UploadEnd, Request]
    assert b"".join(places) == content
    assert isinstance(events[-1], Request)
    assert events[-1].fields.program == behind
    assert reader.at_boundary


def test_a_place_must_be_some_of_what_is_left() -> None:
    reader = reader_with(set_tensor(b"abcdef"))
    assert isinstance(reader.next_event(), UploadStart)
    for wrong in (bytearray(), bytearray(7)):
        with pytest.raises(ValueError, match="place"):
            reader.direct(memoryview(wrong))
    reader.direct(memoryview(bytearray(4)))
    with pytest.raises(ValueError, match="place"):
        reader.direct(memoryview(bytearray(1)))
    assert isinstance(reader.next_event(), UploadChunk)
    with pytest.raises(ValueError, match="no place yet"):
        reader.next_event()
    with pytest.raises(ValueError, match="place"):
        reader.direct(memoryview(bytearray(3)))
    last = bytearray(2)
    reader.direct(memoryview(last))
    assert isinstance(reader.next_event(), UploadEnd)
    assert last == b"ef"


@given(st.integers(0, 300), st.integers(0, 300))
def test_what_is_staged_can_be_taken_and_put_back(inputs: int, kept: int) -> None:
    stream = np.random.default_rng(2).bytes(inputs)
    reader = reader_with(run_program(1) + stream + run_program(2) * 3)
    first = reader.next_event()
    assert isinstance(first, Request)
    early = reader.take_received()
    assert early == stream + run_program(2) * 3
    assert reader.at_boundary
    # The program took its inputs; what is left belongs to the reader again.
    reader.put_back(early[inputs:])
    numbers = []
    while (event := reader.next_event()) is not None:
        assert isinstance(event, Request)
        numbers.append(event.fields.program)
    assert numbers == [2, 2, 2]


def test_as_much_as_can_be_staged_can_be_put_back() -> None:
    reader = reader_with(b"")
    taken = feed(reader, run_program(0) + bytes(1 << 20))
    assert isinstance(reader.next_event(), Request)
    early = reader.take_received()
    assert len(early) == taken - len(run_program(0))
    reader.put_back(early)
    assert reader.take_received() == early


def test_the_commands_are_unknown_without_the_extension() -> None:
    reader = RequestReader()
    reader.dialect = NEWEST
    feed(reader, run_program(0))
    with pytest.raises(ProtocolError, match="SPLIT_RUN is no command of protocol"):
        reader.next_event()


def test_versions() -> None:
    """Both sides speak the lower one: each has the commands of those before it."""
    names = [set(with_split(NEWEST, v).commands) - set(NEWEST.commands) for v in range(6)]
    assert names[0] == set()
    assert min(names[1]) == Command.SPLIT_QUERY
    assert max(names[1]) == Command.SPLIT_STATUS
    assert names[2] - names[1] == {
        Command.SPLIT_MEMBERS,
        Command.SPLIT_ACQUIRE,
        Command.SPLIT_RELEASE,
    }
    assert names[3] - names[2] == {Command.SPLIT_DESCRIBE}
    assert names[4] - names[3] == {Command.SPLIT_LOAD}
    assert names[5] - names[4] == {Command.SPLIT_PEERS, Command.SPLIT_JOIN}
    assert names[5] == set(SPLIT_COMMANDS)
