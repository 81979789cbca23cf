"""Sessions of servers that add up among themselves: one is played to, and the others are played."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest

from tests.split.cluster import HOST, WorkerProcess
from tests.split.test_groups import adding, members, run, send_program
from tests.split.weights import values
from tools.record.proxy import Proxy
from tools.record.recorder import Recorder
from tools.replay.__main__ import main
from tools.replay.errors import ReplayError
from tools.replay.live import Live
from tools.replay.player import Player, ReplayResult
from tools.serving.processes import PATIENCE

# No whole number of it is in a piece that is passed on.
N = 50_001


@pytest.fixture(scope="module")
def servers() -> Iterator[list[WorkerProcess]]:
    """Three that are recorded, and one that is played to."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(WorkerProcess()) for _ in range(4)]


@contextlib.asynccontextmanager
async def recording(path: Path, servers: Sequence[WorkerProcess]) -> AsyncIterator[list[int]]:
    """Ports by which servers are reached while what goes there is recorded."""
    recorder = Recorder(path)
    proxies = [Proxy((HOST, server.port), recorder, print) for server in servers]
    yield [await proxy.listen(HOST, 0) for proxy in proxies]
    for proxy in proxies:
        await proxy.close()
    recorder.close()


async def session(ports: Sequence[int]) -> None:
    """Two runs of a program that adds up three times what all members have."""
    async with members(ports) as made:
        for i, b in enumerate(made):
            await send_program(b, await adding(b, i, len(made), N, rounds=3))
        for turn in range(2):
            given = [values(N, seed=10 * turn + i) for i in range(len(made))]
            await asyncio.gather(*(run(b, x) for b, x in zip(made, given, strict=True)))


async def play(path: Path, server: WorkerProcess, recorded: int = 0) -> ReplayResult:
    name = f"{HOST}:{recorded}" if recorded else ""
    return await Player(HOST, server.port, timeout=PATIENCE, recorded=name).play(path)


@pytest.mark.parametrize("which", [0, 1, 2])
async def test_each_of_three_can_be_played(
    which: int, servers: list[WorkerProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether others came to it, it went to them, or both; and what they sent is what counts."""
    *recorded, target = servers
    path = tmp_path / "group.pcapng"
    async with recording(path, recorded) as ports:
        await session(ports)
    with pytest.raises(ReplayError, match=r"several servers .* say which by --recorded"):
        await play(path, target)
    result = await play(path, target, ports[which])
    assert result.differences == []
    assert result.worst_nmse == 0
    # The client's, and one for each of the two others.
    assert result.connections == 3
    assert result.notes == [
        f"3 connections to other servers than {HOST}:{ports[which]}, not played"
    ]

    send = Live.send

    async def change(self: Live, data: bytes, *, ahead: bool = False) -> float:
        # A bit in each piece that another member has sent.
        changed = bytearray(data)
        changed[len(data) // 2] ^= 0x40 * ahead
        return await send(self, bytes(changed), ahead=ahead)

    monkeypatch.setattr(Live, "send", change)
    # Another server, where nobody has handed out the same secret just now.
    result = await play(path, recorded[which], ports[which])
    assert "SPLIT_JOIN swaps" in result.differences[0]
    assert any("SPLIT_RUN outputs of step 4" in text for text in result.differences)


async def test_links_that_were_not_recorded(
    servers: list[WorkerProcess], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second goes to the first, past whoever recorded the second alone."""
    first, second, _, target = servers
    path = tmp_path / "half.pcapng"
    async with recording(path, [second]) as (port,):
        await session([first.port, port])
    words = [str(path), "--to", f"{HOST}:{target.port}"]
    assert await asyncio.to_thread(main, words) == 2
    assert (
        f"what part 0 ({HOST}:{first.port}) and {HOST}:{port} said to each other was not recorded"
        in capsys.readouterr().err
    )
    assert await asyncio.to_thread(main, [*words, "--recorded", f"{HOST}:{first.port}"]) == 2
    assert f"{HOST}:{first.port} is none of the servers" in capsys.readouterr().err


async def test_the_one_that_others_come_to_needs_no_other_recording(
    servers: list[WorkerProcess], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, _, target = servers
    path = tmp_path / "half.pcapng"
    async with recording(path, [first]) as (port,):
        await session([port, second.port])
    words = [str(path), "--to", f"{HOST}:{target.port}", "--tolerance", "1e-12"]
    assert await asyncio.to_thread(main, words) == 0
    assert "no difference" in capsys.readouterr().out
