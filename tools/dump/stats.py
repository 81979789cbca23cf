"""Figures of a capture: by command, and by decode step."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from protocol.commands import Command
from protocol.observe.annotate import size_text
from protocol.observe.conversation import Event, MessageKind, ObservedMessage, Side
from tools.capture.connections import CapturedConnection
from tools.dump.filters import Filters
from tools.dump.screen import Screen, duration_text

_PERCENTILES = (50, 90, 99)
# So many latencies of a command, and steps of a kind, are kept; of more, a random choice.
_SAMPLES = 20_000
_GRAPHS = frozenset({Command.GRAPH_COMPUTE, Command.GRAPH_RECOMPUTE, Command.SPLIT_RUN})


class Samples:
    """A random choice of the values seen; small sets are whole."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.count = 0
        self._random = random.Random(0)

    def add(self, value: float) -> None:
        self.count += 1
        if len(self.values) < _SAMPLES:
            self.values.append(value)
        elif (at := self._random.randrange(self.count)) < _SAMPLES:
            self.values[at] = value

    def percentiles(self, wanted: Sequence[int]) -> list[float]:
        """Return the values below which so many percent are; the last may be 100."""
        ordered = sorted(self.values)
        if not ordered:
            return []
        return [ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in wanted]


@dataclass(slots=True)
class CommandTotals:
    """Of one command: requests and answers, bytes of both, seconds until answered."""

    requests: int = 0
    sent: int = 0
    received: int = 0
    latencies: Samples = field(default_factory=Samples)


@dataclass(slots=True)
class GenerationStep:
    """The traffic of a connection from one read-back of results to the next."""

    graphs: list[Command] = field(default_factory=list)
    requests: int = 0
    round_trips: int = 0
    sent: int = 0
    received: int = 0
    began: float | None = None
    ended: float | None = None
    # Results have been asked for after its graphs.
    read_back: bool = False


@dataclass(slots=True)
class StepTotals:
    """All steps of a kind."""

    count: int = 0
    columns: dict[str, Samples] = field(default_factory=dict)

    def add(self, step: GenerationStep) -> None:
        self.count += 1
        seconds = None if step.began is None or step.ended is None else step.ended - step.began
        values = {
            "graphs": len(step.graphs),
            "requests": step.requests,
            "round_trips": step.round_trips,
            "sent": step.sent,
            "received": step.received,
            "seconds": seconds,
        }
        for name, value in values.items():
            if value is not None:
                self.columns.setdefault(name, Samples()).add(value)

    def median(self, name: str) -> float | None:
        found = self.columns[name].percentiles((50,)) if name in self.columns else []
        return found[0] if found else None


