"""Several machines as one device: weights cut by rows over workers, all else on the CPU here.

To a client it is a CPU device with the memory of all. Graphs run on this server's own kernels; a
product of a split weight becomes an exchange with the workers and, if this server has a share, a
product of its own rows meanwhile.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from client.model_header import ModelShape
from client.split.address import OwnCard, ServerAddress
from client.split.balance import Speed, shares_by_time
from protocol.dialects import Dialect
from protocol.ggml.ops import VIEWS
from protocol.ggml.types import GgmlType
from protocol.graph_payload import GraphPayload
from protocol.split import ProgramPayload, split_part_fields, split_status_fields
from protocol.tensor import Tensor
from rpc_server.devices.base import Plan, StopWord
from rpc_server.devices.cpu.device import CpuDevice, CpuQueue
from rpc_server.devices.cpu.kernels.interface.stream import (
    BYTES_RECEIVED,
    BYTES_SENT,
    SILENT,
    STATUS_TEXT,
    StreamPeer,
)
from rpc_server.devices.cpu.streaming.program import program_items
from rpc_server.devices.cpu.streaming.transfer import Receive, Transfer
from rpc_server.devices.cpu.turns import DeviceShare
from rpc_server.devices.planning.nodes import watching
from rpc_server.devices.planning.program import linked_steps
from rpc_server.devices.split.assemble import Assembler, Programmed
from rpc_server.devices.split.cards import HOST, START_SECONDS, CardServer
from rpc_server.devices.split.disks import Disks
from rpc_server.devices.split.holding import Holding
from rpc_server.devices.split.identity import conflict, same_server
from rpc_server.devices.split.links import Linked, Links
from rpc_server.devices.split.measure import measure_parts
from rpc_server.devices.split.mode import Mode, choose, home_box, measure_network
from rpc_server.devices.split.room import HomeMemory, Room, usable
from rpc_server.devices.split.sharded import ShardedWeight
from rpc_server.devices.split.slices import Slices
from rpc_server.devices.split.subgraphs import (
    Indices,
    Partitioning,
    WeightIndex,
    find_subgraphs,
    indices_of,
)
from rpc_server.devices.split.weights import SplitStorage
from rpc_server.devices.split.worker import (
    CONNECT_TIMEOUT,
    NO_TLS,
    PREPARE_TIMEOUT,
    NoRoom,
    PartsMissing,
    Tls,
    UnfitError,
    Worker,
    WorkerLost,
    WorkerSilent,
)
from rpc_server.graph.errors import GraphError
from rpc_server.graph.parse import Resolve, parse_graph
from rpc_server.models.library import Models
from rpc_server.ops.arrays import ArrayContext
from rpc_server.ops.rows import checked_indices
from rpc_server.ops.table import ContractError

if TYPE_CHECKING:
    from rpc_server.cache.store import TensorCache
    from rpc_server.devices.cpu.plan import CpuPlan
    from rpc_server.devices.planning.group import LinkGroup

log = logging.getLogger(__name__)

T = TypeVar("T")

_CONTEXT = ArrayContext()

LOCAL = "local"
# The first protocol whose tensors say how often they are used.
COUNTED_FROM = (5, 1, 0)
_RETRY_SECONDS = 1.0
# How often workers that split over others are asked which.
_MEMBERS_SECONDS = 3.0
# How often a graph that waits for other coordinators looks whether it is still wanted.
_LOOK_SECONDS = 0.25
# Longest that preparing a graph on the workers may take.
_PREPARE_SECONDS = 2 * PREPARE_TIMEOUT


@dataclass(frozen=True, slots=True)
class SplitOptions:
    """``parts``: workers, cards of this machine, None where its processors take a share.

    ``proportions`` are by part, None for each one's free memory, 'auto' for how fast each is;
    ``timeout`` (seconds) is how long a worker may take for one exchange. ``by_columns`` is tensor
    mode: whole blocks of a layer on the parts; None for whichever is faster for a model of
    ``shape`` (None: a typical one). ``tls`` is for those inside of TLS, ``card_command`` starts the
    server of a card with its name behind it.
    """

    parts: tuple[ServerAddress | OwnCard | None, ...]
    proportions: tuple[float, ...] | Literal["auto"] | None = None
    wire: GgmlType = GgmlType.F32
    by_columns: bool | None = False
    timeout: float = 30.0
    # Whether parts add up sums among themselves where they can.
    linked: bool = True
    tls: Tls = NO_TLS
    # This server's own, which none of the parts may have.
    identity: int = 0
    shape: ModelShape | None = None
    card_command: tuple[str, ...] = ()

    @property
    def mixed(self) -> bool:
        """Return whether cards and processors of this machine are parts, which differ in kind."""
        return None in self.parts and any(isinstance(part, OwnCard) for part in self.parts)


@dataclass(frozen=True, slots=True)
class Exchanging:
    """A plan, what workers were made ready for it, and how many tokens it computes.

    ``indices`` are to be in range before anything is sent.
    """

    inner: CpuPlan
    programs: list[Programmed]
    tokens: int = 0
    indices: Sequence[Indices] = ()
    # The links by which parts add up among themselves, if they do.
    linked: Linked | None = None
    # The bytes that each part gives in one run.
    given: Mapping[Worker, int] = field(default_factory=dict)

    def check_indices(self) -> None:
        """Raise GraphError for an index that no row has: a worker would hang up, or worse."""
        for i in self.indices:
            try:
                checked_indices(_CONTEXT, i.tensor, i.limit)
            except ContractError as error:
                raise GraphError(f"{i.node.label}: {error}") from None


class SplitPlan:
    """A plan with exchanges: it borrows the workers' sockets while it runs.

    ``make`` plans; it does so again when weights in ``storages`` were moved meanwhile. ``share`` is
    the client's in the device.
    """

    def __init__(
        self,
        device: SplitDevice,
        share: DeviceShare,
        make: Callable[[], Exchanging],
        storages: Sequence[SplitStorage],
    ) -> None:
        self._device, self._share = device, share
        self._make = make
        self._storages = storages
        self._stopped = False
        self._plan = make()
        inner = self._plan.inner
        self.dialect, self.nbytes, self.scratch = inner.dialect, inner.nbytes, inner.scratch
        self._made_at = self._changes()

    # A stopped run leaves the workers' streams in the middle of an exchange.
    shared = True
    brief = False

    def stop(self) -> None:
        """Do what Plan says."""
        self._stopped = True
        self._plan.inner.stop()

    def _changes(self) -> int:
        return sum(storage.changes for storage in self._storages)

    def run(self) -> None:
        """Run the plan, here and on the workers.

        Raises GraphError or WorkerLost; the message names the worker if one is to blame.
        """
        if self._made_at != self._changes():
            with self._share.aside():
                self._plan = self._make()
            self._made_at = self._changes()
        if self._stopped:
            raise GraphError("was stopped")
        plan = self._plan
        if not plan.programs:
            plan.inner.run()
            return
        plan.check_indices()
        started = time.perf_counter()
        with self._device.lent(plan, self._share, lambda: self._stopped):
            plan.inner.run()
        self._device.count(time.perf_counter() - started, plan.tokens)


class SplitQueue:
    """A queue for graphs of one client: its queue on this machine, and workers for all clients."""

    def __init__(self, device: SplitDevice, cpu: CpuQueue) -> None:
        self._device = device
        self._cpu = cpu

    def prepare(
        self, payload: GraphPayload, dialect: Dialect, resolve: Resolve, stop: StopWord | None
    ) -> SplitPlan:
        """Do what Queue says, but for ``stop``: looking for what is split is not interrupted."""
        storages: dict[int, SplitStorage] = {}
        with self._cpu.share.aside():
            nodes = parse_graph(payload, dialect, watching(resolve, SplitStorage, storages)).nodes
            return self._device.plan(self._cpu, nodes, dialect, list(storages.values()))

    def program(
        self,
        payload: ProgramPayload,
        dialect: Dialect,
        resolve: Resolve,
        peer: StreamPeer,
        group: LinkGroup | None = None,
    ) -> SplitPlan:
        """Return a program of the split extension; its products go on to the workers."""
        storages: dict[int, SplitStorage] = {}
        with self._cpu.share.aside():
            # No group is joined for this device: a program with swaps is refused.
            steps = linked_steps(payload, dialect, watching(resolve, SplitStorage, storages))
            items = program_items(steps, peer)
            return self._device.plan(self._cpu, items, dialect, list(storages.values()))

    def submit(self, job: Callable[[], T]) -> concurrent.futures.Future[T]:
        """Run ``job`` on the client's thread, once it is the client's turn."""
        return self._cpu.submit(job)

    def at_once(self, plan: Plan) -> bool:
        """Do nothing: what is done over sockets is not done at once."""
        return False

    def waited(self, now: float) -> float:
        """Do what Queue says."""
        return self._cpu.waited(now)

    def leave(self) -> None:
        """Do what Queue says."""
        self._cpu.leave()


class SplitDevice:
    """See the module. Made by :meth:`open` on the event loop's thread."""

    name = "SPLIT"
    alignment = CpuDevice.alignment
    max_size = CpuDevice.max_size
    runs_programs = True
    runs_kernels = True
    no_swaps = "it splits over others itself"
    # A worker that is lost may come back.
    lost = ""

    def __init__(self, options: SplitOptions, n_threads: int | None) -> None:
        # What is not split runs here.
        self._cpu = CpuDevice(n_threads)
        self.description = ""
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._workers: list[Worker | None] = [None] * len(options.parts)
        self._cards = {
            part: CardServer(part, options.card_command)
            for part in options.parts
            if isinstance(part, OwnCard)
        }
        # By part, where shares go by speed.
        self._speeds: list[Speed] = []
        self._memory = HomeMemory()
        # By part, the memory for a model at the start.
        self._by_memory: list[float] = []
        self._missing: dict[int, str] = {}
        self._storages: weakref.WeakSet[SplitStorage] = weakref.WeakSet()
        self._tasks: set[asyncio.Task[None]] = set()
        self._keeper: asyncio.Task[None] | None = None
        self._slices: Slices | None = None
        self._disks = Disks()
        self._links = Links(options.timeout)
        # By worker, why it keeps no slices, as far as the log has said so.
        self._keeps_not: dict[str, str] = {}
        self._by_columns = bool(options.by_columns)
        # One graph has the workers' sockets at a time.
        self._lending = asyncio.Lock()
        self._holding = Holding(lambda: self.workers, self._in_background)
        self.graphs = 0
        self.graph_seconds = 0.0
        self.tokens = 0

    @classmethod
    async def open(cls, options: SplitOptions, n_threads: int | None) -> SplitDevice:
        """Connect to all workers. Raises PartsMissing if some can't be reached, WorkerLost."""
        device = cls(options, n_threads)
        try:
            await device._connect(range(len(options.parts)), START_SECONDS)
        except BaseException:
            device.close()
            raise
        if device._missing:
            device.close()
            raise PartsMissing(device._missing)
        device._by_memory = [float(n) for n in device._free_of_parts()]
        names = [LOCAL if worker is None else worker.name for worker in device._workers]
        if options.proportions == "auto" or (options.proportions is None and options.mixed):
            log.info("measuring how fast the parts are")
            try:
                device._speeds = await measure_parts(device._cpu, device._workers)
            except WorkerLost:
                device.close()
                raise
            shares = zip(names, device.proportions(), device._speeds, strict=True)
            for name, share, speed in shares:
                log.info(
                    "%s: %.1f GB/s of weights, %.0f us away: %.1f %% of the rows",
                    name,
                    speed.compute / 1e9,
                    speed.round_trip * 1e6,
                    100 * share,
                )
        try:
            device._by_columns = await device._chosen_mode() == "tensor"
        except WorkerLost:
            device.close()
            raise
        device.description = f"rows over {', '.join(names)}"
        device._keeper = asyncio.create_task(device._keep())
        return device

    async def _chosen_mode(self) -> Mode:
        """Return the mode, the faster one where none is given. Raises WorkerLost."""
        options = self._options
        if options.by_columns is not None:
            return "tensor" if options.by_columns else "row"
        boxes = [
            None if worker is None else await measure_network(worker, linked=options.linked)
            for worker in self._workers
        ]
        return choose(options.shape, home_box(self._home()), boxes, self.proportions())

    # -- the workers

    async def _open(self, part: ServerAddress | OwnCard, patience: float) -> Worker | WorkerLost:
        """Connect to a part, or tell why it can't be had; start the server of a card.

        That may take ``patience`` seconds; it goes on behind that.
        """
        timeout = self._options.timeout
        try:
            if isinstance(part, ServerAddress):
                tls = self._options.tls if part.tls else NO_TLS
                return await Worker.open(part.host, part.port, timeout, tls)
            server = self._cards[part]
            port = await server.port(patience)
            try:
                return await Worker.open(HOST, port, timeout, name=part.name)
            except WorkerSilent:
                # There is nobody else who could have it: it hangs.
                reason = f"it did not answer within {CONNECT_TIMEOUT:g} s"
                await server.restart(reason)
                return WorkerLost(f"{part.name}: {reason}")
        except WorkerLost as error:
            return error

    async def _connect(self, parts: Sequence[int], patience: float = CONNECT_TIMEOUT) -> None:
        wanted = [(i, e) for i in parts if (e := self._options.parts[i]) is not None]
        options = self._options
        opened = await asyncio.gather(*(self._open(e, patience) for _, e in wanted))
        for (i, _), worker in zip(wanted, opened, strict=True):
            if isinstance(worker, Worker):
                reason = conflict(worker, self._others(i), options.identity)
                if not reason:
                    if self._slices is not None:
                        await self._find_keeping(worker)
                    self._workers[i] = worker
                    self._missing.pop(i, None)
                    continue
                worker.abort(reason)
                if self._missing.get(i) != reason and self._keeper is not None:
                    log.error("%s", reason)
                self._missing[i] = reason
        for (i, part), worker in zip(wanted, opened, strict=True):
            if isinstance(worker, Worker):
                continue
            twin = ""
            if isinstance(worker, WorkerSilent) and isinstance(part, ServerAddress):
                twin = await same_server((part.host, part.port), self._others(i))
            before, self._missing[i] = self._missing.get(i, ""), twin or str(worker)
            if self._workers[i] is not None and before != self._missing[i]:
                # It is tried every second: only what is new is told.
                log.error("%s", self._missing[i])

    def _others(self, part: int) -> list[Worker]:
        """The workers that are there, but for that of ``part``."""
        return [
            n for i, n in enumerate(self._workers) if i != part and n is not None and not n.lost
        ]

    async def _keep(self) -> None:
        """Reconnect to workers that were lost, and see that those there are don't form a circle."""
        asked = time.monotonic()
        while True:
            await asyncio.sleep(_RETRY_SECONDS)
            lost = [
                i for i, worker in enumerate(self._workers) if worker is not None and worker.lost
            ]
            for i in lost:
                worker = self._workers[i]
                assert worker is not None
                if i not in self._missing:
                    log.error("%s; trying to reach it again", worker.loss)
                    self._missing[i] = worker.loss
            if lost:
                await self._connect(lost)
            if time.monotonic() - asked >= _MEMBERS_SECONDS:
                asked = time.monotonic()
                for i, worker in enumerate(self._workers):
                    if worker is not None and not worker.lost and worker.splits:
                        self._in_background(self._check_members(i, worker))

    async def _check_members(self, part: int, worker: Worker) -> None:
        """Let a worker go that has become one of those which it must not be."""
        with contextlib.suppress(WorkerLost):
            await worker.refresh_members()
            reason = conflict(worker, self._others(part), self._options.identity)
            if reason:
                worker.abort(reason)

    @property
    def workers(self) -> list[Worker]:
        """The workers, lost ones too."""
        return [worker for worker in self._workers if worker is not None]

    def proportions(self, size: int = 0) -> list[float]:
        """Return the share of each part in a buffer of ``size`` bytes.

        The same for all buffers, since weights and caches of one block are cut alike; but shares by
        speed give way where a buffer doesn't fit.
        """
        given = self._options.proportions
        if given is not None and given != "auto":
            return list(given)
        if self._speeds:
            free = self._free_of_parts()
            shares = shares_by_time(self._speeds)
            if all(share * size <= room for share, room in zip(shares, free, strict=True)):
                return shares
            if size <= sum(free):
                limits = [room / size for room in free]
                return shares_by_time(self._speeds, limits=limits)
        return self._by_memory

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- memory

    def memory(self) -> tuple[int, int]:
        """Return what a model may take whatever it consists of, and that without any client.

        While a worker is missing nothing is free.
        """
        missing = self._missing or any(worker.lost for worker in self.workers)
        free = 0 if missing else self._room().anything
        return free, max(free, self._whole_room().anything)

    def capacity(self) -> int:
        """Return the largest sum of buffers, if they are weights or all is for this machine."""
        return self._whole_room().largest

    def _held(self) -> tuple[int, int]:
        """Bytes of split tensors that lie here, and bytes that nobody knows yet what they are."""
        storages = [s for s in self._storages if s.open]
        return sum(s.bytes_here for s in storages), sum(s.bytes_unknown for s in storages)

    def _home(self) -> int:
        """Return what this machine has for models, less what it keeps of split tensors."""
        here, unknown = self._held()
        return usable(self._memory.free(here + unknown)) - here

    def _free_of_parts(self) -> list[int]:
        own = self._home()
        return [
            max(0, own if worker is None else usable(worker.free) - worker.bytes)
            for worker in self._workers
        ]

    def _room(self, shares: Sequence[float] = ()) -> Room:
        """Room as it is, for weights that are cut in ``shares`` (the default's if not given)."""
        parts = self._free_of_parts()
        return self._divided(parts, self._home(), self._held()[1], shares)

    def _whole_room(self) -> Room:
        """Room if no client held anything, and nobody else on these machines either."""
        self._home()
        own = self._memory.total
        parts = [own if worker is None else worker.total for worker in self._workers]
        return self._divided(parts, own, 0)

    def _divided(
        self, parts: Sequence[int], home: int, unknown: int, shares: Sequence[float] = ()
    ) -> Room:
        if self._speeds and not shares:
            # Shares by speed give way to what fits.
            return Room([sum(parts)], [1.0], home, unknown)
        return Room(parts, shares or self.proportions(), home, unknown)

    @property
    def n_parts(self) -> int:
        return len(self._workers)

    def allocate(self, size: int, proportions: Sequence[float] = ()) -> SplitStorage:
        """Return a buffer whose weights are cut in ``proportions``, one for each part.

        Raises MemoryError when a worker is missing, or for more than all have.
        """
        lost = [worker.loss for worker in self.workers if worker.lost]
        if self._missing or lost:
            raise MemoryError([*self._missing.values(), *lost][0])
        room = self._room(proportions)
        proportions = proportions or self.proportions(size)
        if len(proportions) != len(self._workers):
            raise MemoryError(f"{len(proportions)} proportions for {len(self._workers)} parts")
        if size > room.largest or not sum(proportions) > 0:
            home = max(0, room.home - room.unknown)
            raise MemoryError(
                f"{size} bytes asked for; the parts have {room.weights} for weights, and for all "
                f"else this machine has {home}"
            )
        storage = SplitStorage(
            size,
            list(self._workers),
            proportions,
            self._in_background,
            by_columns=self._by_columns,
            spare=lambda: usable(self._cpu.memory()[0]),
            beyond_here=size > room.home - room.unknown,
        )
        storage.slices = self._slices
        storage.disks = self._disks
        self._storages.add(storage)
        return storage

    def alloc_size(self, tensor: Tensor) -> int:
        """Return what the CPU does: this device pads nothing."""
        return self._cpu.alloc_size(tensor)

    # -- graphs

    def queue(self, address: str = "") -> SplitQueue:
        """Return what graphs of one client run by, in turns with those of others."""
        return SplitQueue(self, self._cpu.queue(address))

    def prefetch_kernels(self, type: GgmlType) -> None:
        """Have the kernels of this weight type ready, for this server's own share."""
        self._cpu.prefetch_kernels(type)

    def plan(
        self,
        cpu: CpuQueue,
        items: Sequence[Tensor | Transfer],
        dialect: Dialect,
        storages: Sequence[SplitStorage],
    ) -> SplitPlan:
        """Plan ``items`` for the client that has ``cpu`` here. Raises GraphError, WorkerLost."""
        for storage in storages:
            for item in items:
                if isinstance(item, Tensor) and not item.empty:
                    start = item.address - storage.address
                    if start >= 0 and start + item.nbytes <= storage.size:
                        storage.claim(start, item.nbytes)
                        if item.op not in VIEWS:
                            storage.computes(start, item.nbytes)
        make = functools.partial(self._exchanging, cpu, items, dialect, storages)
        return SplitPlan(self, cpu.share, make, storages)

    def _exchanging(
        self,
        cpu: CpuQueue,
        items: Sequence[Tensor | Transfer],
        dialect: Dialect,
        storages: Sequence[SplitStorage],
    ) -> Exchanging:
        if self._by_columns:
            parts = next((s.workers for s in storages if s.weights), ())
            if self._options.linked and self._links.may_be(parts):
                try:
                    return self._exchange(cpu, items, dialect, storages, chain=True, linked=True)
                except UnfitError as error:
                    log.warning("%s: sums of this graph go through this server", error)
            try:
                return self._exchange(cpu, items, dialect, storages, chain=True)
            except UnfitError as error:
                log.warning("%s: this graph goes by rows", error)
        return self._exchange(cpu, items, dialect, storages, chain=False)

    def _exchange(
        self,
        cpu: CpuQueue,
        items: Sequence[Tensor | Transfer],
        dialect: Dialect,
        storages: Sequence[SplitStorage],
        *,
        chain: bool,
        linked: bool = False,
    ) -> Exchanging:
        """Raises UnfitError where a part can't do its share; its clients don't notice."""
        found = self._found(cpu.share, items, dialect, storages, chain, linked)
        links = None
        if found.summed:
            workers = next(s.workers for s in storages if s.weights)
            links = self._on_loop(cpu.share, self._links.between(workers))
            if links is None:
                return self._exchange(cpu, items, dialect, storages, chain=chain)
        # What isn't weights was given out as address space, which may be more than there is.
        here = sum(s.bytes_here + s.bytes_unknown for s in storages)
        if here > self._memory.believed:
            raise GraphError(
                f"{here} bytes beside the parts' weights, this machine has {self._memory.believed}"
            )
        for storage, weight in found.whole:
            log.warning("'%s' is needed whole: bringing its rows here", weight.tensor.name)
            self._on_loop(cpu.share, storage.gather(weight))
        for weight in found.weights.values():
            weight.require()
        if not found.subgraphs:
            return Exchanging(cpu.plan_items(items, dialect), [])
        # The weights know them: a link that was lost since may have been replaced here already.
        workers = next(s.workers for s in storages if s.weights)
        assembler = Assembler(
            found, workers, self._options.wire, None if links is None else links.group
        )
        try:
            for storage, leaves in _by_storage(found.lasting):
                self._on_loop(cpu.share, storage.copy_out(leaves))
            programs = self._on_loop(cpu.share, assembler.program())
        except NoRoom as error:
            if links is not None:
                log.warning("%s: sums of this graph go through this server", error)
                return self._exchange(cpu, items, dialect, storages, chain=chain)
            # Better slowly here than not at all.
            log.warning("%s: this machine does it all", error)
            self._use_here(cpu.share, found, storages)
            return self._exchange(cpu, items, dialect, storages, chain=chain)
        made = assembler.items(items, programs)
        inner = cpu.plan_items(made, dialect)
        # Records hold addresses of what these own.
        inner.keep = (made, assembler)
        tokens = max(s.nodes[0].ne[1] for s in found.subgraphs)
        given = {
            p.worker: sum(
                item.head + item.run_bytes * item.runs
                for item in made
                if isinstance(item, Receive) and item.peer is p.worker.peer
            )
            for p in programs
        }
        return Exchanging(inner, programs, tokens, indices_of(found), links, given)

    def _use_here(
        self, share: DeviceShare, found: Partitioning, storages: Sequence[SplitStorage]
    ) -> None:
        """Bring here all weights and caches that a graph has on the parts. Raises NoRoom."""
        for storage in storages:
            for weight in storage.weights:
                if weight not in found.weights.values():
                    continue
                if weight.is_cache:
                    self._on_loop(share, storage.gather_to_host([weight]))
                else:
                    self._on_loop(share, storage.gather(weight))
                    weight.used_here = True

    def _found(
        self,
        share: DeviceShare,
        items: Sequence[Tensor | Transfer],
        dialect: Dialect,
        storages: Sequence[SplitStorage],
        chain: bool,
        linked: bool,
    ) -> Partitioning:
        """The subgraphs; split tensors are moved as the graph wants them."""
        # Caches that would be cut: whether the graph can do with that shows when it is tried.
        tried: dict[int, tuple[SplitStorage, ShardedWeight]] = {}
        while True:
            found = find_subgraphs(
                items,
                WeightIndex(storages, tried.values()),
                chain=chain,
                counted=dialect.version >= COUNTED_FROM,
                linked=linked,
            )
            for storage, weight in found.written:
                if tried.pop(weight.address, None) is not None:
                    storage.refuse(weight)
                    continue
                log.warning("a graph uses '%s' as a whole: it comes here", weight.tensor.name)
                self._on_loop(share, storage.gather_to_host([weight]))
            if found.written:
                continue
            if not found.caches and not tried:
                return found
            for storage, leaf, shard in found.caches:
                tried[leaf.address] = (storage, storage.tentative_shard(leaf, shard.bounds))
            if not found.caches:
                for storage, weight in tried.values():
                    try:
                        self._on_loop(share, storage.cut_cache(weight))
                    except NoRoom as error:
                        log.warning("%s: it stays here as a whole", error)
                        storage.refuse(weight)
                tried.clear()

    def _on_loop(self, share: DeviceShare, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` on the event loop, from the client's thread; others have the device."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            with share.away():
                return future.result(_PREPARE_SECONDS)
        except TimeoutError:
            future.cancel()
            raise WorkerLost("the workers did not get ready in time") from None

    # -- running

    @contextlib.contextmanager
    def lent(
        self,
        plan: Exchanging,
        share: DeviceShare,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[None]:
        """Lend the sockets of a plan's workers to the calling thread meanwhile, and its links.

        Graphs of other clients that need them, and other coordinators, are waited for until
        ``stopped`` says otherwise; those that don't have the device meanwhile. What fails before a
        worker was sent anything costs nobody else a worker. Raises WorkerLost, GraphError.
        """
        programs, linked = plan.programs, plan.linked
        streams = [p.worker.peer.stream for p in programs]
        lent = False
        group = None if linked is None else linked.group
        watching: asyncio.Task[None] | None = None
        # What parts have said of why they fail.
        reports: dict[Worker, str] = {}

        async def lend() -> None:
            nonlocal lent, watching
            await self._lending.acquire()
            lent = True
            await self._holding.begin([p.worker for p in programs])
            for p in programs:
                await p.worker.lend(p.program)
            if group is not None:
                try:
                    group.begin()
                except LookupError as error:
                    raise WorkerLost(str(error)) from None
            if linked is not None:
                ends = {
                    w: w.peer.stream.count(BYTES_RECEIVED) + n for w, n in plan.given.items() if n
                }
                watch = _watch(programs, reports, self._options.timeout, ends)
                watching = asyncio.ensure_future(watch)

        def give_back(*, failed: bool = False) -> None:
            if not lent:
                return
            if watching is not None:
                watching.cancel()
            if group is not None:
                group.end(failed=failed)
            for p in programs:
                p.worker.take_back()
            self._holding.end()
            self._lending.release()

        def hang_up(reason: str) -> None:
            begun = False
            for p, stream, before in zip(programs, streams, sent, strict=True):
                if stream.count(BYTES_SENT) != before:
                    p.worker.abort(reason)
                    begun = True
            give_back(failed=begun)

        sent = [stream.count(BYTES_SENT) for stream in streams]
        future = asyncio.run_coroutine_threadsafe(lend(), self._loop)
        try:
            with share.away():
                _result(future, stopped)
        except BaseException:
            # Where it was not waited for it goes on, until it knows what it has to give back.
            future.add_done_callback(lambda _: self._loop.call_soon_threadsafe(give_back))
            raise
        try:
            yield
        except BaseException as error:
            # In the middle of an exchange nobody can say what the next bytes belong to.
            text = str(error)
            if linked is not None and isinstance(error, GraphError):
                # Where others failed first, the one that was waited for is not to blame.
                first = f"{text}; " if not reports else ""
                told = _told(programs, reports, text)
                text = f"{first}{told}" if told else text
            self._loop.call_soon_threadsafe(hang_up, f"given up after: {text}")
            if text != str(error):
                raise GraphError(text) from None
            raise
        self._loop.call_soon_threadsafe(give_back)

    # -- as a worker of another coordinator: see Splitting

    @property
    def members(self) -> list[int]:
        return [member for worker in self.workers if not worker.lost for member in worker.members]

    async def hold(self, seconds: float) -> str:
        return await self._holding.lease_out(seconds)

    async def renew(self) -> bool:
        return await self._holding.renew()

    def let_go(self) -> None:
        self._holding.take_in()

    # -- what the workers keep on disk

    def use_models(self, models: Models) -> None:
        self._disks = Disks(models)

    async def keep_slices(self, cache: TensorCache) -> str:
        self._slices = Slices.of(cache)
        workers = self.workers
        for worker in workers:
            await self._find_keeping(worker)
        return f"and of {sum(n.keeps for n in workers)} of {len(workers)} workers"

    async def _find_keeping(self, worker: Worker) -> None:
        """Let the log say of a worker that it keeps nothing."""
        with contextlib.suppress(WorkerLost):
            reason = await worker.find_keeping()
            if reason and self._keeps_not.get(worker.name) != reason:
                log.warning(
                    "worker %s %s: weights are sent to it each time",
                    worker.name,
                    reason,
                )
            self._keeps_not[worker.name] = reason

    def split_status(self) -> dict[str, Any]:
        """Return rows, bytes and times by part."""
        parts = []
        for i, worker in enumerate(self._workers):
            if worker is not None:
                parts.append(worker.status())
                continue
            own = [w for s in self._storages for w in s.weights if w.local == i]
            rows = sum(w.local_row_count for w in own)
            size = sum(w.local_bytes for w in own)
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
        self._loop.call_soon_threadsafe(self._links.close)
        for worker in self.workers:
            self._loop.call_soon_threadsafe(worker.close)
        for card in self._cards.values():
            card.close()
        self._cpu.close()


def _by_storage(
    lasting: Sequence[tuple[SplitStorage, Tensor]],
) -> list[tuple[SplitStorage, list[Tensor]]]:
    found: dict[int, tuple[SplitStorage, list[Tensor]]] = {}
    for storage, leaf in lasting:
        found.setdefault(id(storage), (storage, []))[1].append(leaf)
    return list(found.values())


async def _watch(
    programs: Sequence[Programmed],
    reports: dict[Worker, str],
    timeout: float,
    ends: Mapping[Worker, int],
) -> None:
    """Look at parts that add up among themselves, until one fails; then end the run.

    The plan waits for one of them at a time: it would wait long for one that waits for another. And
    where another has given what comes behind the last sum, a part has no more to wait for: it may
    take ``timeout`` seconds from then on. The plan may have taken that already: ``ends`` are the
    counts of bytes received at which it has all that a part gives.
    """
    given_since: dict[Worker, float] = {}
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        now = time.monotonic()
        for p in programs:
            report, following = p.worker.report(), p.worker.next_byte
            if report or following == b"":
                reports[p.worker] = report
            got, end = p.worker.peer.stream.count(BYTES_RECEIVED), ends.get(p.worker)
            if following or (end is not None and got >= end):
                given_since.setdefault(p.worker, now)
            else:
                given_since.pop(p.worker, None)
        if any(now - since > timeout for since in given_since.values()):
            for p in programs:
                if p.worker not in given_since and p.worker.peer.stream.awaited > timeout:
                    reports[p.worker] = STATUS_TEXT[SILENT]
        if reports:
            for p in programs:
                p.worker.interrupt()
            return


def _told(programs: Sequence[Programmed], reports: dict[Worker, str], error: str) -> str:
    """Return what parts say of why they fail, '' if none does."""
    for p in programs:
        report = p.worker.report(error)
        if report:
            reports[p.worker] = report
    return "; ".join(f"worker {w.name}: {report}" for w, report in reports.items() if report)


def _result(future: concurrent.futures.Future[None], stopped: Callable[[], bool]) -> None:
    """Wait for ``future``. Raises what it raises, and GraphError once ``stopped`` says so."""
    while True:
        try:
            return future.result(_LOOK_SECONDS)
        except TimeoutError:
            if future.done():
                return future.result()
            if stopped():
                raise GraphError("was stopped") from None
