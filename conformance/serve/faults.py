"""What a scripted server does wrong on purpose: when, and how its answer then goes out."""

from __future__ import annotations

import enum
import random
import socket
import struct
import threading
import time
from dataclasses import dataclass

from protocol.commands import Command
from protocol.responses import encode_size

# Of a large answer so many bytes go out one by one; the rest in pieces of uneven lengths.
_DRIBBLED = 256
_PIECES = 50


class Mishap(enum.Enum):
    """A fault in an answer, or instead of one."""

    CLOSE = "closes the connection instead of answering"
    RESET = "resets the connection instead of answering"
    CUT = "closes the connection in the middle of the answer"
    CUT_SIZE = "closes the connection in the middle of the answer's size"
    LONG = "answers with a byte too many"
    SHORT = "answers with a byte too few"
    HUGE = "announces an answer of 2^62 bytes"
    SILENT = "never answers"
    DELAY = "answers late"
    DRIBBLE = "answers byte by byte"

    @property
    def fatal(self) -> bool:
        """True if no client can go on with the connection."""
        return self not in (Mishap.DELAY, Mishap.DRIBBLE)


@dataclass(frozen=True, slots=True)
class Fault:
    """Misbehave by ``how`` at a ``command`` (None: at every one that answers).

    ``number`` counts requests of this command from 1 in one run of a client; 0 means all of them.
    ``within`` asks for the middle of a SET_TENSOR's data; ``seconds`` is of DELAY.
    """

    how: Mishap
    command: Command | None = None
    number: int = 1
    within: bool = False
    seconds: float = 0.0

    def concerns(self, command: Command, number: int) -> bool:
        if self.command is None:
            return True
        return command is self.command and self.number in (0, number)


class Hangup(Exception):  # noqa: N818
    """The fault has ended the connection, or the server only watches it from here on."""

    def __init__(self, watch: bool) -> None:
        super().__init__()
        self.watch = watch


def send_answer(
    sock: socket.socket,
    payload: bytes | memoryview | None,
    fault: Fault | None,
    stop: threading.Event,
) -> None:
    """Send an answer (None: there is none) as the fault has it. Raises Hangup, OSError."""
    how = fault.how if fault is not None else None
    if how is Mishap.CLOSE or (how in (Mishap.CUT, Mishap.CUT_SIZE) and payload is None):
        raise Hangup(watch=False)
    if how is Mishap.RESET:
        reset(sock)
        raise Hangup(watch=False)
    if how is Mishap.SILENT:
        raise Hangup(watch=True)
    if how is Mishap.DELAY:
        assert fault is not None
        stop.wait(fault.seconds)
    if payload is None:
        return
    framed = encode_size(len(payload))
    if how is Mishap.CUT_SIZE:
        sock.sendall(framed[:5])
        raise Hangup(watch=False)
    if how is Mishap.CUT:
        # An empty answer has no middle but its size's end.
        body = bytes(payload)
        sock.sendall(framed + body[: len(body) // 2] if body else framed[:7])
        raise Hangup(watch=False)
    if how is Mishap.HUGE:
        sock.sendall(encode_size(1 << 62) + bytes(payload))
        raise Hangup(watch=True)
    if how in (Mishap.LONG, Mishap.SHORT):
        body = bytes(payload) + b"\0" if how is Mishap.LONG else bytes(payload)[:-1]
        sock.sendall(encode_size(len(body)) + body)
        raise Hangup(watch=True)
    if how is Mishap.DRIBBLE:
        _dribble(sock, framed + bytes(payload))
        return
    sock.sendall(framed)
    sock.sendall(payload)


def reset(sock: socket.socket) -> None:
    """Close so that the peer sees a reset instead of an end."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _dribble(sock: socket.socket, data: bytes) -> None:
    for at in range(min(len(data), _DRIBBLED)):
        sock.sendall(data[at : at + 1])
        if at < 8:
            # The first bytes arrive one by one for sure; later ones as the system joins them.
            time.sleep(0.001)
    rest = memoryview(data)[_DRIBBLED:]
    random_lengths = random.Random(len(data))
    while rest:
        n = random_lengths.randrange(1, max(2, len(data) // _PIECES))
        sock.sendall(rest[:n])
        rest = rest[n:]
