"""--cache with --split: a model that was split once loads from the disks of its parts.

Bytes on their way to a worker are counted by a relay before it. A tensor counts as there only if
every part has its slice, cut as it is cut now; whatever is missing or damaged, the client sends it,
who lacks something is sent it, and the result is right.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from client.errors import ConnectionLost
from client.split.partition import partition
from protocol.ggml.hashing import fnv1a_64
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.devices.split import slices
from rpc_server.devices.split.sharded import ShardedWeight
from rpc_server.devices.split.slices import SliceNotes, chunks, pieces
from rpc_server.folders import PrivateFolder
from tests.parameters import mostly_slow
from tests.split.cluster import Coordinator, WorkerProcess, backend
from tests.split.relay import Relay
from tests.split.weights import NAME, content, nmse, values
from tools.serving.ports import free_port
from tools.serving.processes import Process, listens, upstream_command

F16, Q8_0 = GgmlType.F16, GgmlType.Q8_0
SHAPE = (2048, 4096)
NBYTES = 2 * 2048 * 4096
# What is sent besides weights: handshakes, messages, an input.
LITTLE = NBYTES // 20
PATIENCE = 30.0
# llama.cpp's name of a weight that tensor mode cuts by columns.
DOWN = "blk.0.ffn_down.weight"


class Site:
    """Two workers with caches behind relays, and a folder for the coordinator's."""

    def __init__(self, folder: Path, *, second: bool = True) -> None:
        self.folder = folder
        self._stack = contextlib.ExitStack()
        self.workers = [
            self._stack.enter_context(WorkerProcess(*self.cache(f"worker-{i}") * (second or not i)))
            for i in range(2)
        ]
        self.relays = [Relay(w.port) for w in self.workers]
        for relay in self.relays:
            self._stack.callback(relay.close)

    def cache(self, name: str) -> tuple[str, str]:
        return "--cache-dir", str(self.folder / name)

    def coordinator(self, *options: str, local: bool = False) -> Coordinator:
        parts = [r.address for r in self.relays] + ["local"] * local
        return Coordinator(parts, *self.cache("coordinator"), *options)

    def slices(self, worker: int) -> list[Path]:
        """What is in a worker's cache."""
        return list((self.folder / f"worker-{worker}").glob("[0-9a-f]*"))

    def lose_slices(self, worker: int) -> None:
        for path in self.slices(worker):
            path.unlink()

    @property
    def sent(self) -> int:
        return sum(r.sent for r in self.relays)

    @property
    def notes(self) -> list[Path]:
        return sorted((self.folder / "coordinator" / f".slices-{os.geteuid()}").iterdir())

    def close(self) -> None:
        for worker in self.workers:
            assert worker.alive, worker.log
            assert "ERROR" not in worker.log, worker.log
        self._stack.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.close()


async def load(
    c: WorkerProcess,
    data: bytes,
    type_: GgmlType = F16,
    shape: tuple[int, ...] = SHAPE,
    name: str = NAME,
) -> bool:
    """Load a weight as llama.cpp does, and check it; whether the server had it."""
    async with backend(c, 60.0) as b:
        w: Tensor = b.graph.new_tensor(type_, shape, name)
        await b.allocate([w])
        had = await b.connection.set_tensor_hash(w, fnv1a_64(data))
        if not had:
            await b.connection.set_tensor(w, data, cache_flag=1)
        assert (await b.connection.get_tensor(w)).tobytes() == data
        if len(shape) == 2 and type_ is F16:
            x = values(3, shape[0], seed=9)
            leaf = await b.tensor(GgmlType.F32, (shape[0], 3), x)
            got = await b.compute(b.graph.mul_mat(w, leaf))
            numbers = np.frombuffer(data, np.float16).astype(np.float32).reshape(shape[1], shape[0])
            assert nmse(got.reshape(3, shape[1]), x @ numbers.T) < 1e-5
        return had


@pytest.mark.parametrize("mode", mostly_slow(["row", "tensor"]))
@pytest.mark.parametrize("local", mostly_slow([False, True]))
@pytest.mark.slow
async def test_it_loads_from_the_workers_disks(mode: str, local: bool, site: Site) -> None:
    options = ("--split-mode", mode, "--tensor-split", "3,2,2" if local else "3,2")
    data = content(F16, SHAPE)
    with site.coordinator(*options, local=local) as first:
        assert "(and of 2 of 2 workers)" in first.log
        assert not await load(first, data, name=DOWN)
        assert "WARNING" not in first.log
    assert site.sent > NBYTES * (0.6 if local else 1)
    before = site.sent
    with site.coordinator(*options, local=local) as second:
        assert await load(second, data, name=DOWN)
        # Also for the next client of the same server, over what is there.
        assert await load(second, data, name=DOWN)
    assert site.sent - before < LITTLE


