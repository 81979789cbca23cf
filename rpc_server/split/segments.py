"""Which nodes of a graph the parts compute, and between which points they talk to this server.

A *segment* begins with one or more products of split weights that read the same whole tensor. It is
sent to the parts; nodes that the parts can go on with by themselves (see ``shard``) belong to the
segment too, and so does a product with a weight cut by columns, whose partial results are summed
here. What other nodes read of a segment is gathered.

With rows alone every product is its own end: q, k and v share a segment, so do gate and up. In
tensor mode a segment is a whole feed-forward or attention block, and a layer has two of them.

Results are taken off the stream where the graph has their nodes, so that what lies between runs
while the parts compute, and no memory is needed for results that wait.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from protocol.ggml_ops import VIEWS, Op, TensorFlag
from protocol.ggml_types import TYPE_INFO, GgmlType
from rpc_server.graph.tensor import Tensor
from rpc_server.ops.table import OPS
from rpc_server.split.exchange import Receive, Send, Transfer
from rpc_server.split.shard import Carried, Shard, Slice, carry
from rpc_server.split.weights import SplitStorage, SplitWeight

_PRODUCTS = frozenset({Op.MUL_MAT, Op.MUL_MAT_ID})


@dataclass(slots=True, eq=False)
class Input:
    """A whole tensor that the parts need, cut as ``shard`` or not at all.

    ``kept`` if later segments need it too: it is sent once in a run.
    """

    tensor: Tensor
    shard: Shard | None
    kept: bool = False

    @property
    def key(self) -> tuple[int, Shard | None]:
        return id(self.tensor), self.shard


@dataclass(slots=True, eq=False)
class Segment:
    """``nodes`` are what the parts compute, in order; ``outputs`` those whose results come back."""

    inputs: dict[tuple[int, Shard | None], Input] = field(default_factory=dict)
    nodes: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    opened_at: int = 0


@dataclass(slots=True)
class Found:
    """``shards`` by id() of the tensors that are cut; a node that is among ``partial`` is a sum.

    ``weights`` are the split tensors by the id() of what uses them: the node of a product, of a
    SET_ROWS into a cache, the leaf of a cache. ``whole`` are weights that some node reads here.
    ``written`` are weights that a node here writes to, or caches that one reads or writes;
    ``caches`` are tensors to be cut: while there are any of these, nothing else is valid.
    """

    segments: list[Segment]
    shards: dict[int, Shard]
    partial: set[int]
    weights: dict[int, SplitWeight]
    whole: list[tuple[SplitStorage, SplitWeight]]
    written: list[tuple[SplitStorage, SplitWeight]]
    caches: list[tuple[SplitStorage, Tensor, Shard]]


class WeightIndex:
    """Finds the split tensor, or the storage, that an address lies in.

    ``tried`` are tensors to be looked upon as if they were split.
    """

    def __init__(
        self,
        storages: Iterable[SplitStorage],
        tried: Iterable[tuple[SplitStorage, SplitWeight]] = (),
    ) -> None:
        self._storages = list(storages)
        found = [(w.address, s, w) for s in self._storages for w in s.weights]
        found += [(w.address, s, w) for s, w in tried]
        self._weights = sorted(found, key=lambda entry: entry[0])
        self._starts = [start for start, _, _ in self._weights]

    def __bool__(self) -> bool:
        return bool(self._weights)

    def find(self, address: int) -> tuple[SplitStorage, SplitWeight, int] | None:
        """Storage, weight, and offset in the weight."""
        i = bisect.bisect_right(self._starts, address) - 1
        if i < 0:
            return None
        start, storage, weight = self._weights[i]
        offset = address - start
        return (storage, weight, offset) if offset < weight.tensor.nbytes else None

    def overlapping(self, t: Tensor) -> list[tuple[SplitStorage, SplitWeight]]:
        """Weights of which some bytes are part of ``t``, too."""
        found = []
        i = bisect.bisect_left(self._starts, t.address + t.nbytes) - 1
        while i >= 0 and self._starts[i] + self._weights[i][2].tensor.nbytes > t.address:
            found.append(self._weights[i][1:])
            i -= 1
        return found

    def storage(self, t: Tensor) -> SplitStorage | None:
        """The storage that holds all of ``t``."""
        for s in self._storages:
            if s.address <= t.address and t.address + t.nbytes <= s.address + s.size:
                return s
        return None


def find_segments(
    items: Sequence[Tensor | Transfer],
    index: WeightIndex,
    *,
    chain: bool,
    counted: bool,
) -> Found:
    """Segments of a graph.

    ``chain``: let the parts go on by themselves (tensor mode). ``counted``: tensors carry their
    use_count, without which nobody knows whether something outside this graph reads one.
    """
    finder = _Finder(items, index, chain, counted)
    for position, item in enumerate(items):
        finder.take(position, item)
    finder.finish()
    return finder.found


class _Finder:
    def __init__(
        self, items: Sequence[Tensor | Transfer], index: WeightIndex, chain: bool, counted: bool
    ) -> None:
        self._index = index
        self._chain = chain
        self._counted = counted
        self.found = Found([], {}, set(), {}, [], [], [])
        self._current: Segment | None = None
        self._position = 0
        # When a tensor's value is there: the position of its node; leaves are there from the start.
        self._computed: dict[int, int] = {}
        self._users: dict[int, list[Tensor]] = {}
        self._segment_of: dict[int, Segment] = {}
        self._mutated: set[int] = set()
        self._whole: dict[int, tuple[SplitStorage, SplitWeight]] = {}
        self._written: dict[int, tuple[SplitStorage, SplitWeight]] = {}
        for i, t in enumerate(items):
            if isinstance(t, Tensor):
                if t.op not in VIEWS:
                    self._computed[id(t)] = i
                    if t.view_src is not None:
                        self._mutated.add(id(t.view_src))
                for s in t.src:
                    if s is not None:
                        self._users.setdefault(id(s), []).append(t)

    # -- one item

    def take(self, position: int, item: Tensor | Transfer) -> None:
        self._position = position
        if not isinstance(item, Tensor):
            self._current = None
            self._touch(
                item.tensors if isinstance(item, Send) else (),
                [item.tensor] if isinstance(item, Receive) else (),
            )
            return
        if not self._product(item) and not (self._chain and self._continue(item)):
            self._home(item)

    def _product(self, node: Tensor) -> bool:
        weight, x = node.src[0], node.src[1]
        if node.op not in _PRODUCTS or weight is None or x is None or node.empty:
            return False
        entry = self._index.find(weight.address)
        if entry is None or entry[2]:
            return False
        split = entry[1]
        stored = split.tensor
        plain = (
            (weight.type, weight.ne, weight.nb) == (stored.type, stored.ne, stored.nb)
            and node.type is GgmlType.F32
            and node.contiguous
            and x.type is GgmlType.F32
        )
        if not plain:
            return False
        cut = Shard(0, tuple(split.cuts))
        known = self._shard(x) if self._in_current(x) else None
        if split.axis == 0 and known is not None and known == cut:
            # The parts have their columns' activations already.
            needs = [Slice(i) for i in (2,) if node.src[i] is not None]
            return self._join(node, Carried(cut, tuple(needs)), split, partial=True)
        usable = all(
            s.contiguous_rows and not s.empty and self._index.find(s.address) is None
            for s in node.src[1:3]
            if s is not None
        )
        if not usable:
            return False
        inputs = [Slice(1, cut if split.axis == 0 else None)]
        inputs += [Slice(2)] if node.src[2] is not None else []
        return self._open_or_join(node, Carried(cut, tuple(inputs)), split)

    def _open_or_join(self, node: Tensor, carried: Carried, split: SplitWeight) -> bool:
        keys = {(id(node.src[s.source]), s.shard) for s in carried.needs}
        first = self._current
        if first is None or not keys <= first.inputs.keys():
            self._current = Segment(opened_at=self._position)
            self.found.segments.append(self._current)
        if self._join(node, carried, split, partial=split.axis == 0):
            return True
        if self._current is not None and not self._current.nodes:
            self.found.segments.pop()
            self._current = None
        return False

    def _continue(self, node: Tensor) -> bool:
        if self._current is None:
            return False
        if node.op is Op.SET_ROWS:
            return self._store(node)
        shards = [self._shard(s) for s in node.src]
        if all(s is None for s in shards):
            return False
        if node.op not in VIEWS and node.view_src is not None and self._is_split(node):
            return False
        carried = carry(node, shards)
        return carried is not None and self._join(node, carried)

    def _store(self, node: Tensor) -> bool:
        """SET_ROWS into a tensor that is cut, or can be: the KV cache."""
        rows, target = node.src[0], node.view_src
        shard = self._shard(rows)
        if rows is None or target is None or shard is None or shard.dim:
            return False
        same = (
            node.address == target.address
            and node.ne[0] == target.ne[0] == rows.ne[0]
            and node.nelements == target.nelements
            and target.contiguous
        )
        block = TYPE_INFO[target.type].block_size
        if not same or any(r.first % block or r.last % block for r in shard.bounds):
            return False
        entry = self._index.find(target.address)
        storage = self._index.storage(target)
        if entry is not None:
            split = entry[1]
            if entry[2] or split.axis or tuple(split.cuts) != shard.bounds or split.gathered:
                return False
            self.found.shards[id(target)] = shard
            self.found.weights[id(target)] = split
            return self._join(node, Carried(shard, (Slice(1),)), split)
        if storage is None or not storage.may_cut(target):
            return False
        self.found.caches.append((storage, target, shard))
        return False

    def _shard(self, t: Tensor | None) -> Shard | None:
        """How a source is cut as the current segment sees it."""
        if t is None:
            return None
        if self._in_current(t):
            # A sum is whole only here.
            return None if id(t) in self.found.partial else self.found.shards[id(t)]
        entry = self._index.find(t.address) if t.op is Op.NONE else None
        if entry is None or entry[2] or entry[1].axis or not entry[1].is_cache:
            return None
        shard = Shard(0, tuple(entry[1].cuts))
        self.found.shards[id(t)] = shard
        self.found.weights[id(t)] = entry[1]
        return shard

    def _in_current(self, t: Tensor) -> bool:
        return self._current is not None and self._segment_of.get(id(t)) is self._current

    def _is_split(self, t: Tensor) -> bool:
        return self._index.find(t.address) is not None

    def _join(
        self,
        node: Tensor,
        carried: Carried,
        split: SplitWeight | None = None,
        *,
        partial: bool = False,
    ) -> bool:
        """Make ``node`` part of the current segment, if what it needs was there at its start."""
        segment = self._current
        assert segment is not None
        fresh: list[Input] = []
        for need in carried.needs:
            t = node.src[need.source]
            assert t is not None
            made = Input(t, need.shard)
            if made.key in segment.inputs:
                continue
            if not t.contiguous_rows or t.empty or self._available(t) >= segment.opened_at:
                return False
            if self._is_split(t):
                return False
            fresh.append(made)
        for made in fresh:
            segment.inputs[made.key] = made
        segment.nodes.append(node)
        self._segment_of[id(node)] = segment
        self.found.shards[id(node)] = carried.shard
        if partial:
            self.found.partial.add(id(node))
        if split is not None:
            self.found.weights[id(node)] = split
        self._close_if_changed(node)
        return True

    def _close_if_changed(self, node: Tensor) -> None:
        """A node that works in place of an input gives it another value for what follows."""
        segment = self._current
        if segment is None or node.view_src is None or node.op in VIEWS:
            return
        if any(node.view_src in (i.tensor, i.tensor.view_src) for i in segment.inputs.values()):
            self._current = None

    def _available(self, t: Tensor) -> int:
        """The position at which the value of ``t`` is there."""
        at = self._computed.get(id(t), -1)
        for s in (t.src[0], t.view_src) if t.op in VIEWS else ():
            if s is not None:
                at = max(at, self._available(s))
        return at

    def _home(self, node: Tensor) -> None:
        """A node that runs here: split tensors it touches are needed whole."""
        if node.op in VIEWS or node.empty:
            return
        spec = OPS.get(node.op)
        self._touch(node.src, (node,) if spec is None else spec.written(node))
        self._close_if_changed(node)

    def _touch(self, read: Iterable[Tensor | None], written: Iterable[Tensor | None]) -> None:
        for tensors, is_written in ((read, False), (written, True)):
            for t in tensors:
                for entry in self._index.overlapping(t) if t is not None and t.address else ():
                    if is_written or entry[1].is_cache:
                        self._written[id(entry[1])] = entry
                    elif not entry[1].gathered:
                        self._whole[id(entry[1])] = entry

    # -- the end

    def finish(self) -> None:
        """Say what comes back, what is sent once, and what stands in the way."""
        found = self.found
        seen: dict[tuple[int, Shard | None], Input] = {}
        for segment in found.segments:
            segment.outputs = [
                t for t in segment.nodes if id(t) in found.partial or self._is_read(t)
            ]
            for key, made in segment.inputs.items():
                root = made.tensor if made.tensor.view_src is None else made.tensor.view_src
                if key in seen and id(root) not in self._mutated:
                    seen[key].kept = True
                    segment.inputs[key] = seen[key]
                else:
                    seen[key] = made
        found.whole = list(self._whole.values())
        found.written = list(self._written.values())

    def _is_read(self, t: Tensor) -> bool:
        """Whether something beside the parts reads a chained tensor."""
        if t.op in VIEWS or t.op is Op.SET_ROWS:
            return False
        if t.flags & TensorFlag.OUTPUT or not self._counted:
            return True
        return self._is_read_through(t)

    def _is_read_through(self, t: Tensor) -> bool:
        users = self._users.get(id(t), [])
        if t.use_count != len(users) or not users:
            return True
        home = self._segment_of[id(t)]
        for user in users:
            segment = self._segment_of.get(id(user))
            if segment is not home or any(i.tensor is t for i in segment.inputs.values()):
                return True
            if user.op in VIEWS and self._is_read_through(user):
                return True
        return False
