"""The scripted server: listens, serves every connection by the script, and notes what it sees.

A *visit* is one run of a client, with however many connections. A thread serves each connection,
one request after the other, over a blocking socket.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from conformance.serve.faults import Fault, Hangup, send_answer
from conformance.serve.memory import Addresses, HashStore
from conformance.serve.rules import Notes
from conformance.serve.state import Properties, RequestRefused, ServedSession
from conformance.suite.transcript import KEPT, TranscriptMessage
from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import DIALECTS, Dialect, Version
from protocol.errors import ProtocolError
from protocol.messages import CONN_CAPS_SIZE
from protocol.requests import FRAME, Hello, Request, RequestReader, UploadEnd, UploadStart
from protocol.responses import encode_size

Bytes = bytes | bytearray | memoryview

# What a client may take to notice, and to end a connection that can't go on.
PATIENCE = 5.0
# What arrives so soon after a fault was sent before the client could know of it.
_IN_FLIGHT = 0.5
_LAST_MESSAGES = 12
_SLICE = 0.1


class Offered(NamedTuple):
    """A version to answer with, and the dialect that is spoken from there."""

    version: Version
    dialect: Dialect


@dataclass(frozen=True, slots=True)
class Script:
    """The behaviour of a server in one visit.

    ``offer`` chooses the answer to a HELLO of some size, None to hang up on it.
    """

    offer: Callable[[int], Offered | None]
    properties: Properties = field(default_factory=Properties)
    fault: Fault | None = None


@dataclass(slots=True)
class ConnectionRecord:
    """The record of one connection."""

    number: int
    hello_size: int | None = None
    offered: Version | None = None
    commands: list[tuple[str, int]] = field(default_factory=list)
    # The last messages of both sides, for the report.
    messages: deque[TranscriptMessage] = field(default_factory=lambda: deque(maxlen=_LAST_MESSAGES))
    # Whether a request came after HELLO was answered.
    went_on: bool = False
    # Whether the fault happened here, and how many bytes the client sent when it knew of it.
    faulted: bool = False
    bytes_after_fault: int = 0
    # Who ended it: "client", "server" or "" while it is open; "watch" gave up waiting for it.
    ended_by: str = ""
    refusal: str = ""
    seconds_to_end: float = 0.0

    def note(self, what: str) -> None:
        """Add to the list of what was sent; the same again is counted."""
        if self.commands and self.commands[-1][0] == what:
            self.commands[-1] = (what, self.commands[-1][1] + 1)
        else:
            self.commands.append((what, 1))

    def keep(self, sent: bool, command: Command, data: Bytes, size: int, seconds: float) -> None:
        """Keep a message for the report: its first bytes, of ``size``."""
        name = f"connection {self.number}"
        kept = bytes(data[:KEPT])
        self.messages.append(
            TranscriptMessage(name, sent, command.name, kept, size, seconds=seconds)
        )

    @property
    def story(self) -> str:
        """The messages that were sent, in one line."""
        parts = [what if n == 1 else f"{what} x{n}" for what, n in self.commands]
        return ", ".join(parts) or "nothing"


@dataclass(slots=True)
class Visit:
    """All that was seen of one run of a client."""

    notes: Notes = field(default_factory=Notes)
    connections: list[ConnectionRecord] = field(default_factory=list)
    requests: Counter[Command] = field(default_factory=Counter)
    fault_happened: bool = False

    @property
    def went_on(self) -> bool:
        """True if any connection was used after HELLO."""
        return any(record.went_on for record in self.connections)


class ScriptedServer:
    """Serves one visit by ``script`` on 127.0.0.1 (or ``host``); leaving the context ends it."""

    def __init__(
        self,
        script: Script,
        host: str = "127.0.0.1",
        port: int = 0,
        patience: float = PATIENCE,
        store: HashStore | None = None,
    ) -> None:
        self.script = script
        self.visit = Visit()
        self._patience = patience
        self._store = store or HashStore()
        self._addresses = Addresses(script.properties.alignment)
        self._asked: dict[Any, int] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._open = 0
        self._last_end = time.monotonic()
        self._listener = socket.create_server((host, port), backlog=64)
        self._listener.settimeout(_SLICE)
        self.port: int = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> Visit:
        """Stop listening, end what is open, and give what was seen."""
        self._stop.set()
        self._acceptor.join()
        self._listener.close()
        for thread in self._threads:
            thread.join()
        return self.visit

    def wait_for_visit(self, quiet: float = 1.0) -> None:
        """Wait until a client has come and no connection has been open for ``quiet`` seconds."""
        while not self._stop.is_set():
            with self._lock:
                over = self.visit.connections and not self._open
                idle = time.monotonic() - self._last_end
            if over and idle > quiet:
                return
            time.sleep(_SLICE)

    def settle(self, seconds: float) -> bool:
        """Wait until every connection has ended, for so long at most; whether they have."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with self._lock:
                if not self._open:
                    return True
            time.sleep(0.01)
        return False

    def _accept(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                sock, _ = self._listener.accept()
                with self._lock:
                    record = ConnectionRecord(len(self.visit.connections) + 1)
                    self.visit.connections.append(record)
                    self._open += 1
                thread = threading.Thread(target=self._serve, args=(sock, record), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, sock: socket.socket, record: ConnectionRecord) -> None:
        notes = Notes()
        try:
            sock.settimeout(_SLICE)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _Connection(self, sock, record, notes, self._stop).run()
        finally:
            sock.close()
            with self._lock:
                self.visit.notes.add(notes)
                self._open -= 1
                self._last_end = time.monotonic()

    # -- for connections

    def due_fault(self, command: Command) -> Fault | None:
        """Count a request, and give the fault that it meets."""
        fault = self.script.fault
        with self._lock:
            self.visit.requests[command] += 1
            number = self.visit.requests[command]
            if fault is None or not fault.concerns(command, number):
                return None
            self.visit.fault_happened = True
            return fault

    @property
    def patience(self) -> float:
        return self._patience

    def session(self, dialect: Dialect, notes: Notes) -> ServedSession:
        properties = self.script.properties
        return ServedSession(dialect, properties, self._addresses, self._store, notes, self._asked)


class _ClientGone(Exception):  # noqa: N818
    """The client has ended the connection."""


@dataclass(eq=False, repr=False)
class _Connection:
    """One connection from its first byte to its last."""

    _server: ScriptedServer
    _sock: socket.socket
    _record: ConnectionRecord
    _notes: Notes
    _stop: threading.Event
    _started: float = field(default_factory=time.monotonic)
    _reader: RequestReader = field(default_factory=RequestReader)
    _session: ServedSession | None = None

    def run(self) -> None:
        record, notes = self._record, self._notes
        try:
            while True:
                self._step()
        except _ClientGone:
            record.ended_by = "client"
            whole = self._reader.at_boundary
            notes.check(
                "request/whole", whole, f"the connection ended within {self._reader.within}"
            )
            if self._session is not None and whole:
                self._session.ended()
        except RequestRefused as refusal:
            record.ended_by, record.refusal = "server", str(refusal)
        except ProtocolError as error:
            record.ended_by, record.refusal = "server", str(error)
            notes.check(self._rule_of(error), False, str(error))
        except Hangup as hangup:
            record.faulted = True
            if hangup.watch:
                self._watch()
            else:
                record.ended_by = "server"
        except _Stopped:
            record.ended_by = ""
        except OSError:
            # While an answer was being written: nobody reads it any more.
            record.ended_by = "client"
            if not record.faulted:
                notes.check("stream/answers", False, "the client left while an answer was sent")
        finally:
            self._reader.abandon()

    def _rule_of(self, error: ProtocolError) -> str:
        """By which rule the reader refused a request."""
        if self._session is None:
            return "hello/first"
        text = str(error)
        if "second HELLO" in text:
            return "hello/once"
        if "no command" in text or "unknown command" in text:
            return "request/known"
        return "request/size"

    def _step(self) -> None:
        """Take the next event, or receive what it needs."""
        event = self._reader.next_event()
        if event is None:
            self._receive()
            return
        if isinstance(event, Hello):
            self._hello(event)
        elif isinstance(event, UploadStart):
            self._begin(Command.SET_TENSOR, event.fields, event.size)
            assert self._session is not None
            self._reader.direct(self._session.begin_upload(event))
            fault = self._server.script.fault
            if fault is not None and fault.within and self._due is not None:
                self._leave_within(event.size)
        elif isinstance(event, UploadEnd):
            assert self._session is not None
            self._finish(Command.SET_TENSOR, self._session.end_upload())
        else:
            assert isinstance(event, Request)
            graph = event.graph or b""
            self._begin(event.command, event.fields, len(graph), graph)
            assert self._session is not None
            self._finish(event.command, self._session.answer(event))

    _due: Fault | None = None

    def _begin(self, command: Command, fields: Any, follow: int, body: Bytes = b"") -> None:
        """Note a request: its fields, and the ``follow`` bytes behind them, as far as they came."""
        assert self._reader.dialect is not None
        if self._session is not None:
            # A request may have told that the names of tensors are longer.
            self._session.dialect = self._reader.dialect
        head = codec(self._reader.dialect.commands[command].request).build(fields)
        size = len(head) + follow
        data = FRAME.pack(command, size) + head + body[:KEPT]
        self._record.keep(True, command, data, FRAME.size + size, self._seconds)
        self._record.note(command.name)
        self._record.went_on = True
        for rule in ("request/known", "request/size"):
            self._notes.check(rule, True, "")
        self._due = self._server.due_fault(command)

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def _finish(self, command: Command, payload: bytes | memoryview | None) -> None:
        fault, self._due = self._due, None
        self._record.faulted |= fault is not None and fault.how.fatal
        if isinstance(payload, memoryview):
            # The client may free the buffer while it still takes the bytes.
            payload = bytes(payload)
        if payload is not None:
            data = encode_size(len(payload)) + payload[:KEPT]
            self._record.keep(False, command, data, 8 + len(payload), self._seconds)
        self._sock.settimeout(None)
        try:
            send_answer(self._sock, payload, fault, self._stop)
            if payload is not None:
                self._notes.check("stream/answers", True, "")
        finally:
            self._sock.settimeout(_SLICE)

    def _hello(self, hello: Hello) -> None:
        size = len(hello.caps)
        self._record.hello_size = size
        self._record.note(f"HELLO of {size} bytes")
        data = FRAME.pack(Command.HELLO, size) + hello.caps
        self._record.keep(True, Command.HELLO, data, len(data), self._seconds)
        self._notes.check("hello/first", True, "")
        self._notes.check("hello/once", True, "")
        offered = self._server.script.offer(size)
        self._due = self._server.due_fault(Command.HELLO)
        if offered is None:
            raise RequestRefused(f"no version has a HELLO of {size} bytes in this scenario")
        self._record.offered = offered.version
        dialect = self._reader.dialect = offered.dialect
        self._session = self._server.session(dialect, self._notes)
        major, minor, patch = offered.version
        fields = {
            "major": major,
            "minor": minor,
            "patch": patch,
            "conn_caps": bytes(CONN_CAPS_SIZE),
        }
        self._finish(Command.HELLO, codec(_HELLO_ANSWERS[size]).build(fields))

    # -- bytes

    def _receive(self) -> None:
        while True:
            if self._stop.is_set():
                raise _Stopped
            try:
                n = self._sock.recv_into(self._reader.receive_buffer())
            except TimeoutError:
                continue
            except ConnectionError:
                n = 0
            if not n:
                raise _ClientGone
            self._reader.received(n)
            return

    def _leave_within(self, size: int) -> None:
        """Wait for half of an upload's data, and hang up."""
        self._due = None
        got = 0
        # What came together with the request may be all of it.
        while got < size // 2 and self._reader.next_event() is None:
            with contextlib.suppress(TimeoutError):
                n = self._sock.recv_into(self._reader.receive_buffer())
                if not n:
                    raise _ClientGone
                self._reader.received(n)
                got += n
        raise Hangup(watch=False)

    def _watch(self) -> None:
        """The client has been given what it can't go on with: see what it does."""
        record = self._record
        started = time.monotonic()
        buffer = bytearray(1 << 16)
        while not self._stop.is_set():
            record.seconds_to_end = time.monotonic() - started
            if record.seconds_to_end > self._server.patience:
                record.ended_by = "watch"
                return
            try:
                n = self._sock.recv_into(buffer)
            except TimeoutError:
                continue
            except ConnectionError:
                n = 0
            if not n:
                record.ended_by = "client"
                return
            if time.monotonic() - started > _IN_FLIGHT:
                record.bytes_after_fault += n


class _Stopped(Exception):  # noqa: N818
    """The server is being closed."""


_HELLO_ANSWERS = {d.hello_size: d.commands[Command.HELLO].response for d in DIALECTS}
