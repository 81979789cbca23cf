"""Split weights from the disks of the parts: who has the model's file takes its slice from there.

Bytes on their way to workers are counted by a relay before each; what a client sends goes by the
coordinator. One has the file, another one not: both have the right slices in the end.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from client.connection import connect
from client.errors import ConnectionLost
from client.split.partition import Extent
from protocol.commands import Command
from protocol.ggml.hashing import fnv1a_64
from protocol.ggml.types import GgmlType
from rpc_server.devices.split.disks import pieces_of
from tests.client.test_gguf_file import write
from tests.parameters import mostly_slow
from tests.split.cluster import HOST, Coordinator, WorkerProcess, backend
from tests.split.relay import Relay
from tests.split.weights import NAME, content, nmse, values

Q8_0 = GgmlType.Q8_0
SHAPE = (2048, 3072)
NBYTES = 2048 * 3072 // 32 * 34
# What is sent besides weights: handshakes, messages.
LITTLE = NBYTES // 20
DOWN = "blk.0.ffn_down.weight"
EXPERTS = (256, 1024, 8)


class Site:
    """A model, servers that have it or not, and a coordinator over two workers behind relays."""

    def __init__(self, folder: Path, name: str = NAME, shape: tuple[int, ...] = SHAPE) -> None:
        self.name, self.shape = name, shape
        self.data = content(Q8_0, shape)
        self.path = folder / "m.gguf"
        write(self.path, {"odd": (GgmlType.F32, (3,), bytes(12)), name: (Q8_0, shape, self.data)})
        self._stack = contextlib.ExitStack()
        self.workers: list[WorkerProcess] = []
        self.relays: list[Relay] = []

    def worker(self, *options: str) -> None:
        started = self._stack.enter_context(WorkerProcess(*options))
        if "--models" in options:
            indexed(started)
        self.workers.append(started)
        self.relays.append(Relay(started.port))
        self._stack.callback(self.relays[-1].close)

    def coordinator(self, *options: str, local: bool = False) -> Coordinator:
        parts = [r.address for r in self.relays] + ["local"] * local
        c = self._stack.enter_context(Coordinator(parts, *options))
        if "--models" in options:
            indexed(c)
        return c

    @property
    def has(self) -> tuple[str, str]:
        return "--models", str(self.path)

    @property
    def sent(self) -> list[int]:
        return [relay.sent for relay in self.relays]

    async def load(self, c: WorkerProcess) -> bool:
        """Load the weight as llama.cpp does, and check it; whether it was had."""
        async with backend(c, 60.0) as b:
            w = b.graph.new_tensor(Q8_0, self.shape, self.name)
            await b.allocate([w])
            had = await b.connection.set_tensor_hash(w, fnv1a_64(self.data))
            if not had:
                await b.connection.set_tensor(w, self.data)
            assert (await b.connection.get_tensor(w)).tobytes() == self.data
            return had

    def close(self) -> None:
        for worker in self.workers:
            assert worker.alive, worker.log
            assert "ERROR" not in worker.log, worker.log
        self._stack.close()


def indexed(server: WorkerProcess) -> None:
    """Wait until a server has its model's index."""
    # It is made with a low priority: on a busy machine it waits for everybody.
    server.wait_for(r"\.gguf: \d+ tensors", 240.0)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.close()


@pytest.mark.slow
async def test_each_worker_loads_its_slice(site: Site) -> None:
    site.worker(*site.has)
    site.worker(*site.has)
    c = site.coordinator("--tensor-split", "1,1")
    assert await site.load(c)
    assert max(site.sent) < LITTLE


@pytest.mark.slow
async def test_one_has_the_file_and_one_has_not(site: Site) -> None:
    site.worker(*site.has)
    site.worker()
    c = site.coordinator("--tensor-split", "1,1")
    assert not await site.load(c), "the client sends what one part lacks"
    first, second = site.sent
    assert first < LITTLE
    assert NBYTES // 2 <= second < NBYTES // 2 + LITTLE
    assert not await site.load(c)
    assert site.sent[0] < LITTLE


@pytest.mark.slow
async def test_the_coordinator_has_the_file(site: Site) -> None:
    """It sends the others theirs; the client sends nothing."""
    site.worker()
    site.worker(*site.has)
    c = site.coordinator("--tensor-split", "1,1,1", *site.has, local=True)
    assert await site.load(c)
    first, second = site.sent
    assert NBYTES // 3 - LITTLE < first < NBYTES // 3 + LITTLE
    assert second < LITTLE


@pytest.mark.slow
@pytest.mark.parametrize("mapped", mostly_slow([True, False]))
async def test_products_of_slices_that_are_files(mapped: bool, site: Site) -> None:
    """The same numbers whether workers compute with their files or with what they were sent."""
    site.worker(*site.has * mapped)
    site.worker(*site.has)
    c = site.coordinator("--tensor-split", "1,1")
    x = values(4, SHAPE[0], seed=3)
    async with backend(c, 60.0) as b:
        w = b.graph.new_tensor(Q8_0, SHAPE, NAME)
        await b.allocate([w])
        assert await b.connection.set_tensor_hash(w, fnv1a_64(site.data)) == mapped
        if not mapped:
            await b.connection.set_tensor(w, site.data)
        given = b.graph.new_tensor(GgmlType.F32, (SHAPE[0], 4), "x")
        product = b.graph.mul_mat(w, given)
        await b.allocate([given])
        await b.upload(given, x)
        found = await b.compute(product)
        weights = gguf.quants.dequantize(
            np.frombuffer(site.data, np.uint8).reshape(SHAPE[1], -1),
            gguf.GGMLQuantizationType.Q8_0,
        )
        assert nmse(found.reshape(4, SHAPE[1]), x @ weights.T) < 5e-4


