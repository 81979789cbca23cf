"""Tensors that are on this server's own disk: SET_TENSOR_HASH, and slices of them (SPLIT_LOAD).

What the operator put there (``--models``) comes first, then what clients had kept (``--cache``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from protocol.errors import ProtocolError
from protocol.ggml.types import GgmlType
from protocol.requests import Request
from protocol.tensor import Tensor
from rpc_server.cache.store import TensorCache
from rpc_server.devices.cpu.mapped import MappedStorage
from rpc_server.graph.parse import tensor_of_message
from rpc_server.limits import LimitReached
from rpc_server.models.library import Content, Models, Stripes
from rpc_server.session.buffers import Buffer
from rpc_server.session.state import Session

Bytes = npt.NDArray[np.uint8]

# A weight of this size is mapped within some milliseconds, even over memory that was in use.
_MAPPED_AT_ONCE = 64 << 20


def begin(s: Session, request: Request) -> None:
    """Answer whether the tensor is there, and fill it in. Raises BadAddressError, GraphError."""
    fields = request.fields
    buffer, start = s.locate(fields.tensor, fields.offset, 0)
    sources = s.context.cache, s.context.models
    # A storage of several parts asks these, which may have what this server doesn't.
    if any(source is not None for source in sources) or not buffer.storage.whole:
        tensor = tensor_of_message(fields.tensor, s.dialect)
        s.wait(_load(s, request, buffer, start, tensor))
        return
    s.answer(request.command, {"result": 0})


async def _load(s: Session, request: Request, buffer: Buffer, start: int, tensor: Tensor) -> None:
    # The client means what its tensor has from the offset on; that much is served, or nothing.
    offset, digest = request.fields.offset, request.fields.hash
    size = tensor.nbytes - offset
    fits = 0 < size <= buffer.size - start
    place = Destination(buffer, start, size, tensor, offset)
    cache, models = s.context.cache, s.context.models
    in_models = False
    if not fits:
        found = False
    elif place.is_apart:
        storage = buffer.storage
        # Of a part of a tensor nobody has the hash.
        found = not offset and await storage.recall(tensor, start, digest)
    else:
        in_models = models is not None and await _from_models(s, models, digest, place)
        found = in_models or (cache is not None and await _from_cache(s, cache, digest, place))
    if found:
        s.context.prefetch_kernels(buffer.device, request.fields.tensor.type, size)
    _tell(s, request, size, found, in_models)


def _tell(s: Session, request: Request, size: int, found: bool, in_models: bool) -> None:
    """Count whether it was there, ``in_models`` or elsewhere, and answer."""
    s.stats.cache_hits += found
    s.stats.cache_hit_bytes += size * found
    s.stats.model_hits += in_models
    s.stats.model_hit_bytes += size * in_models
    s.stats.cache_misses += not found
    if found:
        s.meter.upload(size, cached=True)
    s.answer(request.command, {"result": int(found)})


def begin_slice(s: Session, request: Request) -> None:
    """Answer a SPLIT_LOAD. Raises BadAddressError, ProtocolError."""
    fields = request.fields
    stripes = Stripes(fields.start, fields.size, fields.distance, fields.count)
    if not stripes.nbytes or not stripes.inside(fields.nbytes):
        raise ProtocolError(
            f"SPLIT_LOAD of {fields.count} times {fields.size} bytes from {fields.start} on, "
            f"{fields.distance} apart, of {fields.nbytes}"
        )
    buffer = s.buffers.get(fields.remote_ptr)
    start = buffer.locate(fields.address, 0, stripes.nbytes)
    s.wait(_load_slice(s, request, buffer, start, stripes))


async def _load_slice(
    s: Session, request: Request, buffer: Buffer, start: int, stripes: Stripes
) -> None:
    digest, nbytes = request.fields.hash, request.fields.nbytes
    size = stripes.nbytes
    # Bytes without a type: only a storage that cuts tensors looks at what they are of.
    tensor = Tensor(0, GgmlType.I8, (size, 1, 1, 1), (1, size, size, size))
    place = Destination(buffer, start, size, tensor, 0)
    models, cache = s.context.models, s.context.cache
    in_models = False
    if models is not None and buffer.storage.whole:
        with models.open(digest, nbytes) as content:
            if content is not None:
                in_models = await _slice_of_model(s, content, stripes, place, request.fields.whole)
    found = in_models
    if not found and cache is not None and buffer.storage.whole:
        found = await _slice_of_cache(s, cache, digest, nbytes, stripes, place)
    _tell(s, request, size, found, in_models)


async def _slice_of_model(
    s: Session, content: Content, stripes: Stripes, place: Destination, whole: int
) -> bool:
    part = content.part(stripes)
    if part is not None and not place.is_remote and whole and await _map(s, part, place):
        return True
    return await _pass_on(lambda at, room: content.read_slice(stripes, at, room, s.present), place)


async def _slice_of_cache(
    s: Session,
    cache: TensorCache,
    digest: int,
    nbytes: int,
    stripes: Stripes,
    place: Destination,
) -> bool:
    """From a content that is checked as a whole: it takes as much memory meanwhile."""
    content = await _content_of(s, cache, digest, nbytes)
    if content is None:
        return False
    shape, strides = (stripes.count, stripes.size), (stripes.stride, 1)
    rows = np.lib.stride_tricks.as_strided(content[stripes.offset :], shape, strides)
    return await _pass_on(_reader(np.ascontiguousarray(rows).reshape(-1).data), place)


class _Owner:
    """The client that weights are mapped for."""

    def __init__(self, session: Session, device: int) -> None:
        self._session = session
        self._queue = session.queue(device)
        self._loop = asyncio.get_running_loop()

    def quietly(self, work: Callable[[], None]) -> None:
        """Do ``work`` in the place of a graph of the client's; from any thread but the loop's."""
        self._queue.submit(work).result()

    def lose(self, reason: str) -> None:
        """End the connection, and what runs for it."""

        def end() -> None:
            self._session.stop_running()
            self._session.end(LimitReached("--models", reason))

        self._loop.call_soon_threadsafe(end)

    def moved(self) -> None:
        """Forget plans, which may name addresses at which a weight is no longer."""
        for plans in self._session.plans:
            plans.clear()
        self._session.programs.clear()


class Destination:
    """The place where a tensor's bytes belong: ``size`` of them from byte ``offset`` on."""

    def __init__(self, buffer: Buffer, start: int, size: int, tensor: Tensor, offset: int) -> None:
        self.storage = buffer.storage
        self.device = buffer.device
        self.start = start
        self.size = size
        self.tensor = tensor
        self.offset = offset

    @property
    def is_remote(self) -> bool:
        """True if the host can't see the bytes."""
        return self.storage.is_remote(self.start, self.size, self.tensor)

    @property
    def is_apart(self) -> bool:
        """True if the bytes are at several places, which only the storage itself can fill."""
        return not self.storage.whole and self.is_remote


