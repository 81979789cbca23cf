"""A graph made ready for a card: launches that are captured once, and what can't be captured."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import weakref
from collections.abc import Callable, Hashable, MutableMapping, Sequence
from typing import Any, Protocol

import numpy as np

import rpc_server.devices.cuda.lower
import rpc_server.ops  # noqa: F401  (fills the op table)
from protocol.dialects import Dialect
from protocol.tensor import Tensor
from rpc_server.devices.base import StopWord
from rpc_server.devices.cpu.kernels.interface.abi import EXTRA_WORD
from rpc_server.devices.cuda.card import Card
from rpc_server.devices.cuda.graphs import KernelLaunch
from rpc_server.devices.cuda.host import run_on_host
from rpc_server.devices.cuda.kinds import NoPatternError
from rpc_server.devices.cuda.planner import (
    CudaPlanner,
    Launch,
    Product,
    lower_to_launches,
    place_scratch,
)
from rpc_server.devices.cuda.resources import StatusWord, StreamResources
from rpc_server.devices.cuda.storage import CudaStorage
from rpc_server.devices.planning.nodes import PlanSteps, lower_node
from rpc_server.devices.planning.records import STATUS_TEXT
from rpc_server.graph.errors import GraphError
from rpc_server.graph.parse import LinkedGraph
from rpc_server.ops.table import ContractError, OpSpec

log = logging.getLogger(__name__)

# Words of a record that the plan fills in: where failures are written, and the node's number.
_STATUS_WORD, _NODE_WORD = EXTRA_WORD - 2, EXTRA_WORD - 1

# Node numbers are told in the upper 24 bits of a status.
_MOST_NODES = 1 << 24


class Scratch:
    """Memory of the card that a client's plans share: they run one after the other."""

    address = 0

    def __init__(self, card: Card, size: int) -> None:
        self._card = card
        self.size = size
        self.address = card.allocate(size)

    def __del__(self) -> None:
        if self.address:
            self._card.free(self.address)


class CapturedGraph:
    """Launches without anything between them: a captured graph from their second run on.

    Copies that are to be enqueued ``before`` and ``after`` them are captured with them.

    Where a client's cache has grown, its next token has the same kernels as that before, and few of
    them another record or other blocks. Its plan takes the captured graph over, from the first run
    on, and has those changed; if the other plan comes again it captures another graph. ``kin`` are
    by their kernels those of a client that were captured or taken over last; without, none is.
    """

    def __init__(
        self,
        resources: StreamResources,
        work: Sequence[Launch | Product],
        kin: MutableMapping[Hashable, CapturedGraph] | None = None,
    ) -> None:
        self._kin = kin
        self.before: list[Callable[[], None]] = []
        self.after: list[Callable[[], None]] = []
        self._resources = resources
        self._card = card = resources.card
        self._stream = resources.stream
        # CuPy has no cuBLAS in captures; products that need it take longer than their launches.
        self._capturable = not any(isinstance(x, Product) for x in work)
        if not self._capturable:
            # It takes milliseconds to make, and memory that may not be there.
            self._library = resources.library
        kernels = {id(x.kernel): x.kernel for x in work if isinstance(x, Launch)}
        functions = {number: card.function(kernel) for number, kernel in kernels.items()}
        self._work = [
            x
            if isinstance(x, Product)
            else KernelLaunch(functions[id(x.kernel)], x.words, x.grid, x.threads, x.shared)
            for x in work
        ]
        self._graph: Any = None
        # What the graph was captured with, by this or by one before.
        self._captured: Sequence[KernelLaunch] = ()
        self._ran = False

    def __call__(self) -> None:
        if self._ran:
            # The first run is by itself: a graph that comes only once isn't worth capturing.
            self._capture()
        else:
            self._take_over()
        if self._graph is not None:
            self._graph.launch(self._stream)
        else:
            self._enqueue()
        self._ran = True

    def get_ready(self) -> None:
        """Capture it now, if that can be done, and have the card take it; nothing runs."""
        self._capture()
        if self._graph is not None:
            self._card.take_graph(self._graph, self._stream)

    def _capture(self) -> None:
        if self._graph is None and self._capturable:
            self._graph = self._card.capture(self._stream, self._enqueue)
            self._captured = self._kernels
            if self._kin is not None:
                self._kin[self._key] = self

    @property
    def _kernels(self) -> list[KernelLaunch]:
        return [x for x in self._work if not isinstance(x, Product)]

    @functools.cached_property
    def _key(self) -> Hashable:
        """The things that graphs have in common of which one can take the other's place."""
        functions = tuple(id(x.function) for x in self._kernels)
        return functions, tuple(self.before), tuple(self.after)

    def _take_over(self) -> None:
        """Have the captured graph of a kin if most of it is the same.

        One of which more is different, as the end of a prompt between two answers, may leave the
        other one's place again soon.
        """
        if self._kin is None or not (self._capturable and self._card.changes_graphs):
            return
        other = self._kin.get(self._key)
        if other is None or other._graph is None:
            return
        kernels = self._kernels
        pairs = zip(kernels, other._kernels, strict=True)
        changed = {n: mine for n, (mine, its) in enumerate(pairs) if not mine.does(its)}
        if len(changed) > len(kernels) // 2:
            return
        graph, other._graph = other._graph, None
        if self._card.change_graph(graph, other._captured, changed):
            self._graph, self._captured = graph, other._captured
            self._kin[self._key] = self
            log.debug("took a captured graph over, with %d kernels changed", len(changed))

    def _enqueue(self) -> None:
        for copy in self.before:
            copy()
        for work in self._work:
            if isinstance(work, Product):
                self._card.product(work, self._library, self._stream)
            else:
                self._card.launch(work, self._stream)
        for copy in self.after:
            copy()


