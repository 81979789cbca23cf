"""How a device that has no kernels for streams reaches the peer of one: by calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from protocol.tensor import Tensor
from rpc_server.devices.cpu.kernels.interface.stream import StreamPeer


class HostTransfers(Protocol):
    """The transfers of one program, from and to memory of the host (see DirectTransfers).

    What is returned blocks the calling thread until it is done, without the GIL, and raises a
    GraphError that names the peer.
    """

    def receiver(self, t: Tensor, address: int, size: int) -> Callable[[], None]:
        """Return what receives ``size`` bytes for ``t`` to ``address``. Raises GraphError."""
        ...

    def sender(self, tensors: Sequence[Tensor], address: int, size: int) -> Callable[[], None]:
        """Return what sends ``size`` bytes of ``tensors`` from ``address``. Raises GraphError."""
        ...

    def stop(self) -> None:
        """End what waits for the peer, for good; from any thread."""
        ...


TransfersOf = Callable[[StreamPeer], HostTransfers]