@pytest.mark.slow
async def test_types_with_blocks_experts_and_sizes_that_are_no_multiples(site: Site) -> None:
    for i, (type_, shape, name) in enumerate(
        (
            (Q8_0, (1056, 12345, 1), NAME),
            (F16, (1000, 331, 20), "blk.0.ffn_up_exps.weight"),
            (GgmlType.Q4_K, (2048, 9600), DOWN),
        )
    ):
        data = content(type_, shape, seed=i)
        assert len(data) > 10 << 20
        for had in (False, True):
            with site.coordinator("--split-mode", "tensor", "--tensor-split", "5,3") as c:
                assert await load(c, data, type_, shape, name) == had, (type_, had)


@pytest.mark.slow
async def test_another_cut_is_another_tensor(site: Site) -> None:
    data = content(F16, SHAPE)
    cuts = (("1,1",), ("2,1",), ("1,1", "--split-mode", "tensor"))
    for again in (False, True):
        for shares, *more in cuts:
            with site.coordinator("--tensor-split", shares, *more) as c:
                assert await load(c, data, name=DOWN) == again
    assert len(site.notes) == len(cuts)
    with site.coordinator("--tensor-split", "1,2") as c:
        assert not await load(c, data, name=DOWN)


@pytest.mark.slow
async def test_one_part_that_has_lost_its_slice(site: Site) -> None:
    """The other has loaded its own by then, and is not sent it again."""
    data = content(F16, SHAPE)
    with site.coordinator("--tensor-split", "1,1") as c:
        assert not await load(c, data)
        site.lose_slices(1)
        other = content(F16, SHAPE, seed=1)
        async with backend(c, 60.0) as b:
            # In a buffer that has something else.
            w = b.graph.new_tensor(F16, SHAPE, NAME)
            await b.allocate([w])
            await b.connection.set_tensor(w, other)
            # An upload has no answer: all of it is there when this has come.
            assert (await b.connection.get_tensor(w)).tobytes() == other
            before = [r.sent for r in site.relays]
            assert not await b.connection.set_tensor_hash(w, fnv1a_64(data))
            await b.connection.set_tensor(w, data, cache_flag=1)
            assert (await b.connection.get_tensor(w)).tobytes() == data
            sent = [r.sent - n for r, n in zip(site.relays, before, strict=True)]
            assert sent[0] < LITTLE
            assert sent[1] > NBYTES // 2
    with site.coordinator("--tensor-split", "1,1") as c:
        assert await load(c, data)


@pytest.mark.slow
async def test_another_content_than_was_offered_is_not_beside_what_was_loaded(site: Site) -> None:
    data, other = content(F16, SHAPE), content(F16, SHAPE, seed=1)
    with site.coordinator("--tensor-split", "1,1") as c:
        assert not await load(c, data)
        site.lose_slices(1)
        notes = site.notes
        async with backend(c, 60.0) as b:
            w = b.graph.new_tensor(F16, SHAPE, NAME)
            await b.allocate([w])
            assert not await b.connection.set_tensor_hash(w, fnv1a_64(data))
            await b.connection.set_tensor(w, other, cache_flag=1)
            with pytest.raises(ConnectionLost):
                await b.connection.get_tensor(w)
        assert "was offered as" in c.log
        assert site.notes == notes
        # Without an offer it is a weight as any other.
        assert not await load(c, other)
        assert await load(c, other)


@pytest.mark.slow
async def test_a_slice_that_is_damaged_on_disk(site: Site) -> None:
    data = content(F16, SHAPE)
    with site.coordinator("--tensor-split", "1,1") as c:
        assert not await load(c, data)
    for path in site.slices(0):
        if path.stat().st_size > 1 << 20:
            with path.open("r+b") as file:
                file.seek(12345)
                file.write(b"damage")
    with site.coordinator("--tensor-split", "1,1") as c:
        assert not await load(c, data)
        assert await load(c, data)


@pytest.mark.parametrize("damage", mostly_slow([b"", b"nonsense\n" * 9, None]))
@pytest.mark.slow
async def test_a_note_that_is_damaged(damage: bytes | None, site: Site) -> None:
    data = content(F16, SHAPE)
    with site.coordinator("--tensor-split", "1,1") as c:
        assert not await load(c, data)
        (note,) = site.notes
        text = note.read_bytes()
        note.write_bytes(text.replace(b"1", b"2", 9) if damage is None else damage)
        assert not await load(c, data)
        assert re.search(r"WARNING [^\n]*\.slices-\d+/\S+ is damaged", c.log)
        assert note.read_bytes() == text
        assert await load(c, data)


