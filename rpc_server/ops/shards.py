"""How a tensor lies over the parts of a split, and what ops make of sources that lie so.

A *shard* says: cut along one dimension, in these runs of elements, one for each part. A product of
a weight that is cut by rows is sharded along dimension 0; the rule in an op's row carries a shard
through the op, or gives up, and then the tensor is gathered. A rule may only say yes where every
part can compute its slice from its slices alone. Rules that several families share are here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from client.split.partition import Rows
from protocol.ggml.ops import Op
from protocol.ggml.types import TYPE_INFO
from protocol.tensor import Tensor


@dataclass(frozen=True, slots=True)
class Shard:
    """Cut along ``dim``; ``bounds`` in elements, one for each part."""

    dim: int
    bounds: tuple[Rows, ...]

    def scaled(self, dim: int, numerator: int, denominator: int) -> Shard | None:
        """Return the same cut counted in other units; None where it falls between two of them."""
        edges = [(rows.first * numerator, rows.last * numerator) for rows in self.bounds]
        if any(edge % denominator for pair in edges for edge in pair):
            return None
        bounds = tuple(Rows(a // denominator, b // denominator) for a, b in edges)
        return Shard(dim, bounds)


@dataclass(frozen=True, slots=True)
class Slice:
    """A source that is whole here and is needed by the parts: all of it, or cut as ``shard``."""

    source: int
    shard: Shard | None = None


@dataclass(frozen=True, slots=True)
class Propagated:
    """The result of a rule: the result's shard, and which whole sources the parts need."""

    shard: Shard
    needs: tuple[Slice, ...] = ()


Shards = Sequence[Shard | None]

# Ops on whole tensors that every part may compute alike, rather than wait for one of them: what
# lies between the blocks of a layer. It costs little beside a product, and is computed where the
# result is needed next.
REPEATED = frozenset(
    {
        Op.ADD,
        Op.SUB,
        Op.MUL,
        Op.DIV,
        Op.SCALE,
        Op.CLAMP,
        Op.UNARY,
        Op.GLU,
        Op.NORM,
        Op.RMS_NORM,
        Op.GET_ROWS,
    }
)


def _present(node: Tensor) -> list[int]:
    return [i for i, s in enumerate(node.src) if s is not None]


def _others_whole(node: Tensor, shards: Shards) -> tuple[Slice, ...] | None:
    """All sources but the first, if none of them is cut."""
    others = [i for i in _present(node) if i]
    if any(shards[i] is not None for i in others):
        return None
    return tuple(Slice(i) for i in others)


def elementwise_shard(node: Tensor, shards: Shards) -> Propagated | None:
    shard = next((s for s in shards if s is not None), None)
    if shard is None:
        return None
    needs = []
    for i in _present(node):
        source = node.src[i]
        assert source is not None
        if shards[i] is not None:
            if shards[i] != shard or source.ne[shard.dim] != node.ne[shard.dim]:
                return None
        elif source.ne[shard.dim] == 1:
            needs.append(Slice(i))
        elif source.ne[shard.dim] == node.ne[shard.dim] and in_whole_blocks(source, shard):
            needs.append(Slice(i, shard))
        else:
            return None
    return Propagated(shard, tuple(needs))


def in_whole_blocks(t: Tensor, shard: Shard) -> bool:
    if shard.dim:
        return True
    block = TYPE_INFO[t.type].block_size
    return all(r.first % block == 0 and r.last % block == 0 for r in shard.bounds)


def shard_by_rows(node: Tensor, shards: Shards) -> Propagated | None:
    """Shard by rows, each by itself, with parameters that all rows share."""
    needs = _others_whole(node, shards)
    if shards[0] is None or shards[0].dim == 0 or needs is None:
        return None
    return Propagated(shards[0], needs)
