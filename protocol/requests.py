"""Requests: the writer, and the server's reader: bytes of one connection in, requests out.

The framing is the same in all versions, ``cmd u8 | size u64 | payload``; what a payload is, the
dialect says. The reader never copies a large payload: it tells the transport where the next bytes
belong. Small heads go through a receive buffer; the bytes of a SET_TENSOR go to the place that the
owner names when the head has been read; a graph goes into a buffer of exactly its size.

Use::

    view = reader.receive_buffer()      # the transport fills it
    reader.received(n)
    while (event := reader.next_event()) is not None: ...

Events come one at a time so that the owner may stop between two of them while it works on the
first; what has arrived meanwhile stays staged.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from protocol.codec import Message, codec
from protocol.commands import Command
from protocol.dialects import DIALECTS, Body, CommandSpec, Dialect
from protocol.errors import ProtocolError, TooLargeError
from protocol.names import size_by_frame, size_by_graph, size_by_upload, upload_head_size
from protocol.receive_buffer import ReceiveBuffer

FRAME = struct.Struct("<BQ")
# A graph has as much memory as has come of it, times _GROWTH: announcing a large one takes nothing.
_FIRST_PIECE = 1 << 20
_GROWTH = 4


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that a client may announce, in bytes.

    Uploads are bounded by the buffer they go to.
    """

    graph_bytes: int = 256 << 20


@dataclass(slots=True)
class Hello:
    """The first message of a connection; ``caps`` are empty up to protocol 3."""

    caps: bytes


@dataclass(slots=True)
class Request:
    """A whole request: parsed head, and the graph's bytes if it carries one."""

    command: Command
    fields: Any
    graph: bytearray | None = None


@dataclass(slots=True)
class UploadStart:
    """The head of a SET_TENSOR; ``size`` bytes follow, call :meth:`RequestReader.direct` next."""

    fields: Any
    size: int


@dataclass(slots=True)
class UploadChunk:
    """The place that was given is full and more is to come: :meth:`RequestReader.direct` it."""


@dataclass(slots=True)
class UploadEnd:
    """All bytes of the upload are in place."""


Event = Hello | Request | UploadStart | UploadChunk | UploadEnd


def encode_frame(command: int, size: int) -> bytes:
    """Return what a request begins with: the command's number, and the bytes that follow."""
    return FRAME.pack(command, size)


def encode_request(
    command: Command, spec: CommandSpec, fields: Mapping[str, Any] | Message, body_size: int = 0
) -> bytes:
    """Return a request up to the ``body_size`` bytes of data or of a graph that follow it.

    ``spec`` is how the connection's dialect has the command. Raises KeyError for a missing field.
    """
    head = codec(spec.request).build(fields)
    return encode_frame(command, len(head) + body_size) + head


