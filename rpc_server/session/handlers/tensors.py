"""Requests about the bytes of tensors, all but the upload itself (``uploads.py``)."""

from __future__ import annotations

import asyncio
import concurrent.futures
from typing import Any

from protocol.commands import Command
from protocol.requests import Request
from rpc_server.cache.store import TensorCache
from rpc_server.devices.base import (
    Copying,
    RemoteStorage,
    Slicing,
    Storage,
)
from rpc_server.graph.parse import tensor_of_message
from rpc_server.graph.tensor import Tensor
from rpc_server.session.buffers import Buffer
from rpc_server.session.handlers.base import Handler, is_remote
from rpc_server.session.state import Session
from rpc_server.turns import in_pieces

# How llama.cpp names its logits, a row of F32 for each token: for figures alone.
_LOGITS = b"result_output"


def _set_tensor_hash(s: Session, request: Request) -> None:
    fields = request.fields
    buffer, start = s.locate(fields.tensor, fields.offset, 0)
    cache = s.context.cache
    if cache is not None:
        tensor = tensor_of_message(fields.tensor, s.dialect)
        if not _apart(buffer, start, tensor) or isinstance(buffer.storage, Slicing):
            s.wait(_load_cached(s, request, cache, buffer, start, tensor))
            return
    s.answer(request.command, {"result": 0})


async def _load_cached(
    s: Session, request: Request, cache: TensorCache, buffer: Buffer, start: int, tensor: Tensor
) -> None:
    # The client means what its tensor has from the offset on; that much is served, or nothing.
    size = tensor.nbytes - request.fields.offset
    fits = 0 < size <= buffer.size - start

    def load() -> bool:
        with buffer.storage.place(start, size) as place:
            return cache.load(request.fields.hash, place)

    if fits and _apart(buffer, start, tensor):
        storage = buffer.storage
        assert isinstance(storage, Slicing)
        # Of a part of a tensor nobody has the hash.
        found = not request.fields.offset and await storage.recall(
            tensor, start, request.fields.hash
        )
    elif fits and is_remote(buffer, start, size, tensor):
        found = await _load_elsewhere(request, cache, buffer, start, tensor)
    else:
        found = fits and await asyncio.to_thread(load)
    if found:
        s.stats.cache_hits += 1
        s.stats.cache_hit_bytes += size
        s.meter.upload(size, cached=True)
        s.context.prefetch_kernels(buffer.device, request.fields.tensor.type, size)
    else:
        s.stats.cache_misses += 1
    s.answer(request.command, {"result": int(found)})


def _apart(buffer: Buffer, start: int, tensor: Tensor) -> bool:
    """Whether the tensor's bytes are at several places, which the cache doesn't serve."""
    storage = buffer.storage
    return (
        isinstance(storage, RemoteStorage)
        and not storage.whole
        and storage.is_remote(start, tensor.nbytes, tensor)
    )


async def _load_elsewhere(
    request: Request, cache: TensorCache, buffer: Buffer, start: int, tensor: Tensor
) -> bool:
    """From the cache to where the bytes belong, by way of memory here."""
    offset = request.fields.offset
    if await asyncio.to_thread(cache.size, request.fields.hash) != tensor.nbytes - offset:
        # Memory as large as a tensor is taken only for what is there.
        return False
    content = memoryview(bytearray(tensor.nbytes - offset))
    if not await asyncio.to_thread(cache.load, request.fields.hash, content):
        return False
    assert isinstance(buffer.storage, RemoteStorage)
    upload = await buffer.storage.upload(tensor, start, offset, len(content))
    assert upload is not None, "a storage whose bytes are elsewhere takes them itself"
    while content:
        room = upload.room()
        room[:] = content[: len(room)]
        content = content[len(room) :]
        await upload.forward()
    return True


def _init_tensor(s: Session, request: Request) -> None:
    # Our devices keep nothing beside a tensor's data and pad nothing.
    tensor_of_message(request.fields.tensor, s.dialect)
    s.answer_empty(request.command)


