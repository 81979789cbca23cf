"""What the server needs of a device: memory to give to clients, and what runs their graphs."""

from __future__ import annotations

import abc
import concurrent.futures
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from protocol.dialects import Dialect
from protocol.ggml.types import GgmlType
from protocol.graph_payload import GraphPayload
from protocol.split import ProgramPayload
from protocol.tensor import Tensor
from rpc_server.graph.parse import BufferLike, Resolve

if TYPE_CHECKING:
    from rpc_server.cache.store import TensorCache
    from rpc_server.devices.cpu.kernels.interface.stream import StreamPeer
    from rpc_server.devices.planning.group import LinkGroup
    from rpc_server.models.library import Models

T = TypeVar("T")

# One word that another thread sets to end what is being planned.
StopWord = npt.NDArray[np.int64]

__all__ = [
    "BufferLike",
    "Device",
    "DeviceError",
    "NotReadyError",
    "Plan",
    "Queue",
    "Resolve",
    "Splitting",
    "StopWord",
    "Storage",
]


class DeviceError(Exception):
    """The device can't go on with what a client has there; the message tells why."""


class NotReadyError(Exception):
    """A plan needs what is still being made; after ``wait()``, off the device's thread, try again.

    Meanwhile the device can run the graphs of others.
    """

    def __init__(self, wait: Callable[[], object]) -> None:
        super().__init__("not ready")
        self.wait = wait


class Upload(Protocol):
    """Bytes on their way through this server: fill :meth:`room`, let :meth:`forward` take them."""

    def room(self) -> memoryview:
        """Return where the next bytes belong; not more than are left."""
        ...

    async def forward(self) -> None:
        """Take what was filled. Raises DeviceError."""
        ...

    @property
    def kept(self) -> bool:
        """Return whether all of it is kept where it went, for Storage.recall."""
        ...


@runtime_checkable
class Splitting(Protocol):
    """A device that computes on other servers, whose devices it has to have for a program too."""

    @property
    def members(self) -> list[int]:
        """Return the identities of all servers behind this one, those behind these too."""
        ...

    async def hold(self, seconds: float) -> str:
        """Get hold of all servers within ``seconds``; return who has one otherwise, '' if none.

        Raises DeviceError.
        """
        ...

    async def renew(self) -> bool:
        """Keep what is held unless others wait for it; return whether it is still held."""
        ...

    def let_go(self) -> None:
        """Give back what is held."""
        ...

    def use_models(self, models: Models) -> None:
        """Take this server's share of weights, and those of workers without, from its files."""
        ...

    async def keep_slices(self, cache: TensorCache) -> str:
        """Have the servers keep their slices of weights, and its own in ``cache``.

        Returns how many do, in words.
        """
        ...


class Storage(abc.ABC):
    """Memory of one buffer on a device; offsets and sizes are bytes the caller has checked.

    A storage whose bytes lie elsewhere, some of them or all, says so by ``is_remote``: these come
    and go by ``upload``, ``read`` and ``overwrite``. What is here says nothing of all that.
    """

    size: int
    address: int
    # How many bytes the event loop may fill, copy or discard in one go.
    at_once: int
    # Whether all of its bytes lie in this machine's memory, whatever is put there.
    host_only = True
    # Whether all of its bytes are at one place, so that the cache may hold and serve them.
    whole = True

    @abc.abstractmethod
    def view(self, offset: int, size: int) -> memoryview:
        """Return a writable host view of the bytes."""

    @abc.abstractmethod
    def place(self, offset: int, size: int) -> memoryview:
        """Return what :meth:`view` does, for an upload that is about to write all of it."""

    @abc.abstractmethod
    def fill(self, offset: int, size: int, value: int) -> None:
        """Set each byte to ``value``."""

    @abc.abstractmethod
    def copy_from(self, other: Storage, src_offset: int, dst_offset: int, size: int) -> None:
        """Take bytes of another storage of the same device."""

    @abc.abstractmethod
    def discard(self, offset: int, size: int) -> None:
        """Give bytes back to the system ahead of :meth:`close`; what they read as is undefined."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give the memory back to the system; views of it must be gone."""

    def is_remote(self, start: int, size: int, t: Tensor | None = None) -> bool:
        """Return whether bytes lie elsewhere, or belong there when ``t`` is uploaded to them."""
        return False

    async def upload(
        self, t: Tensor, start: int, offset: int, size: int, *, keep: bool = False
    ) -> Upload | None:
        """Return how to take ``size`` bytes from byte ``offset`` of ``t`` on; None: as any others.

        ``keep``: it is to be kept there for :meth:`recall`, if that is done there. Raises
        DeviceError.
        """
        return None

    async def read(self, start: int, size: int) -> memoryview:
        """Return bytes from wherever they are. Raises DeviceError."""
        return self.view(start, size)

    async def overwrite(self, start: int, size: int, value: int) -> None:
        """Fill bytes wherever they are. Raises DeviceError."""
        self.fill(start, size, value)

    def can_copy(self, other: Storage) -> bool:
        """Return whether :meth:`copy` takes bytes of ``other``."""
        return False

    async def copy(self, other: Storage, src_offset: int, dst_offset: int, size: int) -> None:
        """Take bytes of ``other``, which lie elsewhere too. Raises DeviceError."""
        raise NotImplementedError

    async def recall(self, t: Tensor, start: int, digest: int) -> bool:
        """Fill a whole tensor with what was kept under this hash; return whether there was such.

        Raises DeviceError.
        """
        return False


