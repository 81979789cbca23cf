"""Memory for tensors that are needed one after the other: what is over makes room for others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_ALIGN = 128


@dataclass(frozen=True, slots=True)
class Lifetime:
    """``size`` bytes that are in use from time ``first`` to ``last``, both included."""

    size: int
    first: int
    last: int


def place_lifetimes(wanted: Sequence[Lifetime]) -> tuple[list[int], int]:
    """Return an offset for each, aligned, and the bytes that all of them take.

    No two that are in use at one time lie over one another. Each gets the first gap that it fits
    into, in the order in which they begin, the larger first.
    """
    offsets, total = [0] * len(wanted), 0
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i].first, -wanted[i].size))
    # Start, end and last time of what is in use, by start.
    used: list[tuple[int, int, int]] = []
    for i in order:
        one = wanted[i]
        used = [place for place in used if place[2] >= one.first]
        size = -(-one.size // _ALIGN) * _ALIGN
        at, before = 0, 0
        while before < len(used) and used[before][0] - at < size:
            at = used[before][1]
            before += 1
        used.insert(before, (at, at + size, one.last))
        offsets[i] = at
        total = max(total, at + size)
    return offsets, total
