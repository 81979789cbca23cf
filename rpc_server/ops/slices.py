"""Parts of tensors as tensors: how references keep what they decode at a time small."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from protocol.tensor import Tensor

# Bytes of float32 that a reference decodes or computes at a time, unless one row takes more.
_BYTES_AT_ONCE = 16 << 20


def rows_of(t: Tensor, i3: int, i2: int, rows: range) -> Tensor:
    """Return consecutive ``rows`` of one matrix of ``t``, all of them within its dimensions."""
    offset = rows.start * t.nb[1] + i2 * t.nb[2] + i3 * t.nb[3]
    return dataclasses.replace(t, ne=(t.ne[0], len(rows), 1, 1), address=t.address + offset)


def tiles(count: int, width: int) -> Iterator[range]:
    """Yield range(count) in consecutive parts, each bounded for rows of ``width`` elements."""
    step = max(_BYTES_AT_ONCE // (4 * max(width, 1)), 1)
    for start in range(0, count, step):
        yield range(start, min(start + step, count))
