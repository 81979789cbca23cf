"""Faults of reading requests, and of what a wrong one does to a server."""

from __future__ import annotations

import os
from typing import Any

from protocol.commands import Command
from protocol.errors import ProtocolError
from protocol.requests import RequestReader
from rpc_server.net.listener import ClientConnection
from rpc_server.session.state import Session
from tests.conformance.faulty.registry import fault, replace_method


def _on_refusal(do: Any) -> None:
    """Do something else than to close the connection on a request that isn't known."""

    def make(right: Any) -> Any:
        def next_event(self: RequestReader) -> Any:
            try:
                return right(self)
            except ProtocolError as error:
                if "unknown command" not in str(error):
                    raise
                return do(self)

        return next_event

    replace_method(RequestReader, "next_event", make)


@fault("an unknown command is skipped", "unknown-command")
def unknown_command_ignored() -> None:
    _on_refusal(lambda reader: None)


@fault("an unknown command is waited on for ever", "unknown-command")
def unknown_command_hangs() -> None:
    deaf: set[int] = set()

    def do(reader: RequestReader) -> None:
        deaf.add(id(reader))

    _on_refusal(do)

    def make(right: Any) -> Any:
        def next_event(self: RequestReader) -> Any:
            return None if id(self) in deaf else right(self)

        return next_event

    replace_method(RequestReader, "next_event", make)


@fault("an unknown command ends the server", "unknown-command")
def unknown_command_crashes() -> None:
    _on_refusal(lambda reader: os._exit(1))


@fault("one client's bad request closes the connections of all", "unknown-command")
def bad_request_hits_everyone() -> None:
    sessions: list[Session] = []

    def make_init(right: Any) -> Any:
        def init(self: Session, *args: Any) -> None:
            right(self, *args)
            sessions.append(self)

        return init

    def make_failed(right: Any) -> Any:
        def failed(self: Session, error: Exception) -> None:
            right(self, error)
            for session in sessions:
                session._transport.abort()

        return failed

    replace_method(Session, "__init__", make_init)
    replace_method(Session, "failed", make_failed)


@fault("bytes behind a request's structure are skipped", "alloc-buffer-too-long")
def surplus_bytes_skipped() -> None:
    from protocol.codec import codec
    from protocol.dialects import Body

    def make(right: Any) -> Any:
        def _read_frame(self: RequestReader) -> bool:
            import struct

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
            return bool(right(self))

        return _read_frame

    replace_method(RequestReader, "_read_frame", make)


@fault("a request that arrives in pieces is refused", "request-in-single-bytes")
def requests_in_one_piece_only() -> None:
    def make(right: Any) -> Any:
        def buffer_updated(self: ClientConnection, nbytes: int) -> None:
            right(self, nbytes)
            session = self._session
            if session is None or session.busy or session.reader.at_boundary:
                return
            if not session.reader._received.in_body and session.reader._frame is None:
                self.abort()

        return buffer_updated

    replace_method(ClientConnection, "buffer_updated", make)


@fault("a second HELLO is answered", "second-hello")
def second_hello_answered() -> None:
    def make(right: Any) -> Any:
        def next_event(self: RequestReader) -> Any:
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

        return next_event

    replace_method(RequestReader, "next_event", make)