# Scratch is whole pieces of so many bytes: a cache that grows a little needs no other.
_STEP = 1 << 20

# What a plan keeps of a node, about: its launches' arguments, and its name.
_NODE_BYTES = 2048

# Of a smaller graph a lowering for each node takes no longer than to look for what is alike.
LEAST_NODES = 24


class Labels(Protocol):
    """Names of nodes by number."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> str: ...


class CudaPlan:
    """Steps that run a graph from end to end on its client's stream."""

    shared = False
    brief = False

    def __init__(
        self,
        resources: StreamResources,
        dialect: Dialect,
        storages: Sequence[CudaStorage],
        steps: list[Callable[[], None]],
        nodes: Labels,
        scratch: Scratch | None,
        interpreted: dict[str, int],
    ) -> None:
        self.dialect = dialect
        self._resources = resources
        # What its nodes read and write.
        self._storages = storages
        self._steps = steps
        # One launch less a token: a captured graph ends with it.
        last = steps[-1] if steps else None
        self._fetches_status = isinstance(last, CapturedGraph)
        if isinstance(last, CapturedGraph):
            last.after.append(resources.status.fetch)
        self._labels = nodes
        # What captured launches point into.
        self._scratch = scratch
        self.scratch = scratch.size if scratch is not None else 0
        self.nbytes = len(nodes) * _NODE_BYTES
        self.interpreted = interpreted
        self._stopped = False

    def run(self) -> None:
        """Run every step, and wait for the card.

        Raises GraphError naming the node that failed; DeviceError if the card did.
        """
        resources = self._resources
        with resources.card.current():
            try:
                for storage in self._storages:
                    storage.before(resources.stream)
                status = self._run()
            except BaseException:
                # Whoever hears of it may free what the card still works on.
                with contextlib.suppress(Exception):
                    resources.stream.synchronize()
                raise
        if status:
            label = self._labels[status >> 8]
            raise GraphError(f"{label}: {STATUS_TEXT.get(status & 255, f'status {status & 255}')}")

    def _run(self) -> int:
        """Give the card all there is to do, and wait for its status."""
        resources = self._resources
        for step in self._steps:
            self._go_on()
            step()
        if not self._fetches_status:
            resources.status.fetch()
        return resources.status.wait()

    def _go_on(self) -> None:
        """Raise GraphError once the run was stopped."""
        if self._stopped:
            raise GraphError("was stopped")

    def stop(self) -> None:
        """Let a run end behind the step it is at; the card can't be interrupted within one."""
        self._stopped = True


