"""What memory a coordinator tells, and that a model which fits into it loads."""

from __future__ import annotations

import asyncio
import itertools
import random
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from client.connection import connect
from client.errors import AllocationFailed
from protocol.commands import Command
from protocol.dialects import DIALECTS
from protocol.ggml.types import GgmlType, row_size
from protocol.tensor import Tensor, contiguous_strides
from rpc_server.devices.split import room
from rpc_server.devices.split.room import HomeMemory, Room, usable
from rpc_server.devices.split.sharded import is_split
from rpc_server.devices.split.weights import SplitStorage
from rpc_server.devices.split.worker import NoRoom, Worker, WorkerLost
from tests.client.scripted import Peer, scripted
from tests.ops.tensors import four
from tests.parameters import mostly_slow
from tests.split.cluster import HOST, Coordinator, WorkerProcess, backend, emptied, status
from tests.split.weights import content, nmse, values, weight
from tools.serving.processes import own_command

F32, F16, Q8_0 = GgmlType.F32, GgmlType.F16, GgmlType.Q8_0
MIB = 1 << 20


# -- the arithmetic


def test_of_two_workers_with_equal_shares_the_smaller_one_decides() -> None:
    equal = Room([100 * MIB, 300 * MIB], [1.0, 1.0], 24 << 30)
    assert equal.weights == equal.anything == 200 * MIB
    assert Room([100 * MIB, 300 * MIB], [1.0, 3.0], 24 << 30).anything == 400 * MIB
    # What isn't weights lies here; a buffer that is known to be weights may be larger.
    little = Room([100 * MIB, 300 * MIB], [1.0, 3.0], 50 * MIB)
    assert (little.anything, little.largest) == (50 * MIB, 400 * MIB)


def test_a_part_without_a_share_does_not_count() -> None:
    assert Room([0, 64 * MIB], [0.0, 1.0], 1 << 30).anything == 64 * MIB
    assert Room([0, 64 * MIB], [0.0, 0.0], 1 << 30).anything == 0


def test_something_is_left_alone() -> None:
    assert usable(0) == usable(10 * MIB) == 0
    assert usable(100 * MIB) == 84 * MIB
    assert usable(64 << 30) == (64 << 30) - 512 * MIB


def test_whatever_fits_what_is_told_fits_all_parts(seed: int) -> None:
    """For any memory, any shares, any mixture of weights and all else."""
    rng = random.Random(seed)
    for _ in range(20_000):
        n = rng.randint(1, 6)
        parts = [rng.choice([0, rng.randrange(1 << 20), rng.randrange(1 << 45)]) for _ in range(n)]
        shares = [rng.choice([0.0, 1.0, rng.random(), rng.random() * 1000]) for _ in range(n)]
        home, unknown = rng.randrange(1 << 45), rng.choice([0, rng.randrange(1 << 40)])
        told = Room(parts, shares, home, unknown)
        assert 0 <= told.anything <= told.largest
        if not told.anything:
            continue
        weights = rng.randint(0, told.anything)
        others = told.anything - weights
        for part, share in zip(parts, shares, strict=True):
            # All that isn't known yet may turn out to be weights.
            assert (weights + unknown) * share / sum(shares) <= part * (1 + 1e-12) + 1
        assert weights + others + unknown <= home


# -- loading


@dataclass
class FullLink:
    """A worker that has so many bytes and no more."""

    name: str
    free: int
    bytes: int = 0

    def require(self) -> None:
        pass

    async def place(self, type: GgmlType, ne: Sequence[int], name: str) -> tuple[Any, None]:
        size = row_size(type, ne[0]) * ne[1] * ne[2] * ne[3]
        await asyncio.sleep(0)
        if self.bytes + size > self.free:
            raise NoRoom(f"worker {self.name} has no room for {size} bytes")
        self.bytes += size
        return SimpleNamespace(nbytes=size), None

    async def release(self, tensor: Any, buffer: None) -> None:
        self.bytes -= tensor.nbytes

    async def write(self, tensor: Any, data: memoryview, offset: int) -> None:
        assert offset + len(data) <= tensor.nbytes


_KINDS = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_gate", "ffn_down"]


def random_tensor(i: int, rng: random.Random, address: int) -> Tensor:
    type_ = rng.choice([F32, F16, Q8_0])
    ne = four((32 * rng.randint(1, 24), rng.choice([64, 96, 100, 256, 500])))
    name = f"blk.{i}.{rng.choice(_KINDS)}.weight"
    if rng.random() < 0.1:
        ne, name = four((ne[0],)), f"blk.{i}.attn_norm.weight"
    return Tensor(i, type_, ne, contiguous_strides(type_, ne), name=name, address=address)


