"""Times what a token of a model takes on a server: its products, and what lies between them.

Nothing of the model is sent: weights of its types and shapes are filled with one byte there. A
:class:`ModelSample` is such weights on one server, ready to be computed with again and again;
servers on one machine are also timed while they compute at the same time.
"""

from __future__ import annotations

import asyncio
import enum
import math
import statistics
import struct
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from client.backend import Backend, BackendBuffer, PreparedGraph
from client.builder.graph import GraphBuilder
from client.errors import AllocationFailed
from client.model_header import ModelShape
from client.split.balance import least_seconds, median_seconds
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor

# Columns that stand for a prompt.
PROMPT_COLUMNS = 128
# Bytes of a model's weights that are timed at most.
SAMPLE_BYTES = 96 << 20
# Every byte of weights: blocks of all types become numbers other than 0.
_WEIGHT_FILL = 0x21
# Every byte of activations, and another: numbers of usual size, as F32 and as F16.
ACTIVATION_FILL = 0x3C
_OTHER_FILL = 0x3D
# As a product of weights is linear, its results are to each other as these are.
_RATIO = (
    struct.unpack("<f", bytes([_OTHER_FILL] * 4))[0]
    / (struct.unpack("<f", bytes([ACTIVATION_FILL] * 4))[0])
)
# Products of different kernels differ in their roundings.
_SAME = 0.02
# Positions that attention looks at, and layers that are timed of what is no product of a weight.
_POSITIONS = 256
_REST_LAYERS = 4
# How often a graph comes after a pause, and how long that is.
_PAUSES = 15
_PAUSE_SECONDS = 0.004
# How often two servers are timed at the same time, how long, and so many runs at least.
_TOGETHER_TIMES = 3
_TOGETHER_SECONDS = 0.15
_TOGETHER_RUNS = 2
# A slowdown below this is no more than chance.
_LEAST_SLOWDOWN = 0.15
_EPSILON = 1e-5
_LEAST_COLUMNS = 32


class SampleJob(enum.Enum):
    """One thing that is timed: the least graph there is, products of weights, the rest of layers.

    The latter two with one column, and with many.
    """

    LEAST = "least", 1
    DECODE = "products", 1
    PROMPT = "products", PROMPT_COLUMNS
    REST = "rest", 1
    REST_PROMPT = "rest", PROMPT_COLUMNS

    def __init__(self, kind: str, columns: int) -> None:
        self.kind = kind
        self.columns = columns


@dataclass(frozen=True, slots=True)
class SampleGraphs:
    """Graphs that are timed: leaves by the byte that fills them, and each job's outputs.

    ``nbytes`` are those of the weights, ``layers`` how many the rest is of.
    """

    leaves: dict[int, list[Tensor]]
    outputs: dict[SampleJob, list[Tensor]]
    nbytes: int
    layers: int


@dataclass(frozen=True, slots=True)
class ModelSpeed:
    """The speed of a server with a model.

    ``decode`` bytes of weights a second with one column, ``prompt`` the same times columns, with
    many of them. ``rest`` and ``rest_prompt`` are seconds of a token that are no product of a
    weight, None where the server can't be asked; ``graph`` those of the least graph and its answer
    after a pause, the round trip among them; ``cold`` how much longer products take after a pause
    than right behind others, beyond what the least graph does. ``answer`` is one number that was
    computed, and ``computes`` whether it changed as it has to when the input did.
    """

    decode: float
    prompt: float
    rest: float | None
    rest_prompt: float | None
    graph: float
    answer: float
    computes: bool
    cold: float = 0.0

    def agrees(self, other: ModelSpeed) -> bool:
        """Return whether both computed the same number."""
        return math.isclose(self.answer, other.answer, rel_tol=_SAME)


class ModelSample(Protocol):
    """Weights on one server, ready to be computed with."""

    graphs: SampleGraphs

    async def run(self, job: SampleJob) -> float:
        """Compute a job and return one number of what came out."""
        ...

    async def fill(self, value: int) -> None:
        """Fill all activations with one byte."""
        ...

    async def round_trip(self) -> float:
        """Return the seconds of a request that does nothing."""
        ...

    def can(self, job: SampleJob) -> bool:
        """Return whether the server can be asked this."""
        ...


