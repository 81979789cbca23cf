"""How fast the parts are, for shares by time, and this machine is among others (auto)."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

from client.builder.graph import GraphBuilder
from client.errors import AllocationFailed, ConnectionLost
from client.model_header import ModelShape
from client.split.balance import FILL, Speed, least_seconds, measure, sample_product
from client.split.model_speed import ACTIVATION_FILL, SampleJob, sample_graphs
from client.tensors import ShapeError
from protocol.dialects import DIALECTS
from protocol.errors import ProtocolError
from protocol.tensor import Tensor
from rpc_server.devices.cpu.device import CpuDevice
from rpc_server.devices.cpu.plan import CpuPlan
from rpc_server.devices.cpu.storage import HostStorage
from rpc_server.devices.split.worker import PREPARE_TIMEOUT, Worker, WorkerLost

_ALIGN = 64


class _Memory(NamedTuple):
    """A buffer that no client has; its addresses are this machine's."""

    base: int
    size: int
    address: int


async def measure_parts(device: CpuDevice, workers: Sequence[Worker | None]) -> list[Speed]:
    """Return the speed of each part, all at once as they will work; None is this machine.

    Raises WorkerLost.
    """

    async def one(worker: Worker | None) -> Speed:
        if worker is None:
            return await _measure_local(device)
        try:
            async with asyncio.timeout(PREPARE_TIMEOUT):
                return await measure(worker.backend)
        except TimeoutError:
            raise WorkerLost(f"worker {worker.name}: not measured in time") from None
        except (AllocationFailed, ConnectionLost, ProtocolError, ShapeError) as error:
            raise WorkerLost(f"worker {worker.name}: {error}") from None

    return list(await asyncio.gather(*map(one, workers)))


async def _measure_local(device: CpuDevice) -> Speed:
    weight, x, product = sample_product(GraphBuilder())
    graphs = HomeGraphs(device, {FILL: [weight, x]}, {0: [product]})
    try:
        await graphs.run(0)
        seconds = await least_seconds(lambda: graphs.run(0))
    finally:
        graphs.close()
    return Speed(weight.nbytes / seconds, 0.0, float("inf"))


class HomeGraphs:
    """Graphs of our client's tensors, run on this machine's processors.

    ``leaves`` are by the byte that fills them, ``outputs`` by whatever names a graph. Raises
    MemoryError.
    """

    def __init__(
        self,
        device: CpuDevice,
        leaves: Mapping[int, Sequence[Tensor]],
        outputs: Mapping[Hashable, Sequence[Tensor]],
    ) -> None:
        graphs = {name: GraphBuilder().build(found) for name, found in outputs.items()}
        roots = [t for found in leaves.values() for t in found]
        roots += [t for graph in graphs.values() for t in graph.roots]
        places, size = {}, 0
        for t in dict.fromkeys(roots):
            places[t] = size
            size += -(-t.nbytes // _ALIGN) * _ALIGN
        self._storage = HostStorage(size + _ALIGN)
        at = self._storage.address
        for t, offset in places.items():
            t.place(1, at + offset)
        self._leaves, self._outputs = leaves, outputs
        self._places = places
        self._memory = _Memory(at, self._storage.size, at)
        self._payloads = {name: g.payload(DIALECTS[0]) for name, g in graphs.items()}
        self._queue = device.queue()
        self._plans: dict[Hashable, CpuPlan] = {}
        for fill in leaves:
            self.fill(fill, fill)

    def fill(self, group: int, value: int) -> None:
        """Fill the leaves that ``group`` was the byte of at first."""
        for t in self._leaves[group]:
            self._storage.fill(self._places[t], t.nbytes, value)

    async def run(self, name: Hashable) -> float:
        """Compute a graph, planned at its first run; return the first number of its last output."""
        plan = self._plans.get(name)
        if plan is None:
            plan = self._plans[name] = await asyncio.wrap_future(
                self._queue.submit(
                    lambda: self._queue.plan_here(
                        self._payloads[name], DIALECTS[0], lambda _: self._memory
                    )
                )
            )
        await asyncio.wrap_future(self._queue.submit(plan.run))
        at = self._places[self._outputs[name][-1]]
        (value,) = struct.unpack("<f", self._storage.view(at, 4))
        return float(value)

    def close(self) -> None:
        """Give everything back."""
        self._queue.leave()
        self._plans.clear()
        self._storage.close()


class HomeSample:
    """This machine's own share of a model, to be timed like that of a server."""

    def __init__(self, device: CpuDevice, shape: ModelShape) -> None:
        """Raises AllocationFailed where there is no room for it."""
        free, _ = device.memory()
        self.graphs = sample_graphs(GraphBuilder(), shape, free // 4)
        outputs = self.graphs.outputs
        self._home = HomeGraphs(device, self.graphs.leaves, {job: outputs[job] for job in outputs})

    def can(self, job: SampleJob) -> bool:
        """Return True: it has all ops."""
        return True

    async def run(self, job: SampleJob) -> float:
        """Compute a job and return one number."""
        return await self._home.run(job)

    async def fill(self, value: int) -> None:
        """Fill all activations with one byte."""
        self._home.fill(ACTIVATION_FILL, value)

    async def round_trip(self) -> float:
        """Return 0: nothing has to travel."""
        return 0.0

    def close(self) -> None:
        """Give everything back."""
        self._home.close()
