"""Messages as JSON, one object a line."""

from __future__ import annotations

import json
from typing import Any

from protocol.codec import Message
from protocol.dialects import Dialect
from protocol.graph_payload import GraphPayload
from protocol.observe.annotate import graph_tensors, op_text, text_of, type_text
from protocol.observe.conversation import Event, Failure, MessageKind, ObservedMessage
from protocol.split import ProgramPayload
from tools.capture.connections import CapturedConnection
from tools.dump.filters import Filters
from tools.dump.screen import Screen


class JsonView:
    """Writes every message; with ``whole`` graphs have all their nodes.

    Objects have ``event``: ``opened``, ``closed``, ``message``, ``error`` (nothing after it was
    read) or ``skipped``. Times are seconds since 1970, of the last byte (``first`` of the first).
    """

    def __init__(self, screen: Screen, filters: Filters, *, whole: bool = False) -> None:
        self._screen = screen
        self._filters = filters
        self._whole = whole
        self._graphs = 0

    def opened(self, connection: CapturedConnection) -> None:
        if self._filters.wants(connection):
            self._write(
                connection,
                "opened",
                time=connection.started,
                client=connection.client,
                server=connection.server,
                joined=connection.joined,
            )

    def closed(self, connection: CapturedConnection) -> None:
        if not self._filters.wants(connection):
            return
        dialect = connection.conversation.dialect
        self._write(
            connection,
            "closed",
            time=connection.ended,
            complete=connection.complete,
            protocol=dialect and dialect.name,
            unanswered=[m.number for m in connection.conversation.unanswered],
            notes=connection.notes,
        )

    def event(self, connection: CapturedConnection, event: Event) -> None:
        if isinstance(event, ObservedMessage) and event.graph is not None:
            self._graphs += 1
        if not self._filters.wants(connection):
            return
        if isinstance(event, ObservedMessage):
            if self._filters.shows(event):
                self._message(connection, event)
        elif isinstance(event, Failure):
            self._write(
                connection, "error",
                time=event.time, side=event.side.value, offset=event.offset, text=event.text,
            )  # fmt: skip
        else:
            self._write(
                connection, "skipped",
                time=event.time, side=event.side.value, start=event.start, end=event.end,
                text=event.text,
            )  # fmt: skip

    def _message(self, connection: CapturedConnection, message: ObservedMessage) -> None:
        values: dict[str, Any] = {
            "time": message.ended,
            "first": message.started,
            "side": message.side.value,
            "kind": message.kind.value,
            "number": message.number,
            "command": message.command.name,
            "protocol": message.dialect.name,
            "start": message.start,
            "end": message.end,
            "fields": None if message.fields is None else plain(message.fields, message.dialect),
        }
        if message.body_size:
            values["body_size"] = message.body_size
        if message.step:
            values["step"] = message.step
        if message.kind in (MessageKind.ANSWER, MessageKind.OUTPUTS):
            values["latency"] = message.latency
        if message.graph is not None:
            values["graph"] = {"number": self._graphs, **graph_object(message, self._whole)}
        if message.missing:
            values["missing"] = message.missing
        if message.problem:
            values["problem"] = message.problem
        self._write(connection, "message", **values)

    def _write(self, connection: CapturedConnection, event: str, /, **values: Any) -> None:
        self._screen.line(
            json.dumps({"event": event, "connection": connection.number, **values}, allow_nan=False)
        )


def plain(value: Any, dialect: Dialect) -> Any:
    """Return a value of a message for JSON.

    It has ops and types by name, names as text, bytes in hexadecimal.
    """
    if isinstance(value, Message):
        fields = {name: plain(item, dialect) for name, item in vars(value).items()}
        if hasattr(value, "op_params"):
            fields["op"] = op_text(value.op, dialect)
            fields["type"] = type_text(value.type)
        if isinstance(getattr(value, "name", None), bytes):
            fields["name"] = text_of(value.name)
        return fields
    if isinstance(value, tuple | list):
        return [plain(item, dialect) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float) and not abs(value) < float("inf"):
        return str(value)
    return value


def graph_object(message: ObservedMessage, whole: bool) -> dict[str, Any]:
    graph = message.graph
    assert graph is not None
    found: dict[str, Any] = {"tensors": len(graph.tensors)}
    if isinstance(graph, GraphPayload):
        nodes = graph.nodes.tolist()
        found["device"] = graph.device
    else:
        assert isinstance(graph, ProgramPayload)
        nodes = [i for step in graph.steps for i in step.nodes]
        found["steps"] = len(graph.steps)
    found["nodes"] = len(nodes)
    if whole:
        tensors = graph_tensors(graph.tensors, nodes, message.dialect)
        found["graph"] = [
            {
                "id": t.id, "node": t.node, "name": t.label, "op": t.op, "type": t.type,
                "ne": t.ne, "src": t.sources, "view_src": t.view_of, "flags": t.flags,
            }
            for t in tensors.values()
        ]  # fmt: skip
    return found
