"""A split weight is memory like any other: written, read back, cleared, copied and freed."""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.backend import Backend
from client.connection import connect
from client.errors import AllocationFailed, ConnectionLost
from protocol.commands import Command
from protocol.ggml.types import GgmlType
from protocol.split import MAX_PARTS
from protocol.tensor import Tensor
from tests.split.cluster import HOST, Coordinator, WorkerProcess, backend, emptied, status
from tests.split.weights import NAME, allocate, content, nmse, values, weight

F32, F16 = GgmlType.F32, GgmlType.F16
SHARES = (2, 1, 1)
# Rows of 1100 bytes, in three matrices.
SHAPE = (550, 136, 3)


@pytest.fixture
async def b(split: Coordinator) -> AsyncIterator[Backend]:
    async with backend(split) as made:
        await emptied(made)
        yield made


async def bytes_on_workers(b: Backend) -> list[int]:
    return [part.bytes for part in (await status(b)).parts]


async def test_a_weight_lies_where_it_belongs_and_is_read_back(b: Backend) -> None:
    before = await bytes_on_workers(b)
    data = content(F16, SHAPE, seed=1)
    w = await weight(b, F16, SHAPE, data, shares=SHARES)
    after = await bytes_on_workers(b)
    # 136 rows in proportions 2:1:1 are 64, 32 and 40.
    assert [new - old for old, new in zip(before, after, strict=True)] == [
        3 * rows * 1100 for rows in (64, 32, 40)
    ]
    c = b.connection
    assert (await c.get_tensor(w)).tobytes() == data
    for offset, size in ((0, 1), (1099, 2), (64 * 1100 - 3, 7), (136 * 1100 - 1, 150_000)):
        assert (await c.get_tensor(w, offset, size)).tobytes() == data[offset : offset + size]


async def test_pieces_at_any_place(b: Backend) -> None:
    """Ranges that begin and end within rows, in parts, across matrices: written and read."""
    now = bytearray(content(F16, SHAPE, seed=2))
    w = await weight(b, F16, SHAPE, bytes(now), shares=SHARES)
    rng = np.random.default_rng(3)
    for size in (1, 2, 1099, 5000, 71_234, 200_001, len(now)):
        offset = int(rng.integers(0, len(now) - size + 1))
        new = rng.bytes(size)
        now[offset : offset + size] = new
        await b.connection.set_tensor(w, new, offset)
    assert (await b.connection.get_tensor(w)).tobytes() == now


async def test_a_large_weight_goes_through_in_chunks(b: Backend) -> None:
    shape = (1024, 3000)
    data = content(F32, shape, seed=4)
    w = await weight(b, F32, shape, data, shares=SHARES)
    assert (await b.connection.get_tensor(w)).tobytes() == data


async def product(b: Backend, w: Tensor, x: np.ndarray) -> np.ndarray:
    leaf = await b.tensor(F32, (x.shape[1], len(x)), x)
    result = await b.compute(b.graph.mul_mat(w, leaf))
    return np.asarray(result).reshape(len(x), w.ne[1])


async def test_a_first_upload_of_a_part_leaves_the_rest_as_it_was(b: Backend) -> None:
    """What was there before (here zeros, then sevens) is what the workers get too."""
    shape = (256, 192)
    w = await weight(b, F32, shape, shares=SHARES)
    size = w.nbytes
    await b.connection.buffer_clear(w.buffer, 7)
    middle = values(100, 256, seed=5).tobytes()
    await b.connection.set_tensor(w, middle, 50 * 1024 + 3)
    expected = bytearray(b"\7" * size)
    expected[50 * 1024 + 3 : 50 * 1024 + 3 + len(middle)] = middle
    assert (await bytes_on_workers(b))[0] > 0
    assert (await b.connection.get_tensor(w)).tobytes() == expected


async def test_the_same_weight_again(b: Backend) -> None:
    before = await bytes_on_workers(b)
    shape = (256, 192)
    x = values(3, 256, seed=6)
    w = await weight(b, F32, shape, shares=SHARES)
    for seed in (7, 8):
        new = values(192, 256, seed=seed)
        await b.connection.set_tensor(w, new.tobytes())
        assert nmse(await product(b, w, x), x @ new.T) < 1e-9
        rows = [new - old for old, new in zip(before, await bytes_on_workers(b), strict=True)]
        assert rows == [1024 * n for n in (96, 64, 32)] or sum(rows) == w.nbytes


