"""Gets the pages of a mapping ready for an upload, and makes those that are in use large.

The first write to a page makes the system find and clear one: half of the time of an upload into
new memory. So a thread does that while the bytes are still on the way. Wherever the upload covers
a whole large page it asks for that one: products read weights faster from large pages (a processor
remembers where some thousand pages are, and looks every other one up in memory), and they are
ready in a third of the time, unless the system has to move others about for them first. Where that
takes long the thread goes on with small ones.

What is small then, and what several tensors share or was written piece by piece (a cache of keys
and values), is made large in place by a second thread, but only where all of the small pages are in
use: so a buffer takes no more memory than without.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import errno
import functools
import mmap
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

# Python has no names for these: MADV_POPULATE_WRITE is of Linux 5.14, MADV_COLLAPSE of 6.1; older
# ones refuse them.
_POPULATE, _COLLAPSE = 23, 25
_STEP = 1 << 20
# Fewer bytes are there before a thread has started.
WORTH_IT = 1 << 20

# Large pages are asked for so many bytes ahead of the thread that gets them ready.
_ASK = 16 << 20
# Processor time in which a large page should be found and cleared, some times what it takes where
# there is one (small ones take longer), and how much more all of a mapping may take. After that
# uploads to it go on with small ones: elsewhere than in the background nobody waits for others to
# be moved, or for a virtual machine's host to find memory.
_PAGE_SECONDS = 0.0005
_SPARE_SECONDS = 0.03
# Larger ones (machines with small pages of 64 KiB have some) are rarely in use as a whole.
_LARGEST = 32 << 20
# So many are looked at in one go.
_WINDOW = 64
# Bits of an entry of /proc/self/pagemap: in memory, and there for this process alone. A page that
# was only ever read has the first without the second: it is the zeros that all processes share.
_IN_USE = np.uint64(1 << 63 | 1 << 56)

# How soon after an upload it is looked for what can be made large, and how often when that is
# nothing, seconds.
_SOON = 1.0
_RARELY = 30.0

# What is known of the place of a large page: nothing; that it is one; that the system was asked to
# make it one when it finds the time.
_UNKNOWN, _LARGE, _ASKED = range(3)

OFF_VARIABLE = "GGML_RPC_LARGE_PAGES"


@functools.cache
def _libc() -> ctypes.CDLL | None:
    # mmap's own method would keep the GIL.
    return ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _madvise(begin: int, end: int, advice: int) -> int:
    """Advise the system about pages; 0, or the number of its error."""
    libc = _libc()
    if libc is None:
        return errno.ENOSYS
    if libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice):
        return ctypes.get_errno()
    return 0


@functools.cache
def large_page() -> int:
    """Return the size of a large page in bytes; 0 where there are none, or they aren't wanted."""
    if os.environ.get(OFF_VARIABLE, "").lower() in ("0", "off"):
        return 0
    try:
        size = int(Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0
    return size if mmap.PAGESIZE < size <= _LARGEST else 0


@functools.cache
def _thread() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="pages")