def _memset_tensor(s: Session, request: Request) -> None:
    fields = request.fields
    buffer, start = s.locate(fields.tensor, fields.offset, fields.size)
    fill(s, request.command, buffer, start, fields.size, fields.value)


def fill(s: Session, command: Command, buffer: Buffer, start: int, size: int, value: int) -> None:
    """Set bytes of a buffer, and answer."""
    if is_remote(buffer, start, size):
        s.wait(_fill_elsewhere(s, command, buffer, start, size, value))
        return
    storage = buffer.storage
    if size <= storage.at_once:
        storage.fill(start, size, value)
        s.answer_empty(command)
        return
    work = in_pieces(lambda at, n: storage.fill(start + at, n, value), size, wanted=s.present)
    s.wait(_after(work, s, command, {}))


async def _after(
    work: concurrent.futures.Future[None], s: Session, command: Command, answer: dict[str, Any]
) -> None:
    await asyncio.wrap_future(work)
    s.answer(command, answer)


async def _fill_elsewhere(
    s: Session, command: Command, buffer: Buffer, start: int, size: int, value: int
) -> None:
    assert isinstance(buffer.storage, RemoteStorage)
    await buffer.storage.overwrite(start, size, value)
    s.answer_empty(command)


def _get_tensor(s: Session, request: Request) -> None:
    fields = request.fields
    buffer, start = s.locate(fields.tensor, fields.offset, fields.size)
    if fields.tensor.name.startswith(_LOGITS) and fields.tensor.ne[0]:
        s.stats.tokens += fields.size // (4 * fields.tensor.ne[0])
    if is_remote(buffer, start, fields.size):
        s.wait(_read_back(s, buffer, start, fields.size))
        return
    s.send_bytes(buffer.storage.view(start, fields.size))


async def _read_back(s: Session, buffer: Buffer, start: int, size: int) -> None:
    assert isinstance(buffer.storage, RemoteStorage)
    s.send_bytes(await buffer.storage.read(start, size))
    await s.drained()


def _copy_tensor(s: Session, request: Request) -> None:
    fields = request.fields
    tensor = tensor_of_message(fields.src, s.dialect)
    src, src_start = s.locate(fields.src, 0, tensor.nbytes)
    dst, dst_start = s.locate(fields.dst, 0, tensor.nbytes)
    to, source = dst.storage, src.storage
    if isinstance(to, Copying) and to.can_copy(source):
        s.wait(_copy_there(s, request, to, source, (src_start, dst_start, tensor.nbytes)))
        return
    places = ((src, src_start), (dst, dst_start))
    apart = src.device != dst.device
    if apart or any(is_remote(*place, tensor.nbytes) for place in places):
        # llama.cpp then copies through itself.
        s.answer(request.command, {"result": 0})
        return
    if tensor.nbytes <= to.at_once:
        to.copy_from(source, src_start, dst_start, tensor.nbytes)
        s.answer(request.command, {"result": 1})
        return
    work = in_pieces(
        lambda at, n: to.copy_from(source, src_start + at, dst_start + at, n),
        tensor.nbytes,
        # Where the two overlap, bytes are read before others are written over them.
        backwards=to is source and src_start < dst_start,
        wanted=s.present,
    )
    s.wait(_after(work, s, request.command, {"result": 1}))


async def _copy_there(
    s: Session, request: Request, to: Copying, source: Storage, span: tuple[int, int, int]
) -> None:
    await to.copy(source, *span)
    s.answer(request.command, {"result": 1})


HANDLERS: dict[int, Handler] = {
    Command.SET_TENSOR_HASH: _set_tensor_hash,
    Command.INIT_TENSOR: _init_tensor,
    Command.MEMSET_TENSOR: _memset_tensor,
    Command.GET_TENSOR: _get_tensor,
    Command.COPY_TENSOR: _copy_tensor,
}
