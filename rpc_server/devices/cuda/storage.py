"""Memory of one buffer on a card: what comes and goes does so through pinned memory of the host."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

from protocol.tensor import Tensor
from rpc_server.devices.base import DeviceError, Storage
from rpc_server.devices.cuda.card import Card, Pinned

# Bytes of one piece of a transfer. Two of them take turns: one is filled while the other is copied.
CHUNK = 4 << 20

# Up to so many bytes are read where they are asked for: 0.1 ms over PCIe, about what it takes to
# have another thread do it. The logits of a token are fewer.
_READ_AT_ONCE = 1 << 20


class PinnedPair:
    """A pair of pinned chunks, and the event behind the last copy of each."""

    def __init__(self, card: Card) -> None:
        self._card = card
        self.chunks = [card.pinned(CHUNK) for _ in range(2)]
        self.copied: list[Any] = [None, None]

    @property
    def done(self) -> bool:
        """Return whether the card has copied all that it was given of it."""
        with self._card.current():
            return all(event is None or event.done for event in self.copied)

    def wait(self, i: int) -> None:
        """Wait until chunk ``i`` may be written to again."""
        if self.copied[i] is not None:
            with self._card.current():
                self.copied[i].synchronize()
            self.copied[i] = None

    async def ready(self, i: int) -> None:
        """Wait as :meth:`wait`, without blocking the event loop."""
        event = self.copied[i]
        if event is not None:
            with self._card.current():
                done = event.done
            if not done:
                await asyncio.to_thread(self.wait, i)


class PinnedPool:
    """Pinned memory is slow to get: what transfers are done with is kept for the next ones."""

    _KEPT = 4

    def __init__(self, card: Card) -> None:
        self._card = card
        self._idle: list[PinnedPair] = []
        self._lock = threading.Lock()

    def take(self) -> PinnedPair:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return PinnedPair(self._card)

    def give(self, pair: PinnedPair) -> None:
        with self._lock:
            self._idle.append(pair)
            if len(self._idle) > self._KEPT:
                # Not one that the card still copies from: CuPy would give its memory to others.
                done = next((s for s in self._idle if s.done), None)
                if done is not None:
                    self._idle.remove(done)

    def pieces_from(self, address: int, size: int, stream: Any) -> Iterator[tuple[int, Pinned]]:
        """Yield bytes of the card in pieces, after what ``stream`` was given: offset and chunk.

        A chunk has up to CHUNK bytes, which are good until the next is asked for: that one is
        copied meanwhile. Blocks until a piece is here.
        """
        with self._pair() as pair:
            pieces = list(range(0, size, CHUNK))
            for number in range(len(pieces) + 1):
                if number < len(pieces):
                    at, turn = pieces[number], number % 2
                    n = min(CHUNK, size - at)
                    pair.wait(turn)
                    self._card.to_host(pair.chunks[turn].address, address + at, n, stream)
                    pair.copied[turn] = self._card.mark(stream)
                if number:
                    turn = (number - 1) % 2
                    pair.wait(turn)
                    yield pieces[number - 1], pair.chunks[turn]

    def pieces_to(self, address: int, size: int, stream: Any) -> Iterator[tuple[int, Pinned]]:
        """Yield chunks to put up to CHUNK bytes for the card into: offset and chunk.

        One that was filled is given to ``stream`` when the next is asked for, or the end; the last
        may then still be on its way.
        """
        with self._pair() as pair:
            for number, at in enumerate(range(0, size, CHUNK)):
                turn = number % 2
                pair.wait(turn)
                chunk = pair.chunks[turn]
                yield at, chunk
                self._card.to_device(address + at, chunk.address, min(CHUNK, size - at), stream)
                pair.copied[turn] = self._card.mark(stream)

    @contextlib.contextmanager
    def _pair(self) -> Iterator[PinnedPair]:
        pair = self.take()
        try:
            yield pair
        finally:
            self.give(pair)

    def download(self, address: int, size: int, stream: Any) -> memoryview:
        """Return bytes of the card, after what ``stream`` was given; blocks until they are here.

        One chunk is emptied while the other is filled.
        """
        result = memoryview(bytearray(size))
        for at, chunk in self.pieces_from(address, size, stream):
            piece = result[at : at + CHUNK]
            piece[:] = chunk.view[: len(piece)]
        return result

    def upload(self, address: int, data: memoryview, stream: Any) -> None:
        """Give ``stream`` bytes for the card; the last of them may still be on their way."""
        for at, chunk in self.pieces_to(address, len(data), stream):
            piece = data[at : at + CHUNK]
            chunk.view[: len(piece)] = piece


class CudaUpload:
    """Bytes on their way to the card: received into one chunk while another is copied."""

    kept = False

    def __init__(self, storage: CudaStorage, start: int, size: int) -> None:
        self._storage = storage
        self._at = start
        self._left = size
        # Whoever had it before may have given it back while the card still copied from it.
        self._pair = storage.pinned.take()
        self._turn = 0

    async def begin(self) -> None:
        """Wait until there is room to receive into."""
        await self._pair.ready(self._turn)

    def _filling(self) -> int:
        return min(CHUNK, self._left)

    def room(self) -> memoryview:
        return self._pair.chunks[self._turn].view[: self._filling()]

    async def forward(self) -> None:
        """Let the card copy what was received, and wait until the other chunk is free."""
        size, pair, storage = self._filling(), self._pair, self._storage
        if size:
            card, stream = storage.card, storage.stream
            chunk = pair.chunks[self._turn]
            card.to_device(storage.address + self._at, chunk.address, size, stream)
            pair.copied[self._turn] = card.mark(stream)
            storage.written = True
            self._at += size
            self._left -= size
            self._turn = 1 - self._turn
        if self._left:
            await pair.ready(self._turn)
        else:
            storage.pinned.give(pair)


class CudaStorage(Storage):
    """``size`` bytes at ``address``, an address of the card's; zero-filled.

    Raises MemoryError.
    """

    # The card does all of it by itself.
    at_once = sys.maxsize

    def __init__(self, card: Card, pinned: PinnedPool, size: int) -> None:
        self.card = card
        self.pinned = pinned
        self.size = size
        self.address = self.card.allocate_for_client(max(size, 1))
        # Transfers of a buffer are in order among themselves, and beside those of others.
        self.stream = self.card.stream()
        # Whether something is on its way here that no graph has waited for.
        self.written = False
        self.fill(0, size, 0)

    # -- what Storage asks for -----------------------------------------------------------------

    def view(self, offset: int, size: int) -> memoryview:
        """Return a copy: the host sees nothing of the card's memory."""
        return self._download(offset, size)

    def place(self, offset: int, size: int) -> memoryview:
        raise RuntimeError("bytes of a card can't be written in place")

    def fill(self, offset: int, size: int, value: int) -> None:
        if size:
            self.card.fill(self.address + offset, size, value, self.stream)
            self.written = True

    def can_copy(self, other: Storage) -> bool:
        return isinstance(other, CudaStorage)

    async def copy(self, other: Storage, src_offset: int, dst_offset: int, size: int) -> None:
        await asyncio.to_thread(self.copy_from, other, src_offset, dst_offset, size)

    def copy_from(self, other: Storage, src_offset: int, dst_offset: int, size: int) -> None:
        """Copy from another buffer of a card, this or another one."""
        assert isinstance(other, CudaStorage)
        # The client's graphs have ended before a request for a copy is taken.
        behind = other.card.mark(other.stream)
        with self.card.current():
            self.stream.wait_event(behind)
        to, address = self.address + dst_offset, other.address + src_offset
        if other.card is self.card:
            self.card.copy(to, address, size, self.stream)
        else:
            self.card.copy_from_peer(to, other.card, address, size, self.stream)
        self.written = True
        # What is copied from may be written to, or freed, as soon as this returns.
        with self.card.current():
            self.stream.synchronize()

    def before(self, stream: Any) -> None:
        """Order what ``stream`` is given from here on behind all that was written here.

        A buffer is one client's, and so is the stream: nobody else has to wait.
        """
        if self.written:
            self.written = False
            behind = self.card.mark(self.stream)
            with self.card.current():
                stream.wait_event(behind)

    def discard(self, offset: int, size: int) -> None:
        """Do nothing: the card takes an allocation back as a whole."""

    def close(self) -> None:
        with contextlib.suppress(DeviceError), self.card.current():
            self.stream.synchronize()
        address, self.address = self.address, 0
        self.card.free(address)

    # -- bytes that come from elsewhere and go there -------------------------------------------

    host_only = False

    def is_remote(self, start: int, size: int, t: Tensor | None = None) -> bool:
        """Return True: all bytes are elsewhere than in the host's memory."""
        return True

    async def upload(
        self, t: Tensor, start: int, offset: int, size: int, *, keep: bool = False
    ) -> CudaUpload:
        upload = CudaUpload(self, start, size)
        await upload.begin()
        return upload

    async def read(self, start: int, size: int) -> memoryview:
        # Behind what is still being written it could take any time, and everybody would wait.
        if size <= _READ_AT_ONCE and not self.written:
            return self._download(start, size)
        return await asyncio.to_thread(self._download, start, size)

    async def overwrite(self, start: int, size: int, value: int) -> None:
        self.fill(start, size, value)

    def _download(self, start: int, size: int) -> memoryview:
        return self.pinned.download(self.address + start, size, self.stream)
