"""SET_TENSOR on its way: into its buffer, to the cache as well, or on to other machines."""

from __future__ import annotations

import asyncio

from protocol.commands import Command
from protocol.requests import UploadStart
from protocol.tensor import Tensor
from rpc_server.cache.store import HASH_THRESHOLD
from rpc_server.devices.base import Upload
from rpc_server.graph.parse import tensor_of_message
from rpc_server.session.buffers import Buffer
from rpc_server.session.state import Session


def begin(s: Session, upload: UploadStart) -> None:
    """Say where the bytes belong. Raises BadAddressError, GraphError."""
    fields, size = upload.fields, upload.size
    buffer, start = s.locate(fields.tensor, fields.offset, size)
    s.upload.size = size
    s.stats.uploads += 1
    s.stats.upload_bytes += size
    s.meter.upload(size, cached=False)
    keep = False
    if s.context.cache is not None and not s.context.cache.read_only:
        flag = getattr(fields, "cache_flag", None)
        keep = size > HASH_THRESHOLD if flag is None else bool(flag)
    if not buffer.storage.host_only:
        tensor = tensor_of_message(fields.tensor, s.dialect)
        if buffer.storage.is_remote(start, size, tensor):
            if buffer.storage.whole:
                s.upload.relayed = (buffer, start, size) if keep else None
                s.context.prefetch_kernels(buffer.device, fields.tensor.type, size)
            place = (buffer, tensor, start, fields.offset, size)
            s.wait(_begin_relay(s, *place, keep=keep))
            return
    s.upload.direct = (buffer, start, size, keep)
    s.context.prefetch_kernels(buffer.device, fields.tensor.type, size)
    s.reader.direct(buffer.storage.place(start, size))


async def _begin_relay(
    s: Session, buffer: Buffer, tensor: Tensor, start: int, offset: int, size: int, *, keep: bool
) -> None:
    storage = buffer.storage
    s.upload.relay = await storage.upload(tensor, start, offset, size, keep=keep)
    if s.upload.relay is None:
        s.upload.direct = (buffer, start, size, keep)
        s.reader.direct(storage.place(start, size))
        return
    s.reader.direct(s.upload.relay.room())


def part(s: Session) -> None:
    """Pass on the place that was given, which is full, and give the next one."""
    s.wait(_relay_on(s))


async def _relay_on(s: Session) -> None:
    assert s.upload.relay is not None
    await s.upload.relay.forward()
    s.reader.direct(s.upload.relay.room())


def end(s: Session) -> None:
    """End the upload: all bytes are in place."""
    if s.upload.relay is not None:
        relay, s.upload.relay = s.upload.relay, None
        s.wait(_end_relay(s, relay, s.upload.size))
        return
    assert s.upload.direct is not None
    buffer, start, size, keep = s.upload.direct
    s.upload.direct = None
    if keep:
        s.wait(_keep(s, buffer, start, size))
        return
    s.answer_empty(Command.SET_TENSOR)


async def _end_relay(s: Session, relay: Upload, size: int) -> None:
    await relay.forward()
    if relay.kept:
        s.stats.cache_stored += 1
        s.stats.cache_stored_bytes += size
    relayed, s.upload.relayed = s.upload.relayed, None
    if relayed is None:
        s.answer_empty(Command.SET_TENSOR)
        return
    buffer, start, size = relayed
    await _store(s, await buffer.storage.read(start, size))


async def _keep(s: Session, buffer: Buffer, start: int, size: int) -> None:
    await _store(s, buffer.storage.view(start, size))


async def _store(s: Session, content: memoryview) -> None:
    """Into the cache, and answer."""
    size = len(content)
    cache = s.context.cache
    assert cache is not None
    path = await asyncio.to_thread(cache.store, content, s.stats.address, s.present)
    if path is not None:
        s.stats.cache_stored += 1
        s.stats.cache_stored_bytes += size
        s.log.debug("cached %d bytes as %s", size, path)
    s.answer_empty(Command.SET_TENSOR)
