"""A llama without a model file: random weights on the server, and the graphs that llama.cpp makes.

Weights are random blocks: a few megabytes of each type are sent, the rest is copied on the card.
Norms scale activations so that queries, keys and values stay near one whatever the weights are, and
neither half of a layer drowns the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from client.backend import Backend, PreparedGraph
from client.tensors import dims
from conformance.differential.blocks import random_blocks
from protocol.ggml.ops import GluOp
from protocol.ggml.types import TYPE_INFO, GgmlType, row_size
from protocol.tensor import Tensor, contiguous_strides
from rpc_server.types import to_f32

F32, F16, I32, I64 = GgmlType.F32, GgmlType.F16, GgmlType.I32, GgmlType.I64

# Bytes of random weights that are made and sent; the others are copies of them.
_SENT = 8 << 20
# llama.cpp pads the number of positions that attention looks at to a multiple of this.
_PADDED_TO = 256
# How much larger inputs of gate and up are: what GLU gets wrong must not drown in what attention
# adds, nor the other way round.
_FFN_GAIN = 2.0


@dataclass(frozen=True)
class LlamaShape:
    """The shape of a model; ``types``: of most weights, and of those that Q4_K_M keeps better."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    ffn_width: int
    vocabulary: int
    types: tuple[GgmlType, GgmlType] = (GgmlType.Q4_K, GgmlType.Q6_K)

    def is_better(self, layer: int) -> bool:
        """Return whether ``layer`` is one whose values and down matrix Q4_K_M keeps better."""
        eighth = self.layers // 8
        return layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2

    def matrices(self, layer: int) -> dict[str, tuple[GgmlType, int, int]]:
        """Return type, columns and rows of each matrix of a layer."""
        kv = self.kv_heads * self.head_width
        most, better = self.types
        some = better if self.is_better(layer) else most
        return {
            "q": (most, self.width, self.heads * self.head_width),
            "k": (most, self.width, kv),
            "v": (some, self.width, kv),
            "o": (most, self.heads * self.head_width, self.width),
            "gate": (most, self.width, self.ffn_width),
            "up": (most, self.width, self.ffn_width),
            "down": (some, self.ffn_width, self.width),
        }

    @property
    def output(self) -> tuple[GgmlType, int, int]:
        """Type, columns and rows of the matrix that makes logits."""
        return self.types[1], self.width, self.vocabulary

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all matrices, which decoding a token reads once."""
        listed = [m for i in range(self.layers) for m in self.matrices(i).values()]
        return sum(row_size(t, k) * rows for t, k, rows in (*listed, self.output))


LLAMA_8B = LlamaShape("8B, Q4_K_M", 32, 4096, 32, 8, 128, 14336, 128256)
# For the emulation: the same kernels, seconds instead of hours.
SMALL = LlamaShape("small, Q4_K_M", 2, 256, 4, 2, 64, 512, 512)


def padded(positions: int) -> int:
    """Return how many positions attention looks at where ``positions`` of the cache are used."""
    return -(-positions // _PADDED_TO) * _PADDED_TO


def spread(type: GgmlType) -> float:
    """Return the standard deviation of random weights of a type."""
    blocks = random_blocks(type, 64, np.random.default_rng(1)).reshape(64, -1)
    return float(np.std(to_f32(type, blocks)))


@dataclass(frozen=True)
class ModelStep:
    """A graph that is ready: ``tokens`` at once, behind the others in the cache."""

    tokens: int
    graph: PreparedGraph
    logits: Tensor


class _Anywhere:
    """Places for the tensors of graphs, in memory of their own."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def begin(self) -> None:
        """Begin another graph."""

    async def place(self, tensors: Iterable[Tensor]) -> None:
        """Give inputs their places, in the order in which a graph comes to them."""
        await self._backend.allocate(t for t in tensors if not t.placed)

    async def place_results(self, outputs: Sequence[Tensor]) -> None:
        """Leave those to the backend, which frees them with the graph."""