def sample_graphs(g: GraphBuilder, shape: ModelShape, most: int) -> SampleGraphs:
    """Return graphs of weights that take ``most`` bytes at most.

    Raises AllocationFailed if none fits.
    """
    weights, left = [], min(most, SAMPLE_BYTES)
    # As many of each kind as there are in a layer, the largest kinds first.
    wanted = sorted(shape.products, key=lambda p: -p.nbytes * p.count)
    for product in wanted * max(1, shape.layers):
        if product.nbytes <= left and product.columns:
            left -= product.nbytes
            weights.append(g.new_tensor_2d(product.type, product.columns, product.rows))
    if not weights:
        raise AllocationFailed("no room to measure in")
    layers = min(shape.layers, _REST_LAYERS)
    graphs = SampleGraphs({_WEIGHT_FILL: weights}, {}, sum(w.nbytes for w in weights), layers)
    values: list[Tensor] = []
    zeros: list[Tensor] = []
    graphs.leaves.update({ACTIVATION_FILL: values, 0: zeros})
    for job in SampleJob:
        if job.kind == "products":
            widths = {w.ne[0] for w in weights}
            inputs = {n: g.new_tensor_2d(GgmlType.F32, n, job.columns) for n in widths}
            values += inputs.values()
            graphs.outputs[job] = [g.mul_mat(w, inputs[w.ne[0]]) for w in weights]
        elif job.kind == "rest":
            graphs.outputs[job] = _rest(g, shape, layers, job.columns, values, zeros)
        else:
            values.append(g.new_tensor_1d(GgmlType.F32, _LEAST_COLUMNS))
            graphs.outputs[job] = [g.add(values[-1], values[-1])]
    return graphs


