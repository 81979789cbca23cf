"""Graphs with split weights give what they give unsplit, to the last bit where nothing is rounded.

Activations that travel as F32 are what the local kernel would have read, and each row of a product
is computed on its own: a cut may change no bit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence

import numpy as np
import pytest

from client.backend import Backend
from client.tensors import Array
from protocol.ggml.types import GgmlType
from tests.split.cluster import Coordinator, WorkerProcess, backend, status
from tests.split.weights import NAME, content, nmse, values, weight

F32, F16, I32 = GgmlType.F32, GgmlType.F16, GgmlType.I32
TYPES = (
    F32, F16, GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q8_0, GgmlType.Q4_K, GgmlType.Q6_K
)  # fmt: skip
COLUMNS = 512
# No multiple of what rows are cut in.
ROWS = 328
# Of two workers and this server; some have no rows.
SHARES = ((1, 1, 0), (2, 1, 1), (0, 3, 1), (1, 0, 0), (1, 9, 90))

Shares = Sequence[float]
Job = Callable[[Backend, Shares], Awaitable[Sequence[Array]]]


async def compare(
    whole: WorkerProcess, split: WorkerProcess, job: Job, shares: Sequence[Shares] = SHARES
) -> None:
    """``job`` on the split server, cut in various ways, against the one that doesn't split."""
    async with backend(whole) as b:
        expected = await job(b, ())
    assert all(np.isfinite(e).all() and e.any() for e in expected)
    async with backend(split) as b:
        for share in shares:
            for got, wanted in zip(await job(b, share), expected, strict=True):
                assert got.tobytes() == wanted.tobytes(), (
                    f"cut in {share}: NMSE {nmse(got, wanted)}, "
                    f"{np.count_nonzero(got != wanted)} of {got.size} differ"
                )


@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
async def test_products_are_equal_to_the_bit(
    type_: GgmlType, whole: WorkerProcess, split: WorkerProcess
) -> None:
    data = content(type_, (COLUMNS, ROWS), seed=3)
    inputs = [values(n, COLUMNS, seed=n) for n in (1, 5, 300)]

    async def job(b: Backend, shares: Shares) -> Sequence[Array]:
        w = await weight(b, type_, (COLUMNS, ROWS), data, shares=shares)
        results = []
        for x in inputs:
            leaf = await b.tensor(F32, (COLUMNS, len(x)), x)
            results.append(await b.compute(b.graph.mul_mat(w, leaf)))
        return results

    await compare(whole, split, job)


@pytest.mark.parametrize("type_", [F32, GgmlType.Q4_0], ids=lambda t: t.name)
async def test_more_dimensions(type_: GgmlType, whole: WorkerProcess, split: WorkerProcess) -> None:
    """Activations of more dimensions than the weight, and rows that don't lie one by one."""
    data = content(type_, (COLUMNS, ROWS), seed=4)
    x = values(3, 2, 4, COLUMNS, seed=5)

    async def job(b: Backend, shares: Shares) -> Sequence[Array]:
        w = await weight(b, type_, (COLUMNS, ROWS), data, shares=shares)
        leaf = await b.tensor(F32, (COLUMNS, 4, 2, 3), x)
        g = b.graph
        dense = g.mul_mat(w, leaf)
        swapped = g.mul_mat(w, g.permute(leaf, 0, 2, 1, 3))
        part = g.mul_mat(w, g.view_2d(leaf, COLUMNS, 2, 2 * leaf.nb[1], leaf.nb[1]))
        results: list[Array] = await b.compute(dense, swapped, part)
        return results

    await compare(whole, split, job, SHARES[:3])


@pytest.mark.parametrize("type_", [F32, F16, GgmlType.Q8_0, GgmlType.Q4_K], ids=lambda t: t.name)
@pytest.mark.parametrize("tokens", [1, 40])
async def test_experts_are_equal_to_the_bit(
    type_: GgmlType, tokens: int, whole: WorkerProcess, split: WorkerProcess
) -> None:
    experts, used = 4, 2
    shape = (256, 136, experts)
    data = content(type_, shape, seed=6)
    chosen = np.random.default_rng(7).permuted(
        np.tile(np.arange(experts, dtype=np.int32), (tokens, 1)), axis=1
    )
    x = values(tokens, used, 256, seed=8)

    async def job(b: Backend, shares: Shares) -> Sequence[Array]:
        w = await weight(b, type_, shape, data, shares=shares, name="blk.0.ffn_up_exps.weight")
        each = await b.tensor(F32, (256, used, tokens), x)
        one = await b.tensor(F32, (256, 1, tokens), x[:, :1].copy())
        ids = await b.tensor(I32, (experts, tokens), chosen)
        g = b.graph
        best = g.view_2d(ids, used, tokens, ids.nb[1], 0)
        results: list[Array] = await b.compute(
            g.mul_mat_id(w, each, best), g.mul_mat_id(w, one, best)
        )
        return results

    await compare(whole, split, job, SHARES[:3])


