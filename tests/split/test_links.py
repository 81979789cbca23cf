"""Parts that add up among themselves: --split-mode tensor, where a graph is one exchange.

Against one server, and with parts that are killed, silent or can't be reached by one another.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest

from client.backend import Backend
from client.errors import AllocationFailed, ConnectionLost
from client.tensors import Array
from protocol.ggml.ops import TensorFlag
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.devices.cpu.kernels.interface.stream import (
    BYTES_RECEIVED,
    SILENT,
    STATUS_TEXT,
)
from rpc_server.devices.split.device import _watch
from tests.parameters import mostly_slow
from tests.split.cluster import HOST, Coordinator, WorkerProcess, backend, emptied, status
from tests.split.weights import allocate, content, nmse, values

F32, F16 = GgmlType.F32, GgmlType.F16
WIDTH, INNER, CELLS = 256, 512, 32
HEADS, KV_HEADS, HEAD = 8, 8, 32
KV = KV_HEADS * HEAD
LINKED = "the parts are linked"
_SHAPES = {
    "attn_q": (WIDTH, HEADS * HEAD),
    "attn_k": (WIDTH, KV),
    "attn_v": (WIDTH, KV),
    "attn_output": (HEADS * HEAD, WIDTH),
    "ffn_gate": (WIDTH, INNER),
    "ffn_up": (WIDTH, INNER),
    "ffn_down": (INNER, WIDTH),
    "attn_norm": (WIDTH,),
    "ffn_norm": (WIDTH,),
}


@dataclass
class Model:
    """Weights of a few layers in one buffer, as llama.cpp has them, and caches in others."""

    b: Backend
    layers: list[dict[str, Tensor]]
    output: Tensor
    caches: list[tuple[Tensor, Tensor]]

    @classmethod
    async def load(cls, b: Backend, n_layers: int) -> Model:
        g = b.graph
        layers = [
            {k: g.new_tensor(F32, ne, f"blk.{i}.{k}.weight") for k, ne in _SHAPES.items()}
            for i in range(n_layers)
        ]
        output = g.new_tensor(F32, (WIDTH, 1024), "output.weight")
        every = [*(t for layer in layers for t in layer.values()), output]
        handle, base = await allocate(b, sum(t.nbytes for t in every))
        for seed, t in enumerate(every):
            t.place(handle, base)
            base += t.nbytes
            data = content(F32, t.ne, seed)
            if "norm" in t.name:
                data = (1 + np.frombuffer(data, np.float32) / 10).tobytes()
            await b.connection.set_tensor(t, data)
        caches = []
        for i in range(n_layers):
            pair = [g.new_tensor(F16, (KV, CELLS), f"cache_{x}_l{i}") for x in "kv"]
            for cache in pair:
                cache.place(*await allocate(b, cache.nbytes))
                await b.connection.buffer_clear(cache.buffer)
            caches.append((pair[0], pair[1]))
        return cls(b, layers, output, caches)

    async def step(self, tokens: int, done: int) -> Array:
        """The logits of ``tokens`` behind ``done`` others, of the last one only."""
        logits: Array = (await self.b.compute(*await self.graph(tokens, done)))[-1]
        return logits

    async def graph(self, tokens: int, done: int) -> list[Tensor]:
        """What is to be computed for that: stored rows, and logits last."""
        b, g = self.b, self.b.graph
        rng = np.random.default_rng(done)
        given = rng.standard_normal((tokens, WIDTH)).astype(np.float32)
        x = await b.tensor(F32, (WIDTH, tokens), given)
        at = await b.tensor(GgmlType.I64, (tokens,), np.arange(tokens) + done)
        positions = await b.tensor(GgmlType.I32, (tokens,), np.arange(tokens) + done)
        allowed = np.arange(CELLS)[None, :] <= (np.arange(tokens) + done)[:, None]
        mask = await b.tensor(F16, (CELLS, tokens), np.where(allowed, 0.0, -np.inf))
        last = await b.tensor(GgmlType.I32, (1,), np.array([tokens - 1], np.int32))
        stored: list[Tensor] = []
        for i, w in enumerate(self.layers):
            h = g.mul(g.rms_norm(x, 1e-6), w["attn_norm"])
            y = self._attention(i, h, positions, at, mask, stored)
            if i == len(self.layers) - 1:
                y, x = g.get_rows(y, last), g.get_rows(x, last)
            x = g.add(y, x)
            h = g.mul(g.rms_norm(x, 1e-6), w["ffn_norm"])
            gate, up = g.mul_mat(w["ffn_gate"], h), g.mul_mat(w["ffn_up"], h)
            x = g.add(g.mul_mat(w["ffn_down"], g.mul(g.silu(gate), up)), x)
        return [*stored, g.mul_mat(self.output, g.rms_norm(x, 1e-6))]

    def _attention(
        self,
        layer: int,
        h: Tensor,
        positions: Tensor,
        at: Tensor,
        mask: Tensor,
        stored: list[Tensor],
    ) -> Tensor:
        g, w = self.b.graph, self.layers[layer]
        tokens = h.ne[1]
        q = g.rope(g.reshape(g.mul_mat(w["attn_q"], h), HEAD, HEADS, tokens), positions, HEAD)
        k = g.rope(g.reshape(g.mul_mat(w["attn_k"], h), HEAD, KV_HEADS, tokens), positions, HEAD)
        v = g.mul_mat(w["attn_v"], h)
        keys, cached = self.caches[layer]
        stored += [g.set_rows(keys, g.reshape(k, KV, tokens), at), g.set_rows(cached, v, at)]
        shape, row = (HEAD, KV_HEADS, CELLS, 1), keys.nb[1]
        k_seen, v_seen = (
            g.permute(g.view_4d(c, *shape, HEAD * 2, row, row * CELLS), 0, 2, 1, 3)
            for c in (keys, cached)
        )
        y = g.flash_attn_ext(g.permute(q, 0, 2, 1, 3), k_seen, v_seen, mask, HEAD**-0.5)
        return g.mul_mat(w["attn_output"], g.reshape(y, HEADS * HEAD, tokens))


ROUNDS = ((5, 0), (1, 5), (1, 6), (3, 7))


async def rounds(server: WorkerProcess, n_layers: int = 3) -> list[Array]:
    async with backend(server) as b:
        model = await Model.load(b, n_layers)
        return [await model.step(*turn) for turn in ROUNDS]


@pytest.fixture
async def expected(whole: WorkerProcess) -> list[Array]:
    return await rounds(whole)


def is_close(got: Sequence[Array], wanted: Sequence[Array]) -> bool:
    return all(nmse(a, b) < 1e-6 for a, b in zip(got, wanted, strict=True))


PARTS: dict[str, list[int | str]] = {
    "two": [0, 1],
    "and-here": [0, "local"],
    "here-first": ["local", 1],
    "three": [0, "local", 1],
}


@pytest.mark.parametrize("parts", PARTS)
async def test_layers_are_one_exchange(
    parts: str, workers: list[WorkerProcess], expected: list[Array]
) -> None:
    """Of each graph a worker gets its inputs once, and gives its logits once."""
    names: list[WorkerProcess | str] = [
        p if isinstance(p, str) else workers[p] for p in PARTS[parts]
    ]
    shares = ",".join("1" * len(names)) if len(names) < 3 else "2,1,1"
    with Coordinator(names, "--split-mode", "tensor", "--tensor-split", shares) as coordinator:
        got = await rounds(coordinator)
        async with backend(coordinator) as b:
            exchanges = [part.exchanges for part in (await status(b)).parts]
        assert is_close(got, expected)
        assert LINKED in coordinator.log
        for word in ("comes here", "goes by rows", "go through this server", "ERROR"):
            assert word not in coordinator.log
    for name, n in zip(names, exchanges, strict=True):
        assert n == (0 if name == "local" else len(ROUNDS)), exchanges


async def test_sums_here(workers: list[WorkerProcess], expected: list[Array]) -> None:
    """As it is asked for."""
    options = ("--split-mode", "tensor", "--tensor-split", "1,1", "--split-sums", "here")
    with Coordinator(workers, *options) as coordinator:
        assert is_close(await rounds(coordinator), expected)
        async with backend(coordinator) as b:
            parts = (await status(b)).parts
        # Two blocks a layer, and the output.
        assert [part.exchanges for part in parts] == [len(ROUNDS) * 7] * 2
        assert LINKED not in coordinator.log


async def test_parts_that_cant_reach_one_another(expected: list[Array]) -> None:
    """The log says why, and sums go through the coordinator."""
    with (
        WorkerProcess("--host", "127.0.0.3") as first,
        WorkerProcess("--allow", HOST) as second,
        Coordinator(
            [f"127.0.0.3:{first.port}", second], "--split-mode", "tensor", "--tensor-split", "1,1"
        ) as coordinator,
    ):
        assert is_close(await rounds(coordinator), expected)
        assert re.search(
            rf"WARNING +worker {second.address}: 127\.0\.0\.3:{first.port} is not among those of "
            "--allow: sums of the parts go through this server",
            coordinator.log,
        )
        assert "ERROR" not in coordinator.log


@pytest.mark.parametrize("sums", ["parts", "here"])
@pytest.mark.parametrize("shares", ["1,1,0", "1,14,1", "14,1,1", "1,1,14"])
async def test_a_share_of_nothing(
    shares: str, sums: str, workers: list[WorkerProcess], expected: list[Array]
) -> None:
    """Parts without columns, of attention or at all, have nothing to add: sums are made as ever."""
    names: list[WorkerProcess | str] = [*workers, "local"]
    options = ("--split-mode", "tensor", "--tensor-split", shares, "--split-sums", sums)
    with Coordinator(names, *options) as coordinator:
        assert is_close(await rounds(coordinator), expected)
        assert "ERROR" not in coordinator.log


async def test_norms_that_are_written_again(
    whole: WorkerProcess, workers: list[WorkerProcess]
) -> None:
    """Parts have copies of what hardly changes; where it does, they don't use what was."""

    async def job(b: Backend) -> list[Array]:
        model = await Model.load(b, 2)
        nodes = await model.graph(2, 0)
        plan = await b.prepare(nodes)
        seen = []
        norm = model.layers[1]["ffn_norm"]
        for turn in range(5):
            if turn % 2:
                await b.connection.set_tensor(norm, values(WIDTH, seed=turn).tobytes())
            await plan.run()
            seen.append(await b.download(nodes[-1]))
        return seen

    async with backend(whole) as b:
        wanted = await job(b)
    assert not np.array_equal(wanted[0], wanted[1])
    options = ("--split-mode", "tensor", "--tensor-split", "1,1")
    with Coordinator(workers, *options) as coordinator:
        async with backend(coordinator) as b:
            assert is_close(await job(b), wanted)
        assert LINKED in coordinator.log
        async with backend(coordinator) as b:
            await emptied(b)


