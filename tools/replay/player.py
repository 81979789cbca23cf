"""Plays a capture to a server: the same requests in the same order, on as many connections."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import Answer, Version
from protocol.ggml.types import GgmlType
from protocol.negotiation import retry_pause
from protocol.observe.annotate import describe, text_of
from protocol.observe.conversation import dialect_of_version
from protocol.observe.events import (
    Event,
    Failure,
    MessageKind,
    ObservedMessage,
    Side,
    SkippedBytes,
)
from protocol.requests import FRAME
from protocol.split import ProgramPayload, caps_version
from tools.capture.connections import CapturedConnection, Connections, ReadOptions
from tools.capture.files import read_capture
from tools.replay.compare import Comparison, Pieces, compare
from tools.replay.errors import ReplayError
from tools.replay.links import Groups
from tools.replay.live import Live, ServerGoneError
from tools.replay.rewrite import Rewriter

# All data are needed to send them.
_KEEP = 1 << 62


@dataclass(slots=True)
class Timing:
    """The time that answers to one command took, seconds in all."""

    answers: int = 0
    recorded: float = 0.0
    live: float = 0.0


@dataclass(slots=True)
class ReplayResult:
    """The result of a replay.

    ``differences`` are texts for people, in the order of the recording.
    """

    connections: int = 0
    requests: int = 0
    answers: int = 0
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    timings: dict[Command, Timing] = field(default_factory=dict)
    worst_nmse: float = 0.0
    seconds: float = 0.0


@dataclass(slots=True)
class _Played:
    """One recorded connection and the live one for it."""

    connection: CapturedConnection
    live: Live
    rewriter: Rewriter = field(default_factory=Rewriter)
    hello: ObservedMessage | None = None
    # When requests were sent, by their numbers; of unframed bytes when the last before them were.
    sent: dict[int, float] = field(default_factory=dict)
    programs: dict[tuple[int, int], ProgramPayload] = field(default_factory=dict)
    gone: bool = False
    # Members of its group that nobody plays.
    missing: list[str] = field(default_factory=list)
    # Of a link: whose bytes are sent, as which member (None: as was recorded), and what came back.
    ours: Side = Side.CLIENT
    member: int | None = None
    pieces: Pieces = field(default_factory=Pieces)


class Player:
    """Plays to the server at ``host`` and ``port``.

    F32 data may differ by an NMSE of ``tolerance``; ``timeout`` (seconds) is for an answer. Of
    several servers that add up among themselves ``recorded`` is the address of the one to play.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        tolerance: float = 0.0,
        timeout: float = 60.0,
        recorded: str = "",
    ) -> None:
        self.host, self.port = host, port
        self.tolerance, self.timeout = tolerance, timeout
        self.recorded = recorded
        self.result = ReplayResult()
        self._played: dict[int, _Played] = {}
        self._groups = Groups()
        # The recorded server that is played, '' for all; and links by their connections.
        self._server = ""
        self._roles: dict[int, int] = {}
        self._left_out: set[int] = set()
        # Types of the tensors that are swapped.
        self._swapped: set[int] = set()

    async def play(self, path: Path) -> ReplayResult:
        """Play all of the capture in ``path``.

        Raises ReplayError, CaptureError for a file that can't be read, OSError and TimeoutError
        where there is no connection to the server.
        """
        started = time.perf_counter()
        groups = self._groups = Groups.of(path)
        server = self._server = groups.server(self.recorded)
        roles = {link.connection: groups.role(link, server) for link in groups.links}
        self._roles = {number: role for number, role in roles.items() if role is not None}
        try:
            async for connection, event in _events(path):
                if event is None:
                    await self._close(connection)
                elif self._is_anothers(connection):
                    self._left_out.add(connection.number)
                elif isinstance(event, ObservedMessage):
                    await self._message(connection, event)
                else:
                    self._unread(connection, event)
        finally:
            for played in list(self._played.values()):
                await played.live.close()
        if not self.result.connections:
            raise ReplayError(f"{path}: no ggml RPC in it")
        if self._left_out:
            self.result.notes.append(
                f"{len(self._left_out)} connections to other servers than {server}, not played"
            )
        self.result.seconds = time.perf_counter() - started
        return self.result

    # -- what was recorded --------------------------------------------------------------------

    def _is_anothers(self, connection: CapturedConnection) -> bool:
        """Return whether a connection isn't of the server that is played."""
        if not self._server or connection.server == self._server:
            return False
        return connection.number not in self._roles

    def _unread(self, connection: CapturedConnection, event: Failure | SkippedBytes) -> None:
        where = f"connection {connection.number}, {event.side.value}"
        if isinstance(event, SkippedBytes):
            raise ReplayError(f"{where}: {event.size} bytes were not recorded ({event.text})")
        self.result.notes.append(f"{where}: {event.text}")

    async def _close(self, connection: CapturedConnection) -> None:
        played = self._played.pop(connection.number, None)
        if played is not None:
            await played.live.close()

    async def _message(self, connection: CapturedConnection, message: ObservedMessage) -> None:
        if message.missing:
            # Only the end of a recording may lack something: what begins there isn't played.
            self.result.notes.append(
                f"connection {connection.number}: {describe(message)}, not played"
            )
            return
        played = self._played.get(connection.number)
        if played is None:
            if message.command is not Command.HELLO:
                raise ReplayError(f"connection {connection.number} was recorded without its HELLO")
            played = _Played(connection, await self._connect())
            if self._server and connection.server != self._server:
                # The server went to that member. Now it is the member who comes.
                played.ours, played.member = Side.SERVER, self._roles[connection.number]
            self._played[connection.number] = played
            self.result.connections += 1
        if played.gone:
            return
        try:
            if message.kind is MessageKind.SWAPS:
                await self._swap(played, message)
            elif message.kind is MessageKind.REQUEST or message.kind is MessageKind.INPUTS:
                await self._send(played, message)
            else:
                await self._answer(played, message)
        except ServerGoneError as error:
            self._gone(played, message, str(error))
        except TimeoutError:
            self._gone(played, message, f"it has not answered for {self.timeout:g} seconds")

    async def _connect(self) -> Live:
        return await Live.connect(self.host, self.port, self.timeout)

    async def _send(self, played: _Played, message: ObservedMessage) -> None:
        if message.kind is MessageKind.INPUTS:
            played.sent[message.number] = await played.live.send(bytes(message.body or b""))
            return
        self.result.requests += 1
        if message.command is Command.HELLO:
            played.hello = message
        data = played.rewriter.request(message)
        if message.command is Command.SPLIT_PROGRAM and isinstance(message.graph, ProgramPayload):
            self._programmed(played, message, message.graph)
        elif message.command is Command.SPLIT_PEERS:
            secret = bytes(message.fields.secret)
            played.missing = self._groups.missing(self._server, secret)
        elif message.command is Command.SPLIT_RUN:
            self._check_links(played, message)
        elif message.command is Command.SPLIT_JOIN and played.member is not None:
            head = codec(message.spec.request)
            fields = head.parse(data, FRAME.size)
            fields.number = played.member
            data = data[: FRAME.size] + head.build(fields)
        if message.spec.answer is Answer.FIXED:
            played.live.expect(codec(message.spec.response).size)
        elif message.spec.answer is Answer.DATA:
            played.live.expect(message.fields.size)
        played.sent[message.number] = await played.live.send(data)

    def _programmed(
        self, played: _Played, message: ObservedMessage, program: ProgramPayload
    ) -> None:
        """Take note of a program: what it gives, and what it swaps."""
        played.programs[message.fields.device, message.fields.program] = program
        ids, types = (program.tensors[name].tolist() for name in ("id", "type"))
        by_id = dict(zip(ids, types, strict=True))
        self._swapped |= {by_id.get(i, -1) for swap in program.swaps for i in swap.ids}

    def _check_links(self, played: _Played, message: ObservedMessage) -> None:
        """Raise ReplayError where a program has swaps with members that nobody plays."""
        program = played.programs.get((message.fields.device, message.fields.program))
        if program is not None and program.swaps and played.missing:
            raise ReplayError(
                f"request {message.number} of connection {played.connection.number} runs a program "
                f"whose sums are added up with others, and what {', '.join(played.missing)} and "
                f"{self._server} said to each other was not recorded"
            )

    async def _swap(self, played: _Played, message: ObservedMessage) -> None:
        """Send what another member has sent, or compare what the server sends to it."""
        recorded = bytes(message.body or b"")
        if message.side is played.ours:
            # The server reads it when it has come as far.
            await played.live.send(recorded, ahead=True)
            return
        played.live.expect(len(recorded), framed=False)
        data, _ = await played.live.answer(self.timeout)
        f32 = self._swapped == {GgmlType.F32}
        self._compared(played, message, played.pieces.add(recorded, data, f32, self.tolerance))

    # -- answers ------------------------------------------------------------------------------

    async def _answer(self, played: _Played, message: ObservedMessage) -> None:
        request = message.request
        assert request is not None
        if message.kind is MessageKind.OUTPUTS:
            played.live.expect(message.body_size, framed=False)
        data, came = await played.live.answer(self.timeout)
        if message.command is Command.HELLO:
            data = await self._agree(played, message, data)
        self._learn(played, message, data)
        program = None
        if message.kind is MessageKind.OUTPUTS:
            program = played.programs.get((request.fields.device, request.fields.program))
        self.result.answers += 1
        self._timed(played, message, came)
        if message.command is Command.SPLIT_PEERS and message.fields.result:
            # It was to reach others then, and is to reach nobody now.
            reason = text_of(bytes(message.fields.reason))
            self.result.notes.append(
                f"connection {played.connection.number}: {describe(request)}: not compared, as "
                f"there was no group ({reason})"
            )
            return
        self._compared(played, message, compare(message, data, self.tolerance, program))

    def _compared(self, played: _Played, message: ObservedMessage, comparison: Comparison) -> None:
        if comparison.nmse is not None:
            self.result.worst_nmse = max(self.result.worst_nmse, comparison.nmse)
        if not comparison.equal:
            self._differs(played, message, comparison.text)

    def _timed(self, played: _Played, message: ObservedMessage, came: float) -> None:
        latency = message.latency
        sent = played.sent.get(message.number)
        if latency is None or sent is None:
            return
        timing = self.result.timings.setdefault(message.command, Timing())
        timing.answers += 1
        timing.recorded += latency
        timing.live += came - sent

    def _learn(self, played: _Played, message: ObservedMessage, data: bytes) -> None:
        """Learn which buffer is meant by the recording's numbers."""
        if message.command in (Command.ALLOC_BUFFER, Command.SPLIT_ALLOC_BUFFER):
            live = codec(message.spec.response).parse(data)
            if message.fields.remote_ptr and live.remote_ptr:
                played.rewriter.allocated(message.fields.remote_ptr, live.remote_ptr)
        elif message.command is Command.BUFFER_GET_BASE:
            live = codec(message.spec.response).parse(data)
            assert message.request is not None
            handle = message.request.fields.remote_ptr
            played.rewriter.based(handle, message.fields.base_ptr, live.base_ptr)
        elif message.command is Command.GET_ALLOC_SIZE:
            wanted = codec(message.spec.response).parse(data).alloc_size
            recorded = message.fields.alloc_size
            if wanted > recorded and message.request is not None:
                # The client has laid out its buffers by the recorded answer.
                self.result.notes.append(
                    f"{describe(message.request)}: the server wants {wanted} bytes, "
                    f"the recording has room for {recorded}"
                )

    async def _agree(self, played: _Played, message: ObservedMessage, data: bytes) -> bytes:
        """Take the server's version, or connect again until it offers the recorded one."""
        assert played.hello is not None
        seen: list[Version] = []
        while True:
            version = _version(message, data)
            seen.append(version)
            if _same_commands(message, version):
                self._check_extension(message, data)
                return data
            # As a client does that is offered another version; the next offer may be another one.
            await played.live.close()
            pause = retry_pause(seen)
            if pause is None:
                break
            await asyncio.sleep(pause)
            played.live = await self._connect()
            played.live.expect(len(data))
            try:
                await played.live.send(played.rewriter.request(played.hello))
                data, _ = await played.live.answer(self.timeout)
            except (ServerGoneError, TimeoutError):
                break
        offered = ", ".join(".".join(map(str, v)) for v in dict.fromkeys(seen))
        raise ReplayError(
            f"the server speaks protocol {offered}, the recording is of {message.dialect.name}"
        )

    def _check_extension(self, message: ObservedMessage, data: bytes) -> None:
        assert message.request is not None
        recorded = caps_version(getattr(message.fields, "conn_caps", b""))
        asked = caps_version(getattr(message.request.fields, "conn_caps", b""))
        live = caps_version(getattr(codec(message.spec.response).parse(data), "conn_caps", b""))
        if asked and bool(live) != bool(recorded):
            have = "has" if live else "does not have"
            raise ReplayError(f"the server {have} the split extension, unlike the recorded one")

    # -- what is wrong ------------------------------------------------------------------------

    def _differs(self, played: _Played, message: ObservedMessage, text: str) -> None:
        request = message.request
        assert request is not None
        self.result.differences.append(
            f"connection {played.connection.number}, request {message.number}: "
            f"{describe(request if message.kind is MessageKind.ANSWER else message)}\n  {text}"
        )

    def _gone(self, played: _Played, message: ObservedMessage, why: str) -> None:
        played.gone = True
        request = message.request or message
        self.result.differences.append(
            f"connection {played.connection.number}, request {message.number}: "
            f"{describe(request)}\n  no answer from the server: {why}"
        )


