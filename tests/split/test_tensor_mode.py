"""--split-mode tensor: blocks of a layer stay on the parts; what ends one is cut by columns."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest

from client.backend import Backend
from client.tensors import Array
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from tests.split.cluster import Coordinator, WorkerProcess, backend, emptied, status
from tests.split.weights import content, nmse, values, weight

F32, F16, Q8_0, Q4_K = GgmlType.F32, GgmlType.F16, GgmlType.Q8_0, GgmlType.Q4_K
SHARES = ((1, 1, 0), (2, 1, 1), (0, 3, 1), (1, 0, 0))
WIDTH, INNER = 256, 1024


@pytest.fixture(scope="module")
def tensor_mode(workers: list[WorkerProcess]) -> Iterator[Coordinator]:
    with Coordinator([*workers, "local"], "--split-mode", "tensor") as started:
        yield started
        assert started.alive
        assert "internal error" not in started.log


@pytest.fixture(scope="module", params=SHARES, ids=str)
def shares(request: pytest.FixtureRequest) -> Sequence[float]:
    cut: Sequence[float] = request.param
    return cut


async def feed_forward(
    b: Backend, type_: GgmlType, shares: Sequence[float], tokens: int
) -> tuple[Array, list[Tensor]]:
    shapes = {"ffn_gate": (WIDTH, INNER), "ffn_up": (WIDTH, INNER), "ffn_down": (INNER, WIDTH)}
    gate, up, down = [
        await weight(
            b, type_, shape, content(type_, shape, i), shares=shares, name=f"blk.0.{name}.weight"
        )
        for i, (name, shape) in enumerate(shapes.items())
    ]
    g = b.graph
    x = await b.tensor(F32, (WIDTH, tokens), values(tokens, WIDTH, seed=4) * np.float32(0.1))
    h = g.rms_norm(x, 1e-6)
    y = g.mul_mat(down, g.mul(g.silu(g.mul_mat(gate, h)), g.mul_mat(up, h)))
    return await b.compute(g.add(y, x)), [gate, up, down]


@pytest.mark.parametrize("tokens", [1, 50])
@pytest.mark.parametrize("type_", [F32, F16, Q8_0, Q4_K], ids=lambda t: t.name)
async def test_a_feed_forward_block(
    type_: GgmlType,
    tokens: int,
    shares: Sequence[float],
    whole: WorkerProcess,
    tensor_mode: Coordinator,
) -> None:
    """Sums over columns are made in another order; in F32 that is all."""
    async with backend(whole) as b:
        expected, _ = await feed_forward(b, type_, (), tokens)
    async with backend(tensor_mode) as b:
        got, _ = await feed_forward(b, type_, shares, tokens)
    # An activation that lies between two steps of 8 bits may be rounded either way.
    bound = 1e-10 if type_ in (F32, F16) else 1e-4
    assert nmse(got, expected) < bound


async def test_a_block_is_one_exchange(tensor_mode: Coordinator) -> None:
    tokens = 3
    async with backend(tensor_mode) as b:
        await emptied(b)
        before = await status(b)
        await feed_forward(b, F32, (1, 1, 0), tokens)
        after = await status(b)
    for old, new in zip(before.parts[:2], after.parts[:2], strict=True):
        assert 0 <= new.bytes_sent - old.bytes_sent - tokens * WIDTH * 4 < 64
        # Each sends back its sum of all rows.
        assert new.bytes_received - old.bytes_received == tokens * WIDTH * 4


@pytest.mark.parametrize("type_", [F32, Q4_K], ids=lambda t: t.name)
async def test_columns_are_memory_too(
    type_: GgmlType, shares: Sequence[float], tensor_mode: Coordinator
) -> None:
    """Ranges at any place of a weight that is cut within its rows."""
    shape = (INNER, 192)
    now = bytearray(content(type_, shape, seed=5))
    async with backend(tensor_mode) as b:
        await emptied(b)
        before = [part.bytes for part in (await status(b)).parts]
        w = await weight(b, type_, shape, bytes(now), shares=shares, name="blk.0.ffn_down.weight")
        after = [part.bytes for part in (await status(b)).parts]
        there = [new - old for new, old in zip(after, before, strict=True)]
        assert sum(there) == len(now)
        assert [n > 0 for n in there] == [s > 0 for s in shares]
        rng = np.random.default_rng(6)
        for size in (1, 3, 4095, 4096, 50_001, len(now) // 2):
            offset = int(rng.integers(0, len(now) - size + 1))
            new = rng.bytes(size)
            now[offset : offset + size] = new
            await b.connection.set_tensor(w, new, offset)
            offset = int(rng.integers(0, len(now) - size + 1))
            got = await b.connection.get_tensor(w, offset, size)
            assert got.tobytes() == now[offset : offset + size]
        assert (await b.connection.get_tensor(w)).tobytes() == now
        await b.connection.memset_tensor(w, 9, 100, 5000)
        now[100:5100] = b"\11" * 5000
        assert (await b.connection.get_tensor(w)).tobytes() == now


@pytest.mark.parametrize("cut", [(2, 1, 1), (0, 3, 1), (0, 1, 9)], ids=str)
async def test_a_graph_goes_on_after_another_needs_its_weight_whole(
    cut: Sequence[float], tensor_mode: Coordinator
) -> None:
    """This server's columns lie apart from the others' until all of them are here."""
    # More than is moved in one piece, and no multiple of it.
    wide, rows = 8256, 320
    data = values(rows, wide, seed=10)
    async with backend(tensor_mode) as b:
        down = await weight(
            b, F32, (wide, rows), data.tobytes(), shares=cut, name="blk.0.ffn_down.weight"
        )
        g = b.graph
        up = await weight(
            b, F32, (WIDTH, wide), content(F32, (WIDTH, wide), 11), shares=cut,
            name="blk.0.ffn_up.weight",
        )  # fmt: skip
        x = await b.tensor(F32, (WIDTH, 2), values(2, WIDTH, seed=12))
        y = g.mul_mat(down, g.silu(g.mul_mat(up, x)))
        plan = await b.prepare(y)
        await plan.run()
        expected = await b.download(y)
        numbers = np.array([0, 1, 77, rows - 1], np.int32)
        taken = await b.compute(g.get_rows(down, await b.tensor(GgmlType.I32, (4,), numbers)))
        assert np.array_equal(np.asarray(taken).reshape(4, wide), data[numbers])
        await plan.run()
        assert nmse(await b.download(y), expected) < 1e-10
        assert (await b.connection.get_tensor(down)).tobytes() == data.tobytes()
        # What is written now is where both look.
        await b.connection.set_tensor(down, data[:9].tobytes(), 0)
        await b.connection.set_tensor(down, bytes(wide * 4 * (rows - 9)), wide * 4 * 9)
        await plan.run()
        got = np.asarray(await b.download(y)).reshape(2, rows)
        whole = np.asarray(expected).reshape(2, rows)
        assert nmse(got[:, :9], whole[:, :9]) < 1e-10
        assert not got[:, 9:].any()


async def test_experts_in_blocks(
    shares: Sequence[float], whole: WorkerProcess, tensor_mode: Coordinator
) -> None:
    experts, used, tokens = 4, 2, 5

    async def job(b: Backend, cut: Sequence[float]) -> Array:
        up_shape, down_shape = (WIDTH, INNER, experts), (INNER, WIDTH, experts)
        up = await weight(
            b, F32, up_shape, content(F32, up_shape, seed=7), shares=cut,
            name="blk.0.ffn_up_exps.weight",
        )  # fmt: skip
        down = await weight(
            b, F32, down_shape, content(F32, down_shape, seed=8), shares=cut,
            name="blk.0.ffn_down_exps.weight",
        )  # fmt: skip
        ids = np.array([[0, 3], [2, 1], [1, 0], [3, 2], [0, 1]], np.int32)
        chosen = await b.tensor(GgmlType.I32, (used, tokens), ids)
        x = await b.tensor(F32, (WIDTH, 1, tokens), values(tokens, 1, WIDTH, seed=9))
        g = b.graph
        result: Array = await b.compute(
            g.mul_mat_id(down, g.silu(g.mul_mat_id(up, x, chosen)), chosen)
        )
        return result

    async with backend(whole) as b:
        expected = await job(b, ())
    async with backend(tensor_mode) as b:
        assert nmse(await job(b, shares), expected) < 1e-10


async def test_a_cache_lives_on_the_parts(
    shares: Sequence[float], whole: WorkerProcess, tensor_mode: Coordinator
) -> None:
    """What graphs store there is read, cleared and stored again, each after the other."""
    cells, tokens = 64, 4

    async def job(b: Backend, cut: Sequence[float]) -> list[Array]:
        g = b.graph
        shape = (WIDTH, INNER)
        k = await weight(
            b, F32, shape, content(F32, shape, seed=10), shares=cut, name="blk.0.attn_k.weight"
        )
        cache = await weight(b, F16, (INNER, cells), shares=cut, name="cache_k_l0")
        await b.connection.buffer_clear(cache.buffer)
        x = await b.tensor(F32, (WIDTH, tokens), values(tokens, WIDTH, seed=11))
        at = await b.tensor(GgmlType.I64, (tokens,))
        stored = g.set_rows(cache, g.mul_mat(k, g.rms_norm(x, 1e-6)), at)
        plan = await b.prepare(stored)
        seen = []
        for i in range(8):
            await b.upload(at, np.arange(tokens, dtype=np.int64) + 4 * i)
            await plan.run()
            seen.append(await b.download(cache))
            if i % 3 == 2:
                # As llama.cpp clears a KV cache; nothing waits for it before the next graph.
                await b.connection.buffer_clear(cache.buffer, 0)
                await b.upload(at, np.arange(tokens, dtype=np.int64) + 30)
                await plan.run()
                seen.append(await b.download(cache))
        await b.connection.memset_tensor(cache, 0, 1000, 5000)
        seen.append(await b.download(cache))
        await plan.run()
        seen.append(await b.download(cache))
        return seen

    async with backend(whole) as b:
        expected = await job(b, ())
    async with backend(tensor_mode) as b:
        await emptied(b)
        before = [part.bytes for part in (await status(b)).parts]
        got = await job(b, shares)
        assert [part.bytes for part in (await status(b)).parts] != before
    assert all(e.any() for e in expected)
    for one, other in zip(got, expected, strict=True):
        assert np.array_equal(one, other)


HEADS, KV_HEADS, HEAD = 16, 8, 32
KV = KV_HEADS * HEAD


async def attention_weights(b: Backend, shares: Sequence[float]) -> dict[str, Tensor]:
    """The four matrices of a layer's attention, by their names in files."""
    shapes = {
        "attn_q": (WIDTH, HEADS * HEAD),
        "attn_k": (WIDTH, KV),
        "attn_v": (WIDTH, KV),
        "attn_output": (HEADS * HEAD, WIDTH),
    }
    return {
        name: await weight(
            b, F32, shape, content(F32, shape, i), shares=shares, name=f"blk.0.{name}.weight"
        )
        for i, (name, shape) in enumerate(shapes.items())
    }