async def test_what_else_a_client_reads(whole: WorkerProcess, workers: list[WorkerProcess]) -> None:
    """A residual between two blocks, and a product of something that is computed here."""

    async def job(b: Backend) -> list[Array]:
        g = b.graph
        model = await Model.load(b, 2)
        w, v = model.layers
        x = await b.tensor(F32, (WIDTH, 3), values(3, WIDTH, seed=2))
        h = g.rms_norm(x, 1e-6)
        gate, up = g.mul_mat(w["ffn_gate"], h), g.mul_mat(w["ffn_up"], h)
        first = g.add(g.mul_mat(w["ffn_down"], g.mul(g.silu(gate), up)), x)
        h = g.rms_norm(first, 1e-6)
        gate, up = g.mul_mat(v["ffn_gate"], h), g.mul_mat(v["ffn_up"], h)
        # Sums of rows are for this server: what follows is another exchange.
        shifted = g.add(h, g.sum_rows(first))
        second = g.add(g.mul_mat(v["ffn_down"], g.mul(g.silu(gate), up)), first)
        third = g.mul_mat(v["attn_q"], g.mul(shifted, g.rms_norm(second, 1e-6)))
        fourth = g.add(g.mul_mat(w["ffn_down"], g.mul_mat(w["ffn_up"], third)), second)
        for t in (first, second, third):
            t.flags |= TensorFlag.OUTPUT
        return list(await b.compute(first, second, third, g.mul_mat(w["attn_k"], fourth)))

    async with backend(whole) as b:
        wanted = await job(b)
    for here in (False, True):
        names: list[WorkerProcess | str] = [workers[0], "local" if here else workers[1]]
        options = ("--split-mode", "tensor", "--tensor-split", "1,1")
        with Coordinator(names, *options) as coordinator:
            async with backend(coordinator) as b:
                assert is_close(await job(b), wanted)
            assert LINKED in coordinator.log
            assert "ERROR" not in coordinator.log


