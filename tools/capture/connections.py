"""The ggml RPC connections of a capture, decoded.

Which connections those are is told by the server's port, if ports are given; otherwise by content.
A connection seen from its start begins with HELLO; one that was joined in its middle is looked into
until requests are found on one of its sides, or so much went by that it is something else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from protocol.dialects import Dialect
from protocol.errors import ProtocolError
from protocol.observe.conversation import Conversation, Event, ObservedMessage, Side
from protocol.observe.resync import guess_dialect
from protocol.requests import FRAME, first_frame
from tools.capture.files import Frame
from tools.capture.packets import ACK, SYN, PacketReader, Segment, address_text
from tools.capture.streams import Assembly, CapturedStream, SegmentCounts

Address = tuple[bytes, int]

# How much of a connection whose start wasn't captured is looked into for requests.
_LOOK_INTO = 1 << 20
# Connections that ended or are of others are remembered up to so many.
_MOST_FLOWS = 1 << 13


@dataclass(slots=True)
class CapturedConnection:
    """A connection that is, or is taken for, ggml RPC. ``number`` counts them from 1.

    ``joined``: its start wasn't captured. ``counts`` are of the client's and the server's stream.
    """

    number: int
    client_address: Address
    server_address: Address
    joined: bool
    conversation: Conversation
    started: float
    counts: dict[Side, SegmentCounts] = field(default_factory=dict)
    ended: float | None = None
    # Whether its end was captured: closed or reset.
    complete: bool = False

    @property
    def client(self) -> str:
        return address_text(self.client_address)

    @property
    def server(self) -> str:
        return address_text(self.server_address)

    @property
    def notes(self) -> list[str]:
        """The bytes that weren't captured as they were on the wire, in words."""
        return [
            f"{text} from the {side.value}"
            for side, counts in self.counts.items()
            for text in counts.texts()
        ]


class Listener(Protocol):
    """The receiver of connections, in the order of the capture."""

    def opened(self, connection: CapturedConnection) -> None: ...
    def event(self, connection: CapturedConnection, event: Event) -> None: ...
    def closed(self, connection: CapturedConnection) -> None: ...


class FrameListener(Protocol):
    """Takes the frames of connections, those before it was clear what they are included."""

    def frame(self, connection: CapturedConnection, frame: Frame) -> None: ...


# Takes bytes of a message's data: where in it they belong, and the bytes, which are only lent.
ConnectionSink = Callable[
    [CapturedConnection, ObservedMessage, int, "bytes | bytearray | memoryview"], None
]


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """``ports`` of servers, none for finding them by content; the others as of Conversation."""

    ports: frozenset[int] = frozenset()
    dialect: Dialect | None = None
    keep: int = 64 << 10
    sink: ConnectionSink | None = None


def is_hello(data: bytes | bytearray) -> bool:
    """Return whether a connection that begins so is ggml RPC's."""
    try:
        first_frame(*FRAME.unpack_from(data))
    except ProtocolError:
        return False
    return True


class _Flow:
    """One TCP connection; ``first`` is the side that was seen first."""

    def __init__(self, owner: Connections, first: Address, second: Address, started: float) -> None:
        self.owner = owner
        self.addresses = first, second
        self.started = started
        # Which of the two is the client, by a SYN or its port; None if that isn't known.
        self.client: int | None = None
        # Whether a SYN was seen.
        self.from_start = False
        self.port_told = False
        self.ignored = False
        self.connection: CapturedConnection | None = None
        self.frames: list[Frame] = []
        self.time = started
        self._early: list[tuple[int, bytes | int, float]] = []
        self._seen = [bytearray(), bytearray()]
        self._look_at = FRAME.size
        self.assembly = Assembly(
            first,
            (
                CapturedStream(lambda data, time: self._data(0, data, time),
                       lambda size, time: self._lost(0, size, time)),
                CapturedStream(lambda data, time: self._data(1, data, time),
                       lambda size, time: self._lost(1, size, time)),
            ),
        )  # fmt: skip

    # -- before it is clear what it is ----------------------------------------------------------

    def _data(self, index: int, data: memoryview, time: float) -> None:
        self._early.append((index, bytes(data), time))
        self._seen[index] += data
        if self.port_told or len(self._seen[index]) >= self._look_at:
            self._look(index)

    def _lost(self, index: int, size: int, time: float) -> None:
        self._early.append((index, size, time))

    def _look(self, index: int) -> None:
        """Look whether one of the sides has sent what a client sends."""
        seen = self._seen[index]
        if self.port_told and self.client is not None:
            # Whatever it is.
            self._identified(self.client)
            return
        if is_hello(seen) and self.client in (None, index):
            self._identified(index)
            return
        if self.client is not None:
            if self.client == index:
                self._ignore()
            return
        if guess_dialect(seen) is not None:
            self._identified(index)
            return
        self._look_at = 2 * len(seen)
        if sum(map(len, self._seen)) > _LOOK_INTO:
            self._ignore()

    def _ignore(self) -> None:
        self.ignored = True
        self._early, self._seen, self.frames = [], [bytearray(), bytearray()], []

    # -- ggml RPC -------------------------------------------------------------------------------

    def saw_start(self, client: Address) -> None:
        """A SYN was seen that makes this side the client."""
        self.from_start = True
        self.client = self.addresses.index(client)
        self.assembly.expect_start()

    def expect_server(self, ports: Collection[int]) -> None:
        """A side with one of these ports is the server, and the connection is ggml RPC."""
        self.port_told = True
        if self.client is None:
            # Either side may have the port by chance as its own.
            self.client = 0 if self.addresses[1][1] in ports else 1

    def _identified(self, client: int) -> None:
        """It is ggml RPC, and this side is the client."""
        owner, options = self.owner, self.owner.options
        joined = not self.from_start
        conversation = Conversation(
            options.dialect if joined else None,
            joined=joined,
            keep=options.keep,
            sink=self._sink if options.sink is not None else None,
        )
        connection = owner.new_connection(self, client, joined, conversation)
        self.connection = connection
        for index, stream in enumerate(self.assembly.streams):
            side = Side.CLIENT if index == client else Side.SERVER
            connection.counts[side] = stream.counts
            self._connect(stream, side, connection)
        owner.listener.opened(connection)
        if owner.frames is not None:
            for frame in self.frames:
                owner.frames.frame(connection, frame)
        self.frames = []
        early, self._early, self._seen = self._early, [], [bytearray(), bytearray()]
        for index, content, time in early:
            stream = self.assembly.streams[index]
            if isinstance(content, int):
                stream.lose(content, time)
            else:
                stream.deliver(memoryview(content), time)

    def _sink(
        self, message: ObservedMessage, at: int, data: bytes | bytearray | memoryview
    ) -> None:
        sink = self.owner.options.sink
        assert sink is not None
        assert self.connection is not None
        sink(self.connection, message, at, data)

    def _connect(self, stream: CapturedStream, side: Side, connection: CapturedConnection) -> None:
        conversation, listener = connection.conversation, self.owner.listener
        feed, event = conversation.feed, listener.event

        def deliver(data: memoryview, time: float) -> None:
            for found in feed(side, data, time):
                event(connection, found)

        def lose(size: int, time: float) -> None:
            for found in conversation.gap(side, size, time):
                event(connection, found)

        stream.deliver, stream.lose = deliver, lose

    def close(self, complete: bool) -> None:
        """Nothing more is read; what comes late is ignored."""
        if self.ignored:
            return
        self.assembly.flush(self.time)
        connection = self.connection
        self._ignore()
        if connection is None:
            return
        for event in connection.conversation.close():
            self.owner.listener.event(connection, event)
        connection.ended = self.time
        connection.complete = complete
        self.owner.listener.closed(connection)


