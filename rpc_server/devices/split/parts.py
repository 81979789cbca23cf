"""A subgraph as one part computes it: the graph's nodes on slices, in memory of that part.

The same for a worker and for this server's own share: tensors are built with the client's graph
builder; where they lie differs. Slices that nodes compute are dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from client.builder.graph import GraphBuilder
from client.split.lifetimes import Lifetime
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Dims, Tensor
from rpc_server.devices.split.sharded import ShardedWeight
from rpc_server.devices.split.subgraphs import Input, Partitioning, Subgraph
from rpc_server.devices.split.views import part_period
from rpc_server.ops.shards import Shard


@dataclass(frozen=True, slots=True)
class PartSum:
    """A sum that parts make among themselves of one ``node``.

    ``terms`` are those of all parts, in the order in which they are added: the part's own, which
    ``nodes[after]`` computes, and room for the others'. ``total`` is the last of what adds them up.
    """

    node: Tensor
    after: int
    terms: tuple[Tensor, ...]
    total: Tensor


@dataclass(slots=True)
class Built:
    """A subgraph on one part. ``inputs`` are those that have to come with it.

    ``nodes`` pairs what the part computes with the graph's node (None: an input made F32 again, or
    an addition of ``sums``); ``outputs`` are those that come back.
    """

    inputs: list[tuple[Input, Tensor]] = field(default_factory=list)
    nodes: list[tuple[Tensor | None, Tensor]] = field(default_factory=list)
    outputs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    sums: list[PartSum] = field(default_factory=list)

    @property
    def memory(self) -> list[Tensor]:
        """Return what needs memory for this subgraph alone; outputs last."""
        inputs = [t for made, t in self.inputs if not made.kept]
        given = {id(t) for _, t in self.outputs}
        made = [t for _, t in self.nodes if t.view_src is None and id(t) not in given]
        return [*inputs, *made, *(t for _, t in self.outputs)]


def lifetimes(builts: Iterable[Built]) -> list[tuple[Tensor, Lifetime]]:
    """Return when one part needs memory for what, over all of its subgraphs of a graph.

    Sizes are those of the tensors. Outputs are needed until their subgraph ends.
    """
    owned: dict[int, Tensor] = {}
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    time = 0

    def own(t: Tensor) -> None:
        owned[id(t)], first[id(t)], last[id(t)] = t, time, time

    def use(t: Tensor) -> None:
        root = t if t.view_src is None else t.view_src
        if id(root) in owned:
            last[id(root)] = time

    for built in builts:
        sums = {s.after: s for s in built.sums}
        for _, t in built.inputs:
            own(t)
        for i, (_, t) in enumerate(built.nodes):
            time += 1
            if t.view_src is None:
                own(t)
            for s in t.src:
                if s is not None:
                    use(s)
            if i in sums:
                time += 1
                for term in sums[i].terms:
                    if term is t:
                        use(t)
                    else:
                        own(term)
        time += 1
        for _, t in built.outputs:
            use(t)
    return [(t, Lifetime(t.nbytes, first[i], last[i])) for i, t in owned.items()]


@dataclass(eq=False, repr=False)
class PartBuilder:
    """Builds one part's subgraphs, one after the other.

    ``_weight`` gives the part's slice of a split tensor, ``_leaf`` makes the part's tensor for an
    input of a type and shape, ``_copy`` gives its copy of a lasting one. ``_gives``: of what all
    parts have, this one's comes back.
    """

    _number: int
    _found: Partitioning
    _g: GraphBuilder
    _weight: Callable[[ShardedWeight], Tensor | None]
    _leaf: Callable[[Input, Dims], Tensor]
    _copy: Callable[[Input], Tensor]
    _gives: bool
    _kept: dict[int, Tensor] = field(default_factory=dict)
    # What all parts have of nodes of the graph, in later subgraphs too.
    _whole: dict[int, Tensor] = field(default_factory=dict)

    def takes_part(self, subgraph: Subgraph) -> bool:
        """Return whether this part gives anything in a subgraph, or stores something in its
        caches.
        """
        outputs = {id(t) for t in subgraph.outputs}
        return any(
            self._found.is_whole(t)
            or (
                (id(t) in outputs or t.op is Op.SET_ROWS) and self._width(self._found.shards[id(t)])
            )
            for t in subgraph.nodes
        )

    def build(self, subgraph: Subgraph) -> Built:
        """Return the subgraph on this part; it must take part in it.

        Raises ShapeError for what can't be cut into parts of this shape.
        """
        built = Built()
        have: dict[int, Tensor] = dict(self._whole)
        # Of inputs that come cut; one may be there whole, too.
        sliced: dict[int, Tensor] = {}
        nodes = [node for node in subgraph.nodes if self._computes(node)]
        read = {id(s) for node in nodes for s in node.src}
        for made in subgraph.inputs.values():
            if id(made.tensor) not in read:
                # By nodes of which this part has nothing; one that is kept comes later.
                continue
            if made.lasting is not None:
                have[id(made.tensor)] = self._copy(made)
                continue
            known = self._kept.get(id(made))
            if known is None:
                known = self._leaf(made, self._ne(made.tensor, made.shard))
                built.inputs.append((made, known))
                if made.kept:
                    self._kept[id(made)] = known
            value = known
            if made.tensor.type is GgmlType.F32 and known.type is not GgmlType.F32:
                value = self._g.cast(known, GgmlType.F32)
                built.nodes.append((None, value))
            if made.shard is None:
                have[id(made.tensor)] = value
            else:
                sliced.setdefault(id(made.tensor), value)
                have.setdefault(id(made.tensor), value)
        outputs = {id(t) for t in subgraph.outputs}
        for node in nodes:
            if id(node) in self._found.everywhere:
                whole = self._repeated(node, have)
                built.nodes.append((node, whole))
                self._take_whole(node, whole, have, built, outputs)
                continue
            t = have[id(node)] = self._node(node, have, sliced)
            built.nodes.append((node, t))
            if id(node) in self._found.summed:
                self._take_whole(node, self._sum(node, t, built), have, built, outputs)
            elif id(node) in outputs:
                built.outputs.append((node, t))
        return built

    def _computes(self, node: Tensor) -> bool:
        """Return whether this part has all of a node, or some of its slices."""
        if id(node) in self._found.everywhere:
            return True
        split = self._found.weights.get(id(node))
        has_weight = split is None or len(split.cuts[self._number]) > 0
        return has_weight and self._width(self._found.shards[id(node)]) > 0

    def _take_whole(
        self, node: Tensor, t: Tensor, have: dict[int, Tensor], built: Built, outputs: set[int]
    ) -> None:
        """Note what all parts have of a node."""
        have[id(node)] = self._whole[id(node)] = t
        if self._gives and id(node) in outputs:
            built.outputs.append((node, t))

    def _repeated(self, node: Tensor, have: dict[int, Tensor]) -> Tensor:
        """A node of whole tensors, as all parts compute it."""
        sources = [None if s is None else self._known(s, have) for s in node.src]
        return self._g.op(node.op, node.type, node.ne, sources, node.op_params, name=node.name)

    def _sum(self, node: Tensor, own: Tensor, built: Built) -> Tensor:
        """Add up what all parts have of a sum; in the same order on each, for the same bits."""
        after = len(built.nodes) - 1
        terms = [
            own if i == self._number else self._g.new_tensor(node.type, node.ne, node.name)
            for i in range(len(self._found.shards[id(node)].bounds))
        ]
        total = terms[0]
        for term in terms[1:]:
            total = self._g.op(Op.ADD, node.type, node.ne, (total, term), name=node.name)
            built.nodes.append((None, total))
        built.sums.append(PartSum(node, after, tuple(terms), total))
        return total

    def _width(self, shard: Shard) -> int:
        return len(shard.bounds[self._number])

    def _ne(self, t: Tensor, shard: Shard | None) -> Dims:
        ne = list(t.ne)
        if shard is not None:
            ne[shard.dim] = self._width(shard)
        return ne[0], ne[1], ne[2], ne[3]

    def _node(self, node: Tensor, have: dict[int, Tensor], sliced: dict[int, Tensor]) -> Tensor:
        split = self._found.weights.get(id(node))
        weight = self._weight(split) if split is not None else None
        sources = self._sources(node, have, sliced)
        if node.op is Op.SET_ROWS:
            assert weight is not None
            target = self._seen(node, weight, weight)
            return self._g.view_of(
                target, Op.SET_ROWS, (*sources[:2], target), node.op_params, name=node.name
            )
        partial = id(node) in self._found.partial
        ne = node.ne if partial else self._ne(node, self._found.shards[id(node)])
        if weight is not None:
            sources[0] = weight
        return self._g.op(node.op, node.type, ne, sources, node.op_params, name=node.name)

    def _sources(
        self,
        node: Tensor,
        have: dict[int, Tensor],
        sliced: dict[int, Tensor],
    ) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for s in node.src:
            if s is None:
                found.append(None)
                continue
            # Of an input that is there both whole and cut, the op's own cut is the one it needs.
            cut = sliced.get(id(s))
            found.append(cut if cut is not None else self._known(s, have))
        return found

    def _known(self, t: Tensor, have: dict[int, Tensor]) -> Tensor | None:
        """Return what the part has of a tensor; views and caches are made where they are first
        read.
        """
        known = have.get(id(t))
        if known is not None:
            return known
        if t.view_src is None:
            split = self._found.weights.get(id(t)) if t.op is Op.NONE else None
            made = self._weight(split) if split is not None else None
        elif id(t.view_src) in self._whole:
            made = self._view_of_whole(t, self._whole[id(t.view_src)])
        else:
            root = self._known(t.view_src, have)
            if root is None or id(t) not in self._found.views:
                return None
            # What computes the values comes first, be it the root or what stored rows in it.
            source = None if t.src[0] is None else self._known(t.src[0], have)
            made = self._seen(t, root, root if source is None else source)
        if made is not None:
            have[id(t)] = made
        return made

    def _view_of_whole(self, t: Tensor, root: Tensor) -> Tensor:
        """A view of what all parts have: it lies there as it does here."""
        assert t.view_src is not None
        offset = t.address - t.view_src.address
        if (offset, t.ne, t.nb) == (0, root.ne, root.nb):
            return root
        params = (offset, offset >> 32)
        return self._g.view_of(root, Op.VIEW, (root,), params, ne=t.ne, nb=t.nb, offset=offset)

    def _seen(self, t: Tensor, root: Tensor, source: Tensor) -> Tensor:
        """The part's slice of a view, in its slice of the root; ``source`` is the view's."""
        assert t.view_src is not None
        view = self._found.views[id(t)]
        period = part_period(self._found.shards[id(t.view_src)], self._number, root.nb)
        offset, nb = view.place(self._number, period)
        ne = view.shape(self._number)
        if source is root and (offset, ne, nb) == (0, root.ne, root.nb):
            return root
        return self._g.view_of(
            root, Op.VIEW, (source,), (offset, offset >> 32), ne=ne, nb=nb, offset=offset
        )
