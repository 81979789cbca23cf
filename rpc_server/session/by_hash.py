"""SET_TENSOR_HASH: a tensor that is on this server's own disk, so that the client need not send it.

What the operator put there (``--models``) comes first, then what clients had kept (``--cache``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from protocol.requests import Request
from rpc_server.cache.store import TensorCache
from rpc_server.devices.cpu.mapped import MappedStorage
from rpc_server.graph.parse import tensor_of_message
from rpc_server.graph.tensor import Tensor
from rpc_server.limits import LimitReached
from rpc_server.models.library import Content, Models
from rpc_server.session.buffers import Buffer
from rpc_server.session.state import Session


def begin(s: Session, request: Request) -> None:
    """Answer whether the tensor is there, and fill it in. Raises BadAddressError, GraphError."""
    fields = request.fields
    buffer, start = s.locate(fields.tensor, fields.offset, 0)
    if s.context.cache is not None or s.context.models is not None:
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
        found = in_models or (cache is not None and await _from_cache(cache, digest, place))
    if found:
        s.stats.cache_hits += 1
        s.stats.cache_hit_bytes += size
        if in_models:
            s.stats.model_hits += 1
            s.stats.model_hit_bytes += size
        s.meter.upload(size, cached=True)
        s.context.prefetch_kernels(buffer.device, request.fields.tensor.type, size)
    else:
        s.stats.cache_misses += 1
    s.answer(request.command, {"result": int(found)})


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
    """Where a tensor's bytes belong: ``size`` of them from byte ``offset`` on."""

    def __init__(self, buffer: Buffer, start: int, size: int, tensor: Tensor, offset: int) -> None:
        self.storage = buffer.storage
        self.device = buffer.device
        self.start = start
        self.size = size
        self.tensor = tensor
        self.offset = offset

    @property
    def is_remote(self) -> bool:
        """Whether the host can't see the bytes."""
        return self.storage.is_remote(self.start, self.size, self.tensor)

    @property
    def is_apart(self) -> bool:
        """Whether the bytes are at several places, which only the storage itself can fill."""
        return not self.storage.whole and self.is_remote


async def _from_models(s: Session, models: Models, digest: int, place: Destination) -> bool:
    """Fill in what the operator has of this hash and size; return whether there is such."""
    with models.open(digest, place.size) as content:
        if content is None:
            return False
        if place.is_remote:
            return await _pass_on(content, place)
        return await _map(s, content, place) or await asyncio.to_thread(_copy, content, place)


async def _map(s: Session, content: Content, place: Destination) -> bool:
    """Let the file be the tensor's memory, where that can be done."""
    storage, mappings = place.storage, s.context.mappings
    if not isinstance(storage, MappedStorage) or mappings is None:
        return False
    owner = _Owner(s, place.device)
    return await asyncio.to_thread(storage.map, place.start, content, mappings, owner, owner.moved)


def _copy(content: Content, place: Destination) -> bool:
    with place.storage.place(place.start, place.size) as target:
        return content.read(0, target)


async def _pass_on(content: Content, place: Destination) -> bool:
    """From the file into the chunks by which a storage elsewhere takes its bytes."""
    storage = place.storage
    upload = await storage.upload(place.tensor, place.start, place.offset, place.size)
    assert upload is not None, "a storage whose bytes are elsewhere takes them itself"
    at, sound = 0, True
    while at < place.size:
        room = upload.room()
        # An upload that was begun goes on to its end, or its chunks would not be given back.
        sound = sound and await asyncio.to_thread(content.read, at, room)
        at += len(room)
        await upload.forward()
    return sound


async def _from_cache(cache: TensorCache, digest: int, place: Destination) -> bool:
    if place.is_remote:
        return await _from_cache_elsewhere(cache, digest, place)

    def load() -> bool:
        with place.storage.place(place.start, place.size) as target:
            return cache.load(digest, target)

    return await asyncio.to_thread(load)


async def _from_cache_elsewhere(cache: TensorCache, digest: int, place: Destination) -> bool:
    """From the cache to where the bytes belong, by way of memory here: it is checked as a whole."""
    if await asyncio.to_thread(cache.size, digest) != place.size:
        # Memory as large as a tensor is taken only for what is there.
        return False
    content = memoryview(bytearray(place.size))
    if not await asyncio.to_thread(cache.load, digest, content):
        return False
    storage = place.storage
    upload = await storage.upload(place.tensor, place.start, place.offset, len(content))
    assert upload is not None, "a storage whose bytes are elsewhere takes them itself"
    while content:
        room = upload.room()
        room[:] = content[: len(room)]
        content = content[len(room) :]
        await upload.forward()
    return True
