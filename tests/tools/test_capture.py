"""Captures: files of every format, link layers, and TCP put together whatever happened to it."""

from __future__ import annotations

import contextlib
import gzip
import io
import random
import struct
from collections.abc import Sequence

import dpkt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.dialects import DIALECTS
from protocol.observe.events import Event, Failure, MessageKind, ObservedMessage, Side, SkippedBytes
from tests.protocol.transcripts import full_session, session, summary
from tests.tools.packets import (
    CLIENT6,
    LOOP,
    NULL,
    RAW,
    SERVER6,
    SLL,
    SLL2,
    connection_frames,
    cut,
    on_link,
    pcap_bytes,
    tagged,
)
from tools.capture.blocks import INTERFACE, PACKET, SECTION, SIMPLE_PACKET, interface, section
from tools.capture.connections import CapturedConnection, Connections, ReadOptions
from tools.capture.errors import CaptureError
from tools.capture.files import Capture, CaptureWriter, Frame
from tools.capture.packets import Segment
from tools.capture.streams import CapturedStream
from tools.record.frames import Address

NEWEST = DIALECTS[0]
TURNS = full_session(NEWEST, upload=20_000, download=15_000)


class Seen:
    """A listener that keeps everything."""

    def __init__(self) -> None:
        self.connections: list[CapturedConnection] = []
        self.events: list[Event] = []
        self.closed_connections: list[CapturedConnection] = []

    def opened(self, connection: CapturedConnection) -> None:
        self.connections.append(connection)

    def event(self, connection: CapturedConnection, event: Event) -> None:
        self.events.append(event)

    def closed(self, connection: CapturedConnection) -> None:
        self.closed_connections.append(connection)

    @property
    def messages(self) -> list[ObservedMessage]:
        return [e for e in self.events if isinstance(e, ObservedMessage)]


def decoded(frames: list[Frame], options: ReadOptions | None = None) -> Seen:
    seen = Seen()
    Connections(seen, options).run(frames)
    return seen


WHOLE = decoded(connection_frames(TURNS))


def test_a_session_is_read_whole() -> None:
    assert len(WHOLE.messages) == len(TURNS)
    assert WHOLE.messages == WHOLE.events
    [connection] = WHOLE.closed_connections
    assert connection.complete
    assert not connection.joined
    assert not connection.notes
    assert (connection.client, connection.server) == ("10.0.0.2:40000", "10.0.0.1:50052")
    for side in Side:
        sent = sum(len(data) for s, data in TURNS if s is side)
        assert connection.counts[side].bytes == sent


# -- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("nano", [False, True])
def test_pcap_of_all_kinds(order: str, nano: bool) -> None:
    frames = connection_frames(TURNS[:4])
    read = list(Capture(io.BytesIO(pcap_bytes(frames, order=order, nano=nano))))
    assert [(f.link, f.data, f.length) for f in read] == [
        (f.link, f.data, f.length) for f in frames
    ]
    assert [f.time for f in read] == pytest.approx([f.time for f in frames], abs=2e-6)


def test_pcapng_with_several_interfaces() -> None:
    frames = connection_frames(TURNS[:6])
    mixed = [on_link(f, SLL2) if i % 2 else f for i, f in enumerate(frames)]
    file = io.BytesIO()
    writer = CaptureWriter(file)
    for frame in mixed:
        writer.write(frame)
    file.seek(0)
    capture = Capture(file)
    read = list(capture)
    assert [f[1:] for f in read] == [f[1:] for f in mixed]
    assert [f.time for f in read] == pytest.approx([f.time for f in mixed], abs=1e-6)
    assert not capture.truncated
    assert capture.position == len(file.getvalue())
    # Another reader agrees.
    file.seek(0)
    assert [bytes(data) for _, data in dpkt.pcapng.Reader(file)] == [f.data for f in mixed]


