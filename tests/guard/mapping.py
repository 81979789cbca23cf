"""Memory between two pages that can't be touched: a byte too far is fatal, not a wrong value."""

from __future__ import annotations

import ctypes
import enum
import mmap

PAGE = mmap.PAGESIZE
CANARY = 0xA5

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Side(enum.StrEnum):
    """At which end of the memory the guard page is."""

    END = "end"
    BEGIN = "begin"


class GuardedMemory:
    """``size`` bytes that end, or begin, exactly where a page without any access does.

    The other end is at most a page of canary bytes away from a page of the same kind. Satisfies
    BufferLike: ``base`` is what clients know as its address, and congruent with ``address`` to a
    page. Raises OSError when the system has no such mapping.
    """

    def __init__(self, size: int, side: Side = Side.END, base: int = 0) -> None:
        inner = max(-(-size // PAGE), 1) * PAGE
        self._map = mmap.mmap(-1, inner + 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # The object ctypes makes would keep the mapping from being closed.
        first = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._start, self._inner = first + PAGE, inner
        for page in (first, first + PAGE + inner):
            if _libc.mprotect(page, PAGE, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        ctypes.memset(self._start, CANARY, inner)
        self.size = size
        self.address = self._start + (inner - size if side is Side.END else 0)
        self.base = base + (self.address - self._start) if base else self.address

    def write(self, data: bytes) -> None:
        """Set the first bytes; ``data`` is not longer than the memory."""
        if len(data) > self.size:
            raise ValueError(f"{len(data)} bytes for {self.size}")
        ctypes.memmove(self.address, data, len(data))

    def read(self) -> bytes:
        """All bytes."""
        return ctypes.string_at(self.address, self.size)

    @property
    def canaries_intact(self) -> bool:
        """Whether the bytes beside the memory are as they were."""
        before = self.address - self._start
        after = self._inner - before - self.size
        around = ctypes.string_at(self._start, before)
        around += ctypes.string_at(self.address + self.size, after)
        return around.count(CANARY) == len(around)

    def restore_canaries(self) -> None:
        """Let the bytes beside the memory be as they were."""
        content = self.read()
        ctypes.memset(self._start, CANARY, self._inner)
        self.write(content)

    def close(self) -> None:
        """Unmap it: whoever still writes there will be noticed."""
        self._map.close()
