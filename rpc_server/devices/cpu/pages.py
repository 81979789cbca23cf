"""Gets the pages of an upload ready on a thread of its own, while its bytes are still on the way.

The first write to a page makes the system find and clear one: half of the time of an upload into
new memory. Large pages would make that rarer, but are slow to find on a machine that has run for a
while, and products of weights are no faster with them.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

# MADV_POPULATE_WRITE, which Python has no name for: Linux 5.14 and newer; others refuse it.
_POPULATE = 23
_STEP = 1 << 20
# Fewer bytes are there before a thread has started.
WORTH_IT = 1 << 20

_Madvise = Callable[[ctypes.c_void_p, ctypes.c_size_t, int], int]


@functools.cache
def _madvise() -> _Madvise | None:
    # mmap's own method would keep the GIL.
    return ctypes.CDLL(None).madvise if sys.platform == "linux" else None


@functools.cache
def _thread() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="pages")


def drop(address: int, size: int) -> tuple[int, int]:
    """Give the whole pages among these bytes back to the system: private ones read as zero then.

    Returns (begin, end), the addresses between which that was done; they are equal where it can't
    be.
    """
    begin, end = _whole_pages(address, size)
    madvise = _madvise()
    if madvise is None or begin >= end:
        return address, address
    if madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED):
        return address, address
    return begin, end


def _whole_pages(address: int, size: int) -> tuple[int, int]:
    """(begin, end) of the whole pages among these bytes; none if ``begin`` is not below ``end``."""
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    return begin, (address + size) // mmap.PAGESIZE * mmap.PAGESIZE


class Populating:
    """Pages of one mapping that are made ready; :meth:`stop` before it is unmapped."""

    def __init__(self) -> None:
        self._stopped = False
        self._work: list[concurrent.futures.Future[None]] = []

    def start(self, address: int, size: int) -> None:
        """Make the whole pages among these bytes ready."""
        begin, end = _whole_pages(address, size)
        madvise = _madvise()
        if madvise is None or begin >= end:
            return

        def populate() -> None:
            for at in range(begin, end, _STEP):
                n = min(_STEP, end - at)
                if self._stopped or madvise(ctypes.c_void_p(at), ctypes.c_size_t(n), _POPULATE):
                    return

        self._work = [f for f in self._work if not f.done()]
        self._work.append(_thread().submit(populate))

    def stop(self) -> None:
        """Returns when nothing touches the mapping any more."""
        self._stopped = True
        for future in self._work:
            if not future.cancel():
                future.result()
