"""Tensors of the operator's files as memory: mapped, so that all clients share what the disk has.

A mapping is a client's own (what is written to it stays with the client) and costs no memory until
then: its pages are those that the system keeps of the file anyway. Such a page is the file's: if
somebody cut the file short, reading it would end the process, and if somebody wrote to the file,
the weights would change. So a file is *held* as long as something of it is mapped (``Hold``). Who
opens it for writing waits, for at most 45 seconds unless the administrator has set another time,
until all that is mapped has become memory of this process in the same place: running plans notice
nothing. Where a file can't be held nothing of it is mapped.

What is mapped is brought in at once, in the background: while a client still hashes its next weight
the disk reads this one, and its first graph finds all pages in place.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import mmap
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from rpc_server.models.files import BeingWrittenError, Hold, Identity, identity_of, open_file
from rpc_server.models.library import Content

log = logging.getLogger(__name__)

# Places at which blocks of all types are aligned; where a file has less its tensors are copied.
_ALIGNMENT = 32
# How often it is looked whether somebody wants to write to a file.
_LOOK_SECONDS = 0.2
# How long clients that have to go may take; the system itself lets a writer wait for 45 s.
_LEAVE_SECONDS = 30.0
# Bytes that change from the file's to ours in one go.
_PIECE = 8 << 20
# Mappings of all clients: a process may have 65530 by default, half of which are for buffers.
_MOST = 8192
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_MAYMOVE, _FIXED = 1, 2
# Pages into memory and into the page table; Linux has it from 5.14 on. Or at least into memory.
_POPULATE_READ, _WILLNEED = 22, 3
_FAILED = ctypes.c_void_p(-1).value


class Owner(Protocol):
    """The client that a mapping is for."""

    def quietly(self, work: Callable[[], None]) -> None:
        """Do ``work`` while no graph of the client runs; return when it is done."""
        ...

    def lose(self, reason: str) -> None:
        """End the client's connection: the memory that it has can't be kept."""
        ...


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    size = ctypes.c_size_t
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, size, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mremap.argtypes = [ctypes.c_void_p, size, size, ctypes.c_int, ctypes.c_void_p]
    libc.munmap.argtypes = [ctypes.c_void_p, size]
    libc.madvise.argtypes = [ctypes.c_void_p, size, ctypes.c_int]
    return libc


class MappedTensor:
    """The bytes of one tensor as memory of one client, at ``address``."""

    def __init__(self, held: _HeldFile, content: Content, owner: Owner) -> None:
        """Raises OSError, ValueError."""
        place = content.place
        first = place.offset // mmap.PAGESIZE * mmap.PAGESIZE
        self.size = place.size
        self.owner = owner
        self._held = held
        self._skip = place.offset - first
        self._map = mmap.mmap(
            held.file.fileno(),
            self._skip + place.size,
            flags=mmap.MAP_PRIVATE | _NORESERVE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=first,
        )
        self._base = int(np.frombuffer(self._map, np.uint8).ctypes.data)
        self.address = self._base + self._skip
        # Bytes from the beginning on that are memory of this process.
        self._owned = 0
        self._closed = False
        self._lock = threading.Lock()

    @property
    def owned(self) -> bool:
        """True if no byte is the file's any more."""
        return self._closed or self._owned >= self._skip + self.size

    def view(self, offset: int, size: int) -> memoryview:
        """Return a writable view of bytes."""
        begin = self._skip + offset
        return memoryview(self._map)[begin : begin + size]

    def bring_in(self) -> None:
        """Have the disk read what is the file's; errors are left to who reads the bytes."""
        libc = _libc()
        end = self._skip + self.size
        for at in range(0, end, _PIECE):
            with self._lock:
                if self._closed or self._owned:
                    return
                place = self._base + at, min(_PIECE, end - at)
                if libc.madvise(*place, _POPULATE_READ) and libc.madvise(*place, _WILLNEED):
                    return

    def own_next(self) -> None:
        """Turn some more bytes into memory of this process, at the same place.

        Nothing may write to them meanwhile. Raises MemoryError.
        """
        with self._lock:
            if self.owned:
                return
            size = min(_PIECE, self._skip + self.size - self._owned)
            whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
            libc = _libc()
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
            new = libc.mmap(None, whole, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
            if new == _FAILED:
                raise MemoryError(f"no mapping of {whole} bytes")
            at = self._base + self._owned
            ctypes.memmove(new, at, size)
            # In one step: who reads meanwhile reads the same bytes, before and after.
            if libc.mremap(new, whole, whole, _MAYMOVE | _FIXED, at) == _FAILED:
                libc.munmap(new, whole)
                raise MemoryError(f"no mapping of {whole} bytes")
            self._owned += size

    def own(self) -> None:
        """Turn all bytes into memory of this process. Raises MemoryError."""
        while not self.owned:
            self.own_next()

    def close(self) -> None:
        """Give the memory back; views must be gone."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with contextlib.suppress(BufferError):
                self._map.close()
        self._held.release(self)


@dataclass(slots=True, eq=False)
class _HeldFile:
    """A file of which something is mapped."""

    mappings: Mappings
    path: str
    identity: Identity
    file: BinaryIO
    hold: Hold
    tensors: set[MappedTensor] = field(default_factory=set)

    def release(self, tensor: MappedTensor) -> None:
        self.mappings.released(self, tensor)


class Mappings:
    """The mappings of the operator's files, for all clients of a server."""

    def __init__(self, most: int = _MOST, available: Callable[[], int] | None = None) -> None:
        """``most`` mappings there may be; ``available`` tells how many bytes of memory are left."""
        self._most = most
        self._available = available or _available
        self._lock = threading.Lock()
        self._files: dict[Identity, _HeldFile] = {}
        self._said: set[str] = set()
        self._count = 0
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._wanted: queue.SimpleQueue[MappedTensor | None] = queue.SimpleQueue()
        self._reader: threading.Thread | None = None

    def map(self, content: Content, owner: Owner) -> MappedTensor | None:
        """Return a tensor as memory of a client; None where it has to be copied."""
        place = content.place
        if sys.platform != "linux" or place.offset % _ALIGNMENT:
            return None
        with self._lock:
            if self._count >= self._most or self._stopped.is_set():
                return None
            try:
                held = self._files.get(place.identity) or self._hold(content)
                tensor = MappedTensor(held, content, owner)
            except (OSError, ValueError) as error:
                self._drop_unused(place.identity)
                if place.path not in self._said:
                    self._said.add(place.path)
                    log.info("weights of %s are copied, not mapped: %s", place.path, error)
                return None
            held.tensors.add(tensor)
            self._count += 1
            self._wanted.put(tensor)
            return tensor

    def holds(self, content: Content) -> bool:
        """Return whether the tensor's file is held already: to map it is but a system call then."""
        with self._lock:
            return content.place.identity in self._files

    def _hold(self, content: Content) -> _HeldFile:
        """Raises OSError."""
        place = content.place
        file = open_file(place.path)
        try:
            hold = Hold(file.fileno())
            # From here on nobody writes to it; was it the file that was hashed?
            if identity_of(file) != place.identity:
                raise BeingWrittenError(0, "it has changed")
        except BaseException:
            file.close()
            raise
        held = self._files[place.identity] = _HeldFile(self, place.path, place.identity, file, hold)
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="mappings", daemon=True)
            self._thread.start()
            self._reader = threading.Thread(target=self._read_ahead, name="read-ahead", daemon=True)
            self._reader.start()
        return held

    def _drop_unused(self, identity: Identity) -> None:
        held = self._files.get(identity)
        if held is not None and not held.tensors:
            del self._files[identity]
            held.hold.let_go()
            held.file.close()

    def released(self, held: _HeldFile, tensor: MappedTensor) -> None:
        """Note that a tensor is no longer mapped."""
        with self._lock:
            held.tensors.discard(tensor)
            self._count -= 1
            self._drop_unused(held.identity)

    def close(self) -> None:
        """Stop to watch; when no client is left."""
        self._stopped.set()
        self._wanted.put(None)
        for thread in (self._thread, self._reader):
            if thread is not None:
                thread.join()

    def _read_ahead(self) -> None:
        while (tensor := self._wanted.get()) is not None and not self._stopped.is_set():
            # Where memory is short, what is read now would push out what is used.
            if tensor.size < self._available():
                tensor.bring_in()
            # A client's memory is not kept for want of another weight.
            del tensor

    def _watch(self) -> None:
        while not self._stopped.wait(_LOOK_SECONDS):
            with self._lock:
                wanted = [held for held in self._files.values() if held.hold.wanted]
                for held in wanted:
                    # Nothing more is mapped of it.
                    del self._files[held.identity]
            for held in wanted:
                self._give_up(held)

    def _give_up(self, held: _HeldFile) -> None:
        """Let somebody write to a file: all that is mapped of it becomes our memory before."""
        with self._lock:
            tensors = [t for t in held.tensors if not t.owned]
        nbytes = sum(t.size for t in tensors)
        log.info(
            "%s is about to be written to: %.1f MiB that are mapped of it are copied",
            held.path,
            nbytes / (1 << 20),
        )
        enough = nbytes < self._available()
        for tensor in tensors:
            try:
                while enough and not tensor.owned:
                    tensor.owner.quietly(tensor.own_next)
            except MemoryError:
                enough = False
            except Exception as error:
                # A queue that has ended: the client is going, and its memory with it.
                log.debug("a mapping of %s is left to its client: %s", held.path, error)
        self._wait_for_leaving(held)
        held.hold.let_go()
        held.file.close()

    def _wait_for_leaving(self, held: _HeldFile) -> None:
        """End clients who still have something of a file mapped, and wait until they are gone."""
        until = time.monotonic() + _LEAVE_SECONDS
        asked: set[int] = set()
        while time.monotonic() < until:
            with self._lock:
                left = [t for t in held.tensors if not t.owned]
            if not left:
                return
            for tensor in left:
                if id(tensor.owner) not in asked:
                    asked.add(id(tensor.owner))
                    tensor.owner.lose(
                        f"{held.path}, whose weights it uses, is being written to, and there is "
                        "no memory for a copy"
                    )
            self._stopped.wait(0.02)
        log.error("%s is written to while clients still use it", held.path)


def _available() -> int:
    """Bytes of memory that the system could give, without pages that it would have to write out."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 0