class Connections:
    """Give it frames; ``listener`` is told of the ggml RPC in them."""

    def __init__(
        self,
        listener: Listener,
        options: ReadOptions | None = None,
        frames: FrameListener | None = None,
    ) -> None:
        self.listener = listener
        self.options = options or ReadOptions()
        self.frames = frames
        self.packets = PacketReader()
        # Connections of TCP, and those of them that are ggml RPC.
        self.count = 0
        self.found = 0
        self._flows: dict[tuple[Address, Address], _Flow] = {}

    def frame(self, frame: Frame) -> None:
        """Take the next frame of the capture."""
        segment = self.packets.segment(frame)
        if segment is None:
            return
        flow = self._flows.get((segment.source, segment.destination))
        if flow is None or segment.flags & SYN:
            flow = self._opening(segment, flow)
            if flow is None:
                return
        if flow.ignored:
            if self.frames is not None and flow.connection is not None:
                # What acknowledges the end.
                self.frames.frame(flow.connection, frame)
            return
        flow.time = segment.time
        if self.frames is not None:
            if flow.connection is not None:
                self.frames.frame(flow.connection, frame)
            else:
                flow.frames.append(frame)
        assembly = flow.assembly
        assembly.segment(segment)
        if assembly.ended:
            flow.close(complete=True)

    def close(self) -> None:
        """Finish what is open: the capture has ended."""
        flows = dict.fromkeys(self._flows.values())
        self._flows.clear()
        for flow in flows:
            flow.close(complete=False)

    def run(self, frames: Iterable[Frame]) -> None:
        """Take all frames, to the end."""
        for frame in frames:
            self.frame(frame)
        self.close()

    def new_connection(
        self, flow: _Flow, client: int, joined: bool, conversation: Conversation
    ) -> CapturedConnection:
        self.found += 1
        return CapturedConnection(
            self.found,
            flow.addresses[client],
            flow.addresses[1 - client],
            joined,
            conversation,
            flow.started,
        )

    def _opening(self, segment: Segment, flow: _Flow | None) -> _Flow | None:
        """The flow of a SYN, or of the first segment that is seen of a connection."""
        ports = self.options.ports
        syn = segment.flags & SYN
        ends = segment.source[1], segment.destination[1]
        if ports and not ports.intersection(ends):
            return None
        if not syn and not segment.length:
            return None
        client = segment.destination if segment.flags & ACK else segment.source
        if syn and flow is not None:
            if not flow.assembly.restarts(segment):
                flow.saw_start(client)
                return flow
            # The same ports again.
            flow.close(complete=False)
        first, second = segment.source, segment.destination
        flow = _Flow(self, first, second, segment.time)
        self.count += 1
        if len(self._flows) >= 2 * _MOST_FLOWS:
            self._drop_ignored()
        self._flows[first, second] = self._flows[second, first] = flow
        if syn:
            flow.saw_start(client)
        if ports:
            flow.expect_server(ports)
        return flow

    def _drop_ignored(self) -> None:
        self._flows = {key: flow for key, flow in self._flows.items() if not flow.ignored}
