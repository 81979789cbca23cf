"""A subgraph as one part computes it: the graph's nodes on slices, in memory of that part.

The same for a worker and for this server's own share: tensors are built with the client's graph
builder; where they lie differs. Slices that nodes compute are dense.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from client.builder.graph import GraphBuilder
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Dims, Tensor
from rpc_server.devices.split.sharded import ShardedWeight
from rpc_server.devices.split.subgraphs import Input, Partitioning, Subgraph
from rpc_server.devices.split.views import part_period
from rpc_server.ops.shards import Shard


@dataclass(slots=True)
class Built:
    """A subgraph on one part. ``inputs`` are those that have to come with it.

    ``nodes`` pairs what the part computes with the graph's node (None: an input made F32 again);
    ``outputs`` are those that come back.
    """

    inputs: list[tuple[Input, Tensor]] = field(default_factory=list)
    nodes: list[tuple[Tensor | None, Tensor]] = field(default_factory=list)
    outputs: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def memory(self) -> list[Tensor]:
        """Return what needs memory for this subgraph alone; outputs last."""
        inputs = [t for made, t in self.inputs if not made.kept]
        given = {id(t) for _, t in self.outputs}
        made = [t for _, t in self.nodes if t.view_src is None and id(t) not in given]
        return [*inputs, *made, *(t for _, t in self.outputs)]


@dataclass(eq=False, repr=False)
class PartBuilder:
    """Builds one part's subgraphs, one after the other.

    ``_weight`` gives the part's slice of a split tensor, ``_leaf`` makes the part's tensor for an
    input of a type and shape.
    """

    _number: int
    _found: Partitioning
    _g: GraphBuilder
    _weight: Callable[[ShardedWeight], Tensor | None]
    _leaf: Callable[[Input, Dims], Tensor]
    _kept: dict[int, Tensor] = field(default_factory=dict)

    def takes_part(self, subgraph: Subgraph) -> bool:
        """Return whether this part gives anything in a subgraph, or stores something in its
        caches.
        """
        outputs = {id(t) for t in subgraph.outputs}
        return any(
            (id(t) in outputs or t.op is Op.SET_ROWS) and self._width(self._found.shards[id(t)])
            for t in subgraph.nodes
        )

    def build(self, subgraph: Subgraph) -> Built:
        """Return the subgraph on this part; it must take part in it.

        Raises ShapeError for what can't be cut into parts of this shape.
        """
        built = Built()
        have: dict[int, Tensor] = {}
        sliced: dict[tuple[int, Shard | None], Tensor] = {}
        for key, made in subgraph.inputs.items():
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
            sliced[key] = value
            have[id(made.tensor)] = value
        outputs = {id(t) for t in subgraph.outputs}
        for node in subgraph.nodes:
            shard = self._found.shards[id(node)]
            if not self._width(shard):
                continue
            t = self._node(node, shard, have, sliced)
            if t is None:
                continue
            have[id(node)] = t
            built.nodes.append((node, t))
            if id(node) in outputs:
                built.outputs.append((node, t))
        return built

    def _width(self, shard: Shard) -> int:
        return len(shard.bounds[self._number])

    def _ne(self, t: Tensor, shard: Shard | None) -> Dims:
        ne = list(t.ne)
        if shard is not None:
            ne[shard.dim] = self._width(shard)
        return ne[0], ne[1], ne[2], ne[3]

    def _node(
        self,
        node: Tensor,
        shard: Shard,
        have: dict[int, Tensor],
        sliced: dict[tuple[int, Shard | None], Tensor],
    ) -> Tensor | None:
        split = self._found.weights.get(id(node))
        weight = self._weight(split) if split is not None else None
        if split is not None and weight is None:
            return None
        sources = self._sources(node, have, sliced)
        if node.op is Op.SET_ROWS:
            assert weight is not None
            target = self._seen(node, weight, weight)
            return self._g.view_of(
                target, Op.SET_ROWS, (*sources[:2], target), node.op_params, name=node.name
            )
        partial = id(node) in self._found.partial
        ne = node.ne if partial else self._ne(node, shard)
        if weight is not None:
            sources[0] = weight
        return self._g.op(node.op, node.type, ne, sources, node.op_params, name=node.name)

    def _sources(
        self,
        node: Tensor,
        have: dict[int, Tensor],
        sliced: dict[tuple[int, Shard | None], Tensor],
    ) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for s in node.src:
            if s is None:
                found.append(None)
                continue
            # Of an input that is there both whole and cut, the op's own cut is the one it needs.
            cut = next((t for (i, c), t in sliced.items() if i == id(s) and c is not None), None)
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
