"""SET_TENSOR on its way: into its buffer, to the cache as well, or on to other machines."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from protocol.commands import Command
from protocol.requests import UploadStart
from rpc_server.cache.store import HASH_THRESHOLD
from rpc_server.devices.base import (
    KeptUpload,
    RemoteStorage,
    Slicing,
    Upload,
)
from rpc_server.graph.parse import tensor_of_message
from rpc_server.graph.tensor import Tensor
from rpc_server.session.buffers import Buffer

if TYPE_CHECKING:
    from rpc_server.session.state import Session


class Uploads:
    """The upload of one client that is under way, if there is one."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._direct: tuple[Buffer, int, int, bool] | None = None
        self._relay: Upload | KeptUpload | None = None
        # What is to be cached once the relay has taken it.
        self._relayed: tuple[Buffer, int, int] | None = None
        self._size = 0

    @property
    def under_way(self) -> bool:
        return self._direct is not None or self._relay is not None

    def clear(self) -> None:
        """The client is gone; there is no other upload."""
        self._direct = self._relay = self._relayed = None
        # It has this, too.
        del self._session

    def begin(self, upload: UploadStart) -> None:
        """Say where the bytes belong. Raises BadAddressError, GraphError."""
        s, fields, size = self._session, upload.fields, upload.size
        buffer, start = s.locate(fields.tensor, fields.offset, size)
        self._size = size
        s.stats.uploads += 1
        s.stats.upload_bytes += size
        s.meter.upload(size, cached=False)
        keep = False
        if s.context.cache is not None:
            flag = getattr(fields, "cache_flag", None)
            keep = size > HASH_THRESHOLD if flag is None else bool(flag)
        if isinstance(buffer.storage, RemoteStorage):
            tensor = tensor_of_message(fields.tensor, s.dialect)
            if buffer.storage.is_remote(start, size, tensor):
                if buffer.storage.whole:
                    self._relayed = (buffer, start, size) if keep else None
                    s.context.prefetch_kernels(buffer.device, fields.tensor.type, size)
                place = (buffer, tensor, start, fields.offset, size)
                s.wait(self._begin_relay(*place, keep=keep))
                return
        self._direct = (buffer, start, size, keep)
        s.context.prefetch_kernels(buffer.device, fields.tensor.type, size)
        s.reader.direct(buffer.storage.place(start, size))

    async def _begin_relay(
        self, buffer: Buffer, tensor: Tensor, start: int, offset: int, size: int, *, keep: bool
    ) -> None:
        storage = buffer.storage
        assert isinstance(storage, RemoteStorage)
        if keep and isinstance(storage, Slicing):
            self._relay = await storage.upload_kept(tensor, start, offset, size)
        else:
            self._relay = await storage.upload(tensor, start, offset, size)
        if self._relay is None:
            self._direct = (buffer, start, size, keep)
            self._session.reader.direct(storage.place(start, size))
            return
        self._session.reader.direct(self._relay.room())

    def part(self) -> None:
        """The place that was given is full: pass it on, and give the next one."""
        self._session.wait(self._relay_on())

    async def _relay_on(self) -> None:
        assert self._relay is not None
        await self._relay.forward()
        self._session.reader.direct(self._relay.room())

    def end(self) -> None:
        """All bytes are in place."""
        s = self._session
        if self._relay is not None:
            relay, self._relay = self._relay, None
            s.wait(self._end_relay(relay, self._size))
            return
        assert self._direct is not None
        buffer, start, size, keep = self._direct
        self._direct = None
        if keep:
            s.wait(self._keep(buffer, start, size))
            return
        s.answer_empty(Command.SET_TENSOR)

    async def _end_relay(self, relay: Upload | KeptUpload, size: int) -> None:
        await relay.forward()
        if getattr(relay, "kept", False):
            self._session.stats.cache_stored += 1
            self._session.stats.cache_stored_bytes += size
        relayed, self._relayed = self._relayed, None
        if relayed is None:
            self._session.answer_empty(Command.SET_TENSOR)
            return
        buffer, start, size = relayed
        assert isinstance(buffer.storage, RemoteStorage)
        await self._store(await buffer.storage.read(start, size))

    async def _keep(self, buffer: Buffer, start: int, size: int) -> None:
        await self._store(buffer.storage.view(start, size))

    async def _store(self, content: memoryview) -> None:
        """Into the cache, and answer."""
        s, size = self._session, len(content)
        cache = s.context.cache
        assert cache is not None
        path = await asyncio.to_thread(cache.store, content)
        if path is not None:
            s.stats.cache_stored += 1
            s.stats.cache_stored_bytes += size
            s.log.debug("cached %d bytes as %s", size, path)
        s.answer_empty(Command.SET_TENSOR)