@pytest.mark.slow
async def test_a_model_that_is_told_to_fit_loads(seed: int) -> None:
    """However rows are rounded, and however little a part has.

    What a part has no room for stays here, where there is room for anything that was told.
    """
    rng = random.Random(seed)
    kept = 0
    for _ in range(400):
        n = rng.randint(1, 4)
        home = rng.choice([4, 16, 64]) * MIB
        links = [
            FullLink(str(i), rng.choice([rng.randrange(MIB), rng.randrange(12 * MIB)]))
            for i in range(n)
        ]
        shares = [rng.choice([0.0, 1.0, 1.0, rng.random(), 5 * rng.random()]) for _ in links]
        told = Room([link.free for link in links], shares, home).anything
        # Weights and all else in any proportion.
        model, size, goal = [], 0, rng.choice([told, told, int(rng.random() * told)])
        for i in range(200):
            t = random_tensor(i + 1, rng, size)
            if t.nbytes + size <= goal:
                model.append(t)
                size += t.nbytes
        if not model:
            continue
        others = told - size
        waiting: list[Any] = []
        parts: list[Any] = list(links)
        storage = SplitStorage(
            size,
            parts,
            shares,
            waiting.append,
            by_columns=rng.random() < 0.5,
            spare=lambda home=home, others=others: home - others,  # type: ignore[misc]
        )
        here = 0
        for t in model:
            upload = await storage.upload(t, t.address, 0, t.nbytes)
            here += t.nbytes if upload is None else 0
            kept += upload is None and is_split(t)
            while upload is not None and upload.left:
                upload.room()
                await upload.forward()
        assert all(link.bytes <= link.free for link in links)
        assert here + others <= home
        storage.close()
        for work in waiting:
            await work
        assert not any(link.bytes for link in links)
    assert kept, "no part was ever full: this has tried nothing"


def test_what_clients_hold_is_not_taken_off_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that they have written to isn't free to the system, other memory is."""
    resident, free = 100 * MIB, 1000 * MIB
    monkeypatch.setattr(room, "system_memory", lambda: (free, 2000 * MIB))
    monkeypatch.setattr(room, "_resident", lambda: resident)
    memory = HomeMemory()
    assert memory.free(0) == 1000 * MIB
    monkeypatch.setattr(room, "_BELIEVED_SECONDS", -1.0)
    # A client was given 300 MiB and has written to 200 of them.
    resident, free = 300 * MIB, 800 * MIB
    assert memory.free(300 * MIB) == 1000 * MIB
    # What else this process has taken is taken.
    resident, free = 500 * MIB, 600 * MIB
    assert memory.free(300 * MIB) == 900 * MIB


def test_the_system_is_not_asked_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = itertools.count(1)
    monkeypatch.setattr(room, "system_memory", lambda: (next(asked), 1 << 40))
    memory = HomeMemory()
    assert {memory.free(0) for _ in range(65)} == {1}


# -- over the wire


@pytest.mark.parametrize(
    ("memory", "options", "told"),
    mostly_slow(
        [
            ((100, 400), ("--tensor-split", "1,3"), 4 * 84),
            ((100, 10), (), 84),
            ((100, 100), (), 2 * 84),
            ((100, 300), ("--tensor-split", "1,1"), 2 * 84),
            ((100, 10), ("--tensor-split", "1,1"), 0),
            ((100, 300), ("--mem", "50"), 50),
        ],
        quick=2,
    ),
    ids=str,
)
async def test_what_a_coordinator_tells(
    memory: Sequence[int], options: Sequence[str], told: int
) -> None:
    """The same however often it is asked, and nothing that a model can't have."""
    with (
        WorkerProcess("--mem", str(memory[0])) as a,
        WorkerProcess("--mem", str(memory[1])) as b,
        Coordinator([a, b], *options) as coordinator,
    ):
        async with await connect(HOST, coordinator.port, split=True) as c:
            seen = {await c.get_device_memory() for _ in range(65)}
            assert len(seen) == 1
            free, total = seen.pop()
            assert abs(free - told * MIB) <= 1
            assert free <= total
            await c.alloc_buffer(free)
            with pytest.raises(AllocationFailed):
                await c.alloc_buffer(1 << 50)
            assert not (await c.get_device_memory())[0]


@pytest.mark.slow
async def test_a_slice_without_room_stays_here(whole: WorkerProcess) -> None:
    """Rows are rounded to what a part has no room for: the model loads and computes anyway."""
    shape = (1024, 1024)
    data = content(F32, shape)

    async def job(b: Any) -> Any:
        leaves = [await weight(b, F32, shape, data, name=f"blk.{i}.ffn_up.weight") for i in (0, 1)]
        x = await b.tensor(F32, (1024, 3), values(3, 1024))
        g = b.graph
        return await b.compute(g.add(*(g.mul_mat(w, g.scale(x, 1.0)) for w in leaves)))

    async with backend(whole) as b:
        expected = await job(b)
    with WorkerProcess("--mem", "64") as a, WorkerProcess("--mem", "3") as small:
        shares = ("--tensor-split", "1,1")
        with Coordinator([a, small], *shares) as coordinator:
            async with backend(coordinator) as b:
                got = await job(b)
                assert [p.bytes >> 20 for p in (await status(b)).parts] == [2, 2]
                await b.connection.get_alignment()
            assert "has no room" in coordinator.log
            assert "stays here" in coordinator.log
            assert small.alive
            async with backend(coordinator) as b:
                await emptied(b)
    assert nmse(got, expected) < 1e-10


