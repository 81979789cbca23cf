"""What went over the connections of a case, in order, as bytes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from protocol.dialects import Dialect

# Of one message the first bytes are kept: a report shows no more of it.
KEPT = 8 << 10
# Of a case so many messages: a pipelined thousand says no more than its first hundreds.
MOST_MESSAGES = 400


@dataclass(slots=True)
class TranscriptMessage:
    """One message or piece of the stream.

    ``data`` are its first KEPT bytes of ``size``; ``command`` is the request's name, of an answer
    that of what it answers, empty where that isn't known. ``note`` says what is no bytes: the end
    of the stream.
    """

    peer: str
    sent: bool
    command: str = ""
    data: bytes = b""
    size: int = 0
    note: str = ""
    seconds: float = 0.0

    def extend(self, data: bytes | bytearray | memoryview) -> None:
        room = KEPT - len(self.data)
        if room > 0:
            self.data += bytes(data[:room])
        self.size += len(data)


@dataclass(slots=True)
class Transcript:
    """The messages of a case; ``left_out`` counts those over MOST_MESSAGES."""

    messages: list[TranscriptMessage] = field(default_factory=list)
    left_out: int = 0
    # By the name of a connection, what it speaks: the bytes are read by that.
    dialects: dict[str, Dialect] = field(default_factory=dict)
    _start: float = field(default_factory=time.monotonic)

    def add(self, peer: str, *, sent: bool, command: str = "", note: str = "") -> TranscriptMessage:
        """Add a message, to be extended by its bytes."""
        message = TranscriptMessage(
            peer, sent, command, note=note, seconds=time.monotonic() - self._start
        )
        if len(self.messages) < MOST_MESSAGES:
            self.messages.append(message)
        else:
            self.left_out += 1
        return message