def _rest(
    g: GraphBuilder,
    shape: ModelShape,
    layers: int,
    columns: int,
    values: list[Tensor],
    zeros: list[Tensor],
) -> list[Tensor]:
    """Norms, rotations, attention, activations and sums of layers."""

    def leaf(among: list[Tensor], type_: GgmlType, *ne: int) -> Tensor:
        among.append(g.new_tensor(type_, ne))
        return among[-1]

    f32, f16 = GgmlType.F32, GgmlType.F16
    heads = max(1, shape.width // shape.head_width)
    x, gain = leaf(values, f32, shape.width, columns), leaf(values, f32, shape.width)
    q = leaf(values, f32, shape.head_width, heads, columns)
    new_k = leaf(values, f32, shape.head_width, shape.kv_heads, columns)
    gate, up = (leaf(values, f32, shape.ffn_width, columns) for _ in range(2))
    k, v = (leaf(values, f16, shape.head_width, _POSITIONS, shape.kv_heads) for _ in range(2))
    positions = leaf(zeros, GgmlType.I32, columns)
    mask = leaf(zeros, f16, _POSITIONS, -(-columns // 64) * 64)
    outputs = []
    for _ in range(layers):
        normed = g.mul(g.rms_norm(x, _EPSILON), gain)
        turned = g.rope(q, positions, shape.head_width)
        outputs.append(g.rope(new_k, positions, shape.head_width))
        asked = g.permute(turned, 0, 2, 1, 3)
        outputs.append(g.flash_attn_ext(asked, k, v, mask, shape.head_width**-0.5))
        outputs.append(g.mul(g.silu(gate), up))
        x = g.add(g.mul(g.rms_norm(g.add(x, normed), _EPSILON), gain), x)
        outputs.append(x)
    return outputs


class ServerSample:
    """A sample on a server. Made by :meth:`make`; memory is given back by :meth:`close`."""

    def __init__(self, backend: Backend, graphs: SampleGraphs) -> None:
        self.graphs = graphs
        self._backend = backend
        self._buffers: dict[int, list[BackendBuffer]] = {}
        self._plans: dict[SampleJob, PreparedGraph] = {}

    @classmethod
    async def make(cls, backend: Backend, shape: ModelShape) -> ServerSample:
        """Place a sample. Raises AllocationFailed, ConnectionLost."""
        free, _ = await backend.connection.get_device_memory(backend.device)
        made = cls(backend, sample_graphs(backend.graph, shape, free // 4))
        try:
            await made._place()
        except AllocationFailed:
            await made.close()
            raise
        return made

    async def _place(self) -> None:
        connection = self._backend.connection
        for fill, leaves in self.graphs.leaves.items():
            self._buffers[fill] = await self._backend.allocate(leaves)
            for buffer in self._buffers[fill]:
                await connection.buffer_clear(buffer.handle, fill)
        for job, outputs in self.graphs.outputs.items():
            try:
                self._plans[job] = await self._backend.prepare(outputs)
            except ValueError:
                # Its protocol lacks one of the ops.
                if job.kind != "rest":
                    raise

    def can(self, job: SampleJob) -> bool:
        """Return whether its protocol has the ops."""
        return job in self._plans

    async def run(self, job: SampleJob) -> float:
        """Compute a job and return one number. Raises ConnectionLost."""
        await self._plans[job].run()
        last = self.graphs.outputs[job][-1]
        (value,) = struct.unpack("<f", bytes(await self._backend.connection.get_tensor(last, 0, 4)))
        return float(value)

    async def fill(self, value: int) -> None:
        """Fill all activations with one byte. Raises ConnectionLost."""
        for buffer in self._buffers[ACTIVATION_FILL]:
            await self._backend.connection.buffer_clear(buffer.handle, value)

    async def round_trip(self) -> float:
        """Return the seconds of a small request. Raises ConnectionLost.

        Of many in a row, since a token has as many exchanges, and some of them are late.
        """
        return await median_seconds(self._backend.connection.get_alignment)

    async def close(self) -> None:
        """Give back all memory, if the server is still there."""
        if self._backend.connection.closed:
            return
        for plan in self._plans.values():
            await plan.free()
        leaves = [t for tensors in self.graphs.leaves.values() for t in tensors]
        await self._backend.free([b for made in self._buffers.values() for b in made], leaves)


async def time_sample(sample: ModelSample, shape: ModelShape) -> ModelSpeed:
    """Return how fast a sample is computed; each figure is the best of a few runs."""
    answer = await sample.run(SampleJob.DECODE)
    await sample.fill(_OTHER_FILL)
    other = await sample.run(SampleJob.DECODE)
    await sample.fill(ACTIVATION_FILL)
    # The least graph between the others, since all are held against it.
    taken: dict[SampleJob, float] = {}
    for job in (
        SampleJob.LEAST,
        SampleJob.DECODE,
        SampleJob.LEAST,
        SampleJob.REST,
        SampleJob.PROMPT,
        SampleJob.REST_PROMPT,
        SampleJob.LEAST,
    ):
        if sample.can(job):
            seconds = await least_seconds(lambda job=job: sample.run(job))  # type: ignore[misc]
            taken[job] = min(seconds, taken.get(job, seconds))

    def beside(job: SampleJob) -> float:
        """Return what a job takes beside what any graph does."""
        return max(taken[job] - taken[SampleJob.LEAST], 1e-9)

    def rest(job: SampleJob) -> float | None:
        if job not in taken:
            return None
        return beside(job) / job.columns / sample.graphs.layers * shape.layers

    async def typical(job: SampleJob, pause: float) -> float:
        return await _typical_seconds(lambda: sample.run(job), pause)

    graph = await typical(SampleJob.LEAST, _PAUSE_SECONDS)
    woken = await typical(SampleJob.DECODE, _PAUSE_SECONDS) - await typical(SampleJob.DECODE, 0.0)
    size = sample.graphs.nbytes
    return ModelSpeed(
        decode=size / beside(SampleJob.DECODE),
        prompt=size * PROMPT_COLUMNS / beside(SampleJob.PROMPT),
        rest=rest(SampleJob.REST),
        rest_prompt=rest(SampleJob.REST_PROMPT),
        graph=graph,
        answer=answer,
        computes=answer != 0 and math.isclose(other / answer, _RATIO, rel_tol=_SAME),
        cold=max(woken - max(graph - taken[SampleJob.LEAST], 0.0), 0.0),
    )


async def _typical_seconds(job: Callable[[], Awaitable[float]], pause: float) -> float:
    """Return the median seconds of a job that comes ``pause`` seconds after the one before.

    A token comes to a server that has waited for the client, or for other servers. Until a core
    runs again, and finds what it needs in its caches, it takes a few tenths of a millisecond.
    """
    seen = []
    for _ in range(_PAUSES):
        await asyncio.sleep(pause)
        started = time.perf_counter()
        await job()
        seen.append(time.perf_counter() - started)
    return statistics.median(seen)


async def time_together(
    samples: Sequence[ModelSample], job: SampleJob = SampleJob.DECODE
) -> list[float]:
    """Return of each how much longer a job takes while the others compute: 1 is twice as long.

    The median of a few times; each is timed alone first, right before. Those that share everything
    take as many times as long as there are of them; more than that is somebody else's doing.
    """
    trips = [await sample.round_trip() for sample in samples]
    seen: list[list[float]] = [[] for _ in samples]
    for _ in range(_TOGETHER_TIMES):
        alone = [await _mean_seconds(sample, job) for sample in samples]
        together = await asyncio.gather(*(_mean_seconds(sample, job) for sample in samples))
        for found, trip, one, all_ in zip(seen, trips, alone, together, strict=True):
            least = min(trip, one / 2)
            found.append(min((all_ - least) / (one - least), len(samples)) - 1)
    return [more if (more := statistics.median(f)) >= _LEAST_SLOWDOWN else 0.0 for f in seen]


async def _mean_seconds(sample: ModelSample, job: SampleJob) -> float:
    started, runs = time.perf_counter(), 0
    while (now := time.perf_counter() - started) < _TOGETHER_SECONDS or runs < _TOGETHER_RUNS:
        await sample.run(job)
        runs += 1
    return now / runs
