"""How to share rows out so that all servers are done at the same time.

A part's time for one exchange is what it costs however little it computes (its latency: the round
trip, the activations on their way) and its share of the weights at its speed. The exchange is over
when the slowest part is, so the best shares make all parts take equally long; a part whose latency
alone takes longer than the others need without it gets nothing::

    balanced([10e9, 5e9])                                     # two thirds, one third
    balanced([10e9, 10e9], latencies=[0, 1e-3], work=20e6)    # three quarters, one quarter
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from client.backend import Backend
from client.builder.graph import GraphBuilder
from protocol.ggml.types import GgmlType, row_size
from protocol.tensor import Tensor

# Bytes of weights in one exchange where nobody says it: those of a layer of a 7B model at 4 bits.
WORK = 32e6

# The weight that is timed: a few MB, of the type and width that most models have.
_TYPE, _COLS, _ROWS = GgmlType.Q4_0, 4096, 2048
# Every byte: the scale of a block becomes a small number, its elements all the same.
FILL = 0x11
_LINK_BYTES = 1 << 20
# Speeds that are within this of one another are taken for the same.
_ALIKE = 1.2
# Of what a machine has free an eighth is left alone, within these bounds: activations of the
# exchanges lie there too, programs, and what other programs of that machine take meanwhile.
_KEPT_PART, _LEAST_KEPT, _MOST_KEPT = 8, 16 << 20, 512 << 20
# How often one figure is measured: at least so often and so long, seconds, since what disturbs it
# may take longer than a few runs; not much longer than the most.
_TRIES, _MOST_TRIES = 5, 100
_SECONDS, _MOST_SECONDS = 0.1, 0.2


def alike(speeds: Sequence[float]) -> list[float]:
    """Return speeds with those that hardly differ replaced by their mean.

    Machines that are the same differ by as much from one measurement to the next, and equal parts
    are cut alike.
    """
    order = sorted(range(len(speeds)), key=lambda i: speeds[i])
    made, group = list(speeds), []
    for number, i in enumerate(order):
        group.append(i)
        after = order[number + 1] if number + 1 < len(order) else None
        if after is None or speeds[after] > _ALIKE * speeds[group[0]]:
            mean = sum(speeds[k] for k in group) / len(group)
            for k in group:
                made[k] = mean
            group = []
    return made


def usable(free: int) -> int:
    """Return how much of ``free`` bytes of a machine a model may have."""
    return max(0, free - min(max(free // _KEPT_PART, _LEAST_KEPT), _MOST_KEPT))


def balanced(
    speeds: Sequence[float],
    *,
    latencies: Sequence[float] | None = None,
    work: float = WORK,
    limits: Sequence[float] | None = None,
) -> list[float]:
    """Return the share of each part, of 1 in all.

    ``speeds`` are bytes of weights a second, ``latencies`` seconds (default: none), ``work`` bytes
    of weights in one exchange, ``limits`` the most that a part may get, as shares (such as free
    memory over what is to be placed). ValueError for figures that are no such thing, or if the
    limits leave less than 1 in all.
    """
    n = len(speeds)
    late = [0.0] * n if latencies is None else list(latencies)
    most = [1.0] * n if limits is None else [min(1.0, limit) for limit in limits]
    if not n or len(late) != n or len(most) != n or work <= 0:
        raise ValueError(f"{n} speeds, {len(late)} latencies, {len(most)} limits, work {work}")
    if not all(0 <= f < float("inf") for f in (*speeds, *late, *most)):
        raise ValueError("a speed, a latency or a limit is no finite number above 0")
    able = [limit if speed > 0 else 0.0 for speed, limit in zip(speeds, most, strict=True)]
    if sum(able) < 1 - 1e-9:
        raise ValueError(f"the parts may take {sum(able):.3f} of the whole")

    def shares(seconds: float) -> list[float]:
        """Return what the parts get done in that time."""
        return [
            min(limit, max(0.0, seconds - start) * speed / work)
            for speed, start, limit in zip(speeds, late, able, strict=True)
        ]

    low, high = (
        0.0,
        max(
            start + work * limit / speed
            for speed, start, limit in zip(speeds, late, able, strict=True)
            if speed > 0
        ),
    )
    # What is done grows with the time: halve the interval until floats have nothing in between.
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if sum(shares(middle)) < 1 else (low, middle)
    found = shares(high)
    total = sum(found)
    return [share / total for share in found]


@dataclass(frozen=True, slots=True)
class Speed:
    """The measurements of one server.

    ``compute`` bytes of weights a second, ``round_trip`` seconds, ``link`` bytes a second from
    there.
    """

    compute: float
    round_trip: float
    link: float

    def rate(self) -> float:
        """Return bytes of weights a second, with the way back of results (one F32 a row)."""
        return 1 / (1 / self.compute + 4 / row_size(_TYPE, _COLS) / self.link)

    def latency(self) -> float:
        """Return seconds of an exchange of one column beside the products."""
        return self.round_trip + 4 * _COLS / self.link


def shares_by_time(
    speeds: Sequence[Speed], *, work: float = WORK, limits: Sequence[float] | None = None
) -> list[float]:
    """Return :func:`balanced` from measurements."""
    return balanced(
        [s.rate() for s in speeds],
        latencies=[s.latency() for s in speeds],
        work=work,
        limits=limits,
    )


def sample_product(g: GraphBuilder) -> tuple[Tensor, Tensor, Tensor]:
    """Return what is timed: a weight, its input, the product; bytes of the first two are FILL."""
    weight = g.new_tensor_2d(_TYPE, _COLS, _ROWS)
    x = g.new_tensor_1d(GgmlType.F32, _COLS)
    return weight, x, g.mul_mat(weight, x)


async def measure(backend: Backend) -> Speed:
    """Measure the server: small requests, a tensor's way back, a product of a few MB of weights.

    What was allocated there is freed. Takes about half a second. Raises AllocationFailed, and
    ConnectionLost when the server is.
    """
    connection, g = backend.connection, backend.graph
    round_trip = await least_seconds(connection.get_alignment)
    block = g.new_tensor_1d(GgmlType.I8, _LINK_BYTES)
    weight, x, product = sample_product(g)
    buffers = await backend.allocate([block, weight, x])
    try:
        for buffer in buffers:
            await connection.buffer_clear(buffer.handle, FILL)
        seconds = await least_seconds(lambda: connection.get_tensor(block))
        link = _LINK_BYTES / max(seconds - round_trip, 1e-9)
        plan = await backend.prepare(product)
        try:

            async def run() -> None:
                await plan.run()
                await connection.get_tensor(product, 0, 4)

            seconds = await least_seconds(run)
        finally:
            if not connection.closed:
                await plan.free()
    finally:
        if not connection.closed:
            await backend.free(buffers, [block, weight, x])
    return Speed(weight.nbytes / max(seconds - round_trip, 1e-9), round_trip, link)


async def least_seconds(job: Callable[[], Awaitable[Any]]) -> float:
    """Return the least of some runs, since anything may delay one; the first one warms up."""
    return min(await _run_often(job))


async def median_seconds(job: Callable[[], Awaitable[Any]]) -> float:
    """Return the median of some runs: what many of them in a row take, each; the first warms up."""
    return statistics.median(await _run_often(job))


async def _run_often(job: Callable[[], Awaitable[Any]]) -> list[float]:
    """Return the seconds of each of some runs, but for a first one."""
    await job()
    seen: list[float] = []
    before = started = time.perf_counter()
    while len(seen) < _MOST_TRIES:
        await job()
        now = time.perf_counter()
        seen.append(now - before)
        before, taken = now, now - started
        if taken > _MOST_SECONDS or (taken > _SECONDS and len(seen) >= _TRIES):
            break
    return seen


async def measure_all(backends: Sequence[Backend]) -> list[Speed]:
    """Return :func:`measure` of several servers at once, as they will work."""
    return list(await asyncio.gather(*map(measure, backends)))
