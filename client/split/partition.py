"""Which rows of a weight go to which server.

The cut is ggml's tensor_split: each part gets its share of the rows, in order, on boundaries that
suit block formats and the kernels' tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Rows that kernels work on at once, on a processor's or a graphics card's tiles.
ROW_MULTIPLE = 32
# Into how many equal pieces attention's weights are cut, the first that suits, and the least rows
# of a piece: eight heads of keys, or five or three of the usual width and more.
_HEAD_COUNTS = ((8, 32), (5, 64), (3, 64))


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows ``first`` to ``last`` - 1."""

    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first


def partition(
    n_rows: int, proportions: Sequence[float], multiple: int = ROW_MULTIPLE
) -> list[Rows]:
    """Return the rows of each part; cut where whole multiples are nearest to the exact share.

    Proportions are non-negative and need not sum to anything. A part may come out empty, and the
    last one that has a share takes what is no whole multiple. ValueError if no part has a share.
    """
    if not proportions or min(proportions) < 0 or not sum(proportions) > 0:
        raise ValueError(f"no proportions: {list(proportions)}")
    total, done, first = float(sum(proportions)), 0.0, 0
    last_with_share = max(i for i, p in enumerate(proportions) if p > 0)
    parts = []
    for i, share in enumerate(proportions):
        done += share
        last = round(n_rows * done / total / multiple) * multiple
        last = n_rows if i >= last_with_share else min(max(last, first), n_rows)
        parts.append(Rows(first, last))
        first = last
    return parts


def attention_multiple(n_rows: int, block: int = ROW_MULTIPLE) -> int:
    """Return what cuts of a weight of attention are multiples of, in its rows or columns.

    ``block`` are the elements that can't be cut. Queries, keys, values and the output have to be
    cut in the same heads although they arrive one by one, and nothing says how many there are:
    equal pieces of each, as many as models often have heads of keys.
    """
    block = max(block, ROW_MULTIPLE)
    for count, least in _HEAD_COUNTS:
        if n_rows % (count * max(least, block)) == 0:
            return n_rows // count
    return block


@dataclass(frozen=True, slots=True)
class Extent:
    """``count`` pieces of ``size`` bytes, dense from ``at`` on in a part.

    In what they are cut from, counted from its first byte, the first piece begins at ``start`` and
    the next ``distance`` further on.
    """

    part: int
    at: int
    start: int
    count: int
    size: int
    distance: int

    def of(self, data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return the pieces in what they are cut from: a view (count, size)."""
        return np.lib.stride_tricks.as_strided(
            data[self.start :], (self.count, self.size), (self.distance, 1)
        )


def column_extents(edges: Sequence[Rows], row_bytes: int, offset: int, size: int) -> list[Extent]:
    """Return where ``size`` bytes from byte ``offset`` on of rows of ``row_bytes`` belong.

    ``edges`` are the bytes of a row that each part has; its rows are dense in the part. Bytes
    before the first whole row and behind the last are runs of their own.
    """
    found: list[Extent] = []
    at, end = offset, offset + size
    while at < end:
        row, inner = divmod(at, row_bytes)
        whole = (end - at) // row_bytes if inner == 0 else 0
        stop = at + whole * row_bytes if whole else min(end, (row + 1) * row_bytes)
        for i, edge in enumerate(edges):
            low = max(edge.first, inner)
            high = edge.last if whole else min(edge.last, inner + stop - at)
            if low < high:
                place = row * len(edge) + low - edge.first
                start = at - inner + low - offset
                found.append(Extent(i, place, start, max(whole, 1), high - low, row_bytes))
        at = stop
    return found


def row_extents(
    parts: Sequence[Rows], row_bytes: int, n_rows: int, offset: int, size: int
) -> list[Extent]:
    """Return where ``size`` bytes from byte ``offset`` on of a weight that is cut by rows belong.

    ``n_rows`` is ne1; a weight of three dimensions has every matrix cut alike. Each run is one
    piece.
    """
    found: list[Extent] = []
    matrix_bytes = row_bytes * n_rows
    if not matrix_bytes:
        return found
    for matrix in range(offset // matrix_bytes, -(-(offset + size) // matrix_bytes)):
        for i, rows in enumerate(parts):
            begin = matrix * matrix_bytes + rows.first * row_bytes
            end = begin + len(rows) * row_bytes
            low, high = max(begin, offset), min(end, offset + size)
            if low < high:
                at = matrix * len(rows) * row_bytes + low - begin
                found.append(Extent(i, at, low - offset, 1, high - low, high - low))
    return found