async def attention(
    b: Backend, shares: Sequence[float], cells: int, seen: int, rounds: Sequence[int]
) -> list[Array]:
    """Tokens that attend to a cache of ``cells`` places of which ``seen`` are looked at."""
    g = b.graph
    w = await attention_weights(b, shares)
    caches = [await weight(b, F16, (KV, cells), shares=shares, name=f"cache_{x}_l0") for x in "kv"]
    for cache in caches:
        await b.connection.buffer_clear(cache.buffer)
    results, done = [], 0
    for tokens in rounds:
        x = await b.tensor(F32, (WIDTH, tokens), values(tokens, WIDTH, seed=done) * np.float32(0.1))
        at = await b.tensor(GgmlType.I64, (tokens,), np.arange(tokens) + done)
        positions = await b.tensor(GgmlType.I32, (tokens,), np.arange(tokens) + done)
        allowed = np.arange(seen)[None, :] <= (np.arange(tokens) + done)[:, None]
        mask = await b.tensor(F16, (seen, tokens), np.where(allowed, 0.0, -np.inf))
        h = g.rms_norm(x, 1e-6)
        q = g.rope(g.reshape(g.mul_mat(w["attn_q"], h), HEAD, HEADS, tokens), positions, HEAD)
        k = g.rope(g.reshape(g.mul_mat(w["attn_k"], h), HEAD, KV_HEADS, tokens), positions, HEAD)
        v = g.mul_mat(w["attn_v"], h)
        stored = [
            g.set_rows(caches[0], g.reshape(k, KV, tokens), at),
            g.set_rows(caches[1], v, at),
        ]
        row = caches[0].nb[1]
        k_seen, v_seen = (
            g.permute(g.view_4d(c, HEAD, KV_HEADS, seen, 1, HEAD * 2, row, row * seen), 0, 2, 1, 3)
            for c in caches
        )
        y = g.flash_attn_ext(g.permute(q, 0, 2, 1, 3), k_seen, v_seen, mask, HEAD**-0.5)
        y = g.mul_mat(w["attn_output"], g.reshape(y, HEADS * HEAD, tokens))
        results.append((await b.compute(*stored, g.add(y, x)))[-1])
        done += tokens
    return results


