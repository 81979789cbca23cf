"""The golden captures and their messages."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path

from protocol.observe.events import (
    Event,
    Failure,
    ObservedMessage,
    SkippedBytes,
)
from tools.capture.connections import CapturedConnection, Connections, ReadOptions
from tools.capture.files import read_capture

FOLDER = Path(__file__).parents[1] / "data" / "captures"
NAMES = sorted(path.stem for path in FOLDER.glob("*.pcapng"))


@dataclass
class Collected:
    """All that was said in a capture, in its order."""

    connections: list[CapturedConnection] = field(default_factory=list)
    messages: list[tuple[CapturedConnection, ObservedMessage]] = field(default_factory=list)
    others: list[Failure | SkippedBytes] = field(default_factory=list)

    def opened(self, connection: CapturedConnection) -> None:
        self.connections.append(connection)

    def event(self, connection: CapturedConnection, event: Event) -> None:
        if isinstance(event, ObservedMessage):
            self.messages.append((connection, event))
        else:
            self.others.append(event)

    def closed(self, connection: CapturedConnection) -> None:
        pass


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.pcapng"


def collect(path: Path) -> Collected:
    """The messages of a capture with all their bytes."""
    collected = Collected()
    Connections(collected, ReadOptions(keep=1 << 62)).run(read_capture(path))
    return collected


@functools.cache
def collected(name: str) -> Collected:
    """The messages of a golden capture."""
    return collect(path_of(name))
