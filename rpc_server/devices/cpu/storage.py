"""Host memory of a buffer: an anonymous mapping, given back to the system when it is closed."""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np

from rpc_server.devices.base import Storage
from rpc_server.devices.cpu.pages import WORTH_IT, MappingPages
from rpc_server.turns import AT_ONCE

# Python 3.11 has no name for this flag; without it Linux refuses to reserve more than it has.
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class HostStorage(Storage):
    """Zero-filled memory of ``size`` bytes; pages are committed as they are written.

    Long fills and copies let go of the GIL, so they may be done on any thread.
    """

    at_once = AT_ONCE

    def __init__(self, size: int, *, reserve_only: bool = False) -> None:
        """``reserve_only``: more than the machine has may be asked for, if little of it is used.

        Raises MemoryError if the system refuses the mapping.
        """
        self.size = size
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (NORESERVE if reserve_only else 0)
        try:
            self._map = mmap.mmap(-1, max(size, 1), flags=flags)
        except (OSError, ValueError, OverflowError) as error:
            raise MemoryError(f"no mapping of {size} bytes: {error}") from None
        self._bytes = np.frombuffer(self._map, np.uint8)
        self.address = int(self._bytes.ctypes.data)
        self._pages = MappingPages(self.address, size)

    def view(self, offset: int, size: int) -> memoryview:
        return memoryview(self._map)[offset : offset + size]

    def place(self, offset: int, size: int) -> memoryview:
        if size >= WORTH_IT:
            self._pages.populate(self.address + offset, size)
        return self.view(offset, size)

    def fill(self, offset: int, size: int, value: int) -> None:
        address = self.address + offset
        if value or size < AT_ONCE:
            ctypes.memset(address, value, size)
            return
        # Untouched or not, a dropped private page reads as zero and costs nothing.
        begin, end = self._pages.drop(address, size)
        ctypes.memset(address, 0, begin - address)
        ctypes.memset(end, 0, address + size - end)

    def copy_from(self, other: Storage, src_offset: int, dst_offset: int, size: int) -> None:
        ctypes.memmove(self.address + dst_offset, other.address + src_offset, size)

    def discard(self, offset: int, size: int) -> None:
        self._pages.drop(self.address + offset, size)

    def close(self) -> None:
        self._pages.close()
        del self._bytes
        self.address = 0
        # Unmapping fails while somebody still holds a view; then the last of them ends the mapping.
        try:
            self._map.close()
        except BufferError:
            del self._map
