"""Several machines as one device: weights cut by rows over workers, all else on the CPU here.

To a client it is a CPU device with the memory of all. Graphs run on this server's own kernels; a
product of a split weight becomes an exchange with the workers and, if this server has a share, a
product of its own rows meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import weakref
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from client.tensors import Tensor as RemoteTensor
from client.tensors import contiguous_strides
from protocol.dialects import Dialect
from protocol.ggml_ops import Op
from protocol.ggml_types import TYPE_INFO, GgmlType
from protocol.graph_payload import GraphPayload
from protocol.messages import MAX_SOURCES
from protocol.split import ProgramPayload, split_part_fields, split_status_fields
from rpc_server.devices.cpu.device import CpuDevice
from rpc_server.graph.errors import GraphError
from rpc_server.graph.parse import BufferLike, Resolve, parse_graph
from rpc_server.graph.tensor import Tensor
from rpc_server.split.exchange import Peer, Receive, Send, Transfer
from rpc_server.split.link import Frames, Link, Program, Step, WorkerLost, open_links
from rpc_server.split.rewrite import Group, Product, WeightIndex, rewrite
from rpc_server.split.weights import SplitStorage
from rpc_server.split.worker import program_items

if TYPE_CHECKING:
    from rpc_server.devices.cpu.plan import CpuPlan

log = logging.getLogger(__name__)

T = TypeVar("T")

LOCAL = "local"
_RETRY_SECONDS = 1.0
# Longest that preparing a graph on the workers may take.
_PREPARE_SECONDS = 120.0
WIRE_TYPES = {"f32": GgmlType.F32, "f16": GgmlType.F16, "q8_0": GgmlType.Q8_0}


@dataclass(frozen=True, slots=True)
class SplitOptions:
    """``parts``: addresses of workers, None where this server takes a share itself.

    ``proportions`` are by part, None for each one's free memory; ``timeout`` (seconds) is how long
    a worker may take for one exchange.
    """

    parts: tuple[tuple[str, int] | None, ...]
    proportions: tuple[float, ...] | None = None
    wire: GgmlType = GgmlType.F32
    timeout: float = 30.0


@dataclass(frozen=True, slots=True)
class Programmed:
    """What a worker was made ready for, and the frames of each group that it takes part in."""

    link: Link
    program: Program
    frames: dict[Group, Frames]


class SplitPlan:
    """A plan with exchanges: it borrows the workers' sockets while it runs."""

    def __init__(
        self, device: SplitDevice, inner: CpuPlan, programs: list[Programmed], tokens: int
    ) -> None:
        self.dialect = inner.dialect
        self._device = device
        self._inner = inner
        self._programs = programs
        self._tokens = tokens

    def run(self) -> None:
        """Raises GraphError or WorkerLost; the message names the worker if one is to blame."""
        started = time.perf_counter()
        with self._device.lent(self._programs):
            self._inner.run()
        self._device.count(time.perf_counter() - started, self._tokens)


