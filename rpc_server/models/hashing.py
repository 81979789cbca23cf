"""Hashes of all tensors of a file, several at a time and at a pace that leaves clients alone.

FNV-1a takes one byte after the other, and each waits for the one before: a processor is mostly idle
meanwhile. Several tensors side by side fill these gaps, so that one core hashes as fast as a good
disk reads. While clients compute, the work takes a small share of one core.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from protocol.ggml.hashing import FNV_OFFSET
from rpc_server.models.files import read_at
from rpc_server.models.header import FilePlace

# Bytes that are read of one tensor before the next one's turn.
_CHUNK = 1 << 20
# The share of a core that hashing may take while clients compute.
_SHARE = 0.04
# How long after their last work clients still count as computing.
_QUIET_SECONDS = 2.0


class HashLanes(Protocol):
    """Goes on with several hashes at once."""

    # How many there are at most.
    width: int

    def __call__(self, rows: npt.NDArray[np.uint8], size: int, values: Sequence[int]) -> list[int]:
        """Return ``values``, each gone on from over ``size`` bytes of its row (width, n)."""
        ...


class StoppedError(Exception):
    """The work is no longer wanted."""


class Pace:
    """Lets work on the calling thread go on at full speed, or slowly while clients compute.

    ``work`` counts what clients have had done: it grows while they compute. ``sleep`` waits so
    many seconds and returns whether the work is to end.
    """

    def __init__(self, work: Callable[[], int], sleep: Callable[[float], bool]) -> None:
        self._work = work
        self._sleep = sleep
        self._seen = work()
        self._busy_until = 0.0
        self._used = time.thread_time()

    def rest(self) -> None:
        """Wait as long as what was done since the last call asks for. Raises StoppedError."""
        used = time.thread_time()
        spent, self._used = used - self._used, used
        now, count = time.monotonic(), self._work()
        if count != self._seen:
            self._seen, self._busy_until = count, now + _QUIET_SECONDS
        if self._sleep(spent * (1 / _SHARE - 1) if now < self._busy_until else 0.0):
            raise StoppedError


@dataclass(slots=True)
class _Turn:
    """A tensor that is being hashed."""

    number: int
    at: int
    left: int
    value: int = FNV_OFFSET


def hash_places(
    file: BinaryIO, places: Sequence[FilePlace], lanes: HashLanes, between: Callable[[int], None]
) -> list[int]:
    """Return the FNV-1a 64 of each place's bytes.

    ``between`` is called now and then with the number of bytes done since; what it raises ends the
    work. Raises OSError; EOFError for a file that ends too early.
    """
    rows = np.empty((lanes.width, _CHUNK), np.uint8)
    hashes = [0] * len(places)
    # Small ones last: the pieces of all are as long as the shortest one's rest.
    order = sorted(range(len(places)), key=lambda i: (places[i].size < _CHUNK, places[i].offset))
    waiting = iter([_Turn(i, places[i].offset, places[i].size) for i in order])
    turns: list[_Turn] = []
    while True:
        while len(turns) < lanes.width and (turn := next(waiting, None)) is not None:
            turns.append(turn)
        if not turns:
            return hashes
        n = min(_CHUNK, *(turn.left for turn in turns))
        for row, turn in zip(rows, turns, strict=False):
            if not read_at(file, turn.at, row[:n].data):
                raise EOFError
        values = lanes(rows, n, [turn.value for turn in turns])
        for turn, value in zip(turns, values, strict=True):
            turn.value, turn.at, turn.left = value, turn.at + n, turn.left - n
            hashes[turn.number] = value
        between(n * len(turns))
        turns = [turn for turn in turns if turn.left]
