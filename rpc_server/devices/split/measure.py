"""How fast the parts are, for shares by time (--tensor-split auto)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from client.builder.graph import GraphBuilder
from client.errors import AllocationFailed, ConnectionLost
from client.split.balance import (
    FILL,
    Speed,
    least_seconds,
    measure,
    sample_product,
)
from client.tensors import ShapeError
from protocol.dialects import DIALECTS
from protocol.errors import ProtocolError
from rpc_server.devices.cpu.device import CpuDevice
from rpc_server.devices.cpu.storage import HostStorage
from rpc_server.devices.split.worker import PREPARE_TIMEOUT, Worker, WorkerLost

_ALIGN = 64


@dataclass(frozen=True, slots=True)
class _Memory:
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
    storage = HostStorage(weight.nbytes + x.nbytes + product.nbytes + 2 * _ALIGN)
    storage.fill(0, storage.size, FILL)
    at = storage.address
    for t in (weight, x, product):
        t.place(1, at)
        at += -(-t.nbytes // _ALIGN) * _ALIGN
    memory = _Memory(storage.address, storage.size, storage.address)
    dialect = DIALECTS[0]
    payload = GraphBuilder().build(product).payload(dialect)

    queue = device.queue()
    plan = await asyncio.wrap_future(
        queue.submit(lambda: queue.plan_here(payload, dialect, lambda _: memory))
    )
    seconds = await least_seconds(lambda: asyncio.wrap_future(queue.submit(plan.run)))
    queue.leave()
    storage.close()
    return Speed(weight.nbytes / seconds, 0.0, float("inf"))
