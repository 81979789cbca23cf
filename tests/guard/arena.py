"""One client's memory between ranges that nobody may touch; scratch no larger than asked for.

Where :mod:`tests.guard.mapping` gives each tensor pages of its own, here all tensors share an
arena, so that they may lie over one another; and the ranges are so wide that an index which is
taken for a row's number, however wrong, leads into them.
"""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import numpy.typing as npt

from tests.guard.mapping import CANARY, PAGE, GuardedMemory, Side

Bytes = npt.NDArray[np.uint8]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)  # fmt: skip
_libc.mmap.restype = ctypes.c_void_p
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value

# Of addresses on each side: 2^31 rows of 4 KiB, or as much of that as there is.
_WIDEST, _NARROWEST = 1 << 43, 1 << 30


def _reserve(size: int) -> int:
    """Address of a range without any access. Raises OSError."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    address: int = _libc.mmap(None, size, 0, flags, -1, 0)
    if address == _FAILED:
        raise OSError(ctypes.get_errno(), "mmap")
    return address


class Arena:
    """Up to ``room`` bytes, of which each case takes as many as it needs, at one of the ends.

    Satisfies BufferLike. What is left of the room is canaries.
    """

    # A multiple of every element's size.
    UNIT = 8

    def __init__(self, room: int = 1 << 17) -> None:
        self._room = -(-room // PAGE) * PAGE
        guard = _WIDEST
        while True:
            try:
                start = _reserve(2 * guard + self._room)
                break
            except OSError:
                if guard <= _NARROWEST:
                    raise
                guard //= 2
        self._start, self._length = start, 2 * guard + self._room
        self._inner = start + guard
        if _libc.mprotect(self._inner, self._room, mmap.PROT_READ | mmap.PROT_WRITE):
            raise OSError(ctypes.get_errno(), "mprotect")
        memory = (ctypes.c_uint8 * self._room).from_address(self._inner)
        self._bytes: Bytes = np.frombuffer(memoryview(memory), np.uint8)
        self._bytes[...] = CANARY
        self.size, self.address, self.base = 0, self._inner, self._inner
        self.side = Side.BEGIN

    def __del__(self) -> None:
        _libc.munmap(self._start, self._length)

    def take(self, size: int, side: Side) -> None:
        """Be ``size`` bytes, whole units, that end or begin where nobody may go on."""
        if size > self._room or size % self.UNIT:
            raise ValueError(f"{size} bytes of {self._room}")
        self._bytes[...] = CANARY
        self.size, self.side = size, side
        self.address = self._inner + (self._room - size if side is Side.END else 0)
        self.base = self.address

    @property
    def view(self) -> Bytes:
        """The bytes."""
        start = self.address - self._inner
        return self._bytes[start : start + self.size]

    @property
    def canaries_intact(self) -> bool:
        """Whether the bytes around are as they were."""
        start = self.address - self._inner
        around = (self._bytes[:start], self._bytes[start + self.size :])
        return all(bool((part == CANARY).all()) for part in around)


class GuardedScratch:
    """Scratch of a CPU plan of which each piece ends where nobody may go on."""

    def __init__(self, n_threads: int, thread_bytes: int = 1 << 20) -> None:
        # The second half is threads' own, see Planner.thread_scratch.
        self.size = 2 * n_threads * thread_bytes
        self.touched = 0
        self._start = _reserve(n_threads * thread_bytes)
        for i in range(n_threads):
            # The last page of each thread's part stays without access.
            part = self._start + i * thread_bytes
            if _libc.mprotect(part, thread_bytes - PAGE, mmap.PROT_READ | mmap.PROT_WRITE):
                raise OSError(ctypes.get_errno(), "mprotect")
        self._pieces: dict[tuple[int, int], GuardedMemory] = {}

    def address(self, offset: int, size: int) -> int:
        """Where ``size`` bytes at ``offset`` lie, a place of their own. MemoryError if too many."""
        if offset + size > self.size:
            raise MemoryError(f"{offset + size} bytes of scratch")
        if offset == self.size // 2:
            return self._start
        size = -(-size // 64) * 64
        piece = self._pieces.get((offset, size))
        if piece is None:
            piece = self._pieces[offset, size] = GuardedMemory(size)
        return piece.address

    @property
    def canaries_intact(self) -> bool:
        """Whether nothing was written in front of a piece."""
        return all(piece.canaries_intact for piece in self._pieces.values())

    def restore_canaries(self) -> None:
        """Let the bytes in front of pieces be as they were."""
        for piece in self._pieces.values():
            piece.restore_canaries()

    def trim(self, keep: int) -> None:
        """Nothing is given back."""

    def forget(self) -> None:
        """Unmap all pieces: no plan may run any more that was made so far."""
        for piece in self._pieces.values():
            piece.close()
        self._pieces.clear()
