"""tools.load: a short run, and that each kind of trouble is reported."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from client.backend import Backend
from client.connection import Connection, connect
from protocol.tensor import Tensor
from tests.server.process import ServerProcess, running
from tools.load import __main__ as program
from tools.load import clients
from tools.load.clients import LoadClient, LoadTally, kinds

HOST = "127.0.0.1"
# For clients of the server.
MEMORY = 1024 << 20


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running("--threads", "1", "--protocol", "7.0", "--mem", str(MEMORY >> 20)) as started:
        yield started


@pytest.mark.slow
def test_five_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    status = program.main(
        ["--clients", "20", "--minutes", "0.085", "--warm-up", "1", "--server-options", "-t 1"]
    )
    text = capsys.readouterr().out
    assert status == 0, text
    assert "12 steady" in text
    assert "no wrong result, nobody starved, nothing leaked" in text
    assert "before: 4096.0 MiB free" in text
    assert "after:  4096.0 MiB free" in text


@pytest.mark.slow
def test_a_server_that_runs_already(
    server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--endpoint", f"{HOST}:{server.port}", "--clients", "2", "--minutes", "0.01"]
    assert program.main(arguments) == 0
    assert "before: 1024.0 MiB free for clients\n" in capsys.readouterr().out


def test_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--endpoint", f"{HOST}:1", "--clients", "1", "--minutes", "0.01"]) == 2
    assert "error: " in capsys.readouterr().err


async def _crowd(server: ServerProcess, behaviour: clients.Behaviour, seconds: float) -> LoadTally:
    tally, stop = LoadTally("one", "steady"), asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, stop.set)
    await behaviour(LoadClient((HOST, server.port), tally, random.Random(1), stop))
    return tally


async def given_back(subject: program.LoadedServer) -> None:
    """Wait until no client has any memory."""
    async with asyncio.timeout(60):
        while (await subject.level()).free < MEMORY:
            await asyncio.sleep(0.01)


async def test_wrong_results_are_noticed(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Backend.download

    async def off_by_little(self: Backend, tensor: Tensor) -> np.ndarray[Any, Any]:
        return await original(self, tensor) + np.float32(0.01)

    monkeypatch.setattr(Backend, "download", off_by_little)
    tally = await _crowd(server, clients.steady, 0.3)
    assert tally.problems
    assert tally.problems[0].startswith("wrong result: off by 0.01")


@pytest.mark.parametrize("way", clients._WAYS)
async def test_each_way_of_leaving(
    server: ServerProcess, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "_WAYS", {way: clients._WAYS[way]})
    tally = await _crowd(server, clients.steady, 0.2)
    assert not tally.problems
    assert set(tally.left) == {way}


@pytest.mark.parametrize("behaviour", [clients.deaf, clients.trickling])
async def test_bad_clients_reach_the_server(
    server: ServerProcess, behaviour: clients.Behaviour
) -> None:
    tally = await _crowd(server, behaviour, 0.3)
    assert tally.connections
    assert tally.left


@pytest.mark.slow
async def test_memory_that_is_not_freed_is_noticed(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "_SETTLE_SECONDS", 0.5)
    kept: list[Connection] = []

    async def hoard(client: LoadClient) -> None:
        await client.stop.wait()
        connection = await connect(*client.address)
        await connection.alloc_buffer(1 << 20)
        kept.append(connection)

    monkeypatch.setitem(clients.KINDS, "steady", hoard)
    subject = program.LoadedServer((HOST, server.port), None)
    # What clients of other tests had is given back behind their backs.
    await given_back(subject)
    result = await program.load(subject, 1, 0.1, 0.1, 3)
    assert result.problems == ["1048576 bytes of clients were not freed"]
    for connection in kept:
        await connection.close()


def test_unfair_shares_are_noticed() -> None:
    tallies = [LoadTally(f"steady {i}", "steady", rounds=n) for i, n in enumerate((100, 110, 20))]
    tallies.append(LoadTally("slow 3", "slow", rounds=1))
    assert program._unfair(tallies) == ["steady 2: 20 rounds, 26% of a fair share"]
    for tally in tallies:
        tally.rounds //= 2
    assert program._unfair(tallies) == []


def test_the_mix_of_clients() -> None:
    assert {kind: kinds(50).count(kind) for kind in clients.KINDS} == {
        "steady": 30, "slow": 10, "deaf": 5, "trickling": 5,
    }  # fmt: skip