async def test_a_weight_of_three_dimensions_in_a_plain_product(
    whole: WorkerProcess, split: WorkerProcess
) -> None:
    data = content(F16, (256, 96, 3), seed=9)
    x = values(3, 5, 256, seed=10)

    async def job(b: Backend, shares: Shares) -> Sequence[Array]:
        w = await weight(b, F16, (256, 96, 3), data, shares=shares)
        leaf = await b.tensor(F32, (256, 5, 3), x)
        return [await b.compute(b.graph.mul_mat(w, leaf))]

    await compare(whole, split, job)


async def a_layer(b: Backend, shares: Shares, tokens: int = 3) -> Sequence[Array]:
    """Products that share inputs, nodes between them, and one whose input another one makes."""
    g = b.graph
    wide = (COLUMNS, COLUMNS)
    names = ("attn_q", "attn_k", "attn_v", "ffn_down")
    q, k, v, down = [
        await weight(
            b, GgmlType.Q8_0, wide, content(GgmlType.Q8_0, wide, seed=i),
            shares=shares, name=f"blk.1.{name}.weight",
        )
        for i, name in enumerate(names)
    ]  # fmt: skip
    x = await b.tensor(F32, (COLUMNS, tokens), values(tokens, COLUMNS, seed=11))
    h = g.rms_norm(x, 1e-6)
    mixed = g.add(g.mul(g.mul_mat(q, h), g.mul_mat(k, h)), g.mul_mat(v, h))
    y = g.mul_mat(down, g.silu(g.rms_norm(mixed, 1e-6)))
    outputs: list[Array] = await b.compute(y, mixed)
    return outputs


async def test_a_layer_is_equal_to_the_bit(whole: WorkerProcess, split: WorkerProcess) -> None:
    await compare(whole, split, a_layer)


async def test_products_of_one_input_share_an_exchange(split: WorkerProcess) -> None:
    async with backend(split) as b:
        before = await status(b)
        await a_layer(b, (1, 1, 0), tokens=3)
        after = await status(b)
    for old, new in zip(before.parts[:2], after.parts[:2], strict=True):
        sent = new.bytes_sent - old.bytes_sent
        # Its input and that of the last product went out once each; commands are a few bytes.
        assert 0 <= sent - 2 * 3 * COLUMNS * 4 < 64
        assert new.bytes_received - old.bytes_received == 4 * 3 * COLUMNS // 2 * 4
    assert after.graphs == before.graphs + 1
    assert after.tokens == before.tokens + 3


async def test_an_input_that_is_written_between_is_sent_again(
    whole: WorkerProcess, split: WorkerProcess
) -> None:
    data = content(F32, (COLUMNS, COLUMNS), seed=12)

    async def job(b: Backend, shares: Shares) -> Sequence[Array]:
        g = b.graph
        w = await weight(b, F32, (COLUMNS, COLUMNS), data, shares=shares)
        x = await b.tensor(F32, (COLUMNS, 2), values(2, COLUMNS, seed=13))
        first = g.mul_mat(w, x)
        # Written to where x is, so both products have inputs at the same address.
        changed = g.cpy(g.scale(x, 0.5), x)
        results: list[Array] = await b.compute(first, g.mul_mat(w, changed))
        return results

    await compare(whole, split, job, SHARES[:3])


async def test_the_same_graph_again_with_other_inputs(
    whole: WorkerProcess, split: WorkerProcess
) -> None:
    """What llama.cpp does for each token: GRAPH_RECOMPUTE."""
    data = content(GgmlType.Q4_0, (COLUMNS, ROWS), seed=14)

    async def job(b: Backend, shares: Shares) -> Sequence[Array]:
        w = await weight(b, GgmlType.Q4_0, (COLUMNS, ROWS), data, shares=shares)
        x = await b.tensor(F32, (COLUMNS, 1))
        y = b.graph.mul_mat(w, x)
        plan = await b.prepare(y)
        results = []
        for i in range(5):
            await b.upload(x, values(1, COLUMNS, seed=i))
            await plan.run()
            results.append(await b.download(y))
        return results

    await compare(whole, split, job)