async def _from_models(s: Session, models: Models, digest: int, place: Destination) -> bool:
    """Fill in what the operator has of this hash and size; return whether there is such."""
    with models.open(digest, place.size) as content:
        if content is None:
            return False
        if not place.is_remote and await _map(s, content, place):
            return True
        return await _pass_on(lambda at, room: content.read(at, room, s.present), place)


async def _map(s: Session, content: Content, place: Destination) -> bool:
    """Let the file be the tensor's memory, where that can be done."""
    storage, mappings = place.storage, s.context.mappings
    if not isinstance(storage, MappedStorage) or mappings is None:
        return False
    owner = _Owner(s, place.device)
    what = place.start, content, mappings, owner, owner.moved
    if place.size <= _MAPPED_AT_ONCE and mappings.holds(content):
        # Over before a thread would have woken up; the client waits, and there are many of them.
        return storage.map(*what)
    return await asyncio.to_thread(storage.map, *what)


async def _pass_on(read: Callable[[int, memoryview], bool], place: Destination) -> bool:
    """Have ``read(at, into)`` fill all bytes, wherever they are; return whether they are right.

    A storage elsewhere takes them from the chunks into which they are read.
    """
    storage = place.storage
    if not place.is_remote:

        def fill() -> bool:
            with storage.place(place.start, place.size) as target:
                return read(0, target)

        return await asyncio.to_thread(fill)
    upload = await storage.upload(place.tensor, place.start, place.offset, place.size)
    assert upload is not None, "a storage whose bytes are elsewhere takes them itself"
    at, sound = 0, True
    while at < place.size:
        room = upload.room()
        # An upload that was begun goes on to its end, or its chunks would not be given back.
        sound = sound and await asyncio.to_thread(read, at, room)
        at += len(room)
        await upload.forward()
    return sound


async def _from_cache(s: Session, cache: TensorCache, digest: int, place: Destination) -> bool:
    if not place.is_remote:
        return await _pass_on(lambda _, target: _load_kept(s, cache, digest, target), place)
    # It is checked as a whole, so it comes by way of memory here.
    content = await _content_of(s, cache, digest, place.size)
    return content is not None and await _pass_on(_reader(content.data), place)


def _load_kept(s: Session, cache: TensorCache, digest: int, target: memoryview) -> bool:
    return cache.load(digest, target, s.stats.address, s.present)


async def _content_of(s: Session, cache: TensorCache, digest: int, nbytes: int) -> Bytes | None:
    """Return a content of this size, checked; None if there is none."""
    if await asyncio.to_thread(cache.size, digest) != nbytes:
        # Memory as large as a tensor is taken only for what is there.
        return None
    content = np.empty(nbytes, np.uint8)
    found = await asyncio.to_thread(_load_kept, s, cache, digest, content.data)
    return content if found else None


def _reader(content: memoryview) -> Callable[[int, memoryview], bool]:
    """Return what reads from memory, for :func:`_pass_on`."""

    def read(at: int, room: memoryview) -> bool:
        room[:] = content[at : at + len(room)]
        return True

    return read