def test_pcapng_with_several_sections() -> None:
    """Files put one behind the other; each section has interfaces of its own."""
    frames = connection_frames(TURNS[:6])
    data = b""
    for part in (frames[:5], [on_link(f, RAW) for f in frames[5:]]):
        file = io.BytesIO()
        writer = CaptureWriter(file)
        for frame in part:
            writer.write(frame)
        data += file.getvalue()
    read = list(Capture(io.BytesIO(data)))
    assert [f.link for f in read] == [1] * 5 + [RAW] * (len(frames) - 5)


def test_pcapng_as_another_writer_writes_it() -> None:
    frames = connection_frames(TURNS[:6])
    file = io.BytesIO()
    writer = dpkt.pcapng.Writer(file, linktype=1)
    for frame in frames:
        writer.writepkt(frame.data, ts=frame.time)
    file.seek(0)
    read = list(Capture(file))
    assert [f.data for f in read] == [f.data for f in frames]
    assert [f.time for f in read] == pytest.approx([f.time for f in frames], abs=2e-6)


def test_big_endian_pcapng_with_its_own_clock_and_unknown_blocks() -> None:
    def block(kind: int, body: bytes) -> bytes:
        size = struct.pack(">I", 12 + len(body))
        return struct.pack(">I", kind) + size + body + size

    section = block(0x0A0D0D0A, struct.pack(">IHHq", 0x1A2B3C4D, 1, 0, -1))
    # Times in 1/1024 s, 100 s later than they say.
    options = struct.pack(">HHB3x", 9, 1, 0x80 | 10) + struct.pack(">HHq", 14, 8, 100)
    interface = block(1, struct.pack(">HHI", 101, 0, 65535) + options + bytes(4))
    packet = block(6, struct.pack(">IIIII", 0, 0, 2048, 5, 9) + b"abcde" + bytes(3))
    simple = block(3, struct.pack(">I", 4) + b"wxyz")
    data = section + interface + block(0xBAD, b"????") + packet + simple
    assert list(Capture(io.BytesIO(data))) == [
        Frame(102.0, 101, b"abcde", 9),
        Frame(0.0, 101, b"wxyz", 4),
    ]


def test_compressed_files() -> None:
    data = gzip.compress(pcap_bytes(connection_frames(TURNS[:4])))
    assert len(list(Capture(io.BufferedReader(io.BytesIO(data))))) > 4


@pytest.mark.parametrize("pcapng", [False, True])
def test_a_file_that_ends_anywhere(pcapng: bool) -> None:
    frames = connection_frames(TURNS[:2])
    if pcapng:
        file = io.BytesIO()
        for frame in frames:
            if not file.tell():
                writer = CaptureWriter(file)
            writer.write(frame)
        data = file.getvalue()
    else:
        data = pcap_bytes(frames)
    for size in range(len(data)):
        try:
            capture = Capture(io.BytesIO(data[:size]))
            read = list(capture)
        except CaptureError:
            continue
        assert [f.data for f in read] == [f.data for f in frames[: len(read)]]
        assert len(read) < len(frames)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.booleans())
def test_damaged_files_are_capture_errors(data: st.DataObject, pcapng: bool) -> None:
    frames = connection_frames(TURNS[:2])
    file = io.BytesIO()
    writer = CaptureWriter(file)
    for frame in frames:
        writer.write(frame)
    content = bytearray(file.getvalue() if pcapng else pcap_bytes(frames))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    seen = Seen()
    try:
        Connections(seen).run(Capture(io.BytesIO(bytes(content))))
    except CaptureError:
        return


# -- packets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("link", [NULL, LOOP, RAW, SLL, SLL2])
@pytest.mark.parametrize("ip6", [False, True])
def test_link_layers(link: int, ip6: bool) -> None:
    frames = connection_frames(TURNS)
    if ip6:
        frames = connection_frames(TURNS, client=CLIENT6, server=SERVER6)
    seen = decoded([on_link(frame, link) for frame in frames])
    assert summary(seen.events) == summary(WHOLE.events)
    if ip6:
        assert seen.connections[0].client == "[fd00::2]:40000"


def test_vlan_tags() -> None:
    frames = connection_frames(TURNS)
    assert summary(decoded([tagged(f, 7) for f in frames]).events) == summary(WHOLE.events)
    assert summary(decoded([tagged(f, 7, 9) for f in frames]).events) == summary(WHOLE.events)