async def test_a_table_that_rows_are_taken_from_is_brought_here(
    whole: WorkerProcess, split: Coordinator
) -> None:
    data = content(GgmlType.Q8_0, (COLUMNS, ROWS), seed=15)
    wanted = np.array([0, ROWS - 1, 7, 200], np.int32)

    async def job(b: Backend, shares: Shares) -> Sequence[Array]:
        g = b.graph
        # An output that is the embedding too.
        w = await weight(
            b, GgmlType.Q8_0, (COLUMNS, ROWS), data, shares=shares, name="output.weight"
        )
        x = g.get_rows(w, await b.tensor(I32, (len(wanted),), wanted))
        results: list[Array] = await b.compute(x, g.mul_mat(w, x))
        return results

    await compare(whole, split, job)
    assert "'output.weight' is needed whole" in split.log


@pytest.mark.parametrize("where", ["whole", "split"])
async def test_a_weight_that_a_graph_writes(
    where: str, request: pytest.FixtureRequest, whole: WorkerProcess
) -> None:
    """Fine-tuning and merged adapters do: a product must see what was written."""
    server: WorkerProcess = request.getfixturevalue(where)
    before, after = values(ROWS, 256, seed=16), values(ROWS, 256, seed=17)
    x = values(2, 256, seed=18)
    async with backend(server) as b:
        g = b.graph
        w = await weight(b, F32, (256, ROWS), before.tobytes())
        new = await b.tensor(F32, (256, ROWS), after)
        leaf = await b.tensor(F32, (256, 2), x)
        y = g.mul_mat(w, leaf)
        plan = await b.prepare(y)
        await plan.run()
        first = await b.download(y)
        await b.compute(g.cpy(new, w))
        await plan.run()
        second = await b.download(y)
        assert (await b.download(w)).tobytes() == after.tobytes()
    assert nmse(first.reshape(2, ROWS), x @ before.T) < 1e-9
    assert nmse(second.reshape(2, ROWS), x @ after.T) < 1e-9


# -- activations that travel in fewer bits


@pytest.fixture(scope="module", params=["f16", "q8_0"])
def rounded(
    request: pytest.FixtureRequest, workers: list[WorkerProcess]
) -> Iterator[tuple[Coordinator, float]]:
    """A coordinator with another --split-wire, and the error that it may make.

    Rounding to steps of some width is a mean square error of its square over 12. F16's steps are at
    most 2^-10 of a value; Q8_0's are the largest of 32 values over 127, and the square of that
    largest is 5.7 on average where values are normal.
    """
    bounds = {"f16": 2**-20 / 12, "q8_0": 1.1 * 5.7 / 127**2 / 12}
    with Coordinator([*workers, "local"], "--split-wire", request.param) as started:
        yield started, bounds[request.param]


@pytest.mark.parametrize("columns", [COLUMNS, 80])
async def test_fewer_bits_cost_no_more_than_they_must(
    columns: int, rounded: tuple[Coordinator, float], whole: WorkerProcess
) -> None:
    """Rows that are no whole blocks travel as F16."""
    coordinator, bound = rounded
    data = content(F32, (columns, 256), seed=19)
    x = values(40, columns, seed=20)

    async def job(b: Backend, shares: Shares) -> Array:
        w = await weight(b, F32, (columns, 256), data, shares=shares)
        leaf = await b.tensor(F32, (columns, 40), x)
        # What a client wrote travels as it is, what was computed in fewer bits.
        result: Array = await b.compute(b.graph.mul_mat(w, b.graph.scale(leaf, 1.0)))
        return result

    async with backend(whole) as b:
        expected = await job(b, ())
    async with backend(coordinator) as b:
        got = await job(b, (1, 1, 0))
        before = (await status(b)).parts[0].bytes_sent
        there = await job(b, (0, 0, 1))
        assert (await status(b)).parts[0].bytes_sent == before
    assert 0 < nmse(got, expected) < bound
    assert np.array_equal(there, expected), "rows of this server are not rounded"


