"""What all sessions of a server share."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from protocol.ggml.types import GgmlType
from protocol.negotiation import Negotiator
from protocol.numbering_memory import NumberingMemory
from rpc_server.cache.store import TensorCache
from rpc_server.devices.base import Splitting
from rpc_server.devices.cpu.machine import system_memory
from rpc_server.limits import ServerLimits
from rpc_server.models.library import Models
from rpc_server.models.mapping import Mappings
from rpc_server.observability.logs import LineBudget
from rpc_server.observability.metrics import ServerStats
from rpc_server.session.buffers import AddressSpace, Budget, Buffer
from rpc_server.session.graph_memory import GraphMemory
from rpc_server.session.leases import Lease
from rpc_server.turns import in_pieces

if TYPE_CHECKING:
    from rpc_server.devices.planning.group import LinkGroup

log = logging.getLogger(__name__)

# Mappings of a megabyte that the event loop takes apart in one go.
_RELEASED_AT_ONCE = 8
# How long who asks for memory waits for what others are giving back.
_RELEASE_SECONDS = 10.0
# Smaller uploads are inputs of a graph, not weights.
_WEIGHT_FROM = 64 << 10
_TYPES = {int(t): t for t in GgmlType}


def _default_graph_memory() -> int:
    return min(2 << 30, system_memory()[1] // 8)


def new_identity() -> int:
    """Return a number that no other server process has, by all odds; never 0."""
    return secrets.randbits(64) | 1


@dataclass(slots=True)
class ServerContext:
    """One per server. ``budgets`` are the devices in the order that clients number them.

    ``identity`` is what servers that split over this one know it by, under whatever address.
    """

    budgets: list[Budget]
    negotiator: Negotiator
    cache: TensorCache | None = None
    # What the operator has on this machine's disk.
    models: Models | None = None
    mappings: Mappings | None = None
    limits: ServerLimits = field(default_factory=ServerLimits)
    stats: ServerStats = field(default_factory=ServerStats)
    space: AddressSpace = field(default_factory=AddressSpace)
    lines: LineBudget = field(default_factory=LineBudget)
    identity: int = field(default_factory=new_identity)
    graph_memory: GraphMemory = field(init=False)
    # Where tensors are kept beside the cache, in words for the start.
    kept_elsewhere: str = ""
    # Set once a device can't be used any more.
    device_lost: asyncio.Event = field(default_factory=asyncio.Event)
    # By device, who may run programs there.
    leases: list[Lease] = field(init=False)
    numberings: NumberingMemory = field(default_factory=NumberingMemory)
    # Those that clients have made this server a member of.
    groups: set[LinkGroup] = field(default_factory=set)
    # Whether servers at an address are spoken to, and may speak to this one.
    lets_in: Callable[[str], bool] = lambda _: True
    _announced: set[tuple[int, int]] = field(default_factory=set)
    _releasing: set[asyncio.Task[None]] = field(default_factory=set)
    _departing: set[asyncio.Future[None]] = field(default_factory=set)

    def release(self, buffers: Sequence[Buffer]) -> asyncio.Task[None] | None:
        """Give the memory of buffers back; the task that does so, None if it is done already.

        To take apart a mapping of gigabytes, or thousands of small ones, takes seconds.
        """
        if len(buffers) <= _RELEASED_AT_ONCE and all(b.size <= b.storage.at_once for b in buffers):
            for buffer in buffers:
                self._give_back(buffer)
            return None
        task = asyncio.get_running_loop().create_task(self._release(buffers))
        self._releasing.add(task)
        task.add_done_callback(self._releasing.discard)
        return task

    async def _release(self, buffers: Sequence[Buffer]) -> None:
        for number, buffer in enumerate(buffers):
            storage = buffer.storage
            if storage.size > storage.at_once:
                await asyncio.wrap_future(in_pieces(storage.discard, storage.size))
            elif number % _RELEASED_AT_ONCE == 0:
                await asyncio.sleep(0)
            self._give_back(buffer)

    def _give_back(self, buffer: Buffer) -> None:
        self.budgets[buffer.device].release(buffer.storage)
        self.space.give_back(buffer.owner)

    def departing(self) -> asyncio.Future[None]:
        """Note a client that has left and whose memory some work still uses, until that is done.

        Whoever asks sets the result when :meth:`release` has been called.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._departing.add(future)
        future.add_done_callback(self._departing.discard)
        return future

    def note_device_failure(self) -> None:
        """See whether a device that failed is lost: nobody is let in from then on."""
        lost = next((b.device.lost for b in self.budgets if b.device.lost), "")
        if lost and not self.stats.lost:
            self.stats.lost = lost
            self.device_lost.set()

    @property
    def releasing(self) -> bool:
        """True if memory is on its way back to the system that still counts as used."""
        return bool(self._releasing or self._departing)

    async def released(self) -> None:
        """Wait until all memory that is on its way back has arrived, for a bounded time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_RELEASE_SECONDS):
                while waiting := {*self._releasing, *self._departing}:
                    await asyncio.wait(waiting)

    def __post_init__(self) -> None:
        self.graph_memory = GraphMemory(self.limits.graph_memory or _default_graph_memory())
        devices = [budget.device for budget in self.budgets]
        self.leases = [
            Lease(self.limits.peer, d.let_go if isinstance(d, Splitting) else None) for d in devices
        ]

    def prefetch_kernels(self, device: int, type_number: int, size: int) -> None:
        """Let the device get ready for weights of a type while they are still uploading."""
        if size < _WEIGHT_FROM or (device, type_number) in self._announced:
            return
        self._announced.add((device, type_number))
        if type_number in _TYPES:
            self.budgets[device].device.prefetch_kernels(_TYPES[type_number])