def test_extension_headers_of_ip6() -> None:
    frames = []
    for frame in connection_frames(TURNS, client=CLIENT6, server=SERVER6):
        data = bytearray(frame.data)
        # A hop-by-hop header of 8 bytes: padding.
        data[54:54] = bytes([6, 0, 1, 4, 0, 0, 0, 0])
        data[20] = 0
        data[18:20] = (int.from_bytes(data[18:20], "big") + 8).to_bytes(2, "big")
        frames.append(frame._replace(data=bytes(data), length=len(data)))
    assert summary(decoded(frames).events) == summary(WHOLE.events)


def test_what_is_no_tcp_is_counted() -> None:
    udp = bytearray(connection_frames(TURNS)[0].data)
    udp[23] = 17
    fragment = bytearray(connection_frames(TURNS)[0].data)
    fragment[20] = 0x20
    arp = bytes(12) + b"\x08\x06" + bytes(28)
    connections = Connections(Seen())
    connections.run(Frame(0.0, 1, bytes(d), len(d)) for d in (udp, fragment, arp, arp[:20], b"x"))
    others = connections.packets.others
    assert others["not TCP"] == 1
    assert others["not IP"] == 2
    assert sum("fragments" in kind for kind in others) == 1
    assert sum(others.values()) == 5


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=120), st.sampled_from([1, 0, 108, 101, 113, 276, 9999]))
def test_any_bytes_may_be_a_packet(data: bytes, link: int) -> None:
    Connections(Seen()).run([Frame(0.0, link, data, len(data))])


# -- streams ----------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from([700, 1448, 9000, 65000]))
def test_order_and_doubles_do_not_matter(chance: random.Random, mss: int) -> None:
    """Packets that arrive up to 12 places late, and some of them twice or with more in front."""
    frames = connection_frames(TURNS, mss=mss)
    doubled = [f for f in frames for _ in range(1 + (chance.random() < 0.2))]
    places = sorted(range(len(doubled)), key=lambda i: i + chance.random() * 12)
    # The first packet stays: without a SYN it would be another case.
    places.remove(0)
    seen = decoded([doubled[0], *(doubled[i] for i in places)])
    by_side = [[e for e in s if e.side is side] for s in (seen.messages, WHOLE.messages)
               for side in Side]  # fmt: skip
    assert summary(by_side[0]) == summary(by_side[2])
    assert summary(by_side[1]) == summary(by_side[3])
    assert len(seen.events) == len(WHOLE.events)
    [connection] = seen.closed_connections
    assert not any("missing" in note for note in connection.notes)


def segment(seq: int, data: bytes, length: int | None = None, time: float = 0.0) -> Segment:
    ends = (b"aaaa", 1), (b"bbbb", 2)
    size = len(data) if length is None else length
    return Segment(*ends, seq & 0xFFFFFFFF, 0, 16, memoryview(data), size, time)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_overlaps_give_the_same_bytes(data: st.DataObject) -> None:
    """Any ranges of a stream, also around the end of sequence numbers, that cover it in the end."""
    content = bytes(range(200))
    first = data.draw(st.sampled_from([0, 1000, (1 << 32) - 100, (1 << 32) - 1]))
    ranges = data.draw(
        st.lists(st.tuples(st.integers(0, 199), st.integers(1, 60)), min_size=1, max_size=30)
    )
    got = bytearray()
    lost: list[int] = []
    stream = CapturedStream(lambda d, _: got.extend(d), lambda n, _: lost.append(n))
    stream.begin(first)
    for start, size in ranges:
        stream.segment(segment(first + start, content[start : start + size]))
        assert got == content[: len(got)]
    for start in range(0, 200, 50):
        stream.segment(segment(first + start, content[start : start + 50]))
    assert got == content
    assert not lost


