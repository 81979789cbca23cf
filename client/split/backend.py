"""Weights cut by rows over several servers, and products with them: ggml's split buffer type.

    async with SplitBackend.connect([("gpu-1", 50052), ("gpu-2", 50052)], tensor_split=(2, 1)) as s:
        gate = await s.weight(GgmlType.Q4_0, (4096, 11008), gate_blocks)
        up = await s.weight(GgmlType.Q4_0, (4096, 11008), up_blocks)
        g, u = await s.mul_mat([gate, up], x)       # x: (tokens, 4096), each (tokens, 11008)

Each server has its own rows of every weight, in memory that it was sent once. For a product the
input goes to all servers at the same time, each computes its rows, and these come back straight
into their place in the one result. Weights that share an input share the exchange: one message to
each server, one back.

What runs more than once is prepared once for its shape; :meth:`SplitBackend.mul_mat` keeps what it
has prepared, :meth:`SplitBackend.product` hands it out::

        step = await s.product([gate, up], x.shape)
        for x in inputs:
            g, u = await step.run(x)

Servers may be this project's or llama.cpp's, of protocol 5 to 7, in any mixture.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ssl
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, overload

import numpy as np

from client.backend import BackendBuffer, Values
from client.builder.graph import GraphBuilder
from client.errors import ServerLost
from client.split.balance import WORK, measure_all, shares_by_time
from client.split.partition import Extent, Rows, partition, row_extents
from client.split.server import Ready, SplitServer
from client.tensors import Array, from_bytes, require, to_bytes
from protocol.commands import Command
from protocol.ggml.types import TYPE_INFO, GgmlType, row_size
from protocol.split import MAX_PROGRAMS, WIRE_TYPES
from protocol.tensor import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class SplitWeight:
    """A weight of which server ``i`` has rows ``rows[i]``: ``parts[i]``, None if that is none.

    ``whole`` is its shape; it has no memory of its own.
    """

    whole: Tensor
    rows: tuple[Rows, ...]
    parts: tuple[Tensor | None, ...]
    buffers: tuple[BackendBuffer | None, ...]

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.whole.ne[:3]))
        rows = "+".join(str(len(r)) for r in self.rows)
        return f"<SplitWeight {self.whole.name!r} {self.whole.type.name} {shape}, rows {rows}>"

    @property
    def freed(self) -> bool:
        return not all(part is None or part.placed for part in self.parts)

    @property
    def row_bytes(self) -> int:
        return row_size(self.whole.type, self.whole.ne[0])

    def runs(self, offset: int, size: int) -> list[Extent]:
        """Return where these bytes of the whole weight lie."""
        return row_extents(self.rows, self.row_bytes, self.whole.ne[1], offset, size)


class SplitProduct:
    """Products of some weights with one input, prepared for its shape; see SplitBackend.product.

    May be run any number of times, also while an earlier run is under way.
    """

    def __init__(
        self,
        backend: SplitBackend,
        weights: tuple[SplitWeight, ...],
        x_shape: tuple[int, ...],
        ids_shape: tuple[int, ...] | None,
    ) -> None:
        self.weights = weights
        self._backend = backend
        self._x_shape = x_shape
        self._ids_shape = ids_shape
        # Checks the shapes as ggml does.
        self._node(backend._graph, weights[0].whole, *self._new_inputs(backend._graph))
        for weight in weights[1:]:
            require(weight.whole.ne[0] == weights[0].whole.ne[0], "weights differ in columns")
            require(weight.whole.ne[2] == weights[0].whole.ne[2], "weights differ in matrices")
        wire = backend.wire
        if x_shape[-1] % TYPE_INFO[wire].block_size:
            # Rows that aren't whole blocks.
            wire = GgmlType.F16
        self._wire = wire
        self._ready: list[Ready | None] = [None] * len(backend.servers)

    def _new_inputs(
        self, g: GraphBuilder, wire: GgmlType = GgmlType.F32
    ) -> tuple[Tensor, Tensor | None]:
        x = g.new_tensor(wire, self._x_shape[::-1], "x")
        if self._ids_shape is None:
            return x, None
        return x, g.new_tensor(GgmlType.I32, self._ids_shape[::-1], "ids")

    @staticmethod
    def _node(g: GraphBuilder, weight: Tensor, x: Tensor, ids: Tensor | None) -> Tensor:
        return g.mul_mat(weight, x) if ids is None else g.mul_mat_id(weight, x, ids)

    async def run(self, x: Array, ids: Array | None = None) -> list[Array]:
        """Return the products, float32: one array a weight, of the shape of ``x`` with rows last.

        With ``ids`` (expert weights) of their shape and rows. ShapeError for another shape than
        was prepared; ServerLost names the server, of which the weights have to be placed anew.
        """
        require(x.shape == self._x_shape, f"x has shape {x.shape}, not {self._x_shape}")
        inputs = [_on_wire(x, self._wire)]
        lead = self._x_shape[:-1]
        if ids is not None:
            require(ids.shape == self._ids_shape, f"ids have shape {ids.shape}")
            inputs.append(_bytes(np.ascontiguousarray(ids, "<i4")))
            lead = ids.shape
        else:
            require(self._ids_shape is None, "no ids of experts")
        for weight in self.weights:
            require(not weight.freed, f"{weight!r} was freed")
        results = [np.empty((*lead, w.whole.ne[1]), np.float32) for w in self.weights]
        if all(result.size for result in results):
            await self._backend._on(
                self._servers(), lambda i, server: self._run_on(i, server, inputs, results), True
            )
        return results

    async def prepare(self) -> None:
        """Make the servers ready. Raises ServerLost, AllocationFailed."""
        if 0 in self._x_shape or 0 in (self._ids_shape or ()):
            return

        async def one(i: int, server: SplitServer) -> None:
            async with server.preparing:
                await self._find(i, server)

        await self._backend._on(self._servers(), one)

    def _servers(self) -> list[int]:
        return [
            i for i in range(len(self._ready)) if any(w.parts[i] is not None for w in self.weights)
        ]

    async def _run_on(
        self, i: int, server: SplitServer, inputs: list[memoryview], results: list[Array]
    ) -> None:
        targets: list[memoryview] = []
        gathered: list[tuple[Array, Array]] = []
        for weight, result in zip(self.weights, results, strict=True):
            if weight.parts[i] is None:
                continue
            rows = weight.rows[i]
            place = result.reshape(-1, result.shape[-1])[:, rows.first : rows.last]
            if place.flags.c_contiguous:
                targets.append(_bytes(place))
            else:
                part = np.empty(place.shape, np.float32)
                targets.append(_bytes(part))
                gathered.append((place, part))
        await server.run(lambda: self._find(i, server), inputs, targets)
        for place, part in gathered:
            place[...] = part

    async def _find(self, i: int, server: SplitServer) -> Ready:
        ready = self._ready[i]
        if ready is None or not await server.up_to_date(ready):
            g = server.backend.graph
            x, ids = self._new_inputs(g, self._wire)
            cast = x if self._wire is GgmlType.F32 else g.cast(x, GgmlType.F32)
            mine = [part for w in self.weights if (part := w.parts[i]) is not None]
            ready = await server.make_ready(
                [x] if ids is None else [x, ids],
                [] if cast is x else [cast],
                [self._node(g, part, cast, ids) for part in mine],
            )
            self._ready[i] = ready
        return ready


class SplitBackend:
    """Several servers as one; made by :meth:`connect`.

    ``proportions`` are the shares of the servers in weights to come, ``wire`` how inputs travel:
    as they are, or in fewer bytes and rounded. A server that is lost stays lost: what needs it
    raises ServerLost, and the others go on.
    """

    def __init__(
        self, servers: Sequence[SplitServer], proportions: Sequence[float], wire: GgmlType
    ) -> None:
        self.servers = tuple(servers)
        self.proportions = tuple(proportions)
        self.wire = wire
        self._graph = GraphBuilder()
        self._products: OrderedDict[object, SplitProduct] = OrderedDict()

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(
        cls,
        endpoints: Sequence[tuple[str, int]],
        *,
        tensor_split: Sequence[float] | Literal["auto"] | None = None,
        wire: Literal["f32", "f16", "q8_0"] = "f32",
        timeout: float | None = 10.0,
        exchange_timeout: float | None = 120.0,
        tls: ssl.SSLContext | None = None,
        token: bytes | None = None,
    ) -> AsyncIterator[SplitBackend]:
        """Connect to all servers; leaving the context closes, and the servers free everything.

        ``tensor_split`` are shares of any scale, one for each server; None takes the free memory of
        each, 'auto' what :meth:`balance` finds. ``timeout`` (seconds) is for connecting,
        ``exchange_timeout`` how long a server may take for a product (the first one of a type may
        have to be compiled there); ``tls`` and ``token`` as of client.connection.connect, for all
        servers. Raises ServerLost for the first server that can't be reached, ValueError for shares
        that don't fit.
        """
        shares = None if tensor_split is None or tensor_split == "auto" else tuple(tensor_split)
        if not endpoints or (shares is not None and len(shares) != len(endpoints)):
            raise ValueError(f"{len(shares or ())} shares for {len(endpoints)} servers")
        if shares is not None:
            # Raises ValueError where no server has a share.
            partition(0, shares)
        opened = await asyncio.gather(
            *(
                SplitServer.open(host, port, timeout, exchange_timeout, tls, token)
                for host, port in endpoints
            ),
            return_exceptions=True,
        )
        servers = [s for s in opened if isinstance(s, SplitServer)]
        try:
            _raise_first(opened)
            free = [float(s.free) for s in servers]
            backend = cls(servers, free if shares is None else shares, WIRE_TYPES[wire])
            if tensor_split == "auto":
                await backend.balance()
            yield backend
        finally:
            await asyncio.gather(*(s.connection.close() for s in servers))

    async def balance(self, *, work: float = WORK, size: int | None = None) -> tuple[float, ...]:
        """Measure all servers at once, and share weights to come out so that all take equally long.

        ``work`` are the bytes of weights in one product; the less, the more a round trip counts.
        ``size`` are the bytes that will be placed in all: no server gets more than it has free.
        Returns the new ``proportions``. Raises as client.split.balance.balanced and measure.
        """
        everyone = range(len(self.servers))
        await self._on(everyone, self._refresh)
        speeds = await self._on(everyone, lambda i, s: _only(measure_all([s.backend])))
        limits = [s.free / size for s in self.servers] if size else None
        self.proportions = tuple(shares_by_time(speeds, work=work, limits=limits))
        return self.proportions

    async def _refresh(self, i: int, server: SplitServer) -> None:
        server.free, server.total = await server.connection.get_device_memory()

    async def _on(
        self,
        chosen: Iterable[int],
        job: Callable[[int, SplitServer], Awaitable[T]],
        timed: bool = False,
    ) -> list[T]:
        """Do ``job`` with all chosen servers at once, and let all finish before one's error counts.

        Nothing is begun if one of them is lost. Raises ServerLost.
        """
        servers = [(i, self.servers[i]) for i in chosen]
        for _, server in servers:
            if server.connection.closed:
                raise ServerLost(server.name, "was lost")
        done = await asyncio.gather(
            *(server.attempt(functools.partial(job, i, server), timed) for i, server in servers),
            return_exceptions=True,
        )
        _raise_first(done)
        return [result for result in done if not isinstance(result, BaseException)]

    # -- weights

    async def weight(
        self,
        type: GgmlType,
        ne: Sequence[int],
        values: Values | None = None,
        *,
        name: str = "",
        cache: bool = False,
    ) -> SplitWeight:
        """Make a weight, (cols, rows) or with experts (cols, rows, n_expert), cut by rows.

        With ``values`` it is uploaded, see :meth:`upload`. Raises AllocationFailed that names the
        server, and then nothing is allocated.
        """
        whole = self._graph.new_tensor(type, ne, name)
        require(whole.ne[3] == 1, f"{whole!r}: a weight has 2 or 3 dimensions")
        rows = tuple(partition(whole.ne[1], self.proportions))
        parts: list[Tensor | None] = [None] * len(rows)
        buffers: list[BackendBuffer | None] = [None] * len(rows)

        async def one(i: int, server: SplitServer) -> None:
            part = server.backend.graph.new_tensor(
                type, (whole.ne[0], len(rows[i]), whole.ne[2]), name
            )
            (buffers[i],) = await server.backend.allocate([part])
            parts[i] = part

        try:
            await self._on([i for i, r in enumerate(rows) if len(r)], one)
        except Exception:
            with contextlib.suppress(ServerLost):
                await self.free(SplitWeight(whole, rows, tuple(parts), tuple(buffers)))
            raise
        weight = SplitWeight(whole, rows, tuple(parts), tuple(buffers))
        if values is not None:
            await self.upload(weight, values, cache=cache)
        return weight

    async def upload(self, weight: SplitWeight, values: Values, *, cache: bool = False) -> None:
        """Write all of a weight, each server's rows to it; values as of Backend.upload.

        With ``cache`` large parts are offered by the hash of their rows first. Raises ServerLost.
        """
        require(not weight.freed, f"{weight!r} was freed")
        if not isinstance(values, bytes | bytearray | memoryview):
            values = np.asarray(values)
        data = to_bytes(weight.whole, values)
        found = weight.runs(0, len(data))

        async def one(i: int, server: SplitServer) -> None:
            part = weight.parts[i]
            assert part is not None
            runs = [data[p.start : p.start + p.size] for p in found if p.part == i]
            if cache:
                # What is hashed and kept is one run of bytes.
                whole = runs[0] if len(runs) == 1 else b"".join(runs)
                await server.backend.upload(part, whole, cache=True)
                return
            at = 0
            for run in runs:
                await server.connection.set_tensor(part, run, at)
                at += len(run)

        await self._on(dict.fromkeys(p.part for p in found), one)

    async def download(self, weight: SplitWeight, rows: range | None = None) -> Array:
        """Return the values of all rows, or of a range of them (of each matrix), as download does.

        Raises ServerLost; ShapeError for rows that there aren't.
        """
        require(not weight.freed, f"{weight!r} was freed")
        cols, n_rows, matrices, _ = weight.whole.ne
        wanted = range(n_rows) if rows is None else rows
        fits = wanted.step == 1 and 0 <= wanted.start <= wanted.stop <= n_rows
        require(fits, f"{weight!r}: {wanted}")
        run = len(wanted) * weight.row_bytes
        raw = np.empty(matrices * run, np.uint8)
        reads: dict[int, list[tuple[Extent, int]]] = {}
        for matrix in range(matrices):
            start = (matrix * n_rows + wanted.start) * weight.row_bytes
            for piece in weight.runs(start, run):
                reads.setdefault(piece.part, []).append((piece, matrix * run + piece.start))

        async def one(i: int, server: SplitServer) -> None:
            part = weight.parts[i]
            assert part is not None
            tensor = server.connection.wire_tensor(part)
            futures = [
                await server.connection.start(
                    Command.GET_TENSOR,
                    destination=raw[at : at + piece.size].data,
                    tensor=tensor,
                    offset=piece.at,
                    size=piece.size,
                )
                for piece, at in reads[i]
            ]
            await asyncio.gather(*futures)

        await self._on(reads, one)
        shape = self._graph.new_tensor(weight.whole.type, (cols, len(wanted), matrices))
        return from_bytes(shape, raw)

    async def free(self, weight: SplitWeight) -> None:
        """Give the memory back; products of the weight can't be run any more."""
        for key, product in list(self._products.items()):
            if weight in product.weights:
                del self._products[key]

        async def one(i: int, server: SplitServer) -> None:
            part, buffer = weight.parts[i], weight.buffers[i]
            assert part is not None
            assert buffer is not None
            await server.backend.free([buffer], [part])

        there = [i for i, part in enumerate(weight.parts) if part is not None and part.placed]
        lost = [i for i in there if self.servers[i].connection.closed]
        for i in lost:
            # Its server freed it, or is gone.
            part = weight.parts[i]
            assert part is not None
            part.place(0, 0)
        await self._on([i for i in there if i not in lost], one)

    # -- products

    async def product(
        self,
        weights: SplitWeight | Sequence[SplitWeight],
        x_shape: Sequence[int],
        ids_shape: Sequence[int] | None = None,
    ) -> SplitProduct:
        """Make products of weights with one input of that (numpy) shape ready on all servers.

        ``ids_shape`` (tokens, experts used) makes them products of expert weights. ShapeError as
        GraphBuilder.mul_mat and mul_mat_id; ServerLost, AllocationFailed.
        """
        chosen = (weights,) if isinstance(weights, SplitWeight) else tuple(weights)
        require(bool(chosen), "no weights")
        for weight in chosen:
            require(len(weight.parts) == len(self.servers), f"{weight!r} is another backend's")
            require(not weight.freed, f"{weight!r} was freed")
        ids = None if ids_shape is None else tuple(ids_shape)
        key = (chosen, tuple(x_shape), ids)
        known = self._products.get(key)
        if known is not None:
            self._products.move_to_end(key)
            return known
        made = SplitProduct(self, chosen, tuple(x_shape), ids)
        await made.prepare()
        self._products[key] = made
        while len(self._products) > MAX_PROGRAMS:
            self._products.popitem(last=False)
        return made

    @overload
    async def mul_mat(self, weights: SplitWeight, x: Array) -> Array: ...
    @overload
    async def mul_mat(self, weights: Sequence[SplitWeight], x: Array) -> list[Array]: ...
    async def mul_mat(
        self, weights: SplitWeight | Sequence[SplitWeight], x: Array
    ) -> Array | list[Array]:
        """Multiply ``x`` (..., cols) by the rows of each weight: float32 (..., rows).

        Of several weights a list, in one exchange with each server. Errors as of :meth:`product`.
        """
        results = await (await self.product(weights, x.shape)).run(x)
        return results[0] if isinstance(weights, SplitWeight) else results

    @overload
    async def mul_mat_id(self, weights: SplitWeight, x: Array, ids: Array) -> Array: ...
    @overload
    async def mul_mat_id(
        self, weights: Sequence[SplitWeight], x: Array, ids: Array
    ) -> list[Array]: ...
    async def mul_mat_id(
        self, weights: SplitWeight | Sequence[SplitWeight], x: Array, ids: Array
    ) -> Array | list[Array]:
        """Multiply ``x`` (tokens, 1 or used, cols) by the experts that ``ids`` (tokens, used) name.

        float32 (tokens, used, rows), of several weights a list. Errors as of :meth:`product`.
        """
        results = await (await self.product(weights, x.shape, ids.shape)).run(x, ids)
        return results[0] if isinstance(weights, SplitWeight) else results


async def _only(several: Awaitable[list[T]]) -> T:
    (one,) = await several
    return one


def _raise_first(results: Sequence[object]) -> None:
    """Raise the first exception among results; what else went wrong is noted with it."""
    errors = [r for r in results if isinstance(r, BaseException)]
    if errors:
        for other in errors[1:]:
            errors[0].add_note(f"also: {other}")
        raise errors[0]


def _bytes(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _on_wire(x: Array, wire: GgmlType) -> memoryview:
    """The bytes of ``x`` as they travel."""
    if wire is GgmlType.Q8_0:
        # Importing gguf takes a while: only who wants this type pays for it.
        import gguf

        rows = np.ascontiguousarray(x, np.float32)
        return _bytes(gguf.quants.quantize(rows, gguf.GGMLQuantizationType.Q8_0))
    with np.errstate(over="ignore"):
        # What is too big for F16 becomes infinite, as in ggml.
        return _bytes(np.ascontiguousarray(x, "<f4" if wire is GgmlType.F32 else "<f2"))