class _SamePlaces(_Anywhere):
    """The places that the first graph's tensors have, for those of all graphs.

    So does llama.cpp, which reserves them for the largest graph.
    """

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self._places: list[tuple[int, int]] = []
        self._left: Iterator[tuple[int, int]] | None = None

    def begin(self) -> None:
        if self._places:
            self._left = iter(self._places)

    async def place(self, tensors: Iterable[Tensor]) -> None:
        listed = [t for t in tensors if not t.placed]
        if self._left is None:
            await super().place(listed)
            self._places += [(t.buffer, t.address) for t in listed]
            return
        for t in listed:
            t.place(*next(self._left))

    async def place_results(self, outputs: Sequence[Tensor]) -> None:
        await self.place(self._backend.graph.build(outputs).roots)


class SyntheticLlama:
    """A model whose weights and cache lie on the server; see :meth:`load`."""

    def __init__(self, backend: Backend, shape: LlamaShape, positions: int) -> None:
        self._backend = backend
        self._places = _Anywhere(backend)
        self.shape = shape
        self.positions = padded(positions)
        new = backend.graph.new_tensor
        self._matrices = [
            {name: new(t, (k, rows)) for name, (t, k, rows) in shape.matrices(layer).items()}
            for layer in range(shape.layers)
        ]
        type_, columns, rows = shape.output
        self._output = new(type_, (columns, rows))
        self._norms = {gain: new(F32, (shape.width,)) for gain in (1.0, _FFN_GAIN)}
        kv = shape.kv_heads * shape.head_width
        self._caches = [
            (new(F16, (kv, self.positions)), new(F16, (kv, self.positions)))
            for _ in range(shape.layers)
        ]

    def _weights(self) -> list[Tensor]:
        return [*(t for layer in self._matrices for t in layer.values()), self._output]

    @property
    def nbytes(self) -> int:
        """Bytes that weights and cache take on the server."""
        caches = [t for pair in self._caches for t in pair]
        return sum(t.nbytes for t in (*self._weights(), *caches, *self._norms.values()))

    async def load(self, seed: int) -> None:
        """Allocate weights and cache, and fill them. Raises AllocationFailed."""
        backend = self._backend
        caches = [t for pair in self._caches for t in pair]
        await backend.allocate([*self._weights(), *caches, *self._norms.values()])
        scale = 1 / (spread(self.shape.types[0]) * self.shape.width**0.5)
        for gain, norm in self._norms.items():
            await backend.upload(norm, np.full(self.shape.width, gain * scale, np.float32))
        random = np.random.default_rng(seed)
        small = (random.standard_normal(_SENT // 64) * 0.5).astype(np.float16)
        filled: dict[GgmlType, Tensor] = {}
        for t in self._weights():
            if t.type not in filled or filled[t.type].nbytes < t.nbytes:
                blocks = min(_SENT, t.nbytes) // TYPE_INFO[t.type].type_size
                await self._repeat(t, random_blocks(t.type, blocks, random).reshape(-1))
                filled[t.type] = t
            else:
                await self._copy(filled[t.type], 0, t, 0, t.nbytes)
        for t in caches:
            await self._repeat(t, small[: t.nbytes // 2].view(np.uint8))

    async def _repeat(self, t: Tensor, data: npt.NDArray[np.uint8]) -> None:
        """Fill ``t`` with ``data`` over and over: what is there is doubled on the card."""
        await self._backend.connection.set_tensor(_bytes_of(t, 0, len(data)), data.data)
        done = len(data)
        while done < t.nbytes:
            more = min(done, t.nbytes - done)
            await self._copy(t, 0, t, done, more)
            done += more

    async def _copy(self, source: Tensor, at: int, target: Tensor, to: int, size: int) -> None:
        connection = self._backend.connection
        here, there = _bytes_of(source, at, size), _bytes_of(target, to, size)
        if not await connection.copy_tensor(here, there):
            await connection.set_tensor(there, (await connection.get_tensor(here)).data)

    async def reserve(self, tokens: int) -> None:
        """Have graphs lie in one place from here on: of up to ``tokens`` behind a full cache."""
        self._places = _SamePlaces(self._backend)
        await self.prepare(tokens, self.positions - tokens)

    async def prepare(
        self, tokens: int, before: int, *, every: bool = False, seed: int = 1
    ) -> ModelStep:
        """Make the graph of ``tokens`` behind ``before`` others.

        Logits are made of the last one, as for a prompt, or of ``every`` one. What another graph
        has computed is lost if :meth:`reserve` gave both one place.
        """
        self._places.begin()
        shape, g = self.shape, self._backend.graph
        n_kv = padded(before + tokens)
        random = np.random.default_rng(seed)
        x = g.new_tensor(F32, (shape.width, tokens))
        positions, rows = g.new_tensor(I32, (tokens,)), g.new_tensor(I64, (tokens,))
        last, mask = g.new_tensor(I32, (1,)), g.new_tensor(F16, (n_kv, tokens))
        at = np.arange(before, before + tokens)
        inputs: dict[Tensor, npt.NDArray[Any]] = {
            x: random.standard_normal((tokens, shape.width)).astype(np.float32),
            positions: at.astype(np.int32),
            rows: at.astype(np.int64),
            last: np.array([tokens - 1], np.int32),
            mask: np.where(np.arange(n_kv) <= at[:, None], 0, -np.inf).astype(np.float16),
        }
        await self._places.place(inputs)
        for t, values in inputs.items():
            await self._backend.upload(t, values)
        outputs: list[Tensor] = []
        hidden = x
        for number in range(shape.layers):
            attended = self._attention(hidden, number, positions, rows, mask, outputs)
            if number == shape.layers - 1 and not every:
                attended, hidden = g.get_rows(attended, last), g.get_rows(hidden, last)
            hidden = self._feed_forward(g.add(attended, hidden), number)
        logits = g.mul_mat(self._output, self._normalized(hidden))
        outputs.append(logits)
        await self._places.place_results(outputs)
        graph = await self._backend.prepare(outputs)
        return ModelStep(tokens, graph, logits)

    def _normalized(self, x: Tensor, gain: float = 1.0) -> Tensor:
        g = self._backend.graph
        return g.mul(g.rms_norm(x, 1e-5), self._norms[gain])

    def _attention(
        self,
        x: Tensor,
        number: int,
        positions: Tensor,
        rows: Tensor,
        mask: Tensor,
        outputs: list[Tensor],
    ) -> Tensor:
        """Return what attention adds; what has to be computed before it goes to ``outputs``."""
        shape, g, w = self.shape, self._backend.graph, self._matrices[number]
        tokens, width = x.ne[1], shape.head_width
        cur = self._normalized(x)
        q = g.reshape(g.mul_mat(w["q"], cur), width, shape.heads, tokens)
        k = g.reshape(g.mul_mat(w["k"], cur), width, shape.kv_heads, tokens)
        v = g.mul_mat(w["v"], cur)
        q, k = (
            g.rope_ext(t, positions, None, width, n_ctx_orig=8192, freq_base=500000.0)
            for t in (q, k)
        )
        keys, values = self._caches[number]
        kept = g.set_rows(keys, g.reshape(k, shape.kv_heads * width, tokens), rows)
        # Keys come last, as llama.cpp has it: so they are next to what puts them into the cache.
        outputs += [q, v, k, kept, g.set_rows(values, v, rows)]

        def heads(cache: Tensor) -> Tensor:
            row = cache.nb[1]
            head = width * TYPE_INFO[F16].type_size
            seen = g.view_4d(
                cache, width, shape.kv_heads, mask.ne[0], 1, head, row, row * mask.ne[0], 0
            )
            return g.permute(seen, 0, 2, 1, 3)

        out = g.flash_attn_ext(
            g.permute(q, 0, 2, 1, 3), heads(keys), heads(values), mask, width**-0.5
        )
        return g.mul_mat(w["o"], g.reshape(out, shape.heads * width, tokens))

    def _feed_forward(self, x: Tensor, number: int) -> Tensor:
        g, w = self._backend.graph, self._matrices[number]
        cur = self._normalized(x, _FFN_GAIN)
        up, gate = g.mul_mat(w["up"], cur), g.mul_mat(w["gate"], cur)
        return g.add(g.mul_mat(w["down"], g.glu_split(gate, up, GluOp.SWIGLU)), x)


def _bytes_of(t: Tensor, at: int, size: int) -> Tensor:
    """Return ``size`` bytes of the memory of a tensor with a place, as a tensor of bytes."""
    ne = dims([size])
    piece = Tensor(t.id, GgmlType.I8, ne, contiguous_strides(GgmlType.I8, ne))
    piece.place(t.buffer, t.address + at)
    return piece


def one_layer(shape: LlamaShape, type: GgmlType) -> LlamaShape:
    """Return one layer of a model with all weights of one type, for comparing results."""
    return replace(shape, name=type.name, layers=1, vocabulary=shape.width, types=(type, type))