def test_a_hole_is_given_up_when_it_was_acknowledged() -> None:
    got: list[bytes] = []
    lost: list[int] = []
    stream = CapturedStream(lambda d, _: got.append(bytes(d)), lambda n, _: lost.append(n))
    stream.begin(100)
    stream.segment(segment(100, b"one"))
    stream.segment(segment(110, b"two"))
    assert got == [b"one"]
    stream.acknowledged(113, 0.1)
    assert got == [b"one"]
    # Others of the connection go by, and it doesn't come.
    for _ in range(100):
        stream.acknowledged(113, 0.2)
    assert got == [b"one", b"two"]
    assert lost == [7]
    assert stream.counts.lost_bytes == 7
    stream.segment(segment(103, b"_late__"))
    assert got == [b"one", b"two"]


def test_a_hole_without_end_is_given_up_before_memory_is() -> None:
    lost: list[int] = []
    stream = CapturedStream(lambda d, _: None, lambda n, _: lost.append(n))
    stream.begin(0)
    block = bytes(60_000)
    for i in range(200):
        stream.segment(segment(1000 + i * len(block), block))
    assert lost == [1000]


# -- damaged captures -------------------------------------------------------------------------


def lost_share(frames: list[Frame], every: int) -> list[Frame]:
    return [f for i, f in enumerate(frames) if i % every or i < 4]


@pytest.mark.parametrize("mss", [1448, 300])
def test_lost_packets(mss: int) -> None:
    turns = [*full_session(NEWEST, 20_000, 15_000), *session(NEWEST, 20_000, 15_000)]
    frames = connection_frames(turns, mss=mss)
    seen = decoded(lost_share(frames, 17))
    [connection] = seen.closed_connections
    assert any("bytes missing" in note for note in connection.notes)
    assert not [e for e in seen.events if isinstance(e, Failure)]
    # Uploads and answers with holes are counted, and most of the rest is read.
    assert any(m.missing for m in seen.messages)
    # Answers are found by their size where requests are missing: they are answers, if to others.
    whole = {
        (m.kind, m.side is Side.CLIENT and m.command, m.head) for m in decoded(frames).messages
    }
    sound = [m for m in seen.messages if not m.missing]
    assert len(sound) > len(turns) * 0.4
    for message in sound:
        command = message.side is Side.CLIENT and message.command
        assert (message.kind, command, message.head) in whole


@pytest.mark.parametrize("snaplen", [96, 400, 1000])
def test_a_capture_with_a_snaplen(snaplen: int) -> None:
    frames = connection_frames(TURNS)
    seen = decoded([cut(f, snaplen) for f in frames])
    [connection] = seen.closed_connections
    assert any("cut short" in note for note in connection.notes)
    assert not [e for e in seen.events if isinstance(e, Failure)]
    requests = [m for m in seen.messages if m.kind is MessageKind.REQUEST]
    assert len(requests) > 5
    for message in seen.messages:
        if message.kind is MessageKind.ANSWER and message.size < snaplen - 60:
            assert message.missing == 0


@pytest.mark.parametrize("options", [ReadOptions(), ReadOptions(ports=frozenset({50052}))])
@pytest.mark.parametrize("first", [3, 10, 20])
def test_a_capture_that_starts_late(options: ReadOptions, first: int) -> None:
    turns = [*full_session(NEWEST, 5000, 5000), *session(NEWEST, 5000, 5000)]
    frames = connection_frames(turns)[first:]
    seen = decoded(frames, options)
    assert len(seen.connections) == 1
    assert seen.connections[0].joined
    assert seen.connections[0].client == "10.0.0.2:40000"
    dialect = seen.connections[0].conversation.dialect
    assert dialect is not None
    assert dialect.hello_size == 24
    assert not [e for e in seen.events if isinstance(e, Failure)]
    assert len(seen.messages) > len(turns) * 0.4
    assert all(isinstance(e, ObservedMessage | SkippedBytes) for e in seen.events)


