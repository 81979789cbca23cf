"""What a client has on the scripted server: its buffers, those it freed, and what it was told."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(slots=True, eq=False)
class Block:
    """A buffer: ``size`` bytes that the client knows as addresses from ``base``."""

    handle: int
    base: int
    size: int
    device: int
    data: npt.NDArray[np.uint8]
    freed: bool = False
    # Data that were sent: address -> (bytes reserved, name), of tensors that lie for good.
    sent: dict[int, tuple[int, str]] = field(default_factory=dict)

    def view(self, start: int, size: int) -> memoryview:
        return self.data[start : start + size].data

    def contains(self, address: int, size: int) -> bool:
        return self.base <= address and address + size <= self.base + self.size


_FIRST_ADDRESS = 1 << 44
_FIRST_HANDLE = 0x5001
# Ranges begin far apart: an address that is a little off is still seen to be off.
_GAP = 1 << 20


class Addresses:
    """Handles and addresses for all connections of a server: none is ever given out twice."""

    def __init__(self, alignment: int) -> None:
        self._alignment = alignment
        self._lock = threading.Lock()
        self._next = _FIRST_ADDRESS
        self._handles = itertools.count(_FIRST_HANDLE)

    def reserve(self, size: int) -> tuple[int, int]:
        """Return (handle, base) of a new buffer."""
        with self._lock:
            base = -(-self._next // self._alignment) * self._alignment
            self._next = base + size + _GAP
            return next(self._handles), base


class ServedMemory:
    """The buffers of one connection; ``limit`` is bytes in all."""

    def __init__(self, addresses: Addresses, limit: int) -> None:
        self._addresses = addresses
        self._limit = limit
        self._blocks: dict[int, Block] = {}

    @property
    def used(self) -> int:
        return sum(block.size for block in self.live)

    @property
    def free(self) -> int:
        return max(0, self._limit - self.used)

    @property
    def live(self) -> list[Block]:
        """Buffers that were not freed."""
        return [block for block in self._blocks.values() if not block.freed]

    def allocate(self, size: int, device: int) -> Block | None:
        """Allocate a buffer of zeros; None if there is no room."""
        if size > self.free:
            return None
        handle, base = self._addresses.reserve(size)
        block = Block(handle, base, size, device, np.zeros(size, np.uint8))
        self._blocks[handle] = block
        return block

    def find(self, handle: int) -> Block | None:
        """Return the buffer with this handle, freed or not."""
        return self._blocks.get(handle)

    def release(self, block: Block) -> None:
        block.freed = True
        block.data = np.zeros(0, np.uint8)
        block.sent.clear()


class HashStore:
    """Data a server has kept, by their hash; shared by the connections of a visit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[int, bytes] = {}

    def keep(self, digest: int, data: Any) -> None:
        with self._lock:
            self._kept[digest] = bytes(data)

    def find(self, digest: int) -> bytes | None:
        with self._lock:
            return self._kept.get(digest)