@pytest.mark.slow
async def test_a_worker_without_a_cache(tmp_path: Path) -> None:
    site = Site(tmp_path, second=False)
    try:
        data = content(F16, SHAPE)
        with site.coordinator("--tensor-split", "1,1") as c:
            assert "(and of 1 of 2 workers)" in c.log
            sent = []
            for _ in range(2):
                before = [r.sent for r in site.relays]
                assert not await load(c, data)
                sent.append([r.sent - n for r, n in zip(site.relays, before, strict=True)])
            # The second time the one that keeps its slice has it.
            assert min(*sent[0], sent[1][1]) > NBYTES // 2
            assert sent[1][0] < LITTLE
            said = rf"worker {site.relays[1].address} was started without --cache: weights"
            assert len(re.findall(said, c.log)) == 1
            assert len(site.notes) == 1
        # One that has no share needs none.
        with site.coordinator("--tensor-split", "1,0") as c:
            assert not await load(c, data)
            assert await load(c, data)
    finally:
        site.close()


@pytest.mark.slow
async def test_without_the_wish_nothing_is_kept(site: Site) -> None:
    with site.coordinator("--tensor-split", "1,1") as c:
        async with backend(c, 60.0) as b:
            w = b.graph.new_tensor(F16, SHAPE, NAME)
            await b.allocate([w])
            await b.connection.set_tensor(w, content(F16, SHAPE))
            # Nor where it comes in pieces, of which nobody knows the hash.
            await b.connection.set_tensor(w, bytes(4096), 8192, cache_flag=1)
    assert site.notes == []


@pytest.mark.upstream
@pytest.mark.slow
async def test_upstreams_workers_keep_their_slices_too(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        ports = [free_port() for _ in range(2)]
        for i, port in enumerate(ports):
            command = upstream_command(port, "-t", "1", "-c")
            if command is None:
                pytest.skip("no ggml-rpc-server: run python -m tools.upstream")
            env = {"LLAMA_CACHE": str(tmp_path / f"upstream-{i}")}
            server = stack.enter_context(Process(command, env=env))
            server.wait_until(functools.partial(listens, port), PATIENCE, "listening socket")
        relays = [Relay(port) for port in ports]
        data = content(F16, SHAPE)
        cache = ("--cache-dir", str(tmp_path / "coordinator"))
        sent = []
        for had in (False, True):
            with Coordinator([r.address for r in relays], "--tensor-split", "1,1", *cache) as c:
                assert "(and of 2 of 2 workers)" in c.log
                assert await load(c, data) == had
            sent.append(sum(r.sent for r in relays))
        assert sent[0] > NBYTES
        assert sent[1] - sent[0] < LITTLE


# -- by themselves


def weight(shape: tuple[int, int, int], axis: int, shares: tuple[float, ...]) -> ShardedWeight:
    cols, rows, matrices = shape
    nb = (2, 2 * cols, 2 * cols * rows, 2 * cols * rows * matrices)
    t = Tensor(1, F16, (cols, rows, matrices, 1), nb, name=NAME)
    cuts = partition(shape[axis], shares)
    return ShardedWeight(t, 0, axis, cuts, [None] * len(shares), None, 0)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(64, 96, 1), (160, 1000, 1), (96, 100, 7), (4096, 64, 3)])
@pytest.mark.parametrize("shares", [(1.0, 1.0), (1.0, 0.0, 3.0), (5.0, 2.0, 2.0)])
def test_pieces_are_all_that_parts_have(
    axis: int,
    shape: tuple[int, int, int],
    shares: tuple[float, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One after the other, without holes, and small whatever the tensor."""
    monkeypatch.setattr(slices, "PIECE", 10_000)
    w = weight(shape, axis, shares)
    end = dict.fromkeys(range(len(shares)), 0)
    offset = 0
    for chunk in chunks(w):
        assert chunk.offset == offset
        offset += chunk.size
        found = pieces(w, chunk)
        assert sum(p.size for p in found) == chunk.size
        for p in found:
            assert p.at == end[p.part]
            end[p.part] += p.size
    assert offset == w.tensor.nbytes
    for i, cut in enumerate(w.cuts):
        assert end[i] == w.tensor.nbytes * len(cut) // shape[axis]


def test_notes_are_bounded(tmp_path: Path) -> None:
    notes = SliceNotes(PrivateFolder.open(tmp_path), most=20)
    w = weight((64, 96, 1), 1, (1.0, 1.0))
    for i in range(25):
        notes.keep(i, w, [i, i])
        os.utime(next(tmp_path.glob(f".slices-*/{i:016x}-*")), (i, i))
    left = sorted(int(p.name[:16], 16) for p in tmp_path.glob(".slices-*/*"))
    assert len(left) <= 20
    assert left[-5:] == [20, 21, 22, 23, 24]
    assert notes.find(24, w) == [24, 24]
    assert notes.find(0, w) is None


def test_a_folder_of_others_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / f".slices-{os.geteuid()}").mkdir(mode=0o777)
    os.chmod(tmp_path / f".slices-{os.geteuid()}", 0o777)
    notes = SliceNotes(PrivateFolder.open(tmp_path))
    w = weight((64, 96, 1), 1, (1.0, 1.0))
    notes.keep(1, w, [1, 2])
    assert notes.find(1, w) is None
    assert "others can write to it" in caplog.text
