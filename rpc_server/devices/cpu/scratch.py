"""Scratch memory of a CPU device: one reserved range of addresses, committed as it is touched."""

from __future__ import annotations

import mmap
import threading
from collections import OrderedDict

import numpy as np

from rpc_server.devices.cpu.pages import MappingPages
from rpc_server.devices.cpu.storage import NORESERVE


class ScratchArena:
    """A fixed range of address space, so that a plan can name scratch before its size is known.

    Only touched pages take memory; :meth:`trim` gives pages above a level back.
    """

    def __init__(self, reserve: int = 1 << 36) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
        try:
            self._map = mmap.mmap(-1, reserve, flags=flags)
        except OSError as error:
            raise MemoryError(f"no addresses for scratch: {error.strerror}") from None
        self._base = int(np.frombuffer(self._map, np.uint8, 1).ctypes.data)
        self.size = reserve
        # Bytes that graphs have used since it was given back.
        self.touched = 0
        self._pages = MappingPages(self._base, reserve, look_after=0)
        self._used = 0

    def address(self, offset: int, size: int) -> int:
        """Return the host address of ``size`` bytes at ``offset``.

        Raises MemoryError if beyond the reserve.
        """
        if offset + size > self.size:
            raise MemoryError(f"graph needs {offset + size} bytes of scratch, limit {self.size}")
        if offset + size > self._used:
            self._used = offset + size
            self._pages.look_after(self._used)
        return self._base + offset

    def trim(self, keep: int) -> None:
        """Return pages above ``keep`` bytes to the system."""
        start = -(-keep // mmap.PAGESIZE) * mmap.PAGESIZE
        self.touched = min(self.touched, start)
        if start < self.size:
            self._map.madvise(mmap.MADV_DONTNEED, start, self.size - start)
            self._pages.forget(self._base + start, self.size - start)
        # What comes and goes with every graph isn't worth to be made large.
        self._used = min(self._used, keep)
        self._pages.look_after(self._used)


class IdleScratch:
    """The scratch of clients that compute nothing, together: ``most`` bytes.

    Whoever goes on soon finds its pages again; of whoever computed longest ago they are given back
    first.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._idle: OrderedDict[ScratchArena, int] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes that are kept now."""
        return sum(self._idle.values())

    def leave(self, arena: ScratchArena) -> None:
        """Count ``arena`` no longer: it is in use, or gone."""
        with self._lock:
            self._idle.pop(arena, None)

    def enter(self, arena: ScratchArena) -> None:
        """Count ``arena``: nothing uses it for now."""
        with self._lock:
            self._idle[arena] = arena.touched
            while self.nbytes > self._most:
                oldest, _ = self._idle.popitem(last=False)
                oldest.trim(0)
