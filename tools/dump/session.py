"""Saving the connections of ggml RPC out of a larger capture."""

from __future__ import annotations

from pathlib import Path

from tools.capture.connections import CapturedConnection
from tools.capture.errors import CaptureError
from tools.capture.files import CaptureWriter, Frame
from tools.dump.filters import Filters


class SessionWriter:
    """Writes the packets of the wanted connections into a pcapng file, as they were captured."""

    def __init__(self, path: Path, filters: Filters) -> None:
        try:
            self._file = path.open("wb")
        except OSError as error:
            raise CaptureError(f"{path}: {error.strerror}") from None
        self._writer = CaptureWriter(self._file)
        self._filters = filters
        self.connections: set[int] = set()
        self.packets = 0

    def frame(self, connection: CapturedConnection, frame: Frame) -> None:
        if self._filters.wants(connection):
            self.connections.add(connection.number)
            self.packets += 1
            self._writer.write(frame)

    def close(self) -> None:
        self._file.close()
