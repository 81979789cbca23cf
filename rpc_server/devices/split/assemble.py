"""From subgraphs to a plan: programs for the workers, and what this server does at each node."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from client.builder.graph import Graph, GraphBuilder
from client.split.lifetimes import place_lifetimes
from client.split.steps import Envelope, Step
from client.tensors import ShapeError
from protocol.ggml.ops import Op
from protocol.ggml.types import TYPE_INFO, GgmlType
from protocol.tensor import Dims, Tensor, contiguous_strides, padded_sources, place_views
from rpc_server.devices.cpu.streaming.transfer import Receive, Send, Swap, Transfer
from rpc_server.devices.planning.group import LinkGroup
from rpc_server.devices.split.parts import Built, PartBuilder, PartSum, lifetimes
from rpc_server.devices.split.sharded import ShardedWeight
from rpc_server.devices.split.subgraphs import Input, Partitioning, Subgraph
from rpc_server.devices.split.worker import Program, UnfitError, Worker
from rpc_server.ops.shards import Shard
from rpc_server.ops.table import ContractError, check

_ALIGN = 64
# Inputs of fewer elements travel as they are.
_LEAST_CONVERTED = 64


@dataclass(frozen=True, slots=True)
class Programmed:
    """The steps that part ``number`` was made ready for, and the envelopes of its subgraphs."""

    worker: Worker
    number: int
    program: Program
    built: dict[Subgraph, Built]
    envelopes: dict[Subgraph, Envelope]


@dataclass(frozen=True, slots=True)
class Prepared:
    """The steps that part ``number`` is to be sent.

    There is one for each subgraph it takes part in, and another behind each sum that the parts make
    among themselves; ``first`` is the first one's number of each subgraph.
    """

    worker: Worker
    number: int
    steps: list[Step]
    built: dict[Subgraph, Built]
    first: list[int]


@dataclass(slots=True)
class PlanMemory:
    """Host memory that a plan owns: it lives as long as the plan's records."""

    blocks: list[np.ndarray[tuple[int], np.dtype[np.uint8]]] = field(default_factory=list)

    def take(self, size: int) -> int:
        """Return the address of ``size`` new bytes."""
        block = np.empty(size + _ALIGN, np.uint8)
        self.blocks.append(block)
        return -(-int(block.ctypes.data) // _ALIGN) * _ALIGN


class Assembler:
    """Turns one graph's subgraphs into the items of a plan.

    ``workers`` are the workers by part, None where this server is meant. ``wire`` is the type in
    which activations travel. ``group`` is what this server's share makes sums in, if it has one.
    """

    def __init__(
        self,
        found: Partitioning,
        workers: Sequence[Worker | None],
        wire: GgmlType,
        group: LinkGroup | None = None,
    ) -> None:
        self._group = group
        self._found = found
        self._workers = workers
        self._wire = wire
        self.memory = PlanMemory()
        self._local: dict[Subgraph, Built] = {}
        # By id() of nodes: what this server's share computes for them, and how it adds up.
        self._own_nodes: dict[int, list[Tensor]] = {}
        self._own_sums: dict[int, PartSum] = {}
        self._converted: dict[int, Tensor] = {}

    # -- the workers

    async def program(self) -> list[Programmed]:
        """Make each worker ready for its part. Raises WorkerLost, UnfitError.

        Nothing is sent to any of them before all parts have been held against the contracts.
        """
        prepared = await asyncio.gather(
            *(
                self._prepare(i, worker)
                for i, worker in enumerate(self._workers)
                if worker is not None
            )
        )
        wanted = [p for p in prepared if p.steps]
        programs = await asyncio.gather(*(p.worker.program(p.steps) for p in wanted))
        return [
            Programmed(
                p.worker,
                p.number,
                program,
                p.built,
                dict(zip(p.built, (program.envelopes[i] for i in p.first), strict=True)),
            )
            for p, program in zip(wanted, programs, strict=True)
        ]

    async def _prepare(self, number: int, worker: Worker) -> Prepared:
        """Build the part's subgraphs and give them memory there. Raises WorkerLost, UnfitError."""
        g = worker.backend.graph

        def weight(split: ShardedWeight) -> Tensor | None:
            part = split.parts[number]
            return None if part is None else part.tensor

        def leaf(made: Input, ne: Dims) -> Tensor:
            return g.new_tensor(self._wire_type(made), ne, made.tensor.name)

        def copy(made: Input) -> Tensor:
            assert made.lasting is not None
            return made.lasting.copy_of(made.tensor, number)

        builder = PartBuilder(number, self._found, g, weight, leaf, copy, number == self._giver)
        try:
            built = {s: builder.build(s) for s in self._found.subgraphs if builder.takes_part(s)}
        except ShapeError as error:
            raise UnfitError(f"worker {worker.name}: {error}") from None
        if self._found.summed:
            return await self._prepare_linked(number, worker, built)
        kept = [t for b in built.values() for made, t in b.inputs if made.kept]
        if kept:
            await worker.place_kept(kept)
        steps = []
        for b in built.values():
            await worker.place_step(b.memory)
            graph = g.build([t for _, t in b.nodes])
            steps.append(Step(tuple(t for _, t in b.inputs), graph, tuple(t for _, t in b.outputs)))
            place_views(graph.tensors)
            _check(graph.nodes, worker)
        return Prepared(worker, number, steps, built, list(range(len(steps))))

    async def _prepare_linked(
        self, number: int, worker: Worker, built: dict[Subgraph, Built]
    ) -> Prepared:
        """Cut subgraphs into steps behind which parts add up, in memory that all of them share.

        Raises WorkerLost, UnfitError.
        """
        builts = list(built.values())
        await worker.place_lifetimes(lifetimes(builts))
        graph = worker.backend.graph.build([t for b in builts for _, t in b.nodes])
        place_views(graph.tensors)
        _check(graph.nodes, worker)
        steps: list[Step] = []
        first: list[int] = []
        nodes = iter(graph.nodes)
        for b in builts:
            first.append(len(steps))
            inputs, given = tuple(t for _, t in b.inputs), [t for _, t in b.outputs]
            ends = [(b.nodes[s.after][1], s.terms) for s in b.sums]
            for end, terms in [*ends, (b.nodes[-1][1], ())]:
                computed = _until(nodes, end)
                there = {id(t) for t in computed}
                outputs = tuple(t for t in given if id(t) in there)
                # The tensors of all steps are told once.
                tensors, uses = (graph.tensors, graph.use_counts) if not steps else ((), ())
                steps.append(Step(inputs, Graph(computed, tensors, uses), outputs, terms))
                inputs = ()
        return Prepared(worker, number, steps, built, first)

    @property
    def _giver(self) -> int:
        """The part from which comes what all of them have: this server's, or else the first."""
        return 0 if self._own is None else self._own

    def _wire_type(self, made: Input) -> GgmlType:
        """Return how an input travels: what was computed may be rounded, what the client wrote
        not.
        """
        t = made.tensor
        if made.kept or made.exact or t.type is not GgmlType.F32 or t.op is Op.NONE:
            return t.type
        if self._wire is GgmlType.F32 or t.nelements < _LEAST_CONVERTED:
            return t.type
        # Rows that aren't whole blocks go as F16.
        edges = [r.first for r in made.shard.bounds] if made.shard is not None else []
        block = TYPE_INFO[self._wire].block_size
        return self._wire if not any(n % block for n in (t.ne[0], *edges)) else GgmlType.F16

    # -- this server

    def items(
        self, items: Sequence[Tensor | Transfer], programs: Sequence[Programmed]
    ) -> list[Tensor | Transfer]:
        """Return the graph's items with those of subgraphs replaced."""
        self._build_local()
        home = {id(t): s for s in self._found.subgraphs for t in s.nodes}
        starts = {id(s.nodes[0]): s for s in self._found.subgraphs}
        made: list[Tensor | Transfer] = []
        for item in items:
            subgraph = home.get(id(item))
            if subgraph is None:
                made.append(item)
                continue
            assert isinstance(item, Tensor)
            if starts.get(id(item)) is subgraph:
                for p in programs:
                    if subgraph in p.envelopes:
                        made += self._sends(p, subgraph)
            made += self._results(item, subgraph, programs)
        return made

    def _sends(self, p: Programmed, subgraph: Subgraph) -> Iterator[Send | Tensor]:
        envelope, inputs = p.envelopes[subgraph], p.built[subgraph].inputs
        sums = len(p.built[subgraph].sums)
        for i, (made, t) in enumerate(inputs):
            source = made.tensor
            if t.type is not source.type:
                known = self._converted.get(id(made))
                if known is None:
                    known = self._converted[id(made)] = self._convert(source, t.type)
                    yield known
                source = known
            last = i == len(inputs) - 1
            send = _send(p.worker, source, made.shard, p.number)
            send.prefix, send.suffix = envelope.prefixes[i], envelope.suffix if last else b""
            send.completes = last
            # Each sum waits for all parts, unless this server has waited for them there.
            send.patience = 1 + sums if self._group is None else 1
            yield send

    def _convert(self, x: Tensor, wire: GgmlType) -> Tensor:
        """A node that copies ``x`` as ``wire`` into memory of the plan."""
        nb = contiguous_strides(wire, x.ne)
        return _node(x, Op.CPY, self.memory.take(nb[3] * x.ne[3]), x, type=wire, nb=nb)

    def _results(
        self, node: Tensor, subgraph: Subgraph, programs: Sequence[Programmed]
    ) -> Iterator[Tensor | Transfer]:
        """Yield what is done where the graph has a node of a subgraph."""
        whole = self._found.is_whole(node)
        partial = id(node) in self._found.partial and not whole
        summed = False
        local = self._local.get(subgraph)
        if local is not None:
            for t in self._own_nodes.get(id(node), ()):
                yield t
                summed = True
                own = self._own_sums.get(id(node))
                if own is not None and own.terms[self._group_number] is t:
                    yield self._swap(own)
                is_output = not whole and any(o is node for o, _ in local.outputs)
                if is_output and not _at_home(t, node):
                    yield self._copy_home(node, t)
        for p in programs:
            if subgraph not in p.built or not any(o is node for o, _ in p.built[subgraph].outputs):
                continue
            head = p.envelopes[subgraph].head
            if whole:
                yield Receive(p.worker.peer, node, node.address, node.nbytes, 1, node.nbytes, head)
            elif not partial:
                shard = self._found.shards[id(node)]
                yield _receive(p.worker, node, shard, p.number, head)
            elif not summed:
                yield Receive(p.worker.peer, node, node.address, node.nbytes, 1, node.nbytes, head)
                summed = True
            else:
                yield from self._add(p.worker, node, head)

    @property
    def _group_number(self) -> int:
        assert self._group is not None
        return self._group.number

    def _swap(self, own: PartSum) -> Swap:
        """Exchange this server's term of a sum for those of the others."""
        assert self._group is not None
        number = self._group.number
        received = {i: t for i, t in enumerate(own.terms) if i != number}
        return Swap(self._group.peers, own.terms[number], received)

    def _add(self, worker: Worker, node: Tensor, head: int) -> Iterator[Tensor | Transfer]:
        """Add a part's sum to what is in the node's memory."""
        other = _node(node, Op.NONE, self.memory.take(node.nbytes))
        yield Receive(worker.peer, other, other.address, node.nbytes, 1, node.nbytes, head)
        so_far = _node(node, Op.NONE, node.address)
        total = _node(node, Op.ADD, node.address, so_far, other)
        total.view_src = so_far
        yield total

    def _copy_home(self, node: Tensor, t: Tensor) -> Tensor:
        """A copy of this server's slice to where the graph has it."""
        assert self._own is not None
        shard = self._found.shards[id(node)]
        address = _slice_address(node, shard, self._own)
        return _node(node, Op.CPY, address, t, ne=t.ne)

    # -- this server's own share

    @property
    def _own(self) -> int | None:
        return next((i for i, worker in enumerate(self._workers) if worker is None), None)

    def _build_local(self) -> None:
        own = self._own
        if own is None:
            return
        g = GraphBuilder()

        def weight(split: ShardedWeight) -> Tensor | None:
            t = split.tensor
            if not len(split.cuts[own]):
                return None
            made = g.new_tensor(t.type, split.shape(own), t.name)
            if split.packed:
                return _put(made, split.address)
            # Its rows lie as far apart as those of the whole.
            made.nb = contiguous_strides(t.type, t.ne)
            return _put(made, split.address + _dim_bytes(t, split.cuts[own].first, split.axis))

        def leaf(made: Input, ne: Dims) -> Tensor:
            t = made.tensor
            view = g.new_tensor(t.type, ne, t.name)
            view.nb = t.nb
            address = t.address if made.shard is None else _slice_address(t, made.shard, own)
            return _put(view, address)

        def copy(made: Input) -> Tensor:
            return leaf(made, made.tensor.ne)

        builder = PartBuilder(own, self._found, g, weight, leaf, copy, own == self._giver)
        places: list[tuple[Tensor, int]] = []
        size = 0
        for subgraph in self._found.subgraphs:
            if not builder.takes_part(subgraph):
                continue
            built = self._local[subgraph] = builder.build(subgraph)
            self._note_own(built)
            totals = {id(s.total): s.node for s in built.sums}
            at = 0
            outputs = {id(t): node for node, t in built.outputs}
            read = [s for _, t in built.nodes for s in t.src if s is not None]
            used = {id(s if s.view_src is None else s.view_src) for s in read}
            for made, t in built.nodes:
                if t.view_src is not None:
                    continue
                node = outputs.get(id(t))
                whole = totals.get(id(t))
                if whole is None and made is not None and id(made) in self._found.everywhere:
                    whole = made
                if whole is not None:
                    # What the graph computes here after it finds it where it has it.
                    _put(t, whole.address)
                elif node is not None and id(node) in self._found.partial:
                    _put(t, node.address)
                elif node is not None and node.op in _STRIDED and id(t) not in used:
                    t.nb = node.nb
                    _put(t, _slice_address(node, self._found.shards[id(node)], own))
                else:
                    places.append((t, at))
                    at += -(-t.nbytes // _ALIGN) * _ALIGN
            size = max(size, at)
        if self._found.summed:
            places, size = _by_lifetime(self._local, {id(t) for t, _ in places})
        base = self.memory.take(size)
        for t, at in places:
            _put(t, base + at)
        place_views(g.build([t for b in self._local.values() for _, t in b.nodes]).tensors)

    def _note_own(self, built: Built) -> None:
        """Note what this server's share computes where the graph has its nodes."""
        self._own_sums |= {id(s.node): s for s in built.sums}
        current: list[Tensor] = []
        for node, t in built.nodes:
            if node is not None:
                current = self._own_nodes.setdefault(id(node), [])
            current.append(t)


def _by_lifetime(
    local: Mapping[Subgraph, Built], wanted: set[int]
) -> tuple[list[tuple[Tensor, int]], int]:
    """Places for those ``wanted`` by id() and for what comes from others, and their size."""
    terms = {id(t) for b in local.values() for s in b.sums for t in s.terms if t.op is Op.NONE}
    found = [(t, life) for t, life in lifetimes(local.values()) if id(t) in wanted | terms]
    offsets, size = place_lifetimes([life for _, life in found])
    return [(t, at) for (t, _), at in zip(found, offsets, strict=True)], size


def _until(nodes: Iterator[Tensor], end: Tensor) -> tuple[Tensor, ...]:
    """Take nodes up to ``end``; none where that was taken already."""
    taken: list[Tensor] = []
    while not taken or taken[-1] is not end:
        node = next(nodes, None)
        if node is None:
            break
        taken.append(node)
    return tuple(taken)


# Ops whose results may have any stride between rows.
_STRIDED = frozenset({Op.MUL_MAT, Op.MUL_MAT_ID})


def _node(
    like: Tensor,
    op: Op,
    address: int,
    *sources: Tensor,
    type: GgmlType | None = None,
    ne: Dims | None = None,
    nb: Dims | None = None,
) -> Tensor:
    """A tensor at ``address`` named as ``like``; of its type, shape and strides unless given."""
    return Tensor(
        like.id,
        like.type if type is None else type,
        like.ne if ne is None else ne,
        like.nb if nb is None else nb,
        op,
        src=padded_sources(sources),
        name=like.name,
        address=address,
    )


def _check(nodes: Sequence[Tensor], worker: Worker) -> None:
    """Hold a worker's nodes against their contracts before they go there. Raises UnfitError.

    A worker that can't do a graph may hang up, on all clients of this server, or even end:
    upstream's relies on ggml's constructors, which have seen whole tensors only.
    """
    try:
        for t in nodes:
            check(t)
    except ContractError as error:
        raise UnfitError(f"worker {worker.name}: {error}") from None


def _put(t: Tensor, address: int) -> Tensor:
    # Any buffer will do: this server's own slices are never sent.
    t.place(1, address)
    return t


def _at_home(t: Tensor, node: Tensor) -> bool:
    """Return whether a slice was computed where the graph has it."""
    return t.nb == node.nb and node.address <= t.address < node.address + node.nbytes


def _dim_bytes(t: Tensor, n: int, dim: int) -> int:
    return n * t.type_size // t.block_size if dim == 0 else n * t.nb[dim]


def _slice_address(t: Tensor, shard: Shard, part: int) -> int:
    return t.address + _dim_bytes(t, shard.bounds[part].first, shard.dim)


def _send(worker: Worker, t: Tensor, shard: Shard | None, part: int) -> Send:
    ne, address, row_bytes = list(t.ne), t.address, t.row_size
    if shard is not None:
        width = len(shard.bounds[part])
        address = _slice_address(t, shard, part)
        if shard.dim == 0:
            row_bytes = _dim_bytes(t, width, 0)
        ne[shard.dim] = width
    shape = (ne[1], ne[2], ne[3])
    return Send(worker.peer, [t], address, row_bytes, shape, t.nb[1:])


def _receive(worker: Worker, node: Tensor, shard: Shard, part: int, head: int) -> Receive:
    dim = shard.dim
    above = math.prod(node.ne[dim + 1 :])
    run = _dim_bytes(node, len(shard.bounds[part]), dim)
    distance = _dim_bytes(node, node.ne[dim], dim)
    return Receive(worker.peer, node, _slice_address(node, shard, part), run, above, distance, head)