@pytest.mark.parametrize(("cells", "seen"), [(64, 32), (32, 32)], ids=["part", "whole"])
async def test_an_attention_block(
    cells: int, seen: int, shares: Sequence[float], whole: WorkerProcess, tensor_mode: Coordinator
) -> None:
    """Heads with their cache on the parts, over a prompt and tokens that follow it."""
    rounds = (5, 1, 1, 3)
    async with backend(whole) as b:
        expected = await attention(b, (), cells, seen, rounds)
    async with backend(tensor_mode) as b:
        got = await attention(b, shares, cells, seen, rounds)
    for one, other in zip(got, expected, strict=True):
        assert nmse(one, other) < 1e-6


async def test_an_attention_block_is_one_exchange(tensor_mode: Coordinator) -> None:
    async with backend(tensor_mode) as b:
        await emptied(b)
        before = await status(b)
        await attention(b, (1, 1, 0), 64, 32, (5, 1))
        after = await status(b)
    for old, new in zip(before.parts[:2], after.parts[:2], strict=True):
        # Each sends back its sum of all rows, once a graph, and nothing else.
        assert new.bytes_received - old.bytes_received == (5 + 1) * WIDTH * 4
        assert new.exchanges - old.exchanges == 2


@dataclass(frozen=True)
class Sequences:
    """A graph of several sequences, as llama.cpp may make it or as nobody does."""

    cache_type: GgmlType
    cells: int
    streams: int
    # Which of them are in the batch, of each so many tokens.
    first: int
    count: int
    tokens: int
    seen: int
    # How rows are stored: as rows of all streams, or of a view of those in the batch.
    stored: Literal["reshaped", "viewed"]
    # What is done with the views on their way: nothing, there and back, or flat and up again.
    detour: Literal["none", "permuted", "flat"]
    # Whether something beside the parts reads the cache.
    read_here: bool

    @classmethod
    def random(cls, rng: random.Random) -> Sequences:
        streams = rng.choice([1, 2, 3, 4])
        count = rng.randint(1, streams)
        cells = rng.choice([32, 64])
        return cls(
            rng.choice([F16, F32, Q8_0]),
            cells,
            streams,
            rng.randint(0, streams - count),
            count,
            rng.randint(1, 4),
            rng.choice([32, cells]),
            rng.choice(["reshaped", "viewed"]),
            rng.choice(["none", "permuted", "flat"]),
            rng.random() < 0.2,
        )


