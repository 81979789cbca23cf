"""Weights that are cut over the parts: which, where, and how their bytes lie there."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from client.backend import BackendBuffer
from client.split.partition import (
    ROW_MULTIPLE,
    Extent,
    Rows,
    attention_multiple,
    column_extents,
    row_extents,
)
from protocol.ggml.ops import Op
from protocol.tensor import Tensor
from rpc_server.devices.split.worker import Worker

Bytes = npt.NDArray[np.uint8]

# What arrives in one go before it goes on to the workers.
CHUNK = 4 << 20
# Smaller ones aren't worth an exchange.
_LEAST_BYTES = 64 << 10
_LEAST_ROWS = 64
# Matrices by name that are no operand of a product: tables that rows are taken from, convolutions.
# One that is missing here is brought back when a graph shows it, which costs its memory twice.
_NO_PRODUCT = re.compile(r"norm|rope|conv|position_embd|pos_embd|token_types|rel_pos|ssm_[ad]\b")


_BY_COLUMNS = re.compile(r"\.(ffn_down|attn_output)(_exps|_shexp)?\.weight$")
_ATTENTION = re.compile(r"\.attn_(q|k|v|output)\.weight$")


def is_split(t: Tensor) -> bool:
    """Return whether a tensor that is uploaded is a weight to be cut: by name, shape and size."""
    return (
        t.op is Op.NONE
        and t.name.endswith(".weight")
        and _NO_PRODUCT.search(t.name) is None
        and t.contiguous
        and t.ne[1] >= _LEAST_ROWS
        and t.ne[3] == 1
        and t.nbytes >= _LEAST_BYTES
    )


def packed(run: Extent, memory: Bytes) -> Bytes:
    """Return where a run lies in a part's ``memory``: a view (count, size)."""
    return memory[run.at : run.at + run.count * run.size].reshape(run.count, run.size)


def is_cut_by_columns(name: str) -> bool:
    """Return whether a weight multiplies what other products make, so that parts can go on with
    theirs.
    """
    return _BY_COLUMNS.search(name) is not None


def cut_multiple(t: Tensor, axis: int, *, heads: bool) -> int:
    """Return what cuts of a weight are multiples of, in rows or columns.

    With ``heads`` those of attention are cut in whole heads where that is possible. Weights of one
    block (gate, up and down; q, k, v and output) are cut alike although they arrive one by one: the
    same share of each.
    """
    if heads and _ATTENTION.search(t.name):
        return attention_multiple(t.ne[axis], t.block_size)
    return max(ROW_MULTIPLE, t.block_size)


@dataclass(slots=True)
class Part:
    """The slice of a split tensor on one worker."""

    worker: Worker
    tensor: Tensor
    buffer: BackendBuffer


@dataclass(slots=True, eq=False)
class ShardedWeight:
    """One split tensor: ``cuts`` of each part along ``axis`` (1: rows, 0: columns).

    ``start`` is its offset in the buffer, ``address`` the host's, ``parts`` where the slices are
    (None: empty, or this server's). ``gathered`` once all of it is here too. ``is_cache`` tells a
    tensor that graphs write. While ``packed``, this server's slice lies dense from the tensor's
    first byte on, as on a worker; else its bytes are where the whole tensor has them.
    """

    tensor: Tensor
    start: int
    axis: int
    cuts: list[Rows]
    parts: list[Part | None]
    local: int | None
    address: int
    is_cache: bool = False
    packed: bool = False
    gathered: bool = False
    # Whether graphs use it here, gathered, because a part has no memory to work with it.
    used_here: bool = False

    @property
    def local_bytes(self) -> int:
        """Bytes of the slice that this server works on itself."""
        if self.local is None:
            return 0
        return self.tensor.nbytes * len(self.cuts[self.local]) // self.tensor.ne[self.axis]

    @property
    def bytes_here(self) -> int:
        """Bytes of it that this server keeps."""
        return self.tensor.nbytes if self.gathered else self.local_bytes

    @property
    def local_row_count(self) -> int:
        """Return how many rows, or parts of rows, this server works on itself."""
        if self.local is None or not len(self.cuts[self.local]):
            return 0
        rows = len(self.cuts[self.local]) if self.axis else self.tensor.ne[1]
        return rows * self.tensor.ne[2]

    def shape(self, part: int) -> tuple[int, int, int, int]:
        """Return the ne of a part's slice."""
        ne = list(self.tensor.ne)
        ne[self.axis] = len(self.cuts[part])
        return (ne[0], ne[1], ne[2], ne[3])

    def runs(self, offset: int, size: int) -> list[Extent]:
        """Return where bytes of the tensor lie."""
        t = self.tensor
        if self.axis:
            return row_extents(self.cuts, t.row_size, t.ne[1], offset, size)
        edges = [
            Rows(*(t.type_size * n // t.block_size for n in (c.first, c.last))) for c in self.cuts
        ]
        return column_extents(edges, t.row_size, offset, size)

    def here(self, run: Extent, memory: Bytes, offset: int) -> Bytes:
        """Return where this server has a run of :meth:`runs` from ``offset`` on.

        It is a view (count, size). ``memory`` is the tensor's place here, all of it.
        """
        return packed(run, memory) if self.packed else run.of(memory[offset:])

    def step(self, offset: int, left: int) -> int:
        """Return how many of ``left`` bytes from ``offset`` on are taken at once.

        Whole rows where it is possible, so that slices of rows are found by strides.
        """
        row = self.tensor.row_size
        return min(left, -offset % row or max(CHUNK // row * row, row))

    def within(self, start: int, size: int) -> bool:
        """Return whether all of it lies in this range of the buffer."""
        return start <= self.start and self.start + self.tensor.nbytes <= start + size

    def overlap(self, start: int, size: int) -> tuple[int, int]:
        """Return the part of a range that is its own, as start and size."""
        low = max(start, self.start)
        return low, min(start + size, self.start + self.tensor.nbytes) - low

    def require(self) -> None:
        """Raise WorkerLost if slices of it are gone."""
        for part in self.parts:
            if part is not None:
                part.worker.require()
