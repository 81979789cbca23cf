"""Weights whose rows lie on several machines, and the memory of a buffer that holds them.

A client allocates and writes a split device's buffer as any other. What it writes there is looked
at as it arrives: rows of a weight go to the workers piece by piece and are never here in one piece.
The buffer is address space; pages of rows that went elsewhere are never touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from client.backend import Buffer
from client.partition import Piece, Rows, partition, pieces
from client.tensors import Tensor as RemoteTensor
from protocol.ggml_ops import Op
from rpc_server.devices.base import Storage
from rpc_server.devices.cpu.storage import HostStorage
from rpc_server.graph.tensor import Tensor
from rpc_server.split.link import Link, WorkerLost

log = logging.getLogger(__name__)

# What arrives in one go before it goes on to the workers.
CHUNK = 4 << 20
# Smaller ones aren't worth an exchange.
_LEAST_BYTES = 64 << 10
_LEAST_ROWS = 64
# Matrices by name that are no operand of a product: tables that rows are taken from, convolutions.
# One that is missing here is brought back when a graph shows it, which costs its memory twice.
_NO_PRODUCT = re.compile(r"norm|rope|conv|position_embd|pos_embd|token_types|rel_pos|ssm_[ad]\b")


def is_split(t: Tensor) -> bool:
    """Whether a tensor that is uploaded is a weight to be cut: by name, shape and size."""
    return (
        t.op is Op.NONE
        and t.name.endswith(".weight")
        and _NO_PRODUCT.search(t.name) is None
        and t.contiguous
        and t.ne[1] >= _LEAST_ROWS
        and t.ne[3] == 1
        and t.nbytes >= _LEAST_BYTES
    )


@dataclass(slots=True)
class Part:
    """The rows of a weight on one worker."""

    link: Link
    tensor: RemoteTensor
    buffer: Buffer


@dataclass(slots=True, eq=False)
class SplitWeight:
    """One weight: ``rows`` of each part; its ``parts`` (None: no rows, or this server's).

    ``start`` is its offset in the buffer. ``gathered`` once all rows are here too.
    """

    tensor: Tensor
    start: int
    rows: list[Rows]
    parts: list[Part | None]
    local: int | None
    gathered: bool = False

    @property
    def local_rows(self) -> Rows:
        """The rows that this server multiplies itself."""
        return self.rows[self.local] if self.local is not None else Rows(0, 0)

    def pieces(self, offset: int, size: int) -> list[Piece]:
        """Where bytes of the weight lie."""
        return pieces(self.rows, self.tensor.row_size, self.tensor.ne[1], offset, size)

    def require(self) -> None:
        """Raises WorkerLost if rows of it are gone."""
        for part in self.parts:
            if part is not None:
                part.link.require()


@dataclass(slots=True)
class Upload:
    """An upload on its way through: fill :meth:`room`, then let :meth:`forward` send it on."""

    storage: SplitStorage
    weight: SplitWeight
    offset: int
    left: int
    _chunk: memoryview = field(default_factory=lambda: memoryview(b""))

    def room(self) -> memoryview:
        """Where the next bytes of the upload belong."""
        self._chunk = self.storage.chunk(min(self.left, CHUNK))
        return self._chunk

    async def forward(self) -> None:
        """Send what was filled to the workers, all at once; rows of this server are copied.

        Raises WorkerLost.
        """
        data, weight = self._chunk, self.weight
        writes = []
        for piece in weight.pieces(self.offset, len(data)):
            run = data[piece.start : piece.start + piece.size]
            part = weight.parts[piece.part]
            if part is None or weight.gathered:
                at = weight.start + self.offset + piece.start
                self.storage.view(at, piece.size)[:] = run
            if part is not None:
                writes.append(part.link.write(part.tensor, run, piece.at))
        self.offset += len(data)
        self.left -= len(data)
        await asyncio.gather(*writes)


class SplitStorage(HostStorage):
    """A buffer of a split device.

    ``links`` are the workers by part, None where this server is meant; ``background`` runs what is
    given back after the buffer is closed.
    """

    def __init__(
        self,
        size: int,
        links: Sequence[Link | None],
        proportions: Sequence[float],
        background: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        super().__init__(size, reserve_only=True)
        self._links = links
        self._proportions = proportions
        self._background = background
        self._weights: dict[int, SplitWeight] = {}
        self._chunk = bytearray()

    @property
    def weights(self) -> list[SplitWeight]:
        return list(self._weights.values())

    def chunk(self, size: int) -> memoryview:
        """Memory for one piece of an upload; one for the buffer, as uploads come one at a time."""
        if len(self._chunk) < size:
            self._chunk = bytearray(size)
        return memoryview(self._chunk)[:size]

    def find(self, address: int) -> SplitWeight | None:
        """The weight that begins at this address."""
        return self._weights.get(address - self.address)

    def overlapping(self, start: int, size: int) -> list[SplitWeight]:
        """Weights of which some bytes lie in this range."""
        return [
            w
            for w in self._weights.values()
            if w.start < start + size and start < w.start + w.tensor.nbytes
        ]

    def concerns(self, start: int, size: int, t: Tensor | None = None) -> bool:
        """Whether bytes are part of a split weight, or of a tensor that is to become one."""
        return (t is not None and is_split(t)) or bool(self.overlapping(start, size))

    async def upload(self, t: Tensor, start: int, offset: int, size: int) -> Upload | None:
        """How ``size`` bytes of ``t`` from ``offset`` on are taken; None: written here as any.

        Raises WorkerLost.
        """
        begin = start - offset
        known = self._weights.get(begin)
        if known is not None and (known.tensor.type, known.tensor.ne) == (t.type, t.ne):
            known.require()
            return Upload(self, known, offset, size)
        for stale in self.overlapping(start, size):
            self.forget(stale)
        if not is_split(t) or begin < 0 or begin + t.nbytes > self.size:
            return None
        weight = await self._place(t, begin)
        self._weights[begin] = weight
        return Upload(self, weight, offset, size)

    async def _place(self, t: Tensor, begin: int) -> SplitWeight:
        rows = partition(t.ne[1], self._proportions)

        async def part(link: Link | None, own: Rows) -> Part | None:
            if link is None or not len(own):
                return None
            link.require()
            tensor, buffer = await link.place(t.type, (t.ne[0], len(own), t.ne[2]), t.name)
            return Part(link, tensor, buffer)

        made = await asyncio.gather(*map(part, self._links, rows), return_exceptions=True)
        parts: list[Part | None] = []
        failure: BaseException | None = None
        for result in made:
            if isinstance(result, BaseException):
                failure = failure or result
            else:
                parts.append(result)
        if failure is not None:
            await self._release(parts)
            raise failure
        local = next((i for i, link in enumerate(self._links) if link is None), None)
        return SplitWeight(t, begin, rows, parts, local)

    # -- reading back

    async def read(self, start: int, size: int) -> memoryview:
        """Bytes as the client wrote them, from wherever they lie. Raises WorkerLost."""
        data = memoryview(bytearray(self.view(start, size)))
        for weight in self.overlapping(start, size):
            if weight.gathered:
                continue
            low = max(start, weight.start)
            high = min(start + size, weight.start + weight.tensor.nbytes)
            await self._fetch(weight, low - weight.start, data[low - start : high - start])
        return data

    async def gather(self, weight: SplitWeight) -> None:
        """Bring all rows here, beside those of the workers. Raises WorkerLost."""
        if weight.gathered:
            return
        t = weight.tensor
        await self._fetch(weight, 0, self.view(weight.start, t.nbytes))
        weight.gathered = True

    @staticmethod
    async def _fetch(weight: SplitWeight, offset: int, target: memoryview) -> None:
        """Overwrite ``target``, the bytes of the weight from ``offset`` on, with workers' rows."""

        async def fetch(part: Part, piece: Piece) -> None:
            run = target[piece.start : piece.start + piece.size]
            for at in range(0, piece.size, CHUNK):
                part.link.require()
                n = min(CHUNK, piece.size - at)
                run[at : at + n] = await part.link.read(part.tensor, piece.at + at, n)

        await asyncio.gather(
            *(
                fetch(part, piece)
                for piece in weight.pieces(offset, len(target))
                if (part := weight.parts[piece.part]) is not None
            )
        )

    # -- the rest of a Storage

    def fill(self, offset: int, size: int, value: int) -> None:
        for weight in self.overlapping(offset, size):
            self.forget(weight)
        super().fill(offset, size, value)

    def copy_from(self, other: Storage, src_offset: int, dst_offset: int, size: int) -> None:
        for weight in self.overlapping(dst_offset, size):
            self.forget(weight)
        super().copy_from(other, src_offset, dst_offset, size)

    def forget(self, weight: SplitWeight) -> None:
        """The client wrote something else there: the rows on the workers are no longer needed."""
        del self._weights[weight.start]
        self._background(self._release(weight.parts))

    @staticmethod
    async def _release(parts: Sequence[Part | None]) -> None:
        for part in parts:
            if part is not None:
                # A worker that is lost has freed it.
                with contextlib.suppress(WorkerLost, ConnectionError):
                    await part.link.release(part.tensor, part.buffer)

    def close(self) -> None:
        for weight in self.weights:
            self.forget(weight)
        super().close()