async def test_plans_follow_weights_that_move(b: Backend) -> None:
    """The same graph after its weight was cleared, uploaded, replaced by one of another shape."""
    shape = (256, 192)
    x = values(3, 256, seed=9)
    w = await weight(b, F32, shape, shares=SHARES)
    leaf = await b.tensor(F32, (256, 3), x)
    y = b.graph.mul_mat(w, leaf)
    plan = await b.prepare(y)

    async def run() -> np.ndarray:
        await plan.run()
        return (await b.download(y)).reshape(3, 192)

    assert not (await run()).any()
    new = values(192, 256, seed=10)
    await b.connection.set_tensor(w, new.tobytes())
    assert nmse(await run(), x @ new.T) < 1e-9
    await b.connection.buffer_clear(w.buffer)
    assert not (await run()).any()
    await b.connection.set_tensor(w, new.tobytes())
    # The same bytes as a weight of another shape.
    other = b.graph.new_tensor(F32, (512, 96), NAME)
    other.place(*w.location)
    await b.connection.set_tensor(other, new.tobytes())
    assert nmse(await run(), x @ new.T) < 1e-9


@pytest.mark.parametrize("offset", [0, 4096, 190 * 1024])
async def test_a_few_bytes_under_another_name(b: Backend, offset: int) -> None:
    """What is part of a split weight, but isn't written as such: MEMSET, and another tensor."""
    new = values(192, 256, seed=11)
    x = values(3, 256, seed=12)
    w = await weight(b, F32, (256, 192), new.tobytes(), shares=SHARES)
    await b.connection.memset_tensor(w, 0, offset, 2048)
    new.reshape(-1)[offset // 4 : offset // 4 + 512] = 0
    assert (await b.connection.get_tensor(w)).tobytes() == new.tobytes()
    assert nmse(await product(b, w, x), x @ new.T) < 1e-9
    # Uploaded again, so split again; then a row by a tensor of its own.
    await b.connection.set_tensor(w, new.tobytes())
    row = b.graph.new_tensor(F32, (256,), "row")
    row.place(w.buffer, w.address + offset)
    await b.connection.set_tensor(row, values(256, seed=13).tobytes())
    new.reshape(-1)[offset // 4 : offset // 4 + 256] = values(256, seed=13)
    assert (await b.connection.get_tensor(w)).tobytes() == new.tobytes()
    assert nmse(await product(b, w, x), x @ new.T) < 1e-9


async def test_copies_from_and_to_a_split_weight(b: Backend) -> None:
    """COPY_TENSOR says no, as between servers; the client then copies by itself."""
    new = values(192, 256, seed=14)
    w = await weight(b, F32, (256, 192), new.tobytes(), shares=SHARES)
    other = await weight(b, F32, (256, 192), name="some")
    assert not await b.connection.copy_tensor(w, other)
    assert not await b.connection.copy_tensor(other, w)
    assert (await b.connection.get_tensor(w)).tobytes() == new.tobytes()


async def test_a_cleared_buffer_is_clear(b: Backend) -> None:
    w = await weight(b, F32, (256, 192), content(F32, (256, 192)), shares=SHARES)
    await b.connection.buffer_clear(w.buffer, 3)
    assert set((await b.connection.get_tensor(w)).tolist()) == {3}
    await emptied(b)


async def test_what_is_freed_is_freed_on_the_workers(b: Backend, split: Coordinator) -> None:
    w = await weight(b, F32, (256, 192), content(F32, (256, 192)), shares=SHARES)
    assert all(await bytes_on_workers(b))
    await b.connection.free_buffer(w.buffer)
    await emptied(b)
    # A client that goes takes everything with it.
    async with backend(split) as other:
        await weight(other, F32, (256, 192), content(F32, (256, 192)), shares=SHARES)
        assert all(await bytes_on_workers(other))
    await emptied(b)


async def test_what_is_no_weight_stays_here(b: Backend) -> None:
    before = await bytes_on_workers(b)
    for name, shape in (
        ("blk.0.attn_norm.weight", (256, 192)),
        ("inp", (256, 192)),
        ("blk.0.ffn_up.bias", (256, 192)),
        (NAME, (256, 32)),
        (NAME, (16, 64)),
    ):
        data = content(F32, shape)
        w = await weight(b, F32, shape, data, shares=SHARES, name=name)
        assert (await b.connection.get_tensor(w)).tobytes() == data
    assert await bytes_on_workers(b) == before


async def test_uploads_past_the_end_of_a_weight(b: Backend) -> None:
    """Inside the buffer they are allowed, as memory; beyond it they end the connection."""
    data = content(F32, (256, 192), seed=15)
    w = b.graph.new_tensor(F32, (256, 192), NAME)
    w.place(*await allocate(b, w.nbytes + 4096, SHARES))
    await b.connection.set_tensor(w, data)
    await b.connection.set_tensor(w, bytes(range(256)) * 16, w.nbytes - 2048)
    got = await b.connection.get_tensor(w, 0, w.nbytes + 2048)
    assert got.tobytes() == data[:-2048] + bytes(range(256)) * 16
    await b.connection.set_tensor(w, bytes(4096), w.nbytes + 2048)
    with pytest.raises(ConnectionLost):
        await b.connection.get_alignment()


@given(st.lists(st.floats(0, 10, width=32), min_size=1, max_size=5).filter(lambda s: sum(s) > 0))
async def test_proportions_of_the_clients_choice(split: Coordinator, shares: list[float]) -> None:
    async with backend(split) as b:
        c = b.connection
        answer = await c.request(
            Command.SPLIT_ALLOC_BUFFER,
            device=0,
            size=4096,
            n_proportions=len(shares),
            proportions=[*shares, *[0.0] * (MAX_PARTS - len(shares))],
        )
        assert bool(answer.remote_ptr) == (len(shares) == 3)


@pytest.mark.parametrize(
    ("n", "shares"),
    [(3, [0.0, 0.0, 0.0]), (3, [1.0, -1.0, 1.0]), (3, [1.0, float("nan"), 1.0]), (17, [1.0] * 3),
     (3, [1.0, float("inf"), 1.0]), (2**32 - 1, [1.0] * 3)],
)  # fmt: skip
async def test_proportions_that_are_none(b: Backend, n: int, shares: list[float]) -> None:
    with pytest.raises(ConnectionLost):
        await b.connection.request(
            Command.SPLIT_ALLOC_BUFFER,
            device=0,
            size=4096,
            n_proportions=n,
            proportions=[*shares, *[0.0] * (MAX_PARTS - len(shares))],
        )


async def test_a_server_that_does_not_split_ignores_proportions(whole: WorkerProcess) -> None:
    async with backend(whole) as b:
        await weight(b, F32, (256, 192), content(F32, (256, 192)), shares=SHARES)
        assert (await status(b)).n_parts == 0
        answer = await b.connection.request(Command.SPLIT_QUERY, device=0)
        assert answer.n_parts == 0


async def test_a_split_device_tells_what_it_can_use(b: Backend, whole: WorkerProcess) -> None:
    """Weights may take what all have; what isn't weights may not, and is told nothing else."""
    answer = await b.connection.request(Command.SPLIT_QUERY, device=0)
    assert answer.n_parts == 3
    async with backend(whole) as one:
        _, total = await one.connection.get_device_memory()
    free, told = await b.connection.get_device_memory()
    assert free < told == total
    handle, _ = await b.connection.alloc_buffer(2 * free)
    await b.connection.free_buffer(handle)
    with pytest.raises(AllocationFailed):
        await b.connection.alloc_buffer(4 * total)


async def test_without_the_extension_its_commands_are_unknown(split: Coordinator) -> None:
    """What llama.cpp's clients say in HELLO is no request for it, and weights are split anyway."""
    async with await connect(HOST, split.port) as c:
        assert not c.split_version
        b = await Backend.open(c)
        data = content(F32, (256, 192), seed=16)
        w = await b.tensor(F32, (256, 192), np.frombuffer(data, np.float32).reshape(192, 256))
        assert (await c.get_tensor(w)).tobytes() == data
        await c.send_raw(bytes([Command.SPLIT_QUERY]) + (4).to_bytes(8, "little") + bytes(4))
        with pytest.raises(ConnectionLost):
            await c.get_alignment()


async def test_an_upload_takes_no_memory_here(workers: list[WorkerProcess]) -> None:
    """96 MiB of weights over two workers: the coordinator grows by a chunk or two."""
    shape = (4096, 3072)
    data = bytes(shape[0] * shape[1] * 2)
    with Coordinator(workers) as coordinator:
        async with backend(coordinator) as b:
            small = content(F32, (256, 192))
            await weight(b, F32, (256, 192), small)
            before = coordinator.rss()
            w = await weight(b, F16, shape, data)
            for _ in range(3):
                await weight(b, F16, shape, data)
            assert sum(await bytes_on_workers(b)) == 4 * len(data) + len(small)
            assert (await b.connection.get_tensor(w, 0, 1 << 20)).tobytes() == data[: 1 << 20]
            assert coordinator.peak_rss() - before < 20 << 20
