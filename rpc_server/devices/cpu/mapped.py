"""Host memory of a buffer, parts of which may be weights that are mapped from a file.

A mapped weight is not where the buffer's own memory is: a file's tensors begin wherever they do
within a page, and a mapping can't shift them. So a buffer has *overlays*: ranges of it that lie at
another address. Who reads or writes inside of one is given that address. Bytes that are only partly
in an overlay make it go: it is copied to the buffer's own memory first.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass

from rpc_server.devices.base import Storage
from rpc_server.devices.cpu.storage import HostStorage
from rpc_server.models.library import Content
from rpc_server.models.mapping import MappedTensor, Mappings, Owner


@dataclass(frozen=True, slots=True, eq=False)
class Overlay:
    """Bytes of a buffer from ``start`` on that lie elsewhere; ``moved`` is called if they don't
    any more: what was prepared for their address is out of date.
    """

    start: int
    tensor: MappedTensor
    moved: Callable[[], None]

    @property
    def size(self) -> int:
        """The number of bytes."""
        return self.tensor.size

    @property
    def address(self) -> int:
        """The address at which the host has them."""
        return self.tensor.address

    def has(self, offset: int, size: int) -> bool:
        """Return whether bytes of the buffer are all in it."""
        return self.start <= offset and offset + size <= self.start + self.size

    def touches(self, offset: int, size: int) -> bool:
        """Return whether bytes of the buffer are partly in it."""
        return self.start < offset + size and offset < self.start + self.size


class MappedStorage(HostStorage):
    """A HostStorage with overlays. Methods may be called from any thread."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._overlays: list[Overlay] = []
        # Plans that are being thrown away may still name them.
        self._retired: list[MappedTensor] = []
        self._lock = threading.RLock()

    @property
    def overlays(self) -> list[Overlay]:
        """The mapped overlays, in no order."""
        with self._lock:
            return list(self._overlays)

    def map(
        self,
        start: int,
        content: Content,
        mappings: Mappings,
        owner: Owner,
        moved: Callable[[], None],
    ) -> bool:
        """Lay a tensor of a file over the bytes from ``start`` on; return whether that is done.

        It is not where the tensor would end behind the buffer, or touch another one.
        ``owner`` and ``moved`` are of the client that the buffer belongs to.
        """
        with self._lock:
            size = content.place.size
            if not 0 <= start <= self.size - size:
                return False
            if any(o.touches(start, size) for o in self._overlays):
                return False
            tensor = mappings.map(content, owner)
            if tensor is None:
                return False
            self._overlays.append(Overlay(start, tensor, moved))
            # What the buffer had there is not needed.
            super().discard(start, tensor.size)
            return True

    def settle(self, offset: int, size: int, *, overwritten: bool = False) -> None:
        """Copy all overlays that these bytes touch to the buffer's own memory.

        ``overwritten``: of those that lie within them, nothing needs to be copied.
        """
        if not self._overlays:
            return
        with self._lock:
            for o in [o for o in self._overlays if o.touches(offset, size)]:
                covered = offset <= o.start and o.start + o.size <= offset + size
                if not (overwritten and covered):
                    ctypes.memmove(self.address + o.start, o.address, o.size)
                self._overlays.remove(o)
                self._retired.append(o.tensor)
                o.moved()

    def _inside(self, offset: int, size: int) -> Overlay | None:
        if not self._overlays:
            return None
        with self._lock:
            return next((o for o in self._overlays if o.has(offset, size)), None)

    def _host(self, offset: int, size: int, *, write: bool = False) -> int:
        """Return the address of bytes, all of which lie together from there on."""
        overlay = self._inside(offset, size)
        if overlay is None:
            self.settle(offset, size, overwritten=write)
            return self.address + offset
        if write:
            overlay.tensor.own()
        return overlay.address + offset - overlay.start

    def view(self, offset: int, size: int) -> memoryview:
        overlay = self._inside(offset, size)
        if overlay is not None:
            return overlay.tensor.view(offset - overlay.start, size)
        self.settle(offset, size)
        return super().view(offset, size)

    def place(self, offset: int, size: int) -> memoryview:
        overlay = self._inside(offset, size)
        if overlay is not None:
            # What is received goes in piece by piece, while the file may be about to change.
            overlay.tensor.own()
            return overlay.tensor.view(offset - overlay.start, size)
        self.settle(offset, size, overwritten=True)
        return super().place(offset, size)

    def fill(self, offset: int, size: int, value: int) -> None:
        if not self._overlays:
            super().fill(offset, size, value)
            return
        if self._inside(offset, size) is None:
            self.settle(offset, size, overwritten=True)
            super().fill(offset, size, value)
            return
        ctypes.memset(self._host(offset, size, write=True), value, size)

    def copy_from(self, other: Storage, src_offset: int, dst_offset: int, size: int) -> None:
        there = other._overlays if isinstance(other, MappedStorage) else ()
        if not self._overlays and not there:
            super().copy_from(other, src_offset, dst_offset, size)
            return
        source = (
            other._host(src_offset, size)
            if isinstance(other, MappedStorage)
            else other.address + src_offset
        )
        ctypes.memmove(self._host(dst_offset, size, write=True), source, size)

    def close(self) -> None:
        with self._lock:
            for tensor in [*self._retired, *(o.tensor for o in self._overlays)]:
                tensor.close()
            self._overlays.clear()
            self._retired.clear()
        super().close()