def test_packets_before_the_syn() -> None:
    """The first packets in any order: what is seen first is not taken for the start."""
    frames = connection_frames(TURNS)
    for first in ([3, 0, 1, 2, 4], [5, 4, 3, 2, 1, 0], [4, 6, 0, 5, 1, 3, 2]):
        seen = decoded([*(frames[i] for i in first), *frames[len(first) :]])
        assert len(seen.connections) == 1
        assert not seen.connections[0].joined
        assert summary(seen.events) == summary(WHOLE.events)
    # Without a SYN at all, the earliest of the first ones.
    order = [4, 3, 5, 7, 6, 8]
    seen = decoded([*(frames[i] for i in order), *frames[len(order) + 3 :]])
    assert seen.connections[0].joined
    for side in Side:
        found, expected = ([e for e in s.messages if e.side is side] for s in (seen, WHOLE))
        assert summary(found) == summary(expected)


def test_other_connections_are_left_alone() -> None:
    web = [(Side.CLIENT, b"GET / HTTP/1.1\r\n\r\n"), (Side.SERVER, b"HTTP/1.1 200 OK\r\n\r\n")]
    client = Address("10.0.0.2", 41000)
    other = connection_frames(web, client=client, server=Address("10.0.0.1", 80), start=1000.00001)
    both = sorted([*connection_frames(TURNS), *other])
    seen = Seen()
    connections = Connections(seen)
    connections.run(both)
    assert (connections.count, connections.found) == (2, 1)
    assert summary(seen.events) == summary(WHOLE.events)


def test_a_port_that_is_told_is_believed() -> None:
    frames = connection_frames([(Side.CLIENT, b"GET / HTTP/1.1\r\n\r\n")])
    seen = decoded(frames, ReadOptions(ports=frozenset({50052})))
    [failure] = [e for e in seen.events if isinstance(e, Failure)]
    assert "instead of HELLO" in failure.text
    assert not decoded(frames, ReadOptions(ports=frozenset({1}))).connections


def test_ports_that_are_used_again() -> None:
    """Two connections one after the other from the same port, the first one's end not captured."""
    first = connection_frames(TURNS[:4], ended=False)
    second = [
        f._replace(data=_renumbered(f.data), time=f.time + 1) for f in connection_frames(TURNS)
    ]
    seen = decoded([*first, *second])
    assert len(seen.closed_connections) == 2
    assert [c.complete for c in seen.closed_connections] == [False, True]
    assert len(seen.messages) == 4 + len(TURNS)


def _renumbered(data: bytes) -> bytes:
    """With sequence numbers of another connection."""
    changed = bytearray(data)
    for at in (38, 42):
        number = int.from_bytes(changed[at : at + 4], "big") + 0xF0000000 & 0xFFFFFFFF
        changed[at : at + 4] = number.to_bytes(4, "big")
    return bytes(changed)


def _captured(frames: Sequence[Frame]) -> bytes:
    file = io.BytesIO()
    writer = CaptureWriter(file)
    for frame in frames:
        writer.write(frame)
    return file.getvalue()


@pytest.mark.parametrize("kind", [SECTION, INTERFACE, PACKET, SIMPLE_PACKET])
def test_blocks_too_short_for_what_they_are(kind: int) -> None:
    start = section() + interface(1)
    for size in (12, 16, 20, 24, 28):
        block = struct.pack("<II", kind, size) + bytes(size - 12) + struct.pack("<I", size)
        with contextlib.suppress(CaptureError):
            list(Capture(io.BytesIO(start + block)))


def test_compressed_files_that_are_cut_or_damaged(seed: int) -> None:
    """Cut, one is read as far as it goes; damaged, it is refused in words."""
    frames = connection_frames(TURNS)
    whole = gzip.compress(_captured(frames), mtime=0)
    rng = random.Random(seed)
    most = 0
    for size in sorted(rng.sample(range(3, len(whole)), 40)):
        try:
            capture = Capture(io.BufferedReader(io.BytesIO(whole[:size])))
            read = list(capture)
        except CaptureError:
            # Not even the file's header is there.
            continue
        assert capture.truncated
        assert [f.data for f in read] == [f.data for f in frames[: len(read)]]
        most = max(most, len(read))
    assert most > 0
    for _ in range(60):
        content = bytearray(whole)
        content[rng.randrange(10, len(content))] ^= 1 << rng.randrange(8)
        with contextlib.suppress(CaptureError):
            list(Capture(io.BufferedReader(io.BytesIO(bytes(content)))))
