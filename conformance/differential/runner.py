"""Runs cases on one server: one upload, the graph, one download, all of it in a single round trip.

All tensors of a case lie in one buffer, with guard bytes between them. What comes back is the whole
of it, so that a write outside a tensor is seen wherever it went.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from client.connection import Connection
from client.errors import ConnectionLost, GraphFailed
from client.tensors import dims
from conformance.differential.case import GraphCase
from conformance.differential.compare import CaseMemory
from conformance.differential.endpoint import Endpoint
from conformance.differential.values import flushed, leaf_bytes
from protocol.errors import ProtocolError
from protocol.ggml.ops import VIEWS
from protocol.ggml.types import TYPE_INFO, GgmlType
from protocol.graph_payload import encode_graph
from protocol.tensor import Tensor, contiguous_strides
from tools.serving.processes import PATIENCE

GUARD_BYTE = 0xA5
# What nodes find in their memory: not-a-number in every float type.
POISON_BYTE = 0xFF
_GUARD = 64
_ALIGNMENT = 64
_ARENA = 16 << 20


class ServerRefused(RuntimeError):  # noqa: N818
    """The server ended the connection, or its process, instead of computing."""


@dataclass(frozen=True, slots=True)
class Image:
    """The bytes that a case starts with, and where each root lies.

    ``flushes``: no leaf holds numbers below the normal ones, and results below them count as 0.
    """

    data: npt.NDArray[np.uint8]
    offsets: dict[Tensor, int]
    flushes: bool = False

    @classmethod
    def of(cls, case: GraphCase, *, flushes: bool = False) -> Image:
        offsets, at = {}, _GUARD
        for root in case.graph.roots:
            offsets[root] = at
            at = -(-(at + root.nbytes + _GUARD) // _ALIGNMENT) * _ALIGNMENT
        data = np.full(at, GUARD_BYTE, np.uint8)
        for root, start in offsets.items():
            part = data[start : start + root.nbytes]
            fill = case.fills.get(root)
            part[...] = POISON_BYTE if fill is None else leaf_bytes(root, fill)
            if flushes and fill is not None:
                part[...] = flushed(root.type, part)
        return cls(data, offsets, flushes)

    def untouched(self, case: GraphCase) -> npt.NDArray[np.bool_]:
        """Return which bytes no node may write: all but the elements of what nodes write."""
        mask = np.ones(len(self.data), np.bool_)
        for t in case.written:
            if not t.nelements:
                continue
            info = TYPE_INFO[t.type]
            root = t if t.view_src is None else t.view_src
            start = self.offsets[root] + (0 if t.view_src is None else t.view_offs)
            shape = (*reversed(t.ne[1:]), t.ne[0] // info.block_size, info.type_size)
            strides = (*reversed(t.nb), 1)
            np.ndarray(shape, np.bool_, mask, start, strides)[...] = False
        return mask


class CaseRunner:
    """One server's side; keeps a connection and a buffer for case after case."""

    def __init__(self, endpoint: Endpoint, *, timeout: float = PATIENCE) -> None:
        self.endpoint = endpoint
        self._timeout = timeout
        self._connection: Connection | None = None
        self._buffer = 0
        self._base = 0
        self._size = 0

    async def run(self, case: GraphCase, image: Image, *, stepwise: bool = False) -> CaseMemory:
        """Return the memory after the graph ran once.

        ``stepwise`` runs each node as a graph of its own.

        Raises Refused when the server hung up, TimeoutError when it took too long.
        """
        try:
            async with asyncio.timeout(self._timeout):
                return await self._run(case, image, stepwise)
        except (ConnectionLost, GraphFailed, ProtocolError) as error:
            died = await self.endpoint.died()
            await self._drop()
            raise ServerRefused(f"{error}{'; its process ended' if died else ''}") from None
        except TimeoutError:
            await self._drop()
            raise

    async def _run(self, case: GraphCase, image: Image, stepwise: bool) -> CaseMemory:
        connection = await self._ready(len(image.data))
        for root, offset in image.offsets.items():
            root.place(self._buffer, self._base + offset)
        ne = dims([len(image.data)])
        whole = Tensor(0x7FFF_FFFF, GgmlType.I8, ne, contiguous_strides(GgmlType.I8, ne))
        whole.place(self._buffer, self._base)
        payload = case.graph.payload(connection.dialect)
        graphs = [payload.nodes]
        if stepwise:
            computed = [t.id for t in case.graph.nodes if t.op not in VIEWS]
            graphs = [np.array([i], np.uint64) for i in computed]
        steps = [connection.set_tensor(whole, image.data.data)]
        for nodes in graphs:
            payload.nodes = nodes
            steps.append(connection.graph_compute(encode_graph(payload, connection.dialect)))
        *_, result = await asyncio.gather(*steps, connection.get_tensor(whole))
        assert result is not None  # of gather's types, that of the last
        return CaseMemory(result, image.offsets, image.flushes)

    async def _ready(self, size: int) -> Connection:
        if self._connection is None or self._connection.closed:
            self._connection = await self.endpoint.connect()
            self._size = 0
        if size > self._size:
            if self._size:
                await self._connection.free_buffer(self._buffer)
            self._size = max(size, _ARENA)
            self._buffer, _ = await self._connection.alloc_buffer(self._size)
            self._base = await self._connection.buffer_get_base(self._buffer)
        return self._connection

    async def _drop(self) -> None:
        if self._connection is not None:
            self._connection.abort()
            self._connection = None

    async def close(self) -> None:
        """Hang up."""
        if self._connection is not None:
            await self._connection.close()
            self._connection = None