class SplitDevice(CpuDevice):
    """See the module. Made by :meth:`open` on the event loop's thread."""

    name = "SPLIT"

    def __init__(self, options: SplitOptions, n_threads: int | None) -> None:
        super().__init__(n_threads)
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._links: list[Link | None] = [None] * len(options.parts)
        self._missing: dict[int, str] = {}
        self._storages: weakref.WeakSet[SplitStorage] = weakref.WeakSet()
        self._tasks: set[asyncio.Task[None]] = set()
        self._keeper: asyncio.Task[None] | None = None
        self.graphs = 0
        self.graph_seconds = 0.0
        self.tokens = 0

    @classmethod
    async def open(cls, options: SplitOptions, n_threads: int | None) -> SplitDevice:
        """Connect to all workers. Raises WorkerLost naming the first that can't be reached."""
        device = cls(options, n_threads)
        await device._connect(range(len(options.parts)))
        if device._missing:
            device.close()
            raise WorkerLost(next(iter(device._missing.values())))
        names = [LOCAL if link is None else link.name for link in device._links]
        device.description = f"rows over {', '.join(names)}"
        device._keeper = asyncio.create_task(device._keep())
        return device

    # -- the workers

    async def _connect(self, parts: Sequence[int]) -> None:
        wanted = [(i, e) for i in parts if (e := self._options.parts[i]) is not None]
        opened = await open_links([e for _, e in wanted], self._options.timeout)
        for (i, _), link in zip(wanted, opened, strict=True):
            if isinstance(link, Link):
                self._links[i] = link
                self._missing.pop(i, None)
            else:
                self._missing[i] = str(link)

    async def _keep(self) -> None:
        """Reconnect to workers that were lost."""
        while True:
            await asyncio.sleep(_RETRY_SECONDS)
            lost = [i for i, link in enumerate(self._links) if link is not None and link.lost]
            for i in lost:
                link = self._links[i]
                assert link is not None
                if i not in self._missing:
                    log.error("worker %s was lost; trying to reach it again", link.name)
                    self._missing[i] = f"worker {link.name} was lost"
            if lost:
                await self._connect(lost)

    @property
    def links(self) -> list[Link]:
        """The workers, lost ones too."""
        return [link for link in self._links if link is not None]

    def proportions(self) -> list[float]:
        """The share of each part."""
        if self._options.proportions is not None:
            return list(self._options.proportions)
        own = super().memory()[0]
        return [float(own if link is None else link.free) for link in self._links]

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- memory

    def memory(self) -> tuple[int, int]:
        """The sum of what this machine and the workers have."""
        free, total = super().memory()
        for link in self.links:
            free += max(0, link.free - link.bytes)
            total += link.total
        return free, total

    @property
    def n_parts(self) -> int:
        return len(self._links)

    def allocate(self, size: int, proportions: Sequence[float] = ()) -> SplitStorage:
        """A buffer whose weights are cut in ``proportions``, one for each part.

        Raises MemoryError when a worker is missing, or for more than all have.
        """
        if self._missing:
            raise MemoryError(next(iter(self._missing.values())))
        proportions = proportions or self.proportions()
        if len(proportions) != len(self._links):
            raise MemoryError(f"{len(proportions)} proportions for {len(self._links)} parts")
        if size > self.memory()[0]:
            raise MemoryError(f"{size} bytes asked for, {self.memory()[0]} free in all")
        storage = SplitStorage(size, list(self._links), proportions, self._in_background)
        self._storages.add(storage)
        return storage

    # -- graphs

    def prepare(
        self, payload: GraphPayload, dialects: Sequence[Dialect], resolve: Resolve
    ) -> CpuPlan | SplitPlan:
        """Plan under the first dialect that fits; makes the workers ready too."""
        storages: dict[int, SplitStorage] = {}
        watched = _watching(resolve, storages)
        first: GraphError | None = None
        for dialect in dialects:
            try:
                nodes = parse_graph(payload, dialect, watched).nodes
                return self._plan(nodes, dialect, WeightIndex(storages.values()))
            except GraphError as error:
                first = first or error
        raise first or GraphError("no dialect to read the graph by")

    def program(
        self, payload: ProgramPayload, dialect: Dialect, resolve: Resolve, peer: Peer
    ) -> CpuPlan | SplitPlan:
        """A program of the split extension; its products go on to the workers."""
        storages: dict[int, SplitStorage] = {}
        items = program_items(payload, dialect, _watching(resolve, storages), peer)
        return self._plan(items, dialect, WeightIndex(storages.values()))

    def _plan(
        self, items: Sequence[Tensor | Transfer], dialect: Dialect, index: WeightIndex
    ) -> CpuPlan | SplitPlan:
        if not index:
            return self._plans().build_items(items, dialect)
        found = rewrite(items, index)
        for storage, weight in found.whole:
            log.warning("'%s' is needed whole: bringing its rows here", weight.tensor.name)
            self._on_loop(storage.gather(weight))
        for group in found.groups:
            for product in group.products:
                product.weight.require()
        if not found.groups:
            return self._plans().build_items(items, dialect)
        programs = self._on_loop(self._program(found.groups))
        memory = _WireMemory(g.inputs[0] for g in found.groups)
        made = self._items(items, found.groups, programs, memory)
        inner = self._plans().build_items(made, dialect)
        # Records hold addresses of what these own.
        inner.keep = (made, memory)
        tokens = max(g.inputs[0].ne[1] for g in found.groups)
        return SplitPlan(self, inner, list(programs.values()), tokens)

    def _on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` on the event loop, from the device's thread."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(_PREPARE_SECONDS)
        except TimeoutError:
            future.cancel()
            raise WorkerLost("the workers did not get ready in time") from None

    async def _program(self, groups: Sequence[Group]) -> dict[Link, Programmed]:
        """Make each worker ready for its part of all groups."""

        async def one(link: Link) -> Programmed | None:
            mine = {g: step for g in groups if (step := await self._step(link, g)) is not None}
            if not mine:
                return None
            program = await link.program(list(mine.values()))
            return Programmed(link, program, dict(zip(mine, program.frames, strict=True)))

        made = await asyncio.gather(*map(one, self.links))
        return {p.link: p for p in made if p is not None}

    async def _step(self, link: Link, group: Group) -> Step | None:
        """What one worker does of a group, None if it has no rows of it."""
        g = link.backend.graph
        wire = self._wire(group.inputs[0])
        inputs = [
            g.new_tensor(wire if i == 0 else t.type, t.ne, t.name)
            for i, t in enumerate(group.inputs)
        ]
        x = inputs[0] if wire is GgmlType.F32 else g.cast(inputs[0], GgmlType.F32)
        outputs: list[RemoteTensor] = []
        for product in group.products:
            part = next((p for p in product.weight.parts if p and p.link is link), None)
            if part is not None:
                node = product.node
                ne = (part.tensor.ne[1], *node.ne[1:])
                sources = (part.tensor, x, *inputs[1:])
                outputs.append(
                    g.op(node.op, node.type, ne, sources, node.op_params, name=node.name)
                )
        if not outputs:
            return None
        between = [] if x is inputs[0] else [x]
        await link.place_step([*inputs, *between, *outputs])
        return Step(tuple(inputs), g.build(outputs), tuple(outputs))

    def _items(
        self,
        items: Sequence[Tensor | Transfer],
        groups: Sequence[Group],
        programs: dict[Link, Programmed],
        memory: _WireMemory,
    ) -> list[Tensor | Transfer]:
        """The items with products replaced by exchanges."""
        starts = {id(g.products[0].node): g for g in groups}
        products = {id(p.node): (g, p) for g in groups for p in g.products}
        made: list[Tensor | Transfer] = []
        for item in items:
            if id(item) in starts:
                group = starts[id(item)]
                inputs = list(group.inputs)
                wire = self._wire(inputs[0])
                if wire is not inputs[0].type:
                    inputs[0] = memory.converted(inputs[0], wire)
                    made.append(inputs[0])
                for link, programmed in programs.items():
                    if group in programmed.frames:
                        made += _sends(link, inputs, programmed.frames[group])
            if id(item) not in products:
                made.append(item)
                continue
            group, product = products[id(item)]
            local = _local_product(product)
            if local is not None:
                made.append(local)
            for link, programmed in programs.items():
                if group in programmed.frames:
                    made += _receives(link, product, programmed.frames[group].head)
        return made

    def _wire(self, x: Tensor) -> GgmlType:
        """How these activations travel; rows that aren't whole blocks go as F16."""
        wire = self._options.wire
        return wire if x.ne[0] % TYPE_INFO[wire].block_size == 0 else GgmlType.F16

    # -- running

    @contextlib.contextmanager
    def lent(self, programs: Sequence[Programmed]) -> Iterator[None]:
        """The workers' sockets belong to the calling thread meanwhile. Raises WorkerLost."""

        async def lend() -> None:
            for p in programs:
                await p.link.lend(p.program)

        def give_back() -> None:
            for p in programs:
                p.link.take_back()

        def hang_up() -> None:
            for p in programs:
                p.link.abort()

        try:
            self._on_loop(lend())
        except WorkerLost:
            self._loop.call_soon_threadsafe(give_back)
            raise
        try:
            yield
        except BaseException:
            # In the middle of an exchange nobody can say what the next bytes belong to.
            self._loop.call_soon_threadsafe(hang_up)
            raise
        self._loop.call_soon_threadsafe(give_back)

    def split_status(self) -> dict[str, Any]:
        """Rows, bytes and times by part."""
        parts = []
        for i, link in enumerate(self._links):
            if link is not None:
                parts.append(link.status())
                continue
            own = [w for s in self._storages for w in s.weights if w.local == i]
            rows = sum(len(w.local_rows) * w.tensor.ne[2] for w in own)
            size = sum(len(w.local_rows) * w.tensor.ne[2] * w.tensor.nb[1] for w in own)
            parts.append(split_part_fields(LOCAL, rows=rows, bytes=size))
        return split_status_fields(
            parts, graphs=self.graphs, graph_seconds=self.graph_seconds, tokens=self.tokens
        )

    def count(self, seconds: float, tokens: int) -> None:
        """Take a run into the figures of the status."""
        self.graphs += 1
        self.graph_seconds += seconds
        self.tokens += tokens

    def close(self) -> None:
        """Hang up on all workers; they free what is theirs."""
        if self._keeper is not None:
            self._loop.call_soon_threadsafe(self._keeper.cancel)
        for link in self.links:
            self._loop.call_soon_threadsafe(link.abort)
        super().close()


def _watching(resolve: Resolve, storages: dict[int, SplitStorage]) -> Resolve:
    """``resolve`` that notes the split storages it finds."""

    def watched(handle: int) -> BufferLike | None:
        buffer = resolve(handle)
        storage = getattr(buffer, "storage", None)
        if isinstance(storage, SplitStorage):
            storages[handle] = storage
        return buffer

    return watched


class _WireMemory:
    """Memory for activations on their way, used by one exchange after the other."""

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        # No wire type takes more bytes than F32.
        self._memory = np.empty(max((4 * t.nelements for t in inputs), default=0) + 64, np.uint8)

    def converted(self, x: Tensor, wire: GgmlType) -> Tensor:
        """A node that copies ``x`` into this memory as ``wire``."""
        nb = contiguous_strides(wire, x.ne)
        address = -(-int(self._memory.ctypes.data) // 64) * 64
        node = Tensor(x.id, x.name, wire, Op.CPY, x.ne, nb, address=address)
        node.src = (x, *(None,) * (MAX_SOURCES - 1))
        return node


def _sends(link: Link, inputs: Sequence[Tensor], frames: Frames) -> Iterator[Send]:
    for i, t in enumerate(inputs):
        suffix = frames.suffix if i == len(inputs) - 1 else b""
        yield Send.whole(link.peer, t, frames.prefixes[i], suffix)


def _local_product(product: Product) -> Tensor | None:
    """The product of the rows that are here; None if there are none."""
    rows, node = product.weight.local_rows, product.node
    weight = node.src[0]
    if weight is None or not len(rows):
        return None
    part = Tensor(
        id=weight.id,
        name=weight.name,
        type=weight.type,
        op=weight.op,
        ne=(weight.ne[0], len(rows), weight.ne[2], weight.ne[3]),
        nb=weight.nb,
        address=weight.address + rows.first * weight.nb[1],
    )
    return Tensor(
        id=node.id,
        name=node.name,
        type=node.type,
        op=node.op,
        ne=(len(rows), *node.ne[1:]),
        nb=node.nb,
        op_params=node.op_params,
        flags=node.flags,
        src=(part, *node.src[1:]),
        address=node.address + rows.first * node.nb[0],
    )


def _receives(link: Link, product: Product, head: int) -> Iterator[Receive]:
    node = product.node
    for rows, part in zip(product.weight.rows, product.weight.parts, strict=True):
        if part is not None and part.link is link:
            yield Receive(
                link.peer,
                node,
                node.address + rows.first * node.nb[0],
                len(rows) * node.nb[0],
                node.nrows,
                node.nb[1],
                head,
            )
