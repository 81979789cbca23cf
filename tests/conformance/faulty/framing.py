"""Faults of reading requests, and of what a wrong one does to a server."""

from __future__ import annotations

import os
import struct
from typing import Any

from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import Body
from protocol.errors import ProtocolError
from protocol.requests import RequestReader
from rpc_server.net.listener import ClientConnection
from rpc_server.session.state import Session
from tests.conformance.faulty.registry import fault, instead_of, put


def _on_refusal(do: Any) -> None:
    """Do something else than to close the connection on a request that isn't known."""

    def next_event(right: Any, self: RequestReader) -> Any:
        try:
            return right(self)
        except ProtocolError as error:
            if "unknown command" not in str(error):
                raise
            return do(self)

    put((RequestReader, "next_event"), next_event)


@fault("an unknown command is skipped", "unknown-command")
def unknown_command_ignored() -> None:
    _on_refusal(lambda reader: None)


@fault("an unknown command is waited on for ever", "unknown-command")
def unknown_command_hangs() -> None:
    deaf: set[int] = set()

    def next_event(right: Any, self: RequestReader) -> Any:
        return None if id(self) in deaf else right(self)

    _on_refusal(lambda reader: deaf.add(id(reader)))
    put((RequestReader, "next_event"), next_event)


@fault("an unknown command ends the server", "unknown-command")
def unknown_command_crashes() -> None:
    _on_refusal(lambda reader: os._exit(1))


@fault("one client's bad request closes the connections of all", "unknown-command")
def bad_request_hits_everyone() -> None:
    sessions: list[Session] = []

    def init(right: Any, self: Session, *args: Any) -> None:
        right(self, *args)
        sessions.append(self)

    def failed(right: Any, self: Session, error: Exception) -> None:
        right(self, error)
        for session in sessions:
            session._transport.abort()

    put((Session, "__init__"), init)
    put((Session, "failed"), failed)


@fault("bytes behind a request's structure are skipped", "alloc-buffer-too-long")
@instead_of(RequestReader, "_read_frame")
def surplus_bytes_skipped(right: Any, self: RequestReader) -> Any:
    received = self._received
    if self.dialect is not None and len(received) >= 9:
        number, size = struct.unpack_from("<BQ", received._buffer, received._start)
        spec = self.dialect.commands.get(number)
        if spec is not None and spec.body is Body.NONE:
            head = codec(spec.request).size
            if size > head and len(received) >= 9 + size:
                whole = received.take(9 + size)
                rest = received.take(len(received))
                self.put_back(struct.pack("<BQ", number, head) + whole[9 : 9 + head] + rest)
    return right(self)


@fault("a request that arrives in pieces is refused", "request-in-single-bytes")
@instead_of(ClientConnection, "buffer_updated")
def requests_in_one_piece_only(right: Any, self: ClientConnection, nbytes: int) -> None:
    right(self, nbytes)
    session = self._session
    if session is None or session.busy or session.reader.at_boundary:
        return
    if not session.reader._received.in_body and session.reader._frame is None:
        self.abort()


@fault("a second HELLO is answered", "second-hello")
@instead_of(RequestReader, "next_event")
def second_hello_answered(right: Any, self: RequestReader) -> Any:
    received = self._received
    if (
        self.dialect is not None
        and self._frame is None
        and not received.in_body
        and len(received) >= 9
        and received._buffer[received._start] == Command.HELLO
    ):
        self.dialect = None
    return right(self)