async def test_activations_that_are_rounded_on_their_way(
    workers: list[WorkerProcess], expected: list[Array]
) -> None:
    options = ("--split-mode", "tensor", "--tensor-split", "1,1", "--split-wire", "f16")
    for here in (False, True):
        names: list[WorkerProcess | str] = ["local" if here else workers[1], workers[0]]
        with Coordinator(names, *options) as coordinator:
            got = await rounds(coordinator)
            assert all(nmse(a, b) < 1e-4 for a, b in zip(got, expected, strict=True))
            assert LINKED in coordinator.log


# -- faults


@contextlib.contextmanager
def cluster(here: bool, timeout: float) -> Iterator[tuple[Coordinator, list[WorkerProcess]]]:
    """A coordinator over two workers of its own, and its own share if ``here``."""
    own = [WorkerProcess(), WorkerProcess()]
    names: list[WorkerProcess | str] = [*own, *(["local"] if here else [])]
    try:
        with Coordinator(
            names,
            *("--split-mode", "tensor", "--tensor-split", ",".join("1" * len(names))),
            *("--split-timeout", str(timeout)),
        ) as made:
            yield made, own
            assert made.alive, made.log
            for log in (made.log, *(w.log for w in own)):
                assert "internal error" not in log, log
                assert "Traceback" not in log, log
                assert "never retrieved" not in log, log
    finally:
        for worker in own:
            if worker.alive:
                worker.child.send_signal(signal.SIGCONT)
            worker.stop()
            worker.forget()