def _inside(address: int, size: int, page: int) -> tuple[int, int]:
    """(begin, end) of the whole pages among these bytes; none if ``begin`` is not below ``end``."""
    return -(-address // page) * page, (address + size) // page * page


class MappingPages:
    """The pages of one mapping. :meth:`close` before it is unmapped.

    All methods may be called from any thread.
    """

    def __init__(self, address: int, size: int, *, look_after: int | None = None) -> None:
        """Only the first ``look_after`` bytes are made large in the background (default: all)."""
        self._page = large_page()
        self._begin, end = _inside(address, size, self._page) if self._page else (0, 0)
        self._places = np.full(max(0, end - self._begin) // (self._page or 1), _UNKNOWN, np.uint8)
        self._looked_after = 0
        self.look_after(size if look_after is None else look_after)
        # How much longer than they should large pages have taken to be found.
        self._late = 0.0
        self._closed = False
        self._work: list[concurrent.futures.Future[None]] = []
        # Held while the system makes a page large: meanwhile it is not unmapped.
        self._lock = threading.Lock()
        if len(self._places):
            _keeper.add(self)

    # -- uploads

    def populate(self, address: int, size: int) -> None:
        """Get the whole pages among these bytes ready, on a thread of their own."""
        begin, end = _inside(address, size, mmap.PAGESIZE)
        if _libc() is None or begin >= end:
            return
        self._work = [f for f in self._work if not f.done()]
        self._work.append(_thread().submit(self._populate, begin, end))
        _keeper.hurry()

    def _populate(self, begin: int, end: int) -> None:
        # The large pages at the ends of the upload may hold what is never written.
        first, last = _inside(begin, end - begin, self._page) if self._page else (end, end)
        if first >= last:
            first = last = end
        at, asked = begin, first
        while at < end and not self._closed:
            if at == asked < last and self._late < _SPARE_SECONDS:
                asked = min(at + _ASK, last)
                _madvise(at, asked, mmap.MADV_HUGEPAGE)
            large = first <= at < asked
            to = at + self._page if large else min(at + _STEP, first if at < first else end)
            began = time.thread_time()
            if _madvise(at, to, _POPULATE):
                return
            if large:
                late = self._late + time.thread_time() - began - _PAGE_SECONDS
                self._late = max(0.0, late)
            at = to

    # -- in the background

    def look_after(self, size: int) -> None:
        """Make only the first ``size`` bytes large in the background."""
        self._looked_after = min(len(self._places), size // self._page) if self._page else 0

    def large_bytes(self) -> int:
        """Return how many bytes were last seen in large pages."""
        return int(np.count_nonzero(self._places == _LARGE)) * self._page

    def small(self) -> Iterator[int]:
        """Yield the places of large pages of which all small ones are in use."""
        for first in range(0, self._looked_after, _WINDOW):
            places = self._places[first : min(first + _WINDOW, self._looked_after)]
            unknown = np.flatnonzero(places == _UNKNOWN)
            if not len(unknown):
                continue
            begin = self._begin + first * self._page
            present = _in_memory(begin, len(places) * self._page).reshape(len(places), -1)
            for i in unknown[np.all(present[unknown], axis=1)]:
                place = begin + int(i) * self._page
                if _in_use(place, self._page):
                    yield place

    def enlarge(self, place: int) -> int:
        """Make the pages at a place of :meth:`small` one large page; 0, or the system's error."""
        with self._lock:
            if self._closed:
                return 0
            error, state = _madvise(place, place + self._page, _COLLAPSE), _LARGE
            if error == errno.EINVAL:
                # A system that doesn't do it when told to has a thread of its own for that.
                error, state = _madvise(place, place + self._page, mmap.MADV_HUGEPAGE), _ASKED
            if not error:
                self._places[(place - self._begin) // self._page] = state
            return error

    # -- the end

    def drop(self, address: int, size: int) -> tuple[int, int]:
        """Give the whole pages among these bytes back to the system: they read as zero then.

        Returns (begin, end), the addresses between which that was done; they are equal where it
        can't be. The mapping is to be private.
        """
        begin, end = _inside(address, size, mmap.PAGESIZE)
        if begin >= end or _madvise(begin, end, mmap.MADV_DONTNEED):
            return address, address
        self.forget(begin, end - begin)
        return begin, end

    def forget(self, address: int, size: int) -> None:
        """Take note that these bytes' pages were given back."""
        if len(self._places):
            first = max(0, (address - self._begin) // self._page)
            last = max(first, -(-(address + size - self._begin) // self._page))
            with self._lock:
                self._places[first:last] = _UNKNOWN

    def close(self) -> None:
        """Close it; return when nothing touches the mapping any more."""
        self._closed = True
        for future in self._work:
            if not future.cancel():
                future.result()
        with self._lock:
            _keeper.remove(self)


def _in_memory(begin: int, size: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return whether each small page is in memory, as one that was written or as zeros."""
    found = np.zeros(size // mmap.PAGESIZE, np.uint8)
    libc = _libc()
    address = ctypes.c_void_p(found.ctypes.data)
    if libc is None or libc.mincore(ctypes.c_void_p(begin), ctypes.c_size_t(size), address):
        found[:] = 0
    return found & 1 != 0


def _in_use(begin: int, size: int) -> bool:
    """Return whether all small pages are this process's own.

    False where the system doesn't tell.
    """
    entries = size // mmap.PAGESIZE * 8
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            read = os.pread(file.fileno(), entries, begin // mmap.PAGESIZE * 8)
    except OSError:
        return False
    return len(read) == entries and bool(
        (np.frombuffer(read, np.uint64) & _IN_USE == _IN_USE).all()
    )


class _Keeper:
    """The thread that makes pages large, and the mappings that it looks after."""

    def __init__(self) -> None:
        self._mappings: weakref.WeakSet[MappingPages] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._hurry = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, mapping: MappingPages) -> None:
        with self._lock:
            self._mappings.add(mapping)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="large-pages", daemon=True)
                self._thread.start()
        self._hurry.set()

    def remove(self, mapping: MappingPages) -> None:
        with self._lock:
            self._mappings.discard(mapping)

    def hurry(self) -> None:
        """Look soon again: there is an upload."""
        self._hurry.set()

    def large_bytes(self) -> int:
        with self._lock:
            return sum(mapping.large_bytes() for mapping in self._mappings)

    def _work(self) -> None:
        pause = _SOON
        while True:
            if self._hurry.wait(pause):
                self._hurry.clear()
                # Uploads that follow each other are looked at together.
                time.sleep(_SOON)
                pause = _SOON
            pause = _SOON if self._look() else min(2 * pause, _RARELY)

    def _look(self) -> int:
        """Make large what can be; how many pages that were."""
        with self._lock:
            mappings = list(self._mappings)
        made = 0
        while mappings:
            mapping = mappings.pop()
            for place in mapping.small():
                began = time.perf_counter()
                error = mapping.enlarge(place)
                if error == errno.ENOMEM:
                    # The system has none left in one piece: later, perhaps.
                    return 0
                made += not error
                # Whoever wants the processor, or memory, comes first.
                time.sleep(time.perf_counter() - began)
        return made


_keeper = _Keeper()


def large_bytes() -> int:
    """Return how many bytes of this process's mappings were last seen in large pages."""
    return _keeper.large_bytes()
