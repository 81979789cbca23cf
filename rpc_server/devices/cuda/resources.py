"""What a card has for the graphs of one client: a stream, a word for failures, a cuBLAS handle."""

from __future__ import annotations

from typing import Any

from rpc_server.devices.cuda.card import Card, Pinned
from rpc_server.devices.cuda.storage import PinnedPool


class StatusWord:
    """The place where kernels tell what failed.

    It is a word of the card's memory, and its mirror here.
    """

    def __init__(self, card: Card, stream: Any) -> None:
        self._card = card
        self._stream = stream
        self.address = card.allocate(4)
        self._mirror: Pinned = card.pinned(4)
        card.fill(self.address, 4, 0, stream)

    def fetch(self) -> None:
        """Enqueue a copy to the mirror; it may be captured with what comes before it."""
        self._card.to_host(self._mirror.address, self.address, 4, self._stream)

    def wait(self) -> int:
        """Return what the last :meth:`fetch` on the stream brings; waits for it."""
        self._stream.synchronize()
        status = int.from_bytes(self._mirror.view, "little")
        if status:
            self._card.fill(self.address, 4, 0, self._stream)
        return status

    def close(self) -> None:
        self._card.free(self.address)


class StreamResources:
    """Taken from the card when they are first asked for; :meth:`close` gives all back.

    ``name`` is the device's, for messages; ``allow_host_ops`` lets ops run on the host that have no
    kernel.
    """

    def __init__(self, name: str, card: Card, pinned: PinnedPool, *, allow_host_ops: bool) -> None:
        self.name = name
        self.card = card
        self.pinned = pinned
        self.allow_host_ops = allow_host_ops
        # Graphs run on it, one after the other.
        self.stream = card.stream()
        self._status: StatusWord | None = None
        self._library: int | None = None

    @property
    def status(self) -> StatusWord:
        """Return where kernels tell what failed. Raises MemoryError."""
        if self._status is None:
            self._status = StatusWord(self.card, self.stream)
        return self._status

    @property
    def library(self) -> int:
        """The handle of cuBLAS for this stream."""
        if self._library is None:
            self._library = self.card.library()
        return self._library

    def close(self) -> None:
        """Give back what the card has given; nothing may run."""
        if self._status is not None:
            self._status.close()
            self._status = None
        if self._library is not None:
            self.card.close_library(self._library)
            self._library = None
