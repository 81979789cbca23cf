"""What memory a split device has for a model, and what it tells.

Weights go to the parts in proportion to their shares; all else (norms, tables, activations, and the
KV cache unless a graph lets it lie with the heads) lies on the coordinator's machine. A client asks
once how much is free and decides by that one number what it loads, and nobody knows yet how much
of it will be weights. So what is told as free is what fits whatever the mixture::

    free  =  min(what this machine has,  least of (what a part has / its share))

Of two workers with 100 and 300 MiB and equal shares that is 200 MiB, and never more than the
coordinator's own memory, through which no weight goes but without which no model runs.

A single buffer may be larger, up to the larger of the two: somebody who knows that it is weights
(``-ngl`` without fitting) isn't kept from loading them.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from client.split.balance import usable as usable
from rpc_server.devices.cpu.machine import system_memory

# How long what the system says is believed. Clients ask up to 65 times while they fit a model.
_BELIEVED_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes for a model: ``parts`` are for weights, ``home`` is this machine's, for all else.

    ``shares`` are the proportions in which weights are cut, of parts that may be this machine too.
    ``unknown`` bytes have been given out and may still become either.
    """

    parts: Sequence[int]
    shares: Sequence[float]
    home: int
    unknown: int = 0

    @property
    def weights(self) -> int:
        """Return how many bytes of weights the parts have room for."""
        total = sum(self.shares)
        if not total > 0:
            return 0
        limits = [
            room * total / share
            for room, share in zip(self.parts, self.shares, strict=True)
            if share > 0
        ]
        return max(0, int(min(limits)) - self.unknown)

    @property
    def anything(self) -> int:
        """Return how many bytes fit, whatever they are."""
        return max(0, min(self.weights, self.home - self.unknown))

    @property
    def largest(self) -> int:
        """Return the size of the largest buffer there may be."""
        return max(0, self.weights, self.home - self.unknown)


class HomeMemory:
    """This machine's memory as it would be if no client held anything.

    What clients were given counts from then on, not from when they write to it.
    """

    def __init__(self) -> None:
        self._baseline = _resident()
        self._asked_at = 0.0
        # As of when it was asked for last.
        self.believed = self.total = 0

    def free(self, held: int) -> int:
        """Return free bytes while clients hold ``held``, none of them counted as taken."""
        now = time.monotonic()
        if not self._asked_at or now - self._asked_at > _BELIEVED_SECONDS:
            free, self.total = system_memory()
            # Of what clients hold the system misses only what they have written to.
            written = min(held, max(0, _resident() - self._baseline))
            self.believed = min(free + written, self.total)
            self._asked_at = now
        return self.believed


def _resident() -> int:
    """Return the bytes of memory that this process has, 0 where the system doesn't tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * mmap.PAGESIZE
