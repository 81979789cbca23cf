"""A server that has every weight and computes nothing: whatever it is asked, it answers at once.

    python -m tools.bench.instant --port 50052 --protocol 7.0.0

A client that starts against it takes as long as with a server that is infinitely fast: what is left
is the client's own time, and the network's. Every offer by hash is answered with "I have it", every
graph and every tensor with zeros. Nothing is kept, so it is for measurements on one machine alone,
and listens nowhere else.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from protocol.commands import Command
from protocol.dialects import DIALECTS, Answer, Dialect, find_dialects
from protocol.errors import ProtocolError
from protocol.ggml.types import TYPE_INFO, nbytes
from protocol.messages import CONN_CAPS_SIZE
from protocol.requests import Event, Hello, Request, RequestReader, UploadEnd, UploadStart
from protocol.responses import encode_answer, encode_size
from tools.arguments import command_line, port
from tools.serving.processes import HOST

Fields = Mapping[str, Any]

_MEMORY = 64 << 30
# Bytes of an upload that are received, and forgotten, in one go.
_SCRATCH = 1 << 20

_handles = itertools.count(1)


def _nbytes(tensor: Any) -> int:
    if tensor.type not in TYPE_INFO:
        raise ProtocolError(f"a tensor of type {tensor.type}")
    return nbytes(tensor.type, tensor.ne, tensor.nb)


# What depends on the request; the fields of all other answers are among those below.
_ANSWERS: dict[Command, Callable[[Any], Fields]] = {
    Command.ALLOC_BUFFER: lambda f: {"remote_ptr": next(_handles), "remote_size": f.size},
    # Far enough from one another, whatever is in them.
    Command.BUFFER_GET_BASE: lambda f: {"base_ptr": (f.remote_ptr & 0xFFFF) << 40},
    Command.GET_ALLOC_SIZE: lambda f: {"alloc_size": _nbytes(f.tensor)},
    Command.GRAPH_COMPUTE: lambda f: {"result": 0},
}
_ALWAYS: Fields = {
    "device_count": 1,
    "alignment": 64,
    "max_size": 1 << 62,
    "free_mem": _MEMORY,
    "total_mem": _MEMORY,
    # Of an offer by hash: it is there. Of a copy: it is done.
    "result": 1,
}


class _InstantClient:
    """One client: its requests are read and answered until its connection ends."""

    def __init__(self, sock: socket.socket, dialect: Dialect) -> None:
        self._sock = sock
        self._dialect = dialect
        self._reader = RequestReader()
        self._scratch = memoryview(bytearray(_SCRATCH))
        # Bytes of an upload that have no place yet.
        self._left = 0

    def run(self) -> None:
        """Serve the client. Raises ProtocolError, OSError."""
        reader = self._reader
        while n := self._sock.recv_into(reader.receive_buffer()):
            reader.received(n)
            while (event := reader.next_event()) is not None:
                self._take(event)

    def _take(self, event: Event) -> None:
        if isinstance(event, Hello):
            self._reader.dialect = self._dialect
            version = dict(zip(("major", "minor", "patch"), self._dialect.version, strict=True))
            self._send(Command.HELLO, {**version, "conn_caps": bytes(CONN_CAPS_SIZE)})
        elif isinstance(event, UploadEnd):
            self._send(Command.SET_TENSOR, {})
        elif isinstance(event, Request):
            answer = _ANSWERS.get(event.command)
            self._send(event.command, answer(event.fields) if answer else _ALWAYS, event.fields)
        else:
            if isinstance(event, UploadStart):
                self._left = event.size
            room = self._scratch[: self._left]
            self._left -= len(room)
            self._reader.direct(room)

    def _send(self, command: Command, answer: Fields, fields: Any = None) -> None:
        spec = self._dialect.commands[command]
        if spec.answer is Answer.FIXED:
            self._sock.sendall(encode_answer(spec, answer))
        elif spec.answer is Answer.DATA:
            if fields.size > _nbytes(fields.tensor):
                raise ProtocolError(f"{fields.size} bytes asked for, the tensor has fewer")
            self._sock.sendall(encode_size(fields.size) + bytes(fields.size))


def serve(listener: socket.socket, dialect: Dialect) -> None:
    """Answer whoever connects, each on a thread, until the listener is shut down."""
    with contextlib.suppress(OSError):
        while True:
            client = listener.accept()[0]
            threading.Thread(target=_serve_one, args=(client, dialect), daemon=True).start()


def _serve_one(sock: socket.socket, dialect: Dialect) -> None:
    with sock:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _InstantClient(sock, dialect).run()
        except (ProtocolError, OSError) as error:
            print(f"closing a connection: {error}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = command_line("tools.bench.instant", __doc__)
    add = parser.add_argument
    add("--port", type=port, required=True, metavar="N")
    add("--protocol", default=DIALECTS[0].name, metavar="X.Y.Z", help="spoken (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        dialect = find_dialects(options.protocol)[0]
    except ValueError as error:
        parser.error(str(error))
    with contextlib.suppress(KeyboardInterrupt), socket.create_server((HOST, options.port)) as s:
        serve(s, dialect)
    return 0


if __name__ == "__main__":
    sys.exit(main())
