"""The messages of a case, taken apart: which bytes are which field, and what a message is about.

What is sent in a case is often wrong on purpose. As much of it as has the form of a message is read
by the dialect's declarations; the rest is shown as the bytes that it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from conformance.suite.transcript import TranscriptMessage
from protocol.commands import Command
from protocol.dialects import Dialect
from protocol.errors import ProtocolError
from protocol.observe.annotate import (
    Span,
    annotate,
    describe,
    message_of_answer,
    message_of_request,
)
from protocol.requests import FRAME

# Frames of one piece of the stream that are read one by one; a pipelined hundred looks alike.
_MOST_FRAMES = 8
_ARRAY_ITEM = re.compile(r"^(.*)\[(\d+)\]$")
_ZEROS = frozenset({"0", "0x0"})


@dataclass(frozen=True, slots=True)
class Shown:
    """One message as it is shown: a line, its bytes as far as they are kept, what they are."""

    message: TranscriptMessage
    line: str
    spans: tuple[Span, ...]


def show(message: TranscriptMessage, dialect: Dialect) -> Shown:
    """Read a recorded message by the dialect of its connection."""
    if not message.size:
        return Shown(message, message.note, ())
    if message.sent:
        return _request(message, dialect)
    return _answer(message, dialect)


def _request(message: TranscriptMessage, dialect: Dialect) -> Shown:
    data, spans, lines = message.data, list[Span](), list[str]()
    at = 0
    while at < len(data) and len(lines) < _MOST_FRAMES:
        found, line, size = _frame(data[at:], dialect)
        spans += [
            Span(span.start + at, min(span.end + at, len(data)), span.path, span.value)
            for span in found
            if span.start + at < len(data)
        ]
        lines.append(line)
        at += size
    if at < len(data):
        spans.append(Span(at, len(data), "(more)", f"{message.size - at} bytes"))
    if not lines:
        lines = [message.command]
    more = " ..." if at < message.size and len(lines) == _MOST_FRAMES else ""
    return Shown(message, f"{'; '.join(lines)}{more}", tuple(spans))


def _frame(data: bytes, dialect: Dialect) -> tuple[list[Span], str, int]:
    """Return what starts ``data``: its spans, a line about it, how many bytes it takes."""
    if len(data) < FRAME.size:
        return [Span(0, len(data), "(part of a message)", "")], f"{len(data)} bytes", len(data)
    number, claimed = FRAME.unpack_from(data)
    whole = FRAME.size + claimed
    try:
        if whole <= len(data):
            sound = message_of_request(data[:whole], dialect)
            return annotate(sound), describe(sound), whole
    except (ProtocolError, ValueError):
        pass
    known = number in Command.__members__.values()
    name = Command(number).name if known else f"command {number}"
    there = min(claimed, len(data) - FRAME.size)
    spans = [
        Span(0, 1, "command", f"{name} ({number})"),
        Span(1, FRAME.size, "size", f"{claimed}"),
    ]
    if there:
        spans.append(Span(FRAME.size, FRAME.size + there, "payload", f"{there} bytes"))
    line = f"{name} of {claimed} bytes"
    if there < claimed:
        line += f", {there} of them here"
    return spans, line, FRAME.size + there


def _answer(message: TranscriptMessage, dialect: Dialect) -> Shown:
    data = message.data
    whole = len(data) == message.size
    if whole and message.command in Command.__members__:
        command = Command[message.command]
        try:
            sound = message_of_answer(data, command, dialect)
            return Shown(message, describe(sound), tuple(annotate(sound)))
        except (ProtocolError, KeyError):
            pass
    if len(data) < 8:
        return Shown(message, f"{message.size} bytes", (Span(0, len(data), "(bytes)", ""),))
    size = int.from_bytes(data[:8], "little")
    spans = [Span(0, 8, "size", f"{size}")]
    if len(data) > 8:
        spans.append(Span(8, len(data), "payload", f"{message.size - 8} bytes"))
    what = f" to {message.command}" if message.command else ""
    return Shown(message, f"an answer{what} of {size} bytes", tuple(spans))


def merge_zeros(spans: Iterable[Span]) -> Iterator[Span]:
    """Yield the same spans with runs of zeros in one array put together, as ``src[2..9]``."""
    run: list[Span] = []
    for span in spans:
        if run and not _continues(run, span):
            yield _merged(run)
            run = []
        run.append(span)
    if run:
        yield _merged(run)


def _continues(run: list[Span], span: Span) -> bool:
    before, now = _ARRAY_ITEM.match(run[-1].path), _ARRAY_ITEM.match(span.path)
    return (
        before is not None
        and now is not None
        and before[1] == now[1]
        and run[-1].value in _ZEROS
        and span.value in _ZEROS
    )


def _merged(run: list[Span]) -> Span:
    if len(run) == 1:
        return run[0]
    first, last = _ARRAY_ITEM.match(run[0].path), _ARRAY_ITEM.match(run[-1].path)
    assert first is not None
    assert last is not None
    return replace(run[0], end=run[-1].end, path=f"{first[1]}[{first[2]}..{last[2]}]")
