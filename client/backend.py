"""One device of a server as a backend: tensors with values in, arrays out.

    async with Backend.connect("localhost", 50052) as b:
        w = await b.tensor(GgmlType.F32, (64, 32), weights)    # numpy shape (32, 64)
        x = await b.tensor(GgmlType.F32, (64, 8), activations)
        y = b.graph.rms_norm(b.graph.mul_mat(w, x), 1e-6)
        print(await b.compute(y))

A graph that runs more than once is prepared first::

        plan = await b.prepare(y)
        await b.upload(x, more_activations)
        await plan.run()
        print(await b.download(y))
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from client.builder.graph import Graph, GraphBuilder
from client.connection import Connection, connect_any
from client.connection import connect as open_connection
from client.tensors import Array, from_bytes, require, to_bytes
from protocol.commands import Command
from protocol.dialects import DIALECTS, Dialect
from protocol.errors import ProtocolError
from protocol.ggml.hashing import fnv1a_64
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor

Values = Array | bytes | bytearray | memoryview | Sequence[Any] | float

# From this size on, data that may be cached are offered by their hash first; as llama.cpp.
HASH_THRESHOLD = 10 << 20

# Ops for which a server may want more memory than the result takes (ggml_op_alloc_size_may_expand).
_MAY_EXPAND = frozenset(
    {Op.FLASH_ATTN_EXT, Op.MUL_MAT, Op.MUL_MAT_ID, Op.CUMSUM, Op.ARGSORT, Op.TOP_K}
)


@dataclass(frozen=True, slots=True)
class BackendBuffer:
    """A buffer on the server: its handle, the address of its first byte, its bytes."""

    handle: int
    base: int
    size: int


class Backend:
    """One device of the server at the other end of ``connection``; see :meth:`connect`.

    ``graph`` builds nodes. Tensors belong to the backend whose graph or ``tensor`` made them.
    """

    def __init__(self, connection: Connection, device: int, alignment: int, max_size: int) -> None:
        self.connection = connection
        self.device = device
        self.alignment = alignment
        self.max_size = max_size
        self.graph = GraphBuilder()
        self._alloc_sizes: dict[Hashable, int] = {}
        self._last_run: PreparedGraph | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(
        cls,
        host: str,
        port: int,
        *,
        version: str | Dialect | None = DIALECTS[0],
        device: int = 0,
        timeout: float | None = 10.0,
    ) -> AsyncIterator[Backend]:
        """Open a backend on a connection of its own; leaving the context closes it.

        The server then frees all that was allocated. ``version`` None finds the newest that the
        server speaks. Errors as of client.connection.connect.
        """
        if version is None:
            connection = await connect_any(host, port, timeout=timeout)
        else:
            connection = await open_connection(host, port, version=version, timeout=timeout)
        async with connection as c:
            yield await cls.open(c, device)

    @classmethod
    async def open(cls, connection: Connection, device: int = 0) -> Backend:
        """Return a backend on a connection that the caller keeps."""
        alignment, max_size = await asyncio.gather(
            connection.get_alignment(device), connection.get_max_size(device)
        )
        return cls(connection, device, alignment, max_size)

    # -- memory

    async def allocate(self, tensors: Iterable[Tensor]) -> list[BackendBuffer]:
        """Place tensors in as few new buffers as the server's limit allows.

        Views are placed with what they view. Raises AllocationFailed; ShapeError for a tensor that
        is larger than the largest buffer or has a place.
        """
        roots = [t for t in dict.fromkeys(tensors) if t.view_src is None]
        sizes = await asyncio.gather(*map(self.alloc_size, roots))
        groups: list[list[tuple[Tensor, int]]] = []
        used: list[int] = []
        for tensor, size in zip(roots, sizes, strict=True):
            require(not tensor.placed, f"{tensor!r} has a place")
            require(size <= self.max_size, f"{tensor!r}: {size} bytes, at most {self.max_size}")
            if not groups or self._aligned(used[-1]) + size > self.max_size:
                groups.append([])
                used.append(0)
            offset = self._aligned(used[-1])
            groups[-1].append((tensor, offset))
            used[-1] = offset + size
        buffers: list[BackendBuffer] = []
        try:
            for group, size in zip(groups, used, strict=True):
                buffers.append(await self._new_buffer(size))
                for tensor, offset in group:
                    tensor.place(buffers[-1].handle, buffers[-1].base + offset)
        except Exception:
            await self.free(buffers, roots)
            raise
        await asyncio.gather(*(self.connection.init_tensor(t) for t in roots if _padded(t)))
        return buffers

    async def _new_buffer(self, size: int) -> BackendBuffer:
        # A server need not give out buffers without any byte.
        handle, got = await self.connection.alloc_buffer(max(size, 1), self.device)
        base = await self.connection.buffer_get_base(handle)
        if got < size or base + got > 1 << 64:
            raise ProtocolError(f"a buffer of {got} bytes at {base:#x}, {size} asked for")
        return BackendBuffer(handle, base, got)

    async def free(self, buffers: Iterable[BackendBuffer], tensors: Iterable[Tensor] = ()) -> None:
        """Give buffers back; ``tensors`` that lay in them lose their place."""
        handles = {buffer.handle for buffer in buffers}
        for tensor in tensors:
            if tensor.view_src is None and tensor.buffer in handles:
                tensor.place(0, 0)
        # The server forgets its graph with any buffer.
        self._last_run = None
        await asyncio.gather(*map(self.connection.free_buffer, handles))

    def _aligned(self, offset: int) -> int:
        return -(-offset // self.alignment) * self.alignment

    async def alloc_size(self, tensor: Tensor) -> int:
        """Return the bytes to reserve for ``tensor``.

        The server is asked where llama.cpp asks, once for each shape.
        """
        if not _padded(tensor) and tensor.op not in _MAY_EXPAND:
            return tensor.nbytes
        key = (tensor.type, tensor.op, tensor.op_params, tensor.ne, tensor.nb)
        if key not in self._alloc_sizes:
            self._alloc_sizes[key] = await self.connection.get_alloc_size(tensor, self.device)
        # Strides have 32 bits on the wire: the answer may be too small.
        return max(self._alloc_sizes[key], tensor.nbytes)

    # -- values

    async def tensor(
        self, type: GgmlType, ne: Sequence[int], values: Values | None = None, *, name: str = ""
    ) -> Tensor:
        """Make a leaf in a buffer of its own, with ``values`` if given (see :meth:`upload`)."""
        leaf = self.graph.new_tensor(type, ne, name)
        await self.allocate([leaf])
        if values is not None:
            await self.upload(leaf, values)
        return leaf

    async def upload(self, tensor: Tensor, values: Values, *, cache: bool = False) -> None:
        """Write all of a contiguous tensor.

        An array or nested list has the shape (ne3, ne2, ne1, ne0), leading ones left out or not;
        bytes, or uint8 for quantized types, go as they are. With ``cache`` (weights) large data are
        offered by their hash first, and the server is asked to keep them. ShapeError if the size
        doesn't match.
        """
        if not isinstance(values, bytes | bytearray | memoryview):
            values = np.asarray(values)
        data = to_bytes(tensor, values)
        offer = (
            cache
            and len(data) > HASH_THRESHOLD
            and Command.SET_TENSOR_HASH in self.connection.dialect.commands
        )
        if offer:
            digest = await asyncio.to_thread(fnv1a_64, data)
            if await self.connection.set_tensor_hash(tensor, digest):
                return
        await self.connection.set_tensor(tensor, data, cache_flag=int(offer))

    async def download(self, tensor: Tensor) -> Array:
        """Return the tensor's values: (ne3, ne2, ne1, ne0), of quantized types rows of bytes."""
        return from_bytes(tensor, await self.connection.get_tensor(tensor))

    # -- graphs

    async def prepare(self, outputs: Tensor | Iterable[Tensor]) -> PreparedGraph:
        """Order the graph of ``outputs`` and give every node without a place memory of its own.

        So any node can be read after a run; a leaf without values holds whatever was there.
        ValueError if the protocol version lacks one of the ops.
        """
        graph = self.graph.build(outputs)
        for node in graph.nodes:
            self.connection.wire_tensor(node)
        placed = [t for t in graph.roots if not t.placed]
        buffers = await self.allocate(placed)
        payload = graph.encode(self.connection.dialect, self.device)
        return PreparedGraph(self, graph, payload, placed, buffers)

    async def compute(self, *outputs: Tensor) -> Any:
        """Compute ``outputs`` once and download them: an array, of several outputs a list.

        The memory of the nodes is given back.
        """
        plan = await self.prepare(outputs)
        try:
            await plan.run()
            arrays: list[npt.NDArray[Any]] = await asyncio.gather(*map(self.download, outputs))
        finally:
            if not self.connection.closed:
                await plan.free()
        return arrays[0] if len(outputs) == 1 else arrays


@dataclass(eq=False, repr=False)
class PreparedGraph:
    """A graph with memory on the server, to be run any number of times."""

    _backend: Backend
    graph: Graph
    _payload: bytes
    _placed: list[Tensor]
    _buffers: list[BackendBuffer]

    async def run(self) -> None:
        """Compute; returns when the request is sent. A repeated run sends a few bytes only."""
        backend = self._backend
        connection = backend.connection
        again = backend._last_run is self
        if again and Command.GRAPH_RECOMPUTE in connection.dialect.commands:
            await connection.graph_recompute(backend.device)
            return
        backend._last_run = self
        await connection.graph_compute(self._payload)

    async def free(self) -> None:
        """Give back the memory of the nodes; the plan can't be run any more."""
        await self._backend.free(self._buffers, self._placed)
        self._buffers = []


def _padded(tensor: Tensor) -> bool:
    """Return whether a server may want to pad it (CUDA pads rows of quantized types to 512
    elements).
    """
    return tensor.quantized and tensor.ne[0] % 512 != 0 and tensor.view_src is None
