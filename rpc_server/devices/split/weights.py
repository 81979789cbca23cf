"""Weights whose rows lie on several machines, and the memory of a buffer that holds them.

A client allocates and writes a split device's buffer as any other. What it writes there is looked
at as it arrives: rows of a weight go to the workers piece by piece and are never here in one piece.
The buffer is address space; pages of rows that went elsewhere are never touched.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from client.backend import BackendBuffer
from client.split.partition import Extent, Rows, partition
from protocol.ggml.hashing import FNV_OFFSET
from protocol.ggml.ops import Op
from protocol.tensor import Tensor
from rpc_server.devices.base import Storage
from rpc_server.devices.cpu.hashing import compiled_hash
from rpc_server.devices.cpu.storage import HostStorage
from rpc_server.devices.split.disks import DeceivedError, Disks, OfferedWeight
from rpc_server.devices.split.sharded import (
    Bytes,
    Part,
    ShardedWeight,
    cut_multiple,
    is_cut_by_columns,
    is_split,
    packed,
)
from rpc_server.devices.split.slices import Keeping, Slices
from rpc_server.devices.split.worker import NoRoom, Worker
from rpc_server.turns import AT_ONCE, in_pieces

log = logging.getLogger(__name__)

# Memory of this machine is counted in pieces of so many bytes.
_CLAIM = 1 << 20
# Larger tensors are sent when they are needed.
_MOST_COPIED = 4 << 20


_compiled_hash = functools.cache(compiled_hash)


@dataclass(slots=True)
class SplitUpload:
    """An upload on its way through: fill :meth:`room`, then let :meth:`forward` send it on."""

    storage: SplitStorage
    weight: ShardedWeight
    offset: int
    left: int
    # Watches an upload of the whole tensor whose slices are to be kept.
    keeping: Keeping | None = None
    # What it was offered as: parts that have it from their disks are not sent it again.
    offered: OfferedWeight | None = None
    _digest: int = FNV_OFFSET
    _chunk: memoryview = field(default_factory=lambda: memoryview(b""))

    @property
    def kept(self) -> bool:
        """True if parts keep their slices, now that all of it went through."""
        return self.keeping is not None and not self.left

    def room(self) -> memoryview:
        """Return where the next bytes of the upload belong."""
        keeping = self.keeping
        size = (
            self.weight.step(self.offset, self.left)
            if keeping is None
            else keeping.step(self.offset)
        )
        self._chunk = self.storage.chunk(size)
        return self._chunk

    async def forward(self) -> None:
        """Send what was filled to the workers, all at once; this server's slice is copied.

        Raises WorkerLost.
        """
        data, weight = np.frombuffer(self._chunk, np.uint8), self.weight
        loaded = frozenset[int]() if self.offered is None else self.offered.parts
        if self.offered is not None and self.keeping is None:
            hash_ = self.storage.hash
            self._digest = await asyncio.to_thread(hash_, data.data, self._digest)
        writes = []
        memory = self.storage.memory(weight)
        for run in weight.runs(self.offset, len(data)):
            part = weight.parts[run.part]
            if part is None or weight.gathered:
                weight.here(run, memory, self.offset)[...] = run.of(data)
            if part is not None and self.keeping is None and run.part not in loaded:
                dense = np.ascontiguousarray(run.of(data)).reshape(-1)
                writes.append(part.worker.write(part.tensor, dense.data, run.at))
        begun = self.offset
        self.offset += len(data)
        self.left -= len(data)
        if self.keeping is None:
            await asyncio.gather(*writes)
        else:
            await self.keeping.forward(data, begun)
        if self.left:
            return
        digest = self._digest if self.keeping is None else self.keeping.digest
        if self.offered is not None and digest != self.offered.digest:
            raise DeceivedError(
                f"'{weight.tensor.name}' was offered as {self.offered.digest:016x}, and sent as "
                f"{digest:016x}"
            )
        if self.keeping is not None:
            await self.keeping.finish()


@dataclass(slots=True)
class _Copies:
    """Small tensors that one worker has copies of, in ``buffers``, in the order of allocation."""

    worker: Worker
    tensors: list[Tensor]
    buffers: list[BackendBuffer]


class SplitStorage(HostStorage):
    """A buffer of a split device.

    ``workers`` are the workers by part, None where this server is meant; ``background`` runs what
    is given back after the buffer is closed. ``spare`` tells how many bytes this server has left.
    """

    host_only = False
    whole = False

    def __init__(
        self,
        size: int,
        workers: Sequence[Worker | None],
        proportions: Sequence[float],
        background: Callable[[Coroutine[Any, Any, None]], None],
        *,
        by_columns: bool = False,
        spare: Callable[[], int] = lambda: 1 << 62,
        beyond_here: bool = False,
    ) -> None:
        """``by_columns``: cut weights of which a subgraph ends by columns (tensor mode).

        ``beyond_here``: it is larger than what this machine has, so not all of it may be written
        here.
        """
        super().__init__(size, reserve_only=True)
        self.workers = workers
        self._proportions = proportions
        self._background = background
        self._by_columns = by_columns
        self._spare = spare
        self._weights: dict[int, ShardedWeight] = {}
        # Where a weight lies whole because some part has no room for its slice.
        self._whole: set[int] = set()
        # Where a cache was cut that some graph needs whole.
        self._refused: set[int] = set()
        self._chunk = bytearray()
        # A byte for each piece that something here was written to; none where all of it may be.
        self._claimed = bytearray(-(-size // _CLAIM)) if beyond_here else bytearray()
        # How often weights came, went or moved: plans made before are out of date.
        self.changes = 0
        self.open = True
        # Where slices are kept for the next time; None where they aren't.
        self.slices: Slices | None = None
        self.disks = Disks()
        # What weights were offered as that the client is about to send, by their places.
        self._offered: dict[int, OfferedWeight] = {}
        # By where they lie, sizes of small tensors that the workers have copies of, and these by
        # part; what is written again and again is not copied.
        self._copied: dict[int, tuple[int, list[Tensor | None]]] = {}
        self._copies: list[_Copies] = []
        self._unsteady: set[int] = set()
        # Whether graphs write here at all.
        self._computed = False

    @property
    def hash(self) -> Callable[..., int]:
        """The hash by which clients offer weights, compiled."""
        return _compiled_hash()

    @property
    def weights(self) -> list[ShardedWeight]:
        return list(self._weights.values())

    @property
    def bytes_unknown(self) -> int:
        """Bytes of the buffer that are in no split tensor, or not yet."""
        return self.size - sum(w.tensor.nbytes for w in self._weights.values())

    @property
    def bytes_here(self) -> int:
        """Bytes of split tensors that this server keeps."""
        return sum(w.bytes_here for w in self._weights.values())

    def chunk(self, size: int) -> memoryview:
        """Return memory for one piece of an upload.

        There is one for the buffer, as uploads come one at a time.
        """
        if len(self._chunk) < size:
            self._chunk = bytearray(size)
        return memoryview(self._chunk)[:size]

    def place(self, offset: int, size: int) -> memoryview:
        """Do what HostStorage says. Raises NoRoom."""
        self.claim(offset, size)
        self._outdate(offset, size)
        return super().place(offset, size)

    def claim(self, start: int, size: int) -> None:
        """Take memory of this machine for bytes that are about to be written here.

        The buffer may be as large as all workers together. Raises NoRoom.
        """
        if not self._claimed or not size:
            return
        first, end = start // _CLAIM, -(-(start + size) // _CLAIM)
        new = self._claimed.count(0, first, end) * _CLAIM
        if not new:
            return
        if new > (spare := self._spare()):
            raise NoRoom(f"this machine has no room for {new} bytes more: {spare} are left")
        self._claimed[first:end] = b"\1" * (end - first)

    def discard(self, offset: int, size: int) -> None:
        self._outdate(offset, size)
        super().discard(offset, size)
        first, end = -(-offset // _CLAIM), (offset + size) // _CLAIM
        if self._claimed and first < end:
            self._claimed[first:end] = bytes(end - first)

    def memory(self, weight: ShardedWeight) -> Bytes:
        """Return the place of a weight in this server's memory."""
        return np.frombuffer(self.view(weight.start, weight.tensor.nbytes), np.uint8)

    def overlapping(self, start: int, size: int) -> list[ShardedWeight]:
        """Return weights of which some bytes lie in this range."""
        return [
            w
            for w in self._weights.values()
            if w.start < start + size and start < w.start + w.tensor.nbytes
        ]

    def is_remote(self, start: int, size: int, t: Tensor | None = None) -> bool:
        """Return whether bytes are part of a split weight, or of a tensor that is to become one."""
        return (t is not None and is_split(t)) or bool(self.overlapping(start, size))

    async def recall(self, t: Tensor, start: int, digest: int) -> bool:
        """Load a whole tensor from the disks of all parts; return whether all had their slices.

        Raises WorkerLost.
        """
        if not is_split(t) or start + t.nbytes > self.size:
            return False

        slices, hashes = self.slices, None
        # Before room is made for it: how it would be cut.
        tentative = ShardedWeight(t, start, *self._cuts(t), [], self._local, 0)
        if slices is not None:
            hashes = await asyncio.to_thread(slices.notes.find, digest, tentative)
        asked = self.disks.models is not None or any(
            worker is not None and worker.loads for worker in self.workers
        )
        if hashes is None and not asked:
            return False
        self._offered.pop(start, None)
        upload = await self.upload(t, start, 0, t.nbytes)
        if upload is None or upload.weight.gathered:
            return False
        weight, loaded = upload.weight, frozenset[int]()

        def view() -> Bytes:
            return self.memory(weight)

        if asked:
            loaded = await self.disks.load(digest, weight, view)
            if len(loaded) == len(weight.cuts):
                return True
        same = (weight.axis, weight.cuts) == (tentative.axis, tentative.cuts)
        if slices is not None and hashes is not None and same:
            loaded = await slices.load(digest, weight, hashes, view, loaded)
            if len(loaded) == len(weight.cuts):
                return True
        if loaded:
            self._offered[start] = OfferedWeight(digest, loaded)
        return False

    async def upload(
        self, t: Tensor, start: int, offset: int, size: int, *, keep: bool = False
    ) -> SplitUpload | None:
        """Return how ``size`` bytes of ``t`` from ``offset`` on are taken; None: written here.

        So is a weight for whose slice some worker has no room. ``keep``: the parts are asked to
        keep their slices. Raises WorkerLost.
        """
        upload = await self._upload(t, start, offset, size)
        if keep and upload is not None and self.slices is not None and size == t.nbytes:
            upload.keeping = self.slices.keeping(upload.weight)
            if upload.keeping is not None and upload.offered is not None:
                upload.keeping.loaded = upload.offered.parts
        return upload

    async def _upload(self, t: Tensor, start: int, offset: int, size: int) -> SplitUpload | None:
        begin = start - offset
        offered = self._offered.pop(begin, None)
        known = self._weights.get(begin)
        inside = offset + size <= t.nbytes
        if known is not None and inside and (known.tensor.type, known.tensor.ne) == (t.type, t.ne):
            known.require()
            upload = SplitUpload(self, known, offset, size)
            if size == t.nbytes:
                upload.offered = offered
            return upload
        await self.before_overwrite(start, size)
        if not is_split(t) or not inside or begin < 0 or begin + t.nbytes > self.size:
            return None
        await self.gather_to_host(self.overlapping(begin, t.nbytes))
        if begin in self._whole:
            return None
        try:
            weight = await self._place(t, begin)
        except NoRoom as error:
            if t.nbytes > self._spare():
                raise
            # A part that is full has no room for any of the rest either.
            level = logging.DEBUG if self._whole else logging.WARNING
            log.log(level, "%s: it stays here, and so may others", error)
            self._whole.add(begin)
            return None
        self._weights[begin] = weight
        self.changes += 1
        # What the upload leaves out keeps the bytes that it had.
        await self._forward(weight, 0, offset)
        await self._forward(weight, offset + size, t.nbytes - offset - size)
        return SplitUpload(self, weight, offset, size)

    async def _forward(self, weight: ShardedWeight, offset: int, size: int) -> None:
        """Send bytes that are here to where they belong now."""
        upload = SplitUpload(self, weight, offset, size)
        while upload.left:
            room = upload.room()
            at = weight.start + upload.offset
            room[:] = self.view(at, len(room))
            await upload.forward()

    async def before_overwrite(self, start: int, size: int) -> None:
        """Bring here the weights that these bytes are part of, before another way overwrites them.

        Those that are overwritten as a whole need not. Raises WorkerLost.
        """
        for weight in self.overlapping(start, size):
            if weight.within(start, size):
                self.forget(weight)
            else:
                await self.gather_to_host([weight])

    async def overwrite(self, start: int, size: int, value: int) -> None:
        """Fill bytes wherever they are; caches that are cleared stay on the parts.

        Raises WorkerLost.
        """
        found = self.overlapping(start, size)
        caches = [w for w in found if w.is_cache and w.within(start, size)]
        parts = [part for w in caches for part in w.parts if part is not None]
        # Before anything that follows: what a graph writes there next must stay.
        await asyncio.gather(*(part.worker.clear(part.buffer, value) for part in parts))
        for weight in found:
            if weight not in caches:
                await self.before_overwrite(*weight.overlap(start, size))
        work = in_pieces(lambda at, n: self.fill(start + at, n, value), size)
        await asyncio.wrap_future(work)

    def fill(self, offset: int, size: int, value: int) -> None:
        """Do what HostStorage says. Raises NoRoom."""
        if value or size < AT_ONCE:
            self.claim(offset, size)
        else:
            # What is dropped and written again takes memory again.
            self.discard(offset, size)
        self._outdate(offset, size)
        super().fill(offset, size, value)

    async def gather_to_host(self, weights: Sequence[ShardedWeight]) -> None:
        """Make weights ordinary memory of this server. Raises WorkerLost."""
        for weight in weights:
            await self.gather(weight)
            if weight.is_cache:
                # Or the next graph would cut it again.
                self.refuse(weight)
            self.forget(weight)

    def _cuts(self, t: Tensor) -> tuple[int, list[Rows]]:
        """Along which axis a weight is cut, and what each part gets."""
        axis = 0 if self._by_columns and is_cut_by_columns(t.name) else 1
        multiple = cut_multiple(t, axis, heads=self._by_columns)
        return axis, partition(t.ne[axis], self._proportions, multiple)

    @property
    def _local(self) -> int | None:
        return next((i for i, worker in enumerate(self.workers) if worker is None), None)

    async def _place(self, t: Tensor, begin: int) -> ShardedWeight:
        axis, cuts = self._cuts(t)
        weight = await self._new(t, begin, axis, cuts)
        # Rows that are half used take the memory of whole ones, and are read at a quarter of the
        # speed: a processor fetches ahead what follows.
        weight.packed = axis == 0 and weight.local is not None
        return weight

    async def _new(self, t: Tensor, begin: int, axis: int, cuts: list[Rows]) -> ShardedWeight:
        weight = ShardedWeight(t, begin, axis, cuts, [], self._local, self.address + begin)

        async def part(i: int, worker: Worker | None) -> Part | None:
            if worker is None or not len(cuts[i]):
                return None
            worker.require()
            return Part(worker, *await worker.place(t.type, weight.shape(i), t.name))

        made = await asyncio.gather(
            *(part(i, worker) for i, worker in enumerate(self.workers)), return_exceptions=True
        )
        failure: BaseException | None = None
        for result in made:
            if isinstance(result, BaseException):
                failure = failure or result
            else:
                weight.parts.append(result)
        if failure is not None:
            await self._release(weight.parts)
            raise failure
        return weight

    # -- caches

    def may_cut(self, t: Tensor) -> bool:
        """Return whether a tensor that graphs write may live on the parts."""
        start = t.address - self.address
        return (
            self._by_columns
            and t.op is Op.NONE
            and t.contiguous
            and start not in self._refused
            and not self.overlapping(start, t.nbytes)
        )

    def tentative_shard(self, t: Tensor, cuts: Sequence[Rows]) -> ShardedWeight:
        """Return what :meth:`cut_cache` would make of a tensor, without memory on the parts."""
        start = t.address - self.address
        return ShardedWeight(t, start, 0, list(cuts), [], None, t.address, is_cache=True)

    def refuse(self, weight: ShardedWeight) -> None:
        """Refuse to cut this cache: graphs need it whole."""
        self._refused.add(weight.start)

    async def cut_cache(self, tentative: ShardedWeight) -> None:
        """Move a tensor that graphs write to the parts, by columns. Raises WorkerLost, NoRoom."""
        t, start = tentative.tensor, tentative.start
        weight = await self._new(t, start, 0, tentative.cuts)
        weight.is_cache = True
        content = self.view(start, t.nbytes)
        # A cache that nothing was written to yet is empty on the workers too.
        for part in weight.parts:
            if part is not None:
                await part.worker.clear(part.buffer)
        if np.frombuffer(content, np.uint8).any():
            await self._forward(weight, 0, t.nbytes)
        self._weights[start] = weight
        self.changes += 1

    # -- copies

    def computes(self, start: int, size: int) -> None:
        """Take note that a graph writes these bytes: nothing here is copied from now on."""
        self._computed = True
        self._outdate(start, size)

    def may_copy(self, t: Tensor) -> bool:
        """Return whether parts may have copies of a leaf, as it hardly changes: a model's norms."""
        start = t.address - self.address
        return (
            not self._computed
            and t.contiguous
            and t.nbytes <= _MOST_COPIED
            and start not in self._unsteady
            and any(not w.is_cache for w in self._weights.values())
        )

    def copy_of(self, t: Tensor, part: int) -> Tensor:
        """Return a worker's copy of a leaf that was copied by :meth:`copy_out`."""
        found = self._copied[t.address - self.address][1][part]
        assert found is not None
        return found

    async def copy_out(self, leaves: Sequence[Tensor]) -> None:
        """Give workers copies of those leaves that they have none of. Raises WorkerLost, NoRoom."""
        new = [t for t in leaves if t.address - self.address not in self._copied]
        if not new:
            return
        content = [bytes(self.view(t.address - self.address, t.nbytes)) for t in new]

        async def copies(worker: Worker | None) -> list[Tensor | None]:
            if worker is None:
                return [None] * len(new)
            worker.require()
            g = worker.backend.graph
            made = [g.new_tensor(t.type, t.ne, t.name) for t in new]
            buffers = await worker.place_copies(made)
            self._copies.append(_Copies(worker, made, buffers))
            for t, data in zip(made, content, strict=True):
                await worker.write(t, memoryview(data), 0)
            return list(made)

        parts = await asyncio.gather(*map(copies, self.workers))
        for i, t in enumerate(new):
            self._copied[t.address - self.address] = t.nbytes, [part[i] for part in parts]

    def _outdate(self, start: int, size: int) -> None:
        """Forget copies of bytes that are about to be written: plans with them are made again."""
        for at, (nbytes, _) in list(self._copied.items()):
            if at < start + size and start < at + nbytes:
                del self._copied[at]
                self._unsteady.add(at)
                self.changes += 1

    # -- reading back

    async def read(self, start: int, size: int) -> memoryview:
        """Return bytes as the client wrote them, from wherever they lie. Raises WorkerLost."""
        if size > (spare := self._spare()):
            raise NoRoom(f"this machine has no room for an answer of {size} bytes: {spare} left")
        data = np.empty(size, np.uint8).data
        # Through arrays, which let others run meanwhile.
        here, copy = np.frombuffer(self.view(start, size), np.uint8), np.frombuffer(data, np.uint8)
        await asyncio.wrap_future(
            in_pieces(lambda at, n: np.copyto(copy[at : at + n], here[at : at + n]), size)
        )
        for weight in self.overlapping(start, size):
            if weight.gathered:
                continue
            low, n = weight.overlap(start, size)
            await self._fetch(weight, low - weight.start, data[low - start : low - start + n])
        return data

    async def gather(self, weight: ShardedWeight) -> None:
        """Bring all rows here, beside those of the workers. Raises WorkerLost, NoRoom."""
        if weight.gathered:
            return
        t = weight.tensor
        if t.nbytes - weight.local_bytes > self._spare():
            raise NoRoom(f"this machine has no room for all {t.nbytes} bytes of '{t.name}'")
        await self._unpack(weight)
        await self._fetch(weight, 0, self.view(weight.start, t.nbytes))
        weight.gathered = True

    async def _unpack(self, weight: ShardedWeight) -> None:
        """Put this server's slice where the whole tensor has it."""
        if not weight.packed:
            return
        memory, here = self.memory(weight), weight.local

        def piece(at: int, n: int) -> None:
            # The last first: each goes further from the beginning, where others still are.
            for run in reversed(weight.runs(at, n)):
                if run.part == here:
                    run.of(memory[at:])[...] = packed(run, memory)

        # Plans made before read it where it was.
        weight.packed = False
        self.changes += 1
        work = in_pieces(piece, weight.tensor.nbytes, backwards=True)
        await asyncio.wrap_future(work)

    async def _fetch(self, weight: ShardedWeight, offset: int, target: memoryview) -> None:
        """Overwrite ``target``, the bytes from ``offset`` on, with what workers have of them.

        With this server's own where they are packed, too.
        """
        memory = self.memory(weight)

        async def fetch(part: Part, run: Extent, into: np.ndarray[Any, Any]) -> None:
            part.worker.require()
            got = await part.worker.read(part.tensor, run.at, run.count * run.size)
            run.of(into)[...] = np.frombuffer(got, np.uint8).reshape(run.count, run.size)

        at = 0
        while at < len(target):
            n = weight.step(offset + at, len(target) - at)
            into = np.frombuffer(target[at : at + n], np.uint8)
            runs = weight.runs(offset + at, n)
            for run in runs if weight.packed else ():
                if run.part == weight.local:
                    run.of(into)[...] = weight.here(run, memory, offset + at)
            await asyncio.gather(
                *(
                    fetch(part, run, into)
                    for run in runs
                    if (part := weight.parts[run.part]) is not None
                )
            )
            at += n

    # -- the rest of a Storage

    def copy_from(self, other: Storage, src_offset: int, dst_offset: int, size: int) -> None:
        for weight in self.overlapping(dst_offset, size):
            self.forget(weight)
        self.claim(dst_offset, size)
        self._outdate(dst_offset, size)
        super().copy_from(other, src_offset, dst_offset, size)

    def forget(self, weight: ShardedWeight) -> None:
        """Forget a weight.

        The client wrote something else there, and the workers' rows are not needed.
        """
        del self._weights[weight.start]
        self.changes += 1
        self._background(self._release(weight.parts))

    @staticmethod
    async def _release(parts: Sequence[Part | None]) -> None:
        for part in parts:
            if part is not None:
                await part.worker.release(part.tensor, part.buffer)

    def close(self) -> None:
        self.open = False
        for weight in self.weights:
            self.forget(weight)
        for made in self._copies:
            self._background(made.worker.release_copies(made.tensors, made.buffers))
        self._copies.clear()
        super().close()