async def attention_of_sequences(
    b: Backend, shares: Sequence[float], s: Sequences, rounds: int = 2
) -> list[Array]:
    """What each round gives, and the caches at the end."""
    g = b.graph
    w = await attention_weights(b, shares)
    shape = (KV, s.cells, s.streams)
    caches = [
        await weight(b, s.cache_type, shape, shares=shares, name=f"cache_{x}_l0") for x in "kv"
    ]
    for cache in caches:
        await b.connection.buffer_clear(cache.buffer)
    row, plane = caches[0].nb[1], caches[0].nb[2]
    head = caches[0].nb[1] // KV_HEADS
    n = s.tokens * s.count

    def store(cache: Tensor, rows: Tensor, at: Tensor) -> Tensor:
        if s.stored == "reshaped":
            return g.set_rows(g.reshape(cache, KV, s.cells * s.streams), rows, at)
        target = g.view_3d(cache, KV, s.cells, s.count, row, plane, plane * s.first)
        return g.set_rows(target, g.reshape(rows, KV, s.tokens, s.count), at)

    def look(cache: Tensor) -> Tensor:
        offset = plane * s.first
        seen = g.view_4d(cache, HEAD, KV_HEADS, s.seen, s.count, head, row, plane, offset)
        if s.detour == "permuted":
            seen = g.permute(g.permute(seen, 0, 3, 1, 2), 0, 2, 3, 1)
        elif s.detour == "flat" and seen.contiguous:
            seen = g.reshape(g.reshape(seen, seen.nelements), *seen.ne)
        return g.permute(seen, 0, 2, 1, 3)

    results = []
    for turn in range(rounds):
        x = await b.tensor(F32, (WIDTH, n), values(n, WIDTH, seed=turn) * np.float32(0.1))
        cells = np.arange(s.tokens)[None, :] + turn * s.tokens
        planes = np.arange(s.count)[:, None] * np.ones_like(cells)
        if s.stored == "reshaped":
            rows = (planes + s.first) * s.cells + cells
            at = await b.tensor(GgmlType.I64, (n,), rows.reshape(-1))
        else:
            at = await b.tensor(GgmlType.I64, (s.tokens, s.count), 0 * planes + cells)
        where = (0 * planes + cells).reshape(-1)
        positions = await b.tensor(GgmlType.I32, (n,), where)
        allowed = np.arange(s.seen) <= where.reshape(s.count, 1, s.tokens, 1)
        mask = await b.tensor(F16, (s.seen, s.tokens, 1, s.count), np.where(allowed, 0.0, -np.inf))
        h = g.rms_norm(x, 1e-6)
        q = g.rope(g.reshape(g.mul_mat(w["attn_q"], h), HEAD, HEADS, n), positions, HEAD)
        k = g.rope(g.reshape(g.mul_mat(w["attn_k"], h), HEAD, KV_HEADS, n), positions, HEAD)
        outputs = [
            store(caches[0], g.reshape(k, KV, n), at),
            store(caches[1], g.mul_mat(w["attn_v"], h), at),
        ]
        q = g.view_4d(q, HEAD, HEADS, s.tokens, s.count, q.nb[1], q.nb[2], q.nb[2] * s.tokens, 0)
        k, v = map(look, caches)
        y = g.flash_attn_ext(g.permute(q, 0, 2, 1, 3), k, v, mask, HEAD**-0.5)
        y = g.add(g.mul_mat(w["attn_output"], g.reshape(y, HEADS * HEAD, n)), x)
        if s.read_here:
            first = g.view_2d(caches[0], KV, s.cells, row, plane * s.first)
            one = await b.tensor(GgmlType.I32, (2,), [0, s.cells - 1])
            outputs.append(g.get_rows(first, one))
        results.append((await b.compute(*outputs, y))[-1])
    return [*results, *[await b.download(cache) for cache in caches]]