def _version(message: ObservedMessage, data: bytes) -> Version:
    declaration = message.spec.response
    if len(data) != codec(declaration).size:
        raise ReplayError(f"the server answers HELLO with {len(data)} bytes")
    answer = codec(declaration).parse(data)
    return answer.major, answer.minor, answer.patch


def _same_commands(message: ObservedMessage, version: Version) -> bool:
    """Return whether the messages of a server of ``version`` look like those that were recorded."""
    hello = message.request
    assert hello is not None
    size = codec(hello.spec.request).size
    recorded = dialect_of_version(
        (message.fields.major, message.fields.minor, message.fields.patch), size
    )
    live = dialect_of_version(version, size)
    return live is not None and recorded is not None and live.commands is recorded.commands


class _Collector:
    """The events that the capture's reader tells, until it is asked for."""

    def __init__(self) -> None:
        self.events: list[tuple[CapturedConnection, Event | None]] = []

    def opened(self, connection: CapturedConnection) -> None:
        """Nothing to do before the first request."""

    def event(self, connection: CapturedConnection, event: Event) -> None:
        self.events.append((connection, event))

    def closed(self, connection: CapturedConnection) -> None:
        self.events.append((connection, None))

    def take(self) -> list[tuple[CapturedConnection, Event | None]]:
        events, self.events = self.events, []
        return events


async def _events(path: Path) -> AsyncIterator[tuple[CapturedConnection, Event | None]]:
    """Yield what happens on the connections of a capture, in its order; None for the end of one."""
    collector = _Collector()
    connections = Connections(collector, ReadOptions(keep=_KEEP))
    for frame in read_capture(path):
        connections.frame(frame)
        for item in collector.take():
            yield item
    connections.close()
    for item in collector.take():
        yield item