class RequestReader:
    """Reads the requests of one connection; the owner sets ``dialect`` when HELLO is answered.

    Until a request tells how long the names of tensors are, that is open; then ``dialect`` is the
    one with such names, and the connection is held to it.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.dialect: Dialect | None = None
        # Whether a request has told the size of names; whether one was read without knowing it.
        self._names_known = False
        self._names_assumed = False
        self._limits = limits or Limits()
        self._received = ReceiveBuffer()
        self._frame: tuple[Command, CommandSpec, int] | None = None
        self._graph: tuple[Command, Any, bytearray] | None = None
        self._graph_size = 0
        self._awaiting_direct = 0
        self._direct_given = True

    @property
    def full(self) -> bool:
        """Return whether nothing can be received before events are taken."""
        return self._received.full

    @property
    def at_boundary(self) -> bool:
        """Return whether all that came was whole messages: the stream may end there."""
        return not self._received and self._frame is None and not self._received.in_body

    @property
    def within(self) -> str:
        """Return what the reader is in the middle of, for messages."""
        if self._frame is not None:
            return self._frame[0].name
        return "a message" if self._received else "nothing"

    @property
    def held(self) -> int:
        """Bytes of the message that is being received into memory of the reader's own."""
        return len(self._graph[2]) if self._graph is not None else 0

    def receive_buffer(self) -> memoryview:
        """Return where the next bytes of the stream belong; not empty unless :attr:`full`."""
        return self._received.receive_buffer()

    def received(self, n: int) -> None:
        """Take the ``n`` bytes that were written to the start of :meth:`receive_buffer`."""
        self._received.received(n)

    def direct(self, destination: memoryview) -> None:
        """Name the place of the announced upload's next bytes, of all that are left or of some."""
        left = self._awaiting_direct
        if self._direct_given or len(destination) > left or (left and not len(destination)):
            raise ValueError("no upload of this size is waiting for its place")
        self._direct_given = True
        self._awaiting_direct = left - len(destination)
        self._received.begin(destination)

    def take_received(self) -> bytes:
        """Return what was received behind the last event, taken out of the stream."""
        return self._received.take(len(self._received))

    def put_back(self, data: bytes) -> None:
        """Return to the stream what :meth:`take_received` took; nothing was received since."""
        self.receive_buffer()[: len(data)] = data
        self.received(len(data))

    def abandon(self) -> None:
        """Let go of the place of an upload that will not be finished: the stream has ended."""
        self._received.abandon()

    def next_event(self) -> Event | None:
        """Return the next event, None if more bytes are needed. Raises ProtocolError."""
        if not self._direct_given:
            raise ValueError("the last upload has no place yet")
        if self._received.in_body:
            return self._continue_body()
        if self._frame is None and not self._read_frame():
            return None
        assert self._frame is not None
        if not self._names_known and self._frame[1].body is Body.DATA and not self._look_ahead():
            return None
        command, spec, size = self._frame
        head = codec(spec.request)
        if len(self._received) < head.size:
            return None
        if command is Command.HELLO:
            return self._hello(size)
        fields = self._received.parse(head)
        if spec.body is Body.DATA:
            self._awaiting_direct = size - head.size
            self._direct_given = False
            return UploadStart(fields, size - head.size)
        if spec.body is Body.GRAPH:
            self._graph_size = size - head.size
            graph = bytearray(min(self._graph_size, _FIRST_PIECE))
            self._graph = (command, fields, graph)
            self._received.begin(memoryview(graph))
            return self._continue_body()
        self._frame = None
        return Request(command, fields)

    def _read_frame(self) -> bool:
        if len(self._received) < FRAME.size:
            return False
        number, size = self._received.unpack(FRAME)
        if self.dialect is None:
            self._frame = (*first_frame(number, size), size)
        else:
            if not self._names_known:
                self._settle_names(size_by_frame(self.dialect, number, size))
            self._frame = (*check_frame(self.dialect, number, size, self._limits), size)
        return True

    def _look_ahead(self) -> bool:
        """Settle the size of names by the upload that comes next; False if more is needed."""
        assert self._frame is not None
        assert self.dialect is not None
        command, _, size = self._frame
        needed = upload_head_size(self.dialect, size)
        if len(self._received) < needed:
            return False
        name_size = size_by_upload(self.dialect, size, self._received.peek(needed))
        self._settle_names(name_size)
        self._names_assumed |= name_size is None
        self._frame = (command, self.dialect.commands[command], size)
        return True

    def _settle_names(self, size: int | None) -> None:
        if size is None or self.dialect is None:
            return
        self._names_known = True
        if size == self.dialect.name_size:
            return
        if self._names_assumed:
            raise ProtocolError(
                f"names of {size} bytes, after uploads that were read with names of "
                f"{self.dialect.name_size}: they could have been either"
            )
        self.dialect = self.dialect.with_names(size)

    def _hello(self, size: int) -> Hello:
        caps = self._received.take(size)
        self._frame = None
        return Hello(caps)

    def _continue_body(self) -> Event | None:
        while True:
            if not self._received.fill():
                return None
            if self._graph is None or len(self._graph[2]) == self._graph_size:
                break
            command, fields, graph = self._graph
            have = len(graph)
            larger = bytearray(min(self._graph_size, _GROWTH * have))
            larger[:have] = graph
            self._graph = (command, fields, larger)
            self._received.begin(memoryview(larger)[have:])
        if self._graph is None and self._awaiting_direct:
            self._direct_given = False
            return UploadChunk()
        self._frame = None
        if self._graph is None:
            return UploadEnd()
        if not self._names_known and self._graph[0] is Command.GRAPH_COMPUTE:
            assert self.dialect is not None
            self._settle_names(size_by_graph(self.dialect, self._graph[2]))
        request = Request(*self._graph)
        self._graph = None
        return request


_COMMANDS = {int(command): command for command in Command}
_HELLO_SPECS = {d.hello_size: d.commands[Command.HELLO] for d in DIALECTS}


def first_frame(number: int, size: int) -> tuple[Command, CommandSpec]:
    """Return HELLO by the frame of a connection's first request; ProtocolError if it is none.

    Whichever version it is, the size tells what HELLO looks like.
    """
    if number != Command.HELLO:
        raise ProtocolError(
            f"command {number} of {size} bytes instead of HELLO: not ggml RPC, or a client "
            "from before protocol 1.0"
        )
    if size not in _HELLO_SPECS:
        raise ProtocolError(
            f"HELLO of {size} bytes: a dialect that llama.cpp does not speak "
            "(ik_llama.cpp or llama-box?)"
        )
    return Command.HELLO, _HELLO_SPECS[size]


def check_frame(
    dialect: Dialect, number: int, size: int, limits: Limits
) -> tuple[Command, CommandSpec]:
    """Return the command of a later request by its frame.

    Raises ProtocolError if no client sends such a one.
    """
    command = _COMMANDS.get(number)
    if command is None:
        raise ProtocolError(f"unknown command {number} with {size} bytes")
    spec = dialect.commands.get(command)
    if spec is None or command is Command.HELLO:
        raise ProtocolError(
            "a second HELLO"
            if command is Command.HELLO
            else f"{command.name} is no command of protocol {dialect.name}"
        )
    head = codec(spec.request).size
    if spec.body is Body.NONE and size != head:
        raise ProtocolError(f"{command.name} of {size} bytes, it takes {head}")
    if size < head:
        raise ProtocolError(f"{command.name} of {size} bytes, it takes {head} and more")
    if spec.body is Body.GRAPH and size - head > limits.graph_bytes:
        raise TooLargeError(f"{command.name} of {size} bytes, the limit is {limits.graph_bytes}")
    return command, spec