@pytest.mark.slow
async def test_any_number_of_sequences(
    whole: WorkerProcess, tensor_mode: Coordinator, seed: int
) -> None:
    """Whatever views a graph has of its caches: either parts have them exactly, or nothing does."""
    rng = random.Random(seed)
    for _ in range(24):
        s, cut = Sequences.random(rng), rng.choice(SHARES)
        print(s, cut)
        async with backend(whole) as b:
            expected = await attention_of_sequences(b, (), s)
        async with backend(tensor_mode) as b:
            got = await attention_of_sequences(b, cut, s)
        for one, other in zip(expected[:-2], got[:-2], strict=True):
            assert nmse(other, one) < 1e-5
        for one, other in zip(expected[-2:], got[-2:], strict=True):
            assert one.any()
            if s.cache_type is not Q8_0:
                assert nmse(other.astype(np.float32), one.astype(np.float32)) < 1e-5


async def test_sequences_of_one_graph_are_one_exchange(tensor_mode: Coordinator) -> None:
    """The caches stay with the heads: of each graph the parts give its sums and nothing else."""
    s = Sequences(F16, 64, 4, 1, 3, 2, 32, "reshaped", "none", read_here=False)
    async with backend(tensor_mode) as b:
        await emptied(b)
        before = await status(b)
        got = await attention_of_sequences(b, (1, 1, 0), s)
        after = await status(b)
    assert got[0].any()
    for old, new in zip(before.parts[:2], after.parts[:2], strict=True):
        assert new.exchanges - old.exchanges == 2
        assert new.bytes_received - old.bytes_received == 2 * s.tokens * s.count * WIDTH * 4