@pytest.mark.slow
async def test_a_worker_without_room_for_activations(whole: WorkerProcess) -> None:
    """Its weights come back, and this server does their products itself."""
    shape, tokens = (1024, 1024), 2000
    data = content(F32, shape)

    async def job(b: Any) -> Any:
        w = await weight(b, F32, shape, data)
        x = await b.tensor(F32, (1024, tokens), values(tokens, 1024))
        return await b.compute(b.graph.mul_mat(w, b.graph.scale(x, 1.0)))

    async with backend(whole) as b:
        expected = await job(b)
    with (
        WorkerProcess("--mem", "100") as a,
        WorkerProcess("--mem", "7") as small,
        Coordinator([a, small], "--tensor-split", "1,1") as coordinator,
    ):
        async with backend(coordinator) as b:
            got = await job(b)
        assert "bytes of activations" in coordinator.log
        assert "this machine does it all" in coordinator.log
        assert "was lost" not in coordinator.log
    assert nmse(got, expected) < 1e-10


# -- a worker's numbers

GOOD = {"alignment": 64, "max_size": (1 << 64) - 1, "free_mem": 1 << 30, "total_mem": 1 << 31}
NONSENSE = [
    ({"alignment": 0}, "an alignment of 0 bytes"),
    ({"alignment": 48}, "an alignment of 48 bytes"),
    ({"alignment": 1 << 63}, "an alignment of"),
    ({"max_size": 0}, "buffers of no byte"),
    ({"total_mem": 0}, "bytes free"),
    ({"free_mem": (1 << 64) - 1}, "bytes free"),
    ({"free_mem": (1 << 64) - 1, "total_mem": (1 << 64) - 1}, "bytes free"),
    ({"free_mem": 0}, "has no memory free"),
]


async def tells(peer: Peer, figures: dict[str, int]) -> None:
    await peer.hello()
    for command, names in (
        (Command.GET_ALIGNMENT, ("alignment",)),
        (Command.GET_MAX_SIZE, ("max_size",)),
        (Command.GET_DEVICE_MEMORY, ("free_mem", "total_mem")),
    ):
        await peer.take(command)
        await peer.answer(command, **{name: {**GOOD, **figures}[name] for name in names})
    await peer.reader.read()


@pytest.mark.parametrize(("figures", "message"), NONSENSE, ids=str)
async def test_numbers_that_no_worker_has(figures: dict[str, int], message: str) -> None:
    async with scripted(DIALECTS[0], lambda peer: tells(peer, figures)) as port:
        with pytest.raises(WorkerLost, match=message) as caught:
            await Worker.open(HOST, port, 30.0)
    assert f"worker {HOST}:{port}" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--tensor-split", "auto")], ids=str)
async def test_a_coordinator_says_in_a_line_what_is_wrong(options: Sequence[str]) -> None:
    async with scripted(DIALECTS[0], lambda peer: tells(peer, {"alignment": 0})) as port:
        command = own_command(0, "--split", f"{HOST}:{port}", *options)
        done = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "an alignment of 0 bytes" in said
    assert "Traceback" not in said


# -- memory of the coordinator's own


def beyond_here(spare: Sequence[int]) -> SplitStorage:
    """A buffer of 64 MiB on a machine that has ``spare[0]`` bytes left."""
    return SplitStorage(
        64 * MIB, [None], [1.0], lambda work: work.close(), spare=lambda: spare[0], beyond_here=True
    )


async def test_what_is_written_here_is_held_against_what_there_is_here() -> None:
    """However it is written: each way takes no memory where there is none left."""
    spare = [4 * MIB]
    storage = beyond_here(spare)
    storage.place(0, 3 * MIB)
    spare[0] = 1 * MIB
    # Again to the same place; and to one piece more.
    storage.place(100, 2 * MIB)
    storage.fill(3 * MIB, MIB, 7)
    other = SplitStorage(32 * MIB, [None], [1.0], lambda work: work.close())
    for write in (
        lambda: storage.place(10 * MIB, 2 * MIB),
        lambda: storage.fill(10 * MIB, 2 * MIB, 7),
        lambda: storage.copy_from(other, 0, 10 * MIB, 2 * MIB),
        lambda: storage.claim(0, 64 * MIB),
    ):
        with pytest.raises(NoRoom, match="this machine has no room for"):
            write()
    with pytest.raises(NoRoom):
        await storage.overwrite(0, 64 * MIB, 7)
    with pytest.raises(NoRoom, match="for an answer of"):
        await storage.read(0, 64 * MIB)
    # Zeros take none, and what they replace is there for the next.
    await storage.overwrite(0, 64 * MIB, 0)
    spare[0] = 2 * MIB
    storage.place(10 * MIB, 2 * MIB)
    spare[0] = 0
    with pytest.raises(NoRoom):
        storage.place(0, MIB)
    for made in (storage, other):
        made.close()


async def test_a_buffer_that_fits_here_is_not_held_against_it() -> None:
    storage = SplitStorage(8 * MIB, [None], [1.0], lambda work: work.close(), spare=lambda: 0)
    storage.fill(0, 8 * MIB, 7)
    storage.close()
