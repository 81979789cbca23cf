"""A view of a tensor that is cut over the parts, as each part has it.

A view is nothing but places in its root's memory: an offset, and a count and a stride of each
dimension. Which ops made it (RESHAPE, VIEW, PERMUTE, TRANSPOSE, one after the other) doesn't
matter, nor that its shape may be quite another than its root's. So one rule serves all of them.

The root is dense here. Cut along some dimension, its memory is a row of equal *periods*; of each of
them a part has the bytes between its edges, and has these dense, one period after the other:

    here      |--- part 0 ---|-- part 1 --|--- part 0 ---|-- part 1 --| ...
    part 1                   |-- part 1 --|-- part 1 --| ...

The elements of a view are spread over the parts in the same way if some of its dimensions step over
whole periods, the others stay within one, and one of these decides alone to which part an element
belongs. A view for which that isn't so, like one that cuts a head in two, has no slices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from client.split.partition import Rows
from protocol.tensor import Dims, Tensor
from rpc_server.ops.shards import Shard


@dataclass(frozen=True, slots=True)
class CutView:
    """A view whose elements lie on the parts as ``shard`` says.

    ``period`` and ``first_bytes`` (where each part's slice of a period begins) are the root's;
    ``offset`` is where the view begins in the root, ``nb`` its strides, all in bytes of what is
    here. ``block`` is how many elements a block of the type has.
    """

    shard: Shard
    period: int
    first_bytes: tuple[int, ...]
    offset: int
    ne: Dims
    nb: Dims
    block: int

    def shape(self, part: int) -> Dims:
        """Return ne of a part's slice."""
        ne = list(self.ne)
        ne[self.shard.dim] = len(self.shard.bounds[part])
        return ne[0], ne[1], ne[2], ne[3]

    def place(self, part: int, period: int) -> tuple[int, Dims]:
        """Return offset and strides in a part's slice of the root, with periods of ``period``."""
        steps = self.shard.bounds[part].first
        if self.shard.dim == 0:
            steps //= self.block
        periods, column = divmod(self.offset, self.period)
        column += steps * self.nb[self.shard.dim] - self.first_bytes[part]
        ne = self.shape(part)
        nb: list[int] = []
        for k, (n, stride) in enumerate(zip(self.ne, self.nb, strict=True)):
            if stride % self.period == 0:
                nb.append(stride // self.period * period)
            elif n > 1 or k == 0 or stride < self.period:
                nb.append(stride)
            else:
                # Nobody goes along this dimension: any stride will do, ggml's own is the usual.
                nb.append(nb[k - 1] * (ne[0] // self.block if k == 1 else ne[k - 1]))
        return periods * period + column, (nb[0], nb[1], nb[2], nb[3])


def cut_view(root: Tensor, shard: Shard, view: Tensor) -> CutView | None:
    """Return how ``view`` lies on the parts when ``root`` is cut as ``shard``; None: not at all."""
    if not root.contiguous or root.empty or view.empty or view.type is not root.type:
        return None
    offset = view.address - root.address
    if offset < 0 or offset + view.nbytes > root.nbytes:
        return None
    block, size = view.block_size, view.type_size
    if view.quantized and view.nb[0] != size:
        return None
    columns = _columns(root, shard)
    if columns is None:
        return None
    period, edges = columns
    # In blocks along the first dimension, in elements along the others.
    counts = (view.ne[0] // block, *view.ne[1:])
    inner = [k for k in range(4) if counts[k] > 1 and view.nb[k] % period]
    reach = {k: (counts[k] - 1) * view.nb[k] for k in inner}
    column = offset % period
    whole = sum(reach.values()) + size
    if column + whole > period:
        return None
    bounds, dim = None, 0
    for dim in sorted(inner, key=lambda k: -view.nb[k]):
        bounds = _bounds(edges, column, view.nb[dim], counts[dim], whole - reach[dim])
        if bounds is not None:
            break
    if not inner:
        bounds = _bounds(edges, column, period, 1, whole)
        bounds = bounds and [Rows(r.first * counts[0], r.last * counts[0]) for r in bounds]
    if bounds is None:
        return None
    if dim == 0:
        bounds = [Rows(r.first * block, r.last * block) for r in bounds]
    first_bytes = tuple(edge.first for edge in edges)
    cut = Shard(dim, tuple(bounds))
    return CutView(cut, period, first_bytes, offset, view.ne, view.nb, block)


def part_period(shard: Shard, part: int, nb: Dims) -> int:
    """Return the bytes from period to period in a part's slice of a root, which has strides nb."""
    dim = shard.dim
    return nb[dim + 1] if dim < 3 else len(shard.bounds[part]) * nb[3]


def _columns(root: Tensor, shard: Shard) -> tuple[int, list[Rows]] | None:
    """Return the bytes of a period, and those of it that each part has; None: parts of blocks."""
    if shard.dim == 0:
        block, size = root.block_size, root.type_size
        if any(edge % block for r in shard.bounds for edge in (r.first, r.last)):
            return None
        edges = [Rows(r.first // block * size, r.last // block * size) for r in shard.bounds]
        return root.row_size, edges
    unit = root.row_size * math.prod(root.ne[1 : shard.dim])
    return unit * root.ne[shard.dim], [Rows(r.first * unit, r.last * unit) for r in shard.bounds]


def _bounds(
    edges: list[Rows], column: int, stride: int, count: int, extent: int
) -> list[Rows] | None:
    """Return which of ``count`` pieces of ``extent`` bytes, from ``column`` on, each part has.

    None where a piece lies over an edge.
    """
    bounds: list[Rows] = []
    done = 0
    for edge in edges:
        last = done
        if len(edge) and edge.first <= column + done * stride:
            last = max(done, min(count, (edge.last - extent - column) // stride + 1))
        bounds.append(Rows(done, last))
        done = last
    return bounds if done == count else None
