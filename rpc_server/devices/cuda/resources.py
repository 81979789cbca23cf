"""What a card has for the graphs of one client: a stream, a word for failures, a cuBLAS handle."""

from __future__ import annotations

from typing import Any

from rpc_server.devices.cuda.card import Card, Pinned
from rpc_server.devices.cuda.kinds import LaunchMemory
from rpc_server.devices.cuda.planner import COUNTERS
from rpc_server.devices.cuda.storage import PinnedPool

# What the inputs of an exchange may have to go to the card in one piece, and its outputs to come
# back: a token's logits of most models.
MAIL = 1 << 20
# Outputs begin where 16 bytes can be written at a time.
_ALIGN = 16


class StatusWord:
    """The place where kernels tell what failed.

    It is a word of the card's memory, and its mirror here; with ``room`` bytes before it, on both
    sides, for what is fetched with it. Behind it are the counters of launches. Raises MemoryError.
    """

    def __init__(self, card: Card, stream: Any, room: int = 0) -> None:
        self._card = card
        self._stream = stream
        self._room = room
        self._mirror: Pinned = card.pinned(room + 4)
        counted = 4 * (1 + COUNTERS)
        self._memory = card.allocate(room + counted)
        self.address = self._memory + room
        # The same place of the mirror.
        self.here = self._mirror.address + room
        card.fill(self.address, counted, 0, stream)

    def fetch(self, size: int = 0) -> None:
        """Enqueue a copy to the mirror, with ``size`` bytes before the word.

        It may be captured with what comes before it.
        """
        self._card.to_host(self.here - size, self.address - size, size + 4, self._stream)

    def wait(self) -> int:
        """Return what the last :meth:`fetch` on the stream brings; waits for it."""
        self._stream.synchronize()
        status = int.from_bytes(self._mirror.view[self._room :], "little")
        if status:
            self._card.fill(self.address, 4, 0, self._stream)
        return status

    def close(self) -> None:
        self._card.free(self._memory)


class Mailbox:
    """The place where inputs of exchanges arrive, and outputs leave from: up to MAIL bytes each.

    ``word`` tells of failures, and is fetched with the outputs. Raises MemoryError.
    """

    def __init__(self, card: Card, stream: Any) -> None:
        self._card = card
        self._stream = stream
        self.word = StatusWord(card, stream, 2 * MAIL)
        # On the card, and the pinned memory beside it.
        self.inputs, self.inputs_here = (n - 2 * MAIL for n in (self.word.address, self.word.here))

    def deliver(self, address: int, size: int) -> None:
        """Enqueue a copy of ``size`` bytes of inputs that are here to where the card has them."""
        self._card.to_device(address, self.inputs_here, size, self._stream)

    def outputs(self, size: int) -> tuple[int, int]:
        """Return where ``size`` bytes of outputs belong, on the card and here: before the word."""
        return self.word.address - _aligned(size), self.word.here - _aligned(size)

    def fetch(self, size: int) -> None:
        """Enqueue a copy of ``size`` bytes of outputs, and of the word."""
        self.word.fetch(_aligned(size))


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


class StreamResources:
    """Taken from the card when they are first asked for; :meth:`close` gives all back.

    ``name`` is the device's, for messages; ``allow_host_ops`` lets ops run on the host that have no
    kernel. ``patterns`` is what is known of graphs of the card, of all clients.
    """

    def __init__(
        self,
        name: str,
        card: Card,
        pinned: PinnedPool,
        patterns: LaunchMemory,
        *,
        allow_host_ops: bool,
    ) -> None:
        self.name = name
        self.patterns = patterns
        self.card = card
        self.pinned = pinned
        self.allow_host_ops = allow_host_ops
        # Graphs run on it, one after the other.
        self.stream = card.stream()
        self._status: StatusWord | None = None
        self._mailbox: Mailbox | None = None
        self._library: int | None = None

    @property
    def status(self) -> StatusWord:
        """Return where kernels tell what failed. Raises MemoryError."""
        if self._status is None:
            self._status = StatusWord(self.card, self.stream)
        return self._status

    @property
    def mailbox(self) -> Mailbox:
        """Return what exchanges of programs go through. Raises MemoryError."""
        if self._mailbox is None:
            self._mailbox = Mailbox(self.card, self.stream)
        return self._mailbox

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
        if self._mailbox is not None:
            self._mailbox.word.close()
            self._mailbox = None
        if self._library is not None:
            self.card.close_library(self._library)
            self._library = None
