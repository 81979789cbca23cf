"""Which nodes of a graph the parts compute, and between which points they talk to this server.

A *subgraph* begins with one or more products of split weights that read the same whole tensor. It
is sent to the parts; nodes that the parts can go on with by themselves (see ``shard``) belong to
the subgraph too, and so does a product with a weight cut by columns, whose partial results are
summed here. What other nodes read of a subgraph is gathered.

With rows alone every product is its own end: q, k and v share a subgraph, so do gate and up. In
tensor mode a subgraph is a whole feed-forward or attention block, and a layer has two of them.
Where the parts are *linked* they add up sums by themselves, and what lies between two blocks
(residuals, norms) is computed by all of them alike: it is *everywhere*. A subgraph then goes on for
as long as nothing has to be computed here, and what is everywhere is still there in later ones.

Results are taken off the stream where the graph has their nodes, so that what lies between runs
while the parts compute, and no memory is needed for results that wait.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from protocol.ggml.ops import VIEWS, Op, TensorFlag
from protocol.ggml.types import TYPE_INFO, GgmlType
from protocol.tensor import Tensor
from rpc_server.devices.cpu.streaming.transfer import Receive, Send, Transfer
from rpc_server.devices.split.sharded import ShardedWeight
from rpc_server.devices.split.views import CutView, cut_view
from rpc_server.devices.split.weights import SplitStorage
from rpc_server.ops.shards import REPEATED, Propagated, Shard, Slice
from rpc_server.ops.table import OPS, propagate

_PRODUCTS = frozenset({Op.MUL_MAT, Op.MUL_MAT_ID})


@dataclass(slots=True, eq=False)
class Input:
    """A whole tensor that the parts need, cut as ``shard`` or not at all.

    ``kept`` if later subgraphs need it too: it is sent once in a run. An ``exact`` one is not
    rounded on its way. One that has ``lasting`` is not sent at all: parts have copies of what lies
    in that storage.
    """

    tensor: Tensor
    shard: Shard | None
    kept: bool = False
    exact: bool = False
    lasting: SplitStorage | None = None

    @property
    def key(self) -> tuple[int, Shard | None]:
        return id(self.tensor), self.shard


@dataclass(slots=True, eq=False)
class Subgraph:
    """``nodes`` are what the parts compute, in order; ``outputs`` those whose results come back."""

    inputs: dict[tuple[int, Shard | None], Input] = field(default_factory=dict)
    nodes: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    opened_at: int = 0


@dataclass(slots=True)
class Partitioning:
    """``shards`` by id() of the tensors that are cut; a node that is among ``partial`` is a sum.

    The parts add up those among ``summed`` themselves; these, and nodes that are ``everywhere``,
    are whole on all parts.

    ``views`` are those of tensors that are cut, by id() too, and nodes that work in a part of one.
    ``weights`` are the split tensors by the id() of what uses them: the node of a product, of a
    SET_ROWS into a cache, the leaf of a cache. ``whole`` are weights that some node reads here.
    ``written`` are weights that a node here writes to, or caches that one reads or writes;
    ``caches`` are tensors to be cut: while there are any of these, nothing else is valid.
    """

    subgraphs: list[Subgraph]
    shards: dict[int, Shard]
    views: dict[int, CutView]
    partial: set[int]
    weights: dict[int, ShardedWeight]
    whole: list[tuple[SplitStorage, ShardedWeight]]
    written: list[tuple[SplitStorage, ShardedWeight]]
    caches: list[tuple[SplitStorage, Tensor, Shard]]
    everywhere: set[int] = field(default_factory=set)
    summed: set[int] = field(default_factory=set)

    def is_whole(self, node: Tensor) -> bool:
        """Return whether all parts have all of a node, as soon as it is computed."""
        return id(node) in self.everywhere or id(node) in self.summed

    @property
    def lasting(self) -> list[tuple[SplitStorage, Tensor]]:
        """Return the tensors that parts need copies of, each once."""
        found = {
            id(i.tensor): (i.lasting, i.tensor)
            for s in self.subgraphs
            for i in s.inputs.values()
            if i.lasting is not None
        }
        return list(found.values())


class WeightIndex:
    """Finds the split tensor, or the storage, that an address lies in.

    ``tried`` are tensors to be looked upon as if they were split.
    """

    def __init__(
        self,
        storages: Iterable[SplitStorage],
        tried: Iterable[tuple[SplitStorage, ShardedWeight]] = (),
    ) -> None:
        self._storages = list(storages)
        found = [(w.address, s, w) for s in self._storages for w in s.weights]
        found += [(w.address, s, w) for s, w in tried]
        self._weights = sorted(found, key=lambda entry: entry[0])
        self._starts = [start for start, _, _ in self._weights]

    def __bool__(self) -> bool:
        return bool(self._weights)

    def find(self, address: int) -> tuple[SplitStorage, ShardedWeight, int] | None:
        """Return the storage, the weight, and the offset in the weight."""
        i = bisect.bisect_right(self._starts, address) - 1
        if i < 0:
            return None
        start, storage, weight = self._weights[i]
        offset = address - start
        return (storage, weight, offset) if offset < weight.tensor.nbytes else None

    def overlapping(self, t: Tensor) -> list[tuple[SplitStorage, ShardedWeight]]:
        """Return weights of which some bytes are part of ``t``, too."""
        found = []
        i = bisect.bisect_left(self._starts, t.address + t.nbytes) - 1
        while i >= 0 and self._starts[i] + self._weights[i][2].tensor.nbytes > t.address:
            found.append(self._weights[i][1:])
            i -= 1
        return found

    def lasting(self, t: Tensor) -> SplitStorage | None:
        """Return the storage of a leaf that parts may have lasting copies of."""
        if t.op is not Op.NONE or t.view_src is not None:
            return None
        storage = self.storage(t)
        return storage if storage is not None and storage.may_copy(t) else None

    def storage(self, t: Tensor) -> SplitStorage | None:
        """Return the storage that holds all of ``t``."""
        for s in self._storages:
            if s.address <= t.address and t.address + t.nbytes <= s.address + s.size:
                return s
        return None


@dataclass(frozen=True, slots=True)
class Indices:
    """Indices that the client wrote, which ``node`` needs to be below ``limit``."""

    tensor: Tensor
    limit: int
    node: Tensor


# Of ops with indices among their sources: which one, and what it counts.
_INDICES: dict[Op, tuple[int, Callable[[Tensor], int]]] = {
    Op.SET_ROWS: (1, lambda node: node.ne[1]),
    Op.MUL_MAT_ID: (2, lambda node: 0 if node.src[0] is None else node.src[0].ne[2]),
    Op.GET_ROWS: (1, lambda node: 0 if node.src[0] is None else node.src[0].ne[1]),
}


def indices_of(found: Partitioning) -> list[Indices]:
    """Return what can be said of the parts' indices before a graph runs.

    Those that a graph computes aren't there yet.
    """
    made = []
    for node in (t for subgraph in found.subgraphs for t in subgraph.nodes):
        which, limit = _INDICES.get(node.op, (0, None))
        t = node.src[which]
        if limit is not None and t is not None and (t.view_src or t).op is Op.NONE:
            made.append(Indices(t, limit(node), node))
    return made


def find_subgraphs(
    items: Sequence[Tensor | Transfer],
    index: WeightIndex,
    *,
    chain: bool,
    counted: bool,
    linked: bool = False,
) -> Partitioning:
    """Find the subgraphs of a graph.

    ``chain``: let the parts go on by themselves (tensor mode). ``counted``: tensors carry their
    use_count, without which nobody knows whether something outside this graph reads one.
    ``linked``: parts may add up sums among themselves.
    """
    finder = _Partitioner(items, index, chain, counted, chain and counted and linked)
    for position, item in enumerate(items):
        finder.take(position, item)
    finder.finish()
    return finder.found


class _Partitioner:
    def __init__(
        self,
        items: Sequence[Tensor | Transfer],
        index: WeightIndex,
        chain: bool,
        counted: bool,
        linked: bool,
    ) -> None:
        self._index = index
        self._linked = linked
        # Of nodes of subgraphs, the inputs that each of them needs.
        self._needs: dict[int, list[tuple[int, Shard | None]]] = {}
        # All inputs, once they are known.
        self._sent: set[int] = set()
        self._chain = chain
        self._counted = counted
        self.found = Partitioning([], {}, {}, set(), {}, [], [], [])
        self._current: Subgraph | None = None
        self._position = 0
        # When a tensor's value is there: the position of its node; leaves are there from the start.
        self._computed: dict[int, int] = {}
        self._users: dict[int, list[Tensor]] = {}
        self._subgraph_of: dict[int, Subgraph] = {}
        # Where memory was last written by a node that works in place, by id() of its root.
        self._changed: dict[int, int] = {}
        self._whole: dict[int, tuple[SplitStorage, ShardedWeight]] = {}
        self._written: dict[int, tuple[SplitStorage, ShardedWeight]] = {}
        for i, t in enumerate(items):
            if isinstance(t, Tensor):
                if t.op not in VIEWS:
                    self._computed[id(t)] = i
                for s in t.src:
                    if s is not None:
                        self._users.setdefault(id(s), []).append(t)

    # -- one item

    def take(self, position: int, item: Tensor | Transfer) -> None:
        self._position = position
        if not isinstance(item, Tensor):
            self._current = None
            received = [item.tensor] if isinstance(item, Receive) else []
            self._touch(item.tensors if isinstance(item, Send) else (), received)
            self._note_changes(received)
            return
        if item.op in VIEWS or item.empty:
            return
        if not self._product(item) and not (self._chain and self._continue(item)):
            self._home(item)

    def _product(self, node: Tensor) -> bool:
        weight, x = node.src[0], node.src[1]
        if node.op not in _PRODUCTS or weight is None or x is None or node.view_src is not None:
            return False
        entry = self._index.find(weight.address)
        if entry is None or entry[2] or entry[1].used_here:
            return False
        split = entry[1]
        stored = split.tensor
        plain = (
            (weight.type, weight.ne, weight.nb) == (stored.type, stored.ne, stored.nb)
            and not split.is_cache
            and node.type is GgmlType.F32
            and node.contiguous
            and x.type is GgmlType.F32
        )
        if not plain:
            return False
        cut = Shard(0, tuple(split.cuts))
        if split.axis == 0 and self._chain and self._shard(x) == cut:
            # The parts have their columns' activations already.
            needs = [Slice(i) for i in (2,) if node.src[i] is not None]
            return self._join(node, cut, needs, split, partial=True)
        if split.axis == 1 and self._current is not None and self._is_everywhere(x):
            needs = [Slice(i) for i in (1, 2) if node.src[i] is not None]
            if self._join(node, cut, needs, split):
                return True
        usable = all(
            s.contiguous_rows and not s.empty and not self._is_split(s)
            for s in node.src[1:3]
            if s is not None
        )
        if not usable:
            return False
        inputs = [Slice(1, cut if split.axis == 0 else None)]
        inputs += [Slice(2)] if node.src[2] is not None else []
        return self._open_or_join(node, Propagated(cut, tuple(inputs)), split)

    def _open_or_join(self, node: Tensor, carried: Propagated, split: ShardedWeight) -> bool:
        keys = {(id(node.src[s.source]), s.shard) for s in carried.needs}
        first = self._current
        if first is None or not keys <= first.inputs.keys():
            self._current = Subgraph(opened_at=self._position)
            self.found.subgraphs.append(self._current)
        if self._join(node, carried.shard, carried.needs, split, partial=split.axis == 0):
            return True
        if self._current is not None and not self._current.nodes:
            self.found.subgraphs.pop()
            self._current = None
        return False

    def _continue(self, node: Tensor) -> bool:
        if self._current is None:
            return False
        if node.op is Op.SET_ROWS:
            return self._store(node)
        if node.view_src is not None:
            # Parts have a place of its own for each result: what works in place runs here.
            return False
        shards = [self._shard(s) for s in node.src]
        if all(s is None for s in shards):
            return self._repeat(node)
        carried = propagate(node, shards)
        return carried is not None and self._join(node, carried.shard, carried.needs)

    def _repeat(self, node: Tensor) -> bool:
        """Let all parts compute a node of whole tensors alike, if they have one of these."""
        there = [s is not None and self._is_everywhere(s) for s in node.src]
        if node.op not in REPEATED or not any(there) or not node.contiguous:
            return False
        needs = [Slice(i) for i, s in enumerate(node.src) if s is not None and not there[i]]
        return self._join(node, None, needs)

    def _is_everywhere(self, t: Tensor) -> bool:
        """Return whether all parts have all of ``t``, or may have."""
        root = _root(t)
        if root is None or (root is not t and not root.contiguous):
            return False
        summed = id(root) in self.found.partial and self._can_be_summed(root)
        if not (summed or id(root) in self.found.everywhere):
            return False
        return self._changed.get(id(root), -1) < self._computed[id(root)]

    def _can_be_summed(self, partial: Tensor) -> bool:
        """Return whether all parts have a term of a sum, and may add these up."""
        cuts = self.found.weights[id(partial)].cuts
        return self._linked and len(cuts) > 1 and all(len(rows) for rows in cuts)

    def _store(self, node: Tensor) -> bool:
        """SET_ROWS into a tensor that is cut, or can be: the KV cache."""
        rows, target = node.src[0], node.view_src
        shard = self._shard(rows)
        if rows is None or target is None or shard is None or shard.dim:
            return False
        split = self._cut_leaf(target)
        if split is not None:
            view = cut_view(target, self.found.shards[id(target)], node)
            if view is None or view.shard != shard:
                return False
            self.found.views[id(node)] = view
            return self._join(node, shard, (Slice(1),), split)
        storage = self._index.storage(target)
        if storage is None or not storage.may_cut(target) or not self._cut_alike(target, node):
            return False
        block = TYPE_INFO[target.type].block_size
        if not any(edge % block for r in shard.bounds for edge in (r.first, r.last)):
            # Whether rows of the node then lie as those of its source shows when that is tried.
            self.found.caches.append((storage, target, shard))
        return False

    @staticmethod
    def _cut_alike(target: Tensor, node: Tensor) -> bool:
        """Return whether rows of ``node`` are whole rows of what it is a view of."""
        row = target.row_size
        return node.ne[0] == target.ne[0] and (node.address - target.address) % row == 0

    def _shard(self, t: Tensor | None) -> Shard | None:
        """Return how a source is cut as the current subgraph sees it."""
        if t is None:
            return None
        root = _root(t)
        shard = None
        if root is None:
            return None
        if self._in_current(root):
            # A sum is whole, here or everywhere.
            if id(root) not in self.found.partial:
                shard = self.found.shards.get(id(root))
        elif self._cut_leaf(root) is not None:
            shard = self.found.shards[id(root)]
        if shard is None or t is root:
            return shard
        if self._in_current(t):
            # Rows that were stored in a cache.
            return self.found.shards[id(t)]
        view = cut_view(root, shard, t)
        if view is None:
            return None
        self.found.views[id(t)] = view
        self.found.shards[id(t)] = view.shard
        return view.shard

    def _cut_leaf(self, t: Tensor) -> ShardedWeight | None:
        """The cache that a leaf is, if it is cut and the leaf is all of it."""
        entry = self._index.find(t.address) if t.op is Op.NONE and t.view_src is None else None
        if entry is None or entry[2] or entry[1].axis or not entry[1].is_cache:
            return None
        stored = entry[1].tensor
        if (t.type, t.ne) != (stored.type, stored.ne) or not t.contiguous:
            return None
        self.found.weights[id(t)] = entry[1]
        self.found.shards[id(t)] = Shard(0, tuple(entry[1].cuts))
        return entry[1]

    def _in_current(self, t: Tensor) -> bool:
        return self._current is not None and self._subgraph_of.get(id(t)) is self._current

    def _is_split(self, t: Tensor) -> bool:
        return bool(t.address and self._index.overlapping(t))

    def _join(
        self,
        node: Tensor,
        shard: Shard | None,
        needs: Sequence[Slice],
        split: ShardedWeight | None = None,
        *,
        partial: bool = False,
    ) -> bool:
        """Make ``node`` part of the current subgraph, if what it needs was there at its start.

        Its result is cut as ``shard``, or everywhere.
        """
        subgraph = self._current
        assert subgraph is not None
        fresh: list[Input] = []
        keys: list[tuple[int, Shard | None]] = []
        for need in needs:
            t = node.src[need.source]
            assert t is not None
            if need.shard is None and self._is_everywhere(t):
                continue
            made = Input(t, need.shard)
            keys.append(made.key)
            if made.key in subgraph.inputs:
                continue
            if not t.contiguous_rows or t.empty or self._available(t) >= subgraph.opened_at:
                return False
            if self._is_split(t):
                return False
            if self._linked and need.shard is None and node.op not in _PRODUCTS:
                made.lasting = self._index.lasting(t)
            fresh.append(made)
        for made in fresh:
            subgraph.inputs[made.key] = made
        subgraph.nodes.append(node)
        self._subgraph_of[id(node)] = subgraph
        self._needs[id(node)] = keys
        if shard is not None:
            self.found.shards[id(node)] = shard
        else:
            self.found.everywhere.add(id(node))
            for key in keys:
                # Or it would differ from part to part.
                subgraph.inputs[key].exact = True
        if partial:
            self.found.partial.add(id(node))
        if split is not None:
            self.found.weights[id(node)] = split
        if node.view_src is not None:
            self._note_changes([node])
        return True

    def _note_changes(self, written: Iterable[Tensor]) -> None:
        """Note what is written in place: it has another value for what follows.

        The parts don't get to know of it: their subgraph is over.
        """
        roots = {id(t if t.view_src is None else t.view_src) for t in written}
        self._changed.update(dict.fromkeys(roots, self._position))
        subgraph = self._current
        if subgraph is None:
            return
        read = (i.tensor for i in subgraph.inputs.values())
        there = {id(t if t.view_src is None else t.view_src) for t in read}
        there |= {id(t) for t in subgraph.nodes if t.op is not Op.SET_ROWS}
        if roots & there:
            self._current = None

    def _available(self, t: Tensor) -> int:
        """The position at which the value of ``t`` is there."""
        root = t if t.view_src is None else t.view_src
        at = max(self._computed.get(id(t), -1), self._changed.get(id(root), -1))
        for s in (t.src[0], t.view_src) if t.op in VIEWS else ():
            if s is not None:
                at = max(at, self._available(s))
        return at

    def _home(self, node: Tensor) -> None:
        """A node that runs here: split tensors it touches are needed whole."""
        spec = OPS.get(node.op)
        written = [node] if spec is None else spec.written(node)
        self._touch(node.src, written)
        self._note_changes([t for t in written if t is not node or t.view_src is not None])

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
        if self._linked:
            self._keep_needed()
            sums = [t for s in found.subgraphs for t in s.nodes if id(t) in found.partial]
            found.summed = {
                id(t) for t in sums if self._can_be_summed(t) and self._is_used_on_parts(t)
            }
            self._sent = {id(i.tensor) for s in found.subgraphs for i in s.inputs.values()}
        seen: dict[tuple[int, Shard | None], tuple[Input, int]] = {}
        for subgraph in found.subgraphs:
            subgraph.outputs = [
                t
                for t in subgraph.nodes
                if id(t) in found.partial - found.summed or self._is_read(t)
            ]
            for key, made in subgraph.inputs.items():
                root = made.tensor if made.tensor.view_src is None else made.tensor.view_src
                if id(root) in self._changed:
                    made.lasting = None
                first, sent_at = seen.get(key, (made, -1))
                # What was changed before it was sent first will do for all.
                if first is not made and self._changed.get(id(root), -1) < sent_at:
                    first.kept = True
                    first.exact |= made.exact
                    subgraph.inputs[key] = first
                else:
                    seen[key] = (made, subgraph.opened_at)
        found.whole = list(self._whole.values())
        found.written = list(self._written.values())

    def _keep_needed(self) -> None:
        """Take out what is everywhere and nothing on the parts reads: it is computed here."""
        found = self.found
        for subgraph in reversed(found.subgraphs):
            for t in reversed(subgraph.nodes):
                if id(t) in found.everywhere and not self._is_used_on_parts(t):
                    found.everywhere.remove(id(t))
                    del self._subgraph_of[id(t)]
            subgraph.nodes = [t for t in subgraph.nodes if id(t) in self._subgraph_of]
            needed = {key for t in subgraph.nodes for key in self._needs[id(t)]}
            subgraph.inputs = {k: i for k, i in subgraph.inputs.items() if k in needed}

    def _is_used_on_parts(self, t: Tensor) -> bool:
        return any(
            self._is_used_on_parts(user) if user.op in VIEWS else id(user) in self._subgraph_of
            for user in self._users.get(id(t), [])
        )

    def _is_read(self, t: Tensor) -> bool:
        """Return whether something beside the parts reads a chained tensor."""
        if t.op is Op.SET_ROWS:
            return False
        home = None if self.found.is_whole(t) else self._subgraph_of[id(t)]
        return not self._counted or self._is_read_beside(t, home)

    def _is_read_beside(self, t: Tensor, home: Subgraph | None) -> bool:
        """Return whether something beside the parts reads ``t``, a result there or a view.

        ``home`` is the one subgraph that has it; None: all have.
        """
        users = self._users.get(id(t), [])
        if t.flags & TensorFlag.OUTPUT or t.use_count != len(users) or not users:
            return True
        for user in users:
            if user.op in VIEWS:
                if self._is_read_beside(user, home):
                    return True
            elif (where := self._subgraph_of.get(id(user))) is None or home not in (None, where):
                return True
        if home is None:
            return id(t) in self._sent
        return any(i.tensor is t for i in home.inputs.values())


def _root(t: Tensor) -> Tensor | None:
    """Return what ``t`` is a view of, or itself; None where its references don't agree on that."""
    root = t.view_src
    if root is None:
        return t
    source = t.src[0]
    if t.op in VIEWS and source is not None and root not in (source, source.view_src):
        return None
    return root if root.view_src is None else None
