"""What goes into the capture: every connection's packets, until the file may not grow any more.

Recording never disturbs the connections. When the file has reached its limit or can't be written it
ends with the last whole packet, ``stopped`` says why, and what comes after is counted only.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path

from protocol.observe.events import Side
from tools.record.frames import Address, Frame, TcpFrames
from tools.record.pcapng import PcapngWriter

# So much is written at once; what is less waits for the next call of flush.
_FLUSH_AT = 256 << 10


class Recorder:
    """Writes connections to a new capture at ``path``; parameters as of PcapngWriter."""

    def __init__(self, path: Path, *, comment: str = "", limit: int | None = None) -> None:
        self.path = path
        # Why nothing is written any more; empty while recording.
        self.stopped = ""
        # Whether it stopped because of an error.
        self.failed = False
        self.dropped = 0
        self._limit = limit
        self._writer = PcapngWriter(path, comment=comment, limit=limit)
        self._closed = False

    @property
    def size(self) -> int:
        """Bytes of the capture."""
        return self._writer.size

    def opened(self, client: Address, server: Address, time_ns: int) -> RecordedConnection:
        """Count a client that has been connected to a server."""
        connection = RecordedConnection(self, TcpFrames(client, server))
        self._add(connection.frames.opened(), time_ns)
        return connection

    def refused(self, client: Address, server: Address, time_ns: int) -> None:
        """Count a client for which the server could not be reached."""
        self._add(TcpFrames(client, server).refused(), time_ns)

    def flush(self) -> None:
        """Write what is waiting."""
        if not self._closed and not self.stopped:
            try:
                self._writer.flush()
            except OSError as error:
                self._fail(error)

    def close(self) -> None:
        """End the file."""
        if self._closed:
            return
        self._closed = True
        if self.failed:
            self._writer.abandon()
            return
        try:
            self._writer.close(self.dropped)
        except OSError as error:
            self._fail(error)

    def _add(self, frames: Iterable[Frame], time_ns: int) -> None:
        for frame in frames:
            if self.stopped or self._closed:
                self.dropped += 1
            elif not self._writer.packet(time_ns, *frame):
                self.dropped += 1
                self.flush()
                if not self.stopped:
                    self.stopped = f"it has reached its limit of {self._limit} bytes"
        if self._writer.pending >= _FLUSH_AT:
            self.flush()

    def _fail(self, error: OSError) -> None:
        self.failed = True
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        self.stopped = "the disk is full" if full else f"it can't be written ({error.strerror})"


class RecordedConnection:
    """One connection of a recording."""

    def __init__(self, recorder: Recorder, frames: TcpFrames) -> None:
        self._recorder = recorder
        self.frames = frames

    def data(self, side: Side, data: bytes, time_ns: int) -> None:
        """Take ``data``, which ``side`` sent."""
        if self._recorder.stopped:
            self._recorder.dropped += 1
            return
        self._recorder._add(self.frames.data(side, data), time_ns)

    def ended(self, side: Side, time_ns: int) -> None:
        """Take note that ``side`` sends nothing more."""
        self._recorder._add(self.frames.ended(side), time_ns)

    def reset(self, side: Side, time_ns: int) -> None:
        """Take note that ``side`` has broken the connection off."""
        self._recorder._add(self.frames.reset(side), time_ns)