class CudaPlanBuilder:
    """Makes plans for one client; not shared between threads."""

    def __init__(self, resources: StreamResources) -> None:
        self._resources = resources
        self._scratch: Scratch | None = None
        # As of CapturedGraph; plans keep them.
        self._kin: MutableMapping[Hashable, CapturedGraph] = weakref.WeakValueDictionary()
        self._warned: set[str] = set()

    def close(self) -> None:
        """Let go of scratch; plans that are left keep theirs."""
        self._scratch = None

    def build(
        self, graph: LinkedGraph, storages: Sequence[CudaStorage], stop: StopWord | None = None
    ) -> CudaPlan:
        """Hold each node against its contract and lower it; ``storages`` are all it touches.

        Raises GraphError, also once ``stop`` is set.
        """
        started = time.perf_counter()
        try:
            status = self._resources.status
        except MemoryError as error:
            raise GraphError(f"no memory for the graph's status: {error}") from None
        try:
            plan = self._by_kinds(graph, storages, status, stop)
        except NoPatternError as error:
            log.debug("node by node: %s", error)
            plan = self._by_nodes(graph, storages, status, stop)
        log.debug(
            "planned %d nodes in %.1f ms, %d KiB of scratch; without kernels: %s",
            len(graph.order),
            (time.perf_counter() - started) * 1e3,
            plan.scratch >> 10,
            plan.interpreted or "none",
        )
        return plan

    def _by_kinds(
        self,
        graph: LinkedGraph,
        storages: Sequence[CudaStorage],
        status: StatusWord,
        stop: StopWord | None,
    ) -> CudaPlan:
        """Raise NoPatternError where nodes have to be looked at one by one, GraphError."""
        if len(graph.order) < LEAST_NODES:
            raise NoPatternError("few nodes")
        resources, scratch = self._resources, list[Scratch | None]()

        def place(size: int) -> int:
            scratch.append(made := self.scratch_of(size))
            return made.address if made is not None else 0

        made = resources.patterns.plan(graph, place, stop)
        made.words[:, _STATUS_WORD] = status.address
        made.words[:, _NODE_WORD] = np.arange(len(made.words)) % _MOST_NODES
        steps: list[Callable[[], None]] = []
        if made.launches:
            steps.append(CapturedGraph(resources, made.launches, self._kin))
        return CudaPlan(resources, graph.dialect, storages, steps, made.labels, scratch[0], {})

    def _by_nodes(
        self,
        graph: LinkedGraph,
        storages: Sequence[CudaStorage],
        status: StatusWord,
        stop: StopWord | None,
    ) -> CudaPlan:
        """Raise GraphError."""
        parts, size = self.lower(graph.nodes, stop)
        scratch = self.scratch_of(size)
        labels: list[str] = []
        resources, kin = self._resources, self._kin
        self.finish(parts, scratch, status, labels)
        steps = parts.steps(self.reference_step, lambda run: CapturedGraph(resources, run, kin))
        return CudaPlan(
            resources, graph.dialect, storages, steps, labels, scratch, parts.interpreted
        )

    def lower(
        self, nodes: Sequence[Tensor], stop: StopWord | None = None
    ) -> tuple[PlanSteps[Launch | Product], int]:
        """Hold nodes against their contracts, and return their launches and bytes of scratch.

        There are launches at both ends, which may be none. Raises GraphError, also once ``stop`` is
        set.
        """
        card = self._resources.card
        planner = CudaPlanner(nodes, card.multiprocessors, card.capability)
        parts: PlanSteps[Launch | Product] = PlanSteps()

        def decline(node: Tensor, spec: OpSpec) -> None:
            self._refuse_or_warn(node, spec)
            parts.without_kernel(planner.take_launches(), node)

        for node in nodes:
            if stop is not None and stop[0]:
                raise GraphError("was stopped")
            lower_node(node, planner, lambda t: lower_to_launches(t, planner), decline)
        parts.append(planner.take_launches())
        return parts, planner.scratch_peak

    def scratch_of(self, size: int) -> Scratch | None:
        """Return scratch of ``size`` bytes. Raises GraphError if the card hasn't got so much."""
        if not size:
            return None
        if self._scratch is None or self._scratch.size < size:
            # Plans that were captured with the smaller one keep it for as long as they live.
            self._scratch = None
            try:
                self._scratch = Scratch(self._resources.card, -(-size // _STEP) * _STEP)
            except MemoryError as error:
                raise GraphError(f"no scratch for the graph: {error}") from None
        return self._scratch

    def finish(
        self,
        parts: PlanSteps[Launch | Product],
        scratch: Scratch | None,
        status: StatusWord,
        labels: list[str],
    ) -> None:
        """Fill in what records were made without, and append what node numbers stand for."""
        for run in parts.runs():
            for launch in run:
                if scratch is not None:
                    place_scratch(launch, scratch.address)
                if isinstance(launch, Product):
                    continue
                launch.words[_STATUS_WORD] = status.address
                launch.words[_NODE_WORD] = len(labels) % _MOST_NODES
                labels.append(launch.node.label)

    def _refuse_or_warn(self, node: Tensor, spec: OpSpec) -> None:
        if spec.reference is None:
            raise GraphError(f"{node.label}: this combination is not implemented")
        if not self._resources.allow_host_ops:
            raise GraphError(
                f"{node.label}: no kernel for the GPU; --allow-host-ops runs it on the host"
            )
        if node.op not in self._warned:
            self._warned.add(node.op)
            log.warning("%s: runs on the host, which is slow", node.label)

    def reference_step(self, node: Tensor) -> Callable[[], None]:
        """Return what runs ``node`` on the host."""
        stream, pinned = self._resources.stream, self._resources.pinned

        def run() -> None:
            try:
                run_on_host(
                    node,
                    lambda address, size: pinned.download(address, size, stream),
                    lambda address, data: pinned.upload(address, data, stream),
                )
            except (ContractError, MemoryError) as error:
                raise GraphError(f"{node.label}: {error or 'out of memory'}") from None

        return run