class StatsView:
    """Counts while the capture is read; :meth:`write` shows it."""

    def __init__(self, filters: Filters) -> None:
        self._filters = filters
        self.commands: dict[Command, CommandTotals] = {}
        self.steps: dict[str, StepTotals] = {}
        self._open: dict[int, GenerationStep] = {}
        self.connections = 0
        self.missing = 0
        self.troubles = 0
        self._notes: list[str] = []
        self._protocols: dict[str, int] = {}

    def opened(self, connection: CapturedConnection) -> None:
        if self._filters.wants(connection):
            self.connections += 1

    def closed(self, connection: CapturedConnection) -> None:
        self._finish(self._open.pop(connection.number, None))
        if self._filters.wants(connection):
            dialect = connection.conversation.dialect
            name = dialect.name if dialect else "unknown"
            self._protocols[name] = self._protocols.get(name, 0) + 1
            self._notes += [f"connection {connection.number}: {note}" for note in connection.notes]

    def event(self, connection: CapturedConnection, event: Event) -> None:
        if not self._filters.wants(connection):
            return
        if not isinstance(event, ObservedMessage):
            self.troubles += 1
            return
        self.missing += event.missing
        self._follow(connection, event)
        if not self._filters.shows(event):
            return
        figures = self.commands.setdefault(event.command, CommandTotals())
        if event.kind is MessageKind.REQUEST:
            figures.requests += 1
        if event.side is Side.CLIENT:
            figures.sent += event.size
        else:
            figures.received += event.size
            if event.latency is not None:
                figures.latencies.add(event.latency)

    # -- steps ----------------------------------------------------------------------------------

    def _follow(self, connection: CapturedConnection, message: ObservedMessage) -> None:
        """A step ends when something else is asked for after its results were read."""
        step = self._open.get(connection.number)
        if (
            step is not None
            and step.read_back
            and message.kind is MessageKind.REQUEST
            and message.command is not Command.GET_TENSOR
        ):
            self._finish(step)
            step = None
        if step is None:
            step = self._open[connection.number] = GenerationStep()
        if message.kind is MessageKind.REQUEST and message.command in _GRAPHS:
            step.graphs.append(message.command)
        if not step.graphs and not _may_be_input(message):
            # Loading a model and laying out buffers: what comes next begins the step.
            self._open[connection.number] = GenerationStep()
            return
        if step.began is None:
            step.began = message.started
        step.ended = message.ended
        if message.side is Side.CLIENT:
            step.sent += message.size
        else:
            step.received += message.size
        if message.kind is MessageKind.REQUEST:
            step.requests += 1
            step.round_trips += message.answered
            step.read_back = bool(step.graphs) and message.command is Command.GET_TENSOR

    def _finish(self, step: GenerationStep | None) -> None:
        if step is None or not step.graphs:
            return
        counts = {c: step.graphs.count(c) for c in sorted(set(step.graphs))}
        kind = " + ".join(f"{n} {c.name}" for c, n in counts.items())
        self.steps.setdefault(kind, StepTotals()).add(step)

    # -- output ---------------------------------------------------------------------------------

    def as_object(self) -> dict[str, Any]:
        """Return all figures, for JSON."""
        return {
            "connections": self.connections,
            "protocols": self._protocols,
            "missing_bytes": self.missing,
            "troubles": self.troubles,
            "notes": self._notes,
            "commands": {
                command.name: {
                    "requests": f.requests,
                    "sent": f.sent,
                    "received": f.received,
                    **{
                        f"p{p}": value
                        for p, value in zip(
                            (*_PERCENTILES, 100),
                            f.latencies.percentiles((*_PERCENTILES, 100)),
                            strict=False,
                        )
                    },
                }
                for command, f in sorted(self.commands.items())
            },
            "steps": {
                kind: {"count": f.count, **{name: f.median(name) for name in f.columns}}
                for kind, f in self.steps.items()
            },
        }

    def write(self, screen: Screen, as_json: bool) -> None:
        if as_json:
            screen.line(json.dumps(self.as_object()))
            return
        protocols = ", ".join(
            f"protocol {name} ({count})" for name, count in sorted(self._protocols.items())
        )
        screen.line(f"{self.connections} connections: {protocols or 'none'}")
        rows: list[tuple[str, ...]] = [
            ("command", "requests", "sent", "received", "p50", "p90", "p99", "max")
        ]
        for command, f in sorted(self.commands.items(), key=lambda item: -item[1].sent):
            times = [duration_text(t) for t in f.latencies.percentiles((*_PERCENTILES, 100))]
            rows.append(
                (
                    command.name, str(f.requests), size_text(f.sent), size_text(f.received),
                    *(times or ["-"] * 4),
                )
            )  # fmt: skip
        self._table(screen, rows)
        if self.steps:
            screen.line("")
            screen.line("A decode step, from its inputs to its results (medians):")
            rows = [("graphs", "steps", "requests", "round trips", "sent", "received", "time")]
            for kind, steps in sorted(self.steps.items(), key=lambda item: -item[1].count):
                rows.append(
                    (
                        kind, str(steps.count), _number(steps.median("requests")),
                        _number(steps.median("round_trips")),
                        size_text(int(steps.median("sent") or 0)),
                        size_text(int(steps.median("received") or 0)),
                        duration_text(steps.median("seconds") or 0.0),
                    )
                )  # fmt: skip
            self._table(screen, rows)
        if self.missing or self.troubles or self._notes:
            screen.line("")
        for note in self._notes:
            screen.line(screen.style(note, "note"))
        if self.missing or self.troubles:
            text = f"not seen: {size_text(self.missing)} of messages; {self.troubles} interruptions"
            screen.line(screen.style(text, "note"))

    @staticmethod
    def _table(screen: Screen, rows: Sequence[Sequence[str]]) -> None:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for i, row in enumerate(rows):
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            text = "  ".join(cells)
            screen.line(screen.style(text, "command") if i == 0 else text)


def _may_be_input(message: ObservedMessage) -> bool:
    """Return whether it may be for the graphs to come, rather than for loading a model."""
    return message.command is Command.SET_TENSOR


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"
