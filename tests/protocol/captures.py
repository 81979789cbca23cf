"""The golden captures and their messages."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path

from protocol.events import Event, Failure, Message, Skipped
from tools.capture.connections import Connection, Connections, Options
from tools.capture.files import read_capture

FOLDER = Path(__file__).parents[1] / "data" / "captures"
NAMES = sorted(path.stem for path in FOLDER.glob("*.pcapng"))


@dataclass
class Collected:
    """All that was said in a capture, in its order."""

    connections: list[Connection] = field(default_factory=list)
    messages: list[tuple[Connection, Message]] = field(default_factory=list)
    others: list[Failure | Skipped] = field(default_factory=list)

    def opened(self, connection: Connection) -> None:
        self.connections.append(connection)

    def event(self, connection: Connection, event: Event) -> None:
        if isinstance(event, Message):
            self.messages.append((connection, event))
        else:
            self.others.append(event)

    def closed(self, connection: Connection) -> None:
        pass


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.pcapng"


def collect(path: Path) -> Collected:
    """The messages of a capture with all their bytes."""
    collected = Collected()
    Connections(collected, Options(keep=1 << 62)).run(read_capture(path))
    return collected


@functools.cache
def collected(name: str) -> Collected:
    """The messages of a golden capture."""
    return collect(path_of(name))
