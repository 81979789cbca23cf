"""One connection to the server under test: everything on it recorded, every wait bounded.

A plain blocking socket, a message at a time; it sends whatever it is told, right or wrong.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conformance.suite.errors import Closed, Failed, Malformed, NoAnswer
from conformance.suite.tensors import NO_TENSOR, Fields, RemoteBuffer, graph_bytes
from conformance.suite.transcript import Transcript, TranscriptMessage
from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import Answer, CommandSpec, Dialect, Version
from protocol.ggml.ops import Op
from protocol.messages import CONN_CAPS_SIZE, MAX_SOURCES
from protocol.requests import encode_frame
from protocol.split import caps_version, with_split

Bytes = bytes | bytearray | memoryview

# An answer longer than this is no answer to anything that cases ask.
_LONGEST_ANSWER = 1 << 30
_DEFAULTS: dict[str, Any] = {
    "device": 0,
    "offset": 0,
    "value": 0,
    "cache_flag": 0,
    "srcs": [NO_TENSOR] * MAX_SOURCES,
    "conn_caps": bytes(CONN_CAPS_SIZE),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a request: the connection ended, or the server went on, with this answer."""

    closed: bool
    answer: Any = None


class Peer:
    """A connection. ``deadline`` is a time.monotonic() after which every wait raises NoAnswer.

    ``patience`` is how many seconds one wait takes at most. Raises OSError if nobody listens.
    """

    def __init__(
        self,
        address: tuple[str, int],
        dialect: Dialect,
        *,
        name: str = "client",
        transcript: Transcript | None = None,
        deadline: float = float("inf"),
        patience: float = 10.0,
    ) -> None:
        self.dialect = dialect
        self.name = name
        self.patience = patience
        self.version: Version = (0, 0, 0)
        self.caps = b""
        self._deadline = deadline
        self._transcript = Transcript() if transcript is None else transcript
        self._transcript.dialects[name] = dialect
        self._sending: TranscriptMessage | None = None
        self._receiving: TranscriptMessage | None = None
        self.socket = socket.create_connection(address, timeout=patience)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def split_version(self) -> int:
        """Version of the split extension that the server answered with, 0 for none."""
        return caps_version(self.caps)

    def op(self, op: Op) -> int:
        """Return the number of an op in this dialect."""
        return self.dialect.op_number(op)

    # -- bytes ---------------------------------------------------------------------------------

    def _wait(self, patience: float | None) -> None:
        left = min(self.patience if patience is None else patience, self._left())
        self.socket.settimeout(left)

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise NoAnswer("the time for this case is over")
        return left

    def send_bytes(self, data: Bytes, *, more: bool = False, command: str = "") -> None:
        """Send bytes as they are; ``more`` joins them to the message before in the transcript.

        A connection that the server has closed takes them in silence: reading tells.
        """
        if self._sending is None or not more:
            self._sending = self._transcript.add(self.name, sent=True, command=command)
        self._receiving = None
        self._sending.extend(data)
        self._wait(None)
        try:
            self.socket.sendall(data)
        except TimeoutError:
            raise NoAnswer(f"the server doesn't take what is sent ({command or 'bytes'})") from None
        except OSError:
            pass

    def _receive(
        self, n: int, what: str, patience: float | None = None, command: str = ""
    ) -> bytes:
        data = bytearray()
        while len(data) < n:
            self._wait(patience)
            try:
                piece = self.socket.recv(min(n - len(data), 1 << 20))
            except TimeoutError:
                raise NoAnswer(f"no {what} within {self.socket.gettimeout():.0f} s") from None
            except OSError:
                piece = b""
            if not piece:
                self._transcript.add(self.name, sent=False, note="closed by the server")
                within = f" ({len(data)} of {n} bytes came)" if data else ""
                raise Closed(f"the server closed the connection instead of {what}{within}")
            if self._receiving is None:
                self._receiving = self._transcript.add(self.name, sent=False, command=command)
            self._receiving.extend(piece)
            data += piece
        return bytes(data)

    def read_answer(self, command: str = "") -> bytes:
        """Read the payload of the next answer, that to ``command`` as far as one knows."""
        self._receiving = None
        what = f"answer to {command}" if command else "answer"
        size = int.from_bytes(self._receive(8, what, command=command), "little")
        if size > _LONGEST_ANSWER:
            raise Malformed(f"the {what} says that it has {size} bytes")
        data = self._receive(size, what)
        self._receiving = None
        return data

    def read_bytes(self, n: int) -> bytes:
        """Read the next ``n`` bytes of the stream, whatever they are."""
        return self._receive(n, f"{n} bytes")

    def closed_by_server(self, patience: float | None = None) -> bool:
        """Wait whether the server ends the connection within ``patience`` seconds."""
        try:
            while True:
                self._receive(1, "the end of the connection", patience)
        except Closed:
            return True
        except NoAnswer:
            return False

    def silent(self, seconds: float) -> bool:
        """Return whether nothing comes for so long, the end of the connection neither."""
        self.socket.settimeout(min(seconds, self._left()))
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return True
        except OSError:
            pass
        return False

    def half_close(self) -> None:
        """Say that nothing more will be sent; answers can still come."""
        self._transcript.add(self.name, sent=True, note="half-closed by the client")
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Hang up, answers read or not."""
        if self.socket.fileno() >= 0:
            self._transcript.add(self.name, sent=True, note="closed by the client")
        self.drop()

    def drop(self) -> None:
        """Hang up without a mention: the case is over."""
        self.socket.close()

    def reset(self) -> None:
        """Close so that the server sees a connection reset rather than an end."""
        self._transcript.add(self.name, sent=True, note="reset by the client")
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    # -- messages ------------------------------------------------------------------------------

    def spec(self, command: Command) -> CommandSpec:
        return self.dialect.commands[command]

    def payload(self, command: Command, **fields: Any) -> bytes:
        """Return the head of a request; see send for the fields."""
        return codec(self.spec(command).request).build({**_DEFAULTS, **fields})

    def message(self, command: Command, body: Bytes = b"", **fields: Any) -> bytes:
        """Return a request as it goes out."""
        head = self.payload(command, **fields)
        return encode_frame(command, len(head) + len(body)) + head + bytes(body)

    def send(self, command: Command, body: Bytes = b"", **fields: Any) -> None:
        """Send a request; ``fields`` as the dialect's table has them, defaults 0 where harmless."""
        self.send_bytes(self.message(command, body, **fields), command=command.name)

    def send_frame(self, command: int, payload: Bytes = b"", size: int | None = None) -> None:
        """Send a frame of any command number and payload; ``size`` is what it claims."""
        claimed = len(payload) if size is None else size
        known = command in Command.__members__.values()
        name = Command(command).name if known else f"command {command}"
        self.send_bytes(encode_frame(command, claimed) + bytes(payload), command=name)

    def answer(self, command: Command) -> Any:
        """Return the answer to ``command``: a Message, bytes, or None where the dialect has none.

        Raises Closed, NoAnswer, Malformed.
        """
        spec = self.spec(command)
        if spec.answer is Answer.NEVER:
            return None
        data = self.read_answer(command.name)
        if spec.answer is Answer.DATA:
            return data
        reader = codec(spec.response)
        if len(data) != reader.size:
            raise Malformed(
                f"the answer to {command.name} has {len(data)} bytes, "
                f"protocol {self.dialect.name} has {reader.size}"
            )
        return reader.parse(data)

    def call(self, command: Command, body: Bytes = b"", **fields: Any) -> Any:
        self.send(command, body, **fields)
        return self.answer(command)

    def hello(self, caps: bytes = bytes(CONN_CAPS_SIZE)) -> Version:
        """Send HELLO; the version that the server answers with."""
        answer = self.call(Command.HELLO, conn_caps=caps)
        self.version = (answer.major, answer.minor, answer.patch)
        self.caps = getattr(answer, "conn_caps", b"")
        version = min(caps_version(caps), self.split_version)
        if version:
            self.speak(with_split(self.dialect, version))
        return self.version

    def speak(self, dialect: Dialect) -> None:
        """Go on in this dialect."""
        self.dialect = dialect
        self._transcript.dialects[self.name] = dialect

    def ping(self) -> None:
        """Ask what every dialect can, and take the answer: all before it has been done."""
        self.call(Command.GET_ALIGNMENT)

    def outcome(self, command: Command | None = None) -> Outcome:
        """Return what became of the request sent last, of ``command`` if that is to be answered.

        A further request is sent behind it, so that a server that just goes on is seen to.
        """
        self.send(Command.GET_ALIGNMENT)
        try:
            answer = None if command is None else self.answer(command)
            self.answer(Command.GET_ALIGNMENT)
        except Closed:
            return Outcome(closed=True)
        return Outcome(closed=False, answer=answer)

    # -- what most cases need ------------------------------------------------------------------

    def alloc(self, size: int, device: int = 0) -> RemoteBuffer:
        """Allocate a buffer of at least ``size`` bytes.

        Fails the case if the server has no room.
        """
        answer = self.call(Command.ALLOC_BUFFER, device=device, size=size)
        if not answer.remote_ptr or answer.remote_size < size:
            raise Failed(
                f"no buffer of {size} bytes: remote_ptr {answer.remote_ptr:#x}, "
                f"remote_size {answer.remote_size}"
            )
        base = self.call(Command.BUFFER_GET_BASE, remote_ptr=answer.remote_ptr).base_ptr
        return RemoteBuffer(answer.remote_ptr, base, answer.remote_size, self.dialect)

    def set(self, tensor: Fields, data: Bytes, offset: int = 0, cache_flag: int = 0) -> None:
        self.call(Command.SET_TENSOR, data, tensor=tensor, offset=offset, cache_flag=cache_flag)

    def get(self, tensor: Fields, size: int, offset: int = 0) -> bytes:
        """Return ``size`` bytes of a tensor. Raises Malformed when another number comes."""
        data = self.call(Command.GET_TENSOR, tensor=tensor, offset=offset, size=size)
        if len(data) != size:
            raise Malformed(f"GET_TENSOR of {size} bytes is answered with {len(data)}")
        return bytes(data)

    def graph(
        self,
        nodes: Sequence[Fields],
        leaves: Sequence[Fields] = (),
        device: int = 0,
        ids: Sequence[int] | None = None,
    ) -> bytes:
        """Return the body of a GRAPH_COMPUTE of these tensors; ``ids`` as of graph_bytes."""
        return graph_bytes(self.dialect, nodes, leaves, device, ids)

    def compute(
        self, nodes: Sequence[Fields], leaves: Sequence[Fields] = (), device: int = 0
    ) -> None:
        """Run a graph. Where the dialect answers, anything but success fails the case."""
        answer = self.call(Command.GRAPH_COMPUTE, self.graph(nodes, leaves, device))
        if answer is not None and answer.result != 0:
            raise Failed(f"GRAPH_COMPUTE is answered {answer.result}, not GGML_STATUS_SUCCESS")