@pytest.mark.slow
async def test_columns_and_experts(tmp_path: Path) -> None:
    for name, shape, mode in ((DOWN, SHAPE, "tensor"), (NAME, EXPERTS, "row")):
        folder = tmp_path / mode
        folder.mkdir()
        site = Site(folder, name, shape)
        try:
            site.worker(*site.has)
            site.worker()
            options = ("--tensor-split", "1,1,1", "--split-mode", mode)
            assert await site.load(site.coordinator(*options, *site.has, local=True))
            assert site.sent[0] < len(site.data) // 10
        finally:
            site.close()


@pytest.mark.slow
async def test_a_worker_that_was_lost_and_comes_back(site: Site, tmp_path: Path) -> None:
    site.worker(*site.has)
    site.worker(*site.has)
    c = site.coordinator("--tensor-split", "1,1")
    assert await site.load(c)
    lost = site.workers.pop()
    port = lost.port
    lost.stop()
    again = WorkerProcess("--port", str(port), *site.has)
    site._stack.enter_context(again)
    indexed(again)
    site.workers.append(again)
    c.wait_for(rf"(?s)(worker \S+:{site.relays[1].port}: protocol.*){{2}}")
    before = sum(site.sent)
    assert await site.load(c)
    assert sum(site.sent) - before < LITTLE


@pytest.mark.slow
async def test_another_content_than_was_offered_ends_the_client(site: Site) -> None:
    """A part has the slice that was offered: what was sent instead must not be beside it."""
    site.worker(*site.has)
    site.worker()
    c = site.coordinator("--tensor-split", "1,1")
    async with backend(c, 60.0) as b:
        w = b.graph.new_tensor(Q8_0, SHAPE, NAME)
        await b.allocate([w])
        assert not await b.connection.set_tensor_hash(w, fnv1a_64(site.data))
        await b.connection.set_tensor(w, bytes(NBYTES))
        with pytest.raises(ConnectionLost):
            await b.connection.get_tensor(w)
    c.wait_for("was offered as [0-9a-f]{16}, and sent as [0-9a-f]{16}")
    assert not await site.load(c), "others go on"


@pytest.mark.slow
async def test_what_a_worker_keeps_in_its_cache_is_loaded_too(site: Site, tmp_path: Path) -> None:
    """A worker that was used alone with --cache has the whole tensor."""
    cache = ("--cache-dir", str(tmp_path / "cache"))
    site.worker(*cache)
    async with backend(site.workers[0], 60.0) as b:
        w = b.graph.new_tensor(Q8_0, SHAPE, NAME)
        await b.allocate([w])
        await b.connection.set_tensor(w, site.data, cache_flag=1)
        await b.connection.get_alignment()
    c = site.coordinator("--tensor-split", "1,1", *site.has, local=True)
    assert await site.load(c)
    assert max(site.sent) < LITTLE


# -- what a worker takes


@pytest.mark.slow
async def test_slices_that_are_not_sound_end_the_connection(site: Site) -> None:
    site.worker(*site.has)
    sound: dict[str, Any] = {
        "hash": fnv1a_64(site.data), "nbytes": NBYTES, "start": 3400, "size": 340,
        "distance": 6800, "count": 3, "whole": 1,
    }  # fmt: skip
    for change in (
        {"count": 0},
        {"size": 0},
        {"distance": 339},
        {"start": NBYTES - 100},
        {"count": 1 << 63, "distance": 1 << 63},
        {"size": 1 << 63, "distance": 1 << 63},
        {"address": -1},
        {"address": 5000 - 3 * 340 + 1},
        {"remote_ptr": 77},
    ):
        async with await connect(HOST, site.workers[0].port, split=True, timeout=20) as c:
            handle, _ = await c.alloc_buffer(5000)
            base = await c.buffer_get_base(handle)
            fields: dict[str, Any] = {"remote_ptr": handle, **sound, **change}
            fields["address"] = base + change.get("address", 0)
            with pytest.raises(ConnectionLost):
                await c.request(Command.SPLIT_LOAD, **fields)
    async with await connect(HOST, site.workers[0].port, split=True, timeout=20) as c:
        handle, _ = await c.alloc_buffer(5000)
        base = await c.buffer_get_base(handle)
        for fields, result in (
            (sound, 1),
            ({**sound, "hash": 1}, 0),
            ({**sound, "nbytes": 99999}, 0),
        ):
            answer = await c.request(Command.SPLIT_LOAD, remote_ptr=handle, address=base, **fields)
            assert answer.result == result
    log = site.workers[0].log
    assert len(re.findall(r"ERROR [^\n]*closing the connection", log)) == 9
    site.workers.clear()


def test_pieces_of_an_extent_are_all_of_it() -> None:
    data = np.random.default_rng(2).integers(0, 256, 80 << 20, np.uint8)
    for extent in (
        Extent(0, 70, 1000, 1, 40 << 20, 40 << 20),
        Extent(0, 0, 5, 40_000, 1000, 2000),
        Extent(0, 8, 0, 2, 20 << 20, 30 << 20),
    ):
        whole = extent.of(data).reshape(-1)
        at = extent.at
        for piece in pieces_of(extent):
            assert piece.at == at
            n = piece.count * piece.size
            assert np.array_equal(piece.of(data).reshape(-1), whole[at - extent.at :][:n])
            at += n
        assert at - extent.at == len(whole)