@contextlib.asynccontextmanager
async def generating(coordinator: Coordinator, n_layers: int) -> AsyncIterator[asyncio.Task[None]]:
    """A client that computes token after token."""
    begun = asyncio.Event()
    async with backend(coordinator, timeout=60) as b:
        model = await Model.load(b, n_layers)
        nodes = await model.graph(1, 0)
        plan = await b.prepare(nodes)

        async def job() -> None:
            while True:
                await plan.run()
                await b.download(nodes[-1])
                begun.set()

        task = asyncio.ensure_future(job())
        await asyncio.wait_for(begun.wait(), 60)
        await asyncio.sleep(0.1)
        assert not task.done(), task
        yield task


async def lost(task: asyncio.Task[None]) -> None:
    with pytest.raises(ConnectionLost):
        await asyncio.wait_for(task, 40)


async def rounds_again(coordinator: Coordinator) -> list[Array]:
    """Compute once all parts are connected to again: those that fail with another are lost, too."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await rounds(coordinator)
            except (ConnectionLost, AllocationFailed):
                await asyncio.sleep(0.5)


@pytest.mark.parametrize("here", [False, True], ids=["workers", "and-here"])
@pytest.mark.parametrize("which", mostly_slow([0, 1]))
async def test_a_part_is_killed(which: int, here: bool, expected: list[Array]) -> None:
    with cluster(here, 15) as (coordinator, own):
        async with generating(coordinator, 6) as task:
            own[which].kill()
            await lost(task)
        assert re.search(r"ERROR +client [^\n]*(hung up|was lost)[^\n]*; closing", coordinator.log)
        port = own[which].address.rpartition(":")[2]
        own[which].stop()
        own[which].forget()
        pattern = rf"worker {own[which].address}: protocol"
        own[which] = WorkerProcess("--port", port)
        await asyncio.to_thread(
            coordinator.wait_until,
            lambda: len(re.findall(pattern, coordinator.log)) > 1,
            40,
            "reconnection",
        )
        assert is_close(await rounds_again(coordinator), expected)
        assert len(re.findall(LINKED, coordinator.log)) == 2


@pytest.mark.parametrize("here", [False, True], ids=["workers", "and-here"])
@pytest.mark.parametrize("which", mostly_slow([1, 0]))
async def test_a_part_falls_silent(which: int, here: bool, expected: list[Array]) -> None:
    """The others give up on it in the time of one exchange, and say so, whoever is waited for."""
    with cluster(here, 2) as (coordinator, own):
        async with generating(coordinator, 6) as task:
            own[which].child.send_signal(signal.SIGSTOP)
            started = time.monotonic()
            await lost(task)
            took = time.monotonic() - started
            # Between two graphs it is the lease that isn't answered.
            assert 1 < took < 20
        said = r"(part \d did not answer in time|did not answer in time|no answer within 2 s)"
        assert re.search(rf"ERROR +client [^\n]*{said}[^\n]*; closing", coordinator.log)
        own[which].child.send_signal(signal.SIGCONT)
        assert is_close(await rounds_again(coordinator), expected)


class _Stopped:
    """A part as the watch sees it: what was received of it, and for how long it is waited for."""

    def __init__(self, received: int, awaited: float, following: bytes | None) -> None:
        self.peer = self.stream = self.worker = self
        self.received, self.awaited, self.next_byte = received, awaited, following
        self.interrupted = False

    def count(self, word: int) -> int:
        assert word == BYTES_RECEIVED
        return self.received

    def report(self, error: str = "") -> str:
        return ""

    def interrupt(self) -> None:
        self.interrupted = True


@pytest.mark.parametrize(
    ("received", "following", "given_up"),
    [
        (100, b"x", True),
        (100, None, False),
        (108, None, True),
    ],
    ids=["given", "not-yet", "taken"],
)
async def test_a_part_that_stops_behind_the_last_sum(
    received: int, following: bytes | None, given_up: bool
) -> None:
    """It is waited for once, whether the plan has taken what another has given or not."""
    other, silent = _Stopped(received, 0, following), _Stopped(7, 60, None)
    reports: dict[Any, str] = {}
    ends = cast(Any, {other: 108, silent: 1000})
    watch = _watch(cast(Any, [other, silent]), reports, 0.2, ends)
    if not given_up:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(watch, 3)
        assert not reports
        return
    await asyncio.wait_for(watch, 60)
    assert reports == {silent: STATUS_TEXT[SILENT]}
    assert other.interrupted
    assert silent.interrupted


async def test_a_slow_part_costs_time_alone(expected: list[Array]) -> None:
    """It stops again and again, each time for less than the patience."""
    with cluster(False, 15) as (coordinator, own):

        async def disturb() -> None:
            while True:
                own[1].child.send_signal(signal.SIGSTOP)
                await asyncio.sleep(0.05)
                own[1].child.send_signal(signal.SIGCONT)
                await asyncio.sleep(0.02)

        disturbing = asyncio.create_task(disturb())
        try:
            assert is_close(await rounds(coordinator), expected)
        finally:
            disturbing.cancel()
            own[1].child.send_signal(signal.SIGCONT)
        assert "ERROR" not in coordinator.log


async def test_two_coordinators_over_linked_workers(
    workers: list[WorkerProcess], expected: list[Array]
) -> None:
    """In opposite orders: each has links of its own, and one graph runs at a time."""
    options = ("--split-mode", "tensor", "--tensor-split", "1,1")
    with Coordinator(workers, *options) as one, Coordinator(workers[::-1], *options) as other:
        for got in await asyncio.gather(rounds(one), rounds(other), rounds(one)):
            assert is_close(got, expected)
        for coordinator in (one, other):
            assert LINKED in coordinator.log
            assert "ERROR" not in coordinator.log
