"""Messages as lines of text: one each, or whole, or byte by byte."""

from __future__ import annotations

from collections.abc import Iterator

from protocol.graph_payload import GraphPayload
from protocol.observe.annotate import annotate, describe, graph_lines, tree
from protocol.observe.events import Event, Failure, MessageKind, ObservedMessage, Side, SkippedBytes
from tools.capture.connections import CapturedConnection
from tools.dump.filters import Filters
from tools.dump.screen import Screen, duration_text, printable

_ARROWS = {Side.CLIENT: "->", Side.SERVER: "<-"}
_BYTES_A_LINE = 16
# Of data that was kept so many bytes are shown.
_DATA_SHOWN = 64
# A message that takes longer than this from its first to its last byte says so.
_SLOW = 1e-3


class LineView:
    """Writes every message; ``whole`` with all fields, ``hexadecimal`` with all bytes."""

    def __init__(
        self, screen: Screen, filters: Filters, *, whole: bool = False, hexadecimal: bool = False
    ) -> None:
        self._start: float | None = None
        self._graphs = 0
        self._screen = screen
        self._filters = filters
        self._whole = whole
        self._hexadecimal = hexadecimal

    def opened(self, connection: CapturedConnection) -> None:
        if not self._filters.wants(connection):
            return
        if self._start is None:
            self._start = connection.started
        joined = "; its start was not captured" if connection.joined else ""
        self._note(
            connection.started, connection, f"{connection.client} to {connection.server}{joined}"
        )

    def closed(self, connection: CapturedConnection) -> None:
        if not self._filters.wants(connection):
            return
        dialect = connection.conversation.dialect
        parts = ["closed" if connection.complete else "the capture ends"]
        if dialect is not None:
            parts.append(f"protocol {dialect.name}")
        if waiting := connection.conversation.unanswered:
            parts.append(f"{len(waiting)} requests without an answer ({waiting[-1].command.name})")
        self._note(connection.ended, connection, "; ".join([*parts, *connection.notes]))

    def event(self, connection: CapturedConnection, event: Event) -> None:
        graph = None
        if isinstance(event, ObservedMessage) and event.graph is not None:
            self._graphs += 1
            graph = self._graphs
        if not self._filters.wants(connection):
            return
        if not isinstance(event, ObservedMessage):
            self._trouble(connection, event)
        elif self._filters.shows(event):
            self._message(connection, event, graph)

    def _message(
        self, connection: CapturedConnection, message: ObservedMessage, graph: int | None
    ) -> None:
        screen = self._screen
        command, _, about = printable(describe(message)).partition(" ")
        side = "client" if message.side is Side.CLIENT else "server"
        parts = [
            self._head(message.ended, connection, side, _ARROWS[message.side]),
            screen.style(command, "command"),
        ]
        if graph is not None:
            about = f"graph {graph}, {about}"
        parts.append(about)
        timing = list(_timing(message))
        if timing:
            parts.append(screen.style(f"({', '.join(timing)})", "dim"))
        screen.line(" ".join(part for part in parts if part))
        if self._whole:
            for line in tree(message)[1:] if not message.graph else _graph_tree(message):
                screen.line(f"    {printable(line)}")
        if self._hexadecimal:
            for line in hex_lines(message):
                screen.line(f"    {line}")

    def _trouble(self, connection: CapturedConnection, event: Failure | SkippedBytes) -> None:
        who = f"the {event.side.value}'s stream"
        if isinstance(event, Failure):
            text = f"{event.text} (at byte {event.offset} of {who}; the rest of it is not read)"
            style = "error"
        else:
            text = f"{event.size} bytes of {who} from {event.start} on passed over: {event.text}"
            style = "note"
        self._note(event.time, connection, printable(text), style)

    def _note(
        self, time: float | None, connection: CapturedConnection, text: str, style: str = "note"
    ) -> None:
        head = self._head(time, connection, style, "--" if style == "note" else "!!")
        self._screen.line(f"{head} {self._screen.style(text, style)}")

    def _head(
        self, time: float | None, connection: CapturedConnection, style: str, mark: str
    ) -> str:
        if time is None or self._start is None:
            shown = f"{'?':>11}"
        else:
            shown = f"{time - self._start:11.6f}"
        arrow = self._screen.style(mark, style)
        return f"{self._screen.style(shown, 'time')} #{connection.number:<3} {arrow}"


def _timing(message: ObservedMessage) -> Iterator[str]:
    if message.kind in (MessageKind.ANSWER, MessageKind.OUTPUTS) and message.latency is not None:
        yield f"after {duration_text(message.latency)}"
    if message.started is not None and message.ended is not None:
        took = message.ended - message.started
        if took > _SLOW:
            yield f"took {duration_text(took)}"


def _graph_tree(message: ObservedMessage) -> list[str]:
    """The nodes of a graph; its tensors field by field would be a thousand pages."""
    assert message.graph is not None
    lines = graph_lines(message.graph, message.dialect)
    if isinstance(message.graph, GraphPayload):
        lines[0] = f"device {message.graph.device}"
    return [f"  {line}" for line in lines]


def hex_lines(message: ObservedMessage) -> Iterator[str]:
    """Yield every byte of a message, and beside it what it is."""
    data = message.data
    for span in annotate(message):
        end = min(span.end, len(data))
        if span.path == "data":
            end = min(end, span.start + _DATA_SHOWN)
        text = f"{span.path} = {printable(span.value)}"
        if span.start >= end:
            yield f"{span.start:06x}  {'':{3 * _BYTES_A_LINE}} {text}"
        for at in range(span.start, end, _BYTES_A_LINE):
            part = data[at : min(at + _BYTES_A_LINE, end)].hex(" ")
            yield f"{at:06x}  {part:{3 * _BYTES_A_LINE}} {text}".rstrip()
            text = ""
        if end < span.end:
            yield f"{end:06x}  ... {span.end - end} more bytes"