async def test_experts_with_fewer_bits(
    rounded: tuple[Coordinator, float], whole: WorkerProcess
) -> None:
    coordinator, bound = rounded
    data = content(F32, (256, 64, 4), seed=21)
    ids = np.array([[0, 3], [2, 1], [1, 0]], np.int32)

    async def job(b: Backend) -> Array:
        w = await weight(b, F32, (256, 64, 4), data, name="blk.0.ffn_gate_exps.weight")
        x = await b.tensor(F32, (256, 2, 3), values(3, 2, 256, seed=22))
        chosen = await b.tensor(I32, (2, 3), ids)
        result: Array = await b.compute(b.graph.mul_mat_id(w, b.graph.scale(x, 1.0), chosen))
        return result

    async with backend(whole) as b:
        expected = await job(b)
    async with backend(coordinator) as b:
        assert 0 < nmse(await job(b), expected) < bound


# -- more than one at a time


async def test_two_clients_at_once(whole: WorkerProcess, split: WorkerProcess) -> None:
    """Uploads of one go on between the exchanges of another; neither sees the other."""

    async def computes(seed: int) -> list[Array]:
        async with backend(split) as b:
            w = await weight(
                b, F16, (COLUMNS, ROWS), content(F16, (COLUMNS, ROWS), seed), shares=(1, 1, 1)
            )
            x = await b.tensor(F32, (COLUMNS, 30), values(30, COLUMNS, seed=seed))
            y = b.graph.mul_mat(w, x)
            plan = await b.prepare(y)
            results = []
            for _ in range(20):
                await plan.run()
                results.append(await b.download(y))
            return results

    async def uploads(seed: int) -> None:
        async with backend(split) as b:
            data = content(F32, (COLUMNS, 4096), seed)
            w = await weight(b, F32, (COLUMNS, 4096), shares=(1, 1, 0))
            for _ in range(4):
                await b.connection.set_tensor(w, data)
                assert (await b.connection.get_tensor(w)).tobytes() == data

    first, second, *_ = await asyncio.gather(computes(30), computes(31), uploads(32), uploads(33))
    for seed, results in ((30, first), (31, second)):
        async with backend(whole) as b:
            w = await weight(b, F16, (COLUMNS, ROWS), content(F16, (COLUMNS, ROWS), seed))
            x = await b.tensor(F32, (COLUMNS, 30), values(30, COLUMNS, seed=seed))
            expected = await b.compute(b.graph.mul_mat(w, x))
        assert all(np.array_equal(got, expected) for got in results)


async def test_a_coordinator_of_a_coordinator(whole: WorkerProcess, split: Coordinator) -> None:
    """Its workers' results pass through; the inner one cuts by its own proportions."""
    with Coordinator([split, "local"]) as outer:

        async def job(b: Backend, shares: Shares) -> Sequence[Array]:
            return await a_layer(b, shares)

        await compare(whole, outer, job, [(1, 0), (1, 1)])
        assert "internal error" not in outer.log


@pytest.mark.slow
async def test_more_programs_than_a_worker_keeps(split: WorkerProcess) -> None:
    """Graphs of many shapes: an old one is sent again when it is used again."""
    data = content(F32, (COLUMNS, 64), seed=40)
    async with backend(split) as b:
        w = await weight(b, F32, (COLUMNS, 64), data, shares=(1, 1, 0))
        x = await b.tensor(F32, (COLUMNS, 80), values(80, COLUMNS, seed=41))
        g = b.graph
        expected = (await b.compute(g.mul_mat(w, x))).reshape(80, 64)
        plans = []
        for n in range(1, 71):
            y = g.mul_mat(w, g.view_2d(x, COLUMNS, n, x.nb[1], 0))
            plans.append((n, y, await b.prepare(y)))
        for n, y, plan in [*plans, *plans[:3]]:
            await plan.run()
            got = (await b.download(y)).reshape(n, 64)
            assert nmse(got, expected[:n]) < 1e-9


@pytest.mark.slow
async def test_a_prompt_of_thousands_over_three(
    workers: list[WorkerProcess], whole: WorkerProcess
) -> None:
    """What is sent and what comes back are each more than sockets hold: nobody waits in a ring."""
    tokens = 2000
    with WorkerProcess() as third, Coordinator([*workers, third]) as coordinator:

        async def job(b: Backend, shares: Shares) -> Sequence[Array]:
            return await a_layer(b, shares, tokens)

        await asyncio.wait_for(compare(whole, coordinator, job, [(1, 1, 1)]), 120)


def test_the_name_is_one_that_is_split() -> None:
    assert NAME.endswith(".weight")
