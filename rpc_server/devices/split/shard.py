"""How a tensor lies over the parts, and what each op makes of sources that lie so.

A *shard* says: cut along one dimension, in these runs of elements, one for each part. A product of
a weight that is cut by rows is sharded along dimension 0; each rule below carries a shard through
one op, or gives up, and then the tensor is gathered. A rule may only say yes where every part can
compute its slice from its slices alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from client.split.partition import Rows
from protocol.ggml.ops import Op
from protocol.ggml.types import TYPE_INFO
from rpc_server.graph.tensor import Tensor


@dataclass(frozen=True, slots=True)
class Shard:
    """Cut along ``dim``; ``bounds`` in elements, one for each part."""

    dim: int
    bounds: tuple[Rows, ...]

    def scaled(self, dim: int, numerator: int, denominator: int) -> Shard | None:
        """The same cut counted in other units; None where it falls between two of them."""
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
    """What a rule gives: the result's shard, and which whole sources the parts need."""

    shard: Shard
    needs: tuple[Slice, ...] = ()


Shards = Sequence[Shard | None]
Rule = Callable[[Tensor, Shards], Propagated | None]


def propagate(node: Tensor, shards: Shards) -> Propagated | None:
    """Apply the rule of the node's op; ``shards`` are those of its sources (None: whole).

    Views have no rule: they are looked up where they are read, see ``views``.
    """
    rule = _RULES.get(node.op)
    if rule is None or node.empty or any(s is not None and s.empty for s in node.src):
        return None
    return rule(node, shards)


def _present(node: Tensor) -> list[int]:
    return [i for i, s in enumerate(node.src) if s is not None]


def _others_whole(node: Tensor, shards: Shards) -> tuple[Slice, ...] | None:
    """All sources but the first, if none of them is cut."""
    others = [i for i in _present(node) if i]
    if any(shards[i] is not None for i in others):
        return None
    return tuple(Slice(i) for i in others)


def _elementwise(node: Tensor, shards: Shards) -> Propagated | None:
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
        elif source.ne[shard.dim] == node.ne[shard.dim] and _whole_blocks(source, shard):
            needs.append(Slice(i, shard))
        else:
            return None
    return Propagated(shard, tuple(needs))


def _whole_blocks(t: Tensor, shard: Shard) -> bool:
    if shard.dim:
        return True
    block = TYPE_INFO[t.type].block_size
    return all(r.first % block == 0 and r.last % block == 0 for r in shard.bounds)


def _glu(node: Tensor, shards: Shards) -> Propagated | None:
    # Without a second source both halves lie in one row, which a cut along rows doesn't respect.
    if node.src[1] is None and shards[0] is not None and shards[0].dim == 0:
        return None
    return _elementwise(node, shards)


def _copy(node: Tensor, shards: Shards) -> Propagated | None:
    # A copy into another tensor writes memory that is whole here; ggml_cast and ggml_cont don't.
    if node.src[1] is not None or node.view_src is not None:
        return None
    source, shard = node.src[0], shards[0]
    if source is None or shard is None or source.ne != node.ne or not _whole_blocks(node, shard):
        return None
    return Propagated(shard)


def _by_rows(node: Tensor, shards: Shards) -> Propagated | None:
    """Each row by itself, with parameters that all rows share."""
    needs = _others_whole(node, shards)
    if shards[0] is None or shards[0].dim == 0 or needs is None:
        return None
    return Propagated(shards[0], needs)


def _rope(node: Tensor, shards: Shards) -> Propagated | None:
    # Dimension 2 counts positions.
    return _by_rows(node, shards) if shards[0] is not None and shards[0].dim == 1 else None


def _flash_attention(node: Tensor, shards: Shards) -> Propagated | None:
    q, k, v, mask, sinks = node.src[:5]
    if q is None or k is None or v is None or any(s is None or s.dim != 2 for s in shards[:3]):
        return None
    heads, kv = shards[0], shards[1]
    assert heads is not None
    assert kv is not None
    # With ALiBi what a head computes depends on its number.
    if shards[2] != kv or node.param_f32(1) != 0.0 or kv.scaled(2, q.ne[2], k.ne[2]) != heads:
        return None
    needs = []
    if mask is not None:
        if shards[3] is not None or mask.ne[2] != 1:
            return None
        needs.append(Slice(3))
    if sinks is not None:
        if shards[4] is not None:
            return None
        needs.append(Slice(4, Shard(0, heads.bounds)))
    return Propagated(Shard(1, heads.bounds), tuple(needs))


_RULES: dict[Op, Rule] = {
    **dict.fromkeys(
        (Op.ADD, Op.SUB, Op.MUL, Op.DIV, Op.UNARY, Op.SCALE, Op.CLAMP, Op.SQR, Op.SQRT),
        _elementwise,
    ),
    Op.GLU: _glu,
    Op.CPY: _copy,
    Op.CONT: _copy,
    Op.NORM: _by_rows,
    Op.RMS_NORM: _by_rows,
    Op.L2_NORM: _by_rows,
    Op.ROPE: _rope,
    Op.FLASH_ATTN_EXT: _flash_attention,
}
