"""Clients of one coordinator: what one of them sends costs the others nothing.

They share the coordinator's connections to the workers, and what they have lies on the workers.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.backend import Backend
from client.errors import ConnectionLost
from client.tensors import Array
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from tests.split.cluster import Coordinator, WorkerProcess, backend
from tests.split.weights import content, nmse, values, weight
from tests.upstream_server import running_upstream

F32, F16, I32, I64 = GgmlType.F32, GgmlType.F16, GgmlType.I32, GgmlType.I64
WIDTH = 256
CELLS, SEQUENCES = 16, 4


@pytest.fixture(
    scope="module", params=["ours", pytest.param("upstream", marks=pytest.mark.upstream)]
)
def coordinator(
    request: pytest.FixtureRequest,
    workers: list[WorkerProcess],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Coordinator]:
    with contextlib.ExitStack() as stack:
        parts: list[WorkerProcess | str] = [*workers]
        if request.param == "upstream":
            folder: Path = tmp_path_factory.mktemp("workers")
            ends = [
                stack.enter_context(running_upstream(folder / f"{i}.log", "-t", "1"))
                for i in range(2)
            ]
            parts = [f"{end.host}:{end.port}" for end in ends]
        with Coordinator(parts, "--split-mode", "tensor") as started:
            yield started
            assert started.alive
            assert "internal error" not in started.log
            assert "was lost" not in started.log


async def projected(b: Backend, tokens: int) -> tuple[Any, Array]:
    """What a split weight makes of ``tokens`` columns: the node, and its values."""
    shape = (WIDTH, WIDTH)
    k = await weight(b, F32, shape, content(F32, shape, 3), name="blk.0.attn_k.weight")
    data = values(tokens, WIDTH, seed=4)
    x = await b.tensor(F32, (WIDTH, tokens), data)
    rows = np.frombuffer(content(F32, shape, 3), np.float32).reshape(WIDTH, WIDTH)
    return b.graph.mul_mat(k, b.graph.scale(x, 1.0)), data @ rows.T


@contextlib.asynccontextmanager
async def bystander(server: WorkerProcess) -> AsyncIterator[None]:
    """Another client, whose weights have to be there still when the block is over."""
    async with backend(server) as b:
        product, expected = await projected(b, 2)
        plan = await b.prepare(product)
        await plan.run()
        assert nmse((await b.download(product))[0, 0], expected) < 1e-10
        yield
        await plan.run()
        assert nmse((await b.download(product))[0, 0], expected) < 1e-10


async def index_out_of_range(b: Backend) -> None:
    product, _ = await projected(b, 2)
    cache = await weight(b, F16, (WIDTH, CELLS), name="cache_k_l0")
    at = await b.tensor(I64, (2,), np.array([1, CELLS]))
    await b.compute(b.graph.set_rows(cache, product, at))


async def expert_out_of_range(b: Backend) -> None:
    shape = (WIDTH, WIDTH, 4)
    experts = await weight(b, F32, shape, content(F32, shape), name="blk.0.ffn_up_exps.weight")
    x = await b.tensor(F32, (WIDTH, 1, 2), values(2, 1, WIDTH))
    chosen = await b.tensor(I32, (1, 2), np.array([[0], [4]]))
    await b.compute(b.graph.mul_mat_id(experts, x, chosen))


async def token_out_of_range(b: Backend) -> None:
    """It fails here, before anything was sent."""
    product, _ = await projected(b, 1)
    table = await b.tensor(F32, (WIDTH, 8), values(8, WIDTH))
    token = await b.tensor(I32, (1,), np.array([8]))
    await b.compute(b.graph.mul_mat(product.src[0], b.graph.get_rows(table, token)))


async def shapes_that_do_not_fit(b: Backend) -> None:
    """A product whose activations have another width than the weight."""
    product, _ = await projected(b, 2)
    x = await b.tensor(F32, (WIDTH // 2, 2), values(2, WIDTH // 2))
    await b.compute(b.graph.op(Op.MUL_MAT, F32, (WIDTH, 2), (product.src[0], x)))


async def rows_that_do_not_fit(b: Backend) -> None:
    """Rows for four sequences at once, of one."""
    product, _ = await projected(b, 2)
    cache = await weight(b, F16, (WIDTH, CELLS, SEQUENCES), name="cache_k_l0")
    at = await b.tensor(I64, (2,), np.array([1, 2]))
    node = b.graph.view_of(cache, Op.SET_ROWS, (product, at, cache))
    await b.compute(node)


@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        (index_out_of_range, f"index {CELLS} is out of range"),
        (expert_out_of_range, "index 4 is out of range"),
        (token_out_of_range, "out of range"),
        (shapes_that_do_not_fit, "MUL_MAT"),
        (rows_that_do_not_fit, "SET_ROWS"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
async def test_a_graph_that_cannot_be_done_ends_its_client_only(
    attempt: Callable[[Backend], Awaitable[None]], reason: str, coordinator: Coordinator
) -> None:
    before = len(coordinator.log)
    async with bystander(coordinator):
        async with backend(coordinator) as clumsy:
            with pytest.raises(ConnectionLost):
                await attempt(clumsy)
        said = coordinator.log[before:]
        assert any(
            "closing the connection" in line and reason in line for line in said.splitlines()
        )


async def test_rows_of_several_sequences_are_stored_in_one_go(
    coordinator: Coordinator, whole: WorkerProcess
) -> None:
    """The cache of llama.cpp's sequences: rows of all of them at once, whichever they are in."""

    async def job(b: Backend) -> list[Array]:
        g = b.graph
        product, _ = await projected(b, 3)
        cache = await weight(b, F16, (WIDTH, CELLS, SEQUENCES), name="cache_k_l0")
        await b.connection.buffer_clear(cache.buffer)
        at = await b.tensor(I64, (3,), np.array([1, CELLS, 3 * CELLS + 7]))
        rows = g.reshape(cache, WIDTH, CELLS * SEQUENCES)
        await b.compute(g.set_rows(rows, product, at))
        return [await b.download(cache)]

    async with backend(whole) as b:
        expected = await job(b)
    async with backend(coordinator) as b:
        got = await job(b)
    assert expected[0].any()
    assert nmse(got[0].astype(np.float32), expected[0].astype(np.float32)) < 1e-6