class Plan(Protocol):
    """A graph made ready; ``dialect`` is the op numbering under which it validated."""

    dialect: Dialect
    # Bytes of this machine's memory that it takes as long as it is kept, about.
    nbytes: int
    # Bytes that a run takes beside the client's buffers, at most.
    scratch: int

    def run(self) -> None:
        """Run the whole graph on the calling thread (one of the device's). Raises GraphError."""
        ...

    # Whether others are hurt if a run is stopped: clients that share what it uses.
    shared: bool
    # Whether a run is over in less time than it takes to wake another thread.
    brief: bool

    def stop(self) -> None:
        """Let a run that is under way fail soon; from any thread. The plan can't be run again."""
        ...


class Queue(Protocol):
    """The order in which one client's graphs run on a device.

    They run one after the other, and by turns with others'.

    One job of a queue is submitted at a time.
    """

    def prepare(
        self, payload: GraphPayload, dialect: Dialect, resolve: Resolve, stop: StopWord | None
    ) -> Plan:
        """Parse, validate and plan a graph of ``dialect``.

        Runs on a thread of the device's, and ends with a GraphError soon after ``stop`` is not 0
        any more. Raises GraphError, NotReadyError.
        """
        ...

    def program(
        self,
        payload: ProgramPayload,
        dialect: Dialect,
        resolve: Resolve,
        peer: StreamPeer,
        group: LinkGroup | None = None,
    ) -> Plan:
        """Plan a program of the split extension, whose stream is ``peer``'s; as prepare.

        Its swaps are made in ``group``.
        """
        ...

    def submit(self, job: Callable[[], T]) -> concurrent.futures.Future[T]:
        """Run ``job`` on a thread of the device's."""
        ...

    def at_once(self, plan: Plan) -> bool:
        """Run a brief plan on the calling thread if nobody has the device.

        Returns whether it did. Raises GraphError.
        """
        ...

    def waited(self, now: float) -> float:
        """Return how long its jobs have waited for turns of others until ``now``, in seconds.

        From any thread; ``now`` is of time.monotonic.
        """
        ...

    def leave(self) -> None:
        """End it: the client is gone, nothing of it runs, and its plans have been let go of."""
        ...


class Device(Protocol):
    """One device as clients see it. ``alignment`` and ``max_size`` are bytes."""

    name: str
    description: str
    alignment: int
    max_size: int

    # Whether it runs programs of the split extension.
    runs_programs: bool
    # Whether its nodes are computed by compiled kernels of this machine's processors.
    runs_kernels: bool
    # Whether these may have swaps: why not, '' if they may.
    no_swaps: str

    @property
    def lost(self) -> str:
        """The reason why the device can't be used by this process any more; empty while it can."""
        ...

    @property
    def n_parts(self) -> int:
        """The number of parts that weights are cut into; 0 for a device that keeps them whole."""
        ...

    def split_status(self) -> dict[str, Any]:
        """Return the fields of a SPLIT_STATUS answer."""
        ...

    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""
        ...

    def capacity(self) -> int:
        """Return the most bytes that buffers of all clients may have together."""
        ...

    def allocate(self, size: int, proportions: Sequence[float] = ()) -> Storage:
        """Return memory for a buffer, zero-filled.

        ``proportions`` are for a device of several parts; empty: its own choice. Raises
        MemoryError.
        """
        ...

    def alloc_size(self, tensor: Tensor) -> int:
        """Return the bytes that the tensor needs in a buffer of this device (GET_ALLOC_SIZE)."""
        ...

    def queue(self, address: str = "") -> Queue:
        """Return a queue for the graphs of one client at ``address``."""
        ...

    def prefetch_kernels(self, type: GgmlType) -> None:
        """Get kernels ready, without blocking: weights of ``type`` are being uploaded."""
        ...

    def close(self) -> None: ...
