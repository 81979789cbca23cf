"""Windows that slide over samples: which element of a window lies on which sample.

All that convolutions, pools and paddings have in common. Numbers off the wire are only ever Python
integers here, and become slices that lie inside their arrays: strides, paddings and dilations of
any size neither wrap nor make work or memory larger than what they select.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rpc_server.ops.slices import tiles

Tap = tuple[int, ...]
Slices = tuple[slice, ...]
_NOTHING = slice(0, 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Axis:
    """One dimension: a window of ``taps`` elements at ``places`` places over ``samples`` samples.

    Element ``k`` of the window at place ``o`` lies on sample ``o * stride + k * dilation -
    padding``, which may be outside. ``stride`` is positive, padding and dilation are any numbers.
    """

    samples: int
    taps: int
    places: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    def seen(self, tap: int) -> tuple[slice, slice]:
        """Return (places, samples) where element ``tap`` of the window is inside, equally many."""
        offset = tap * self.dilation - self.padding
        first = max(0, -(offset // self.stride))
        end = min(self.places, (self.samples - 1 - offset) // self.stride + 1)
        if first >= end:
            return _NOTHING, _NOTHING
        start, last = (place * self.stride + offset for place in (first, end - 1))
        return slice(first, end), slice(start, last + 1, self.stride)

    def reachable(self) -> range:
        """Return the elements of the window that are ever inside: work grows with no others."""
        low, high = self.padding - (self.places - 1) * self.stride, self.padding + self.samples - 1
        step = self.dilation
        if step == 0:
            return range(self.taps if low <= 0 <= high else 0)
        if step < 0:
            low, high, step = -high, -low, -step
        return range(max(-(-low // step), 0), min(high // step + 1, self.taps))

    def under(self, place: int) -> slice:
        """Return the samples under the window at ``place``, which has no dilation."""
        start = place * self.stride - self.padding
        low = max(start, 0)
        return slice(low, max(min(start + self.taps, self.samples), low))

    def part(self, places: range) -> Axis:
        """Return some consecutive places as if they were all."""
        padding = self.padding - places.start * self.stride
        return dataclasses.replace(self, places=len(places), padding=padding)


def each_tap(axes: Sequence[Axis]) -> Iterator[tuple[Tap, Slices, Slices]]:
    """Yield elements of the window that are ever inside, with :meth:`Axis.seen` of each axis."""
    if any(0 in (axis.samples, axis.taps, axis.places) for axis in axes):
        # What is empty in one dimension takes no memory, of whatever size it is in others.
        return
    inside = [
        [(tap, *seen) for tap in axis.reachable() if (seen := axis.seen(tap))[0] != _NOTHING]
        for axis in axes
    ]
    for chosen in itertools.product(*inside):
        taps, places, samples = zip(*chosen, strict=True)
        yield taps, places, samples


def gather(x: Any, axes: Sequence[Axis], columns: Any) -> None:
    """Gather ``columns`` (N, C, *taps, *places) from ``x`` (N, C, *samples).

    It is 0 where that is outside.
    """
    columns[...] = 0
    for tap, places, samples in each_tap(axes):
        columns[(slice(None), slice(None), *tap, *places)] = x[(..., *samples)]


def scatter(columns: Callable[[Tap], Any], axes: Sequence[Axis], x: Any) -> None:
    """Do the reverse: sum up in ``x`` (N, C, *samples) what ``columns`` has for each sample.

    ``columns`` gives the (N, C, *places) of one element of the window.
    """
    x[...] = 0
    for tap, places, samples in each_tap(axes):
        x[(..., *samples)] += columns(tap)[(..., *places)]


def boxes(shape: Sequence[int], width: int) -> Iterator[tuple[range, ...]]:
    """Yield an array's indices in parts, each bounded in size for ``width`` elements an index."""
    if not shape:
        yield ()
        return
    outer, *inner = shape
    for part in tiles(outer, max(width, 1) * math.prod(inner)):
        rest = boxes(inner, width) if len(part) == 1 else [tuple(map(range, inner))]
        for ranges in rest:
            yield part, *ranges
