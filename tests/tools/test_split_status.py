"""tools.split_status against a coordinator, and against servers that are none."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from client.backend import Backend
from client.connection import connect
from protocol.ggml.types import GgmlType
from tests.server.process import REPOSITORY, ServerProcess, running
from tests.split.cluster import emptied
from tests.upstream_server import running_upstream
from tools.serving.ports import free_port
from tools.split_status import (
    CoordinatorStatus,
    PartStatus,
    as_text,
    main,
)

HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def worker() -> Iterator[ServerProcess]:
    with running("-t", "1") as process:
        yield process


@pytest.fixture(scope="module")
def coordinator(worker: ServerProcess) -> Iterator[ServerProcess]:
    with running(
        *("-t", "1", "--split", f"local,{HOST}:{worker.port}", "--tensor-split", "1,3"),
        *("--split-mode", "row"),
    ) as process:
        yield process


async def compute(port: int, runs: int) -> None:
    """Products of a weight of 256 rows with two columns."""
    async with Backend.connect(HOST, port) as b:
        w = await b.tensor(GgmlType.F32, (64, 256), np.ones((256, 64)), name="blk.0.ffn_up.weight")
        x = await b.tensor(GgmlType.F32, (64, 2), np.ones((2, 64)))
        y = b.graph.mul_mat(w, x)
        plan = await b.prepare(y)
        for _ in range(runs):
            await plan.run()
        assert np.all(await b.download(y) == 64)


async def status_of(port: int, capsys: pytest.CaptureFixture[str]) -> CoordinatorStatus:
    # The program has an event loop of its own.
    assert await asyncio.to_thread(main, [f"{HOST}:{port}", "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    speed = read.pop("tokens_per_second")
    status = CoordinatorStatus(
        **{**read, "parts": tuple(PartStatus(**part) for part in read["parts"])}
    )
    assert status.tokens_per_second == speed
    return status


async def test_what_was_computed_is_counted(
    coordinator: ServerProcess, worker: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    before = await status_of(coordinator.port, capsys)
    assert [part.name for part in before.parts] == ["local", f"{HOST}:{worker.port}"]
    await compute(coordinator.port, 3)
    after = await status_of(coordinator.port, capsys)
    added = after.since(before)
    assert added.graphs == 3
    assert added.tokens == 6
    assert added.graph_seconds > 0
    local, remote = added.parts
    assert local.exchanges == 0
    assert remote.exchanges == 3
    assert remote.bytes_sent >= 3 * 2 * 64 * 4
    # 192 of the 256 rows are the worker's.
    assert remote.bytes_received >= 3 * 2 * 192 * 4
    assert remote.round_trip_seconds > 0


async def test_rows_while_a_client_has_them(
    coordinator: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    async with await connect(HOST, coordinator.port, split=True) as c:
        b = await Backend.open(c)
        await emptied(b)
        await b.tensor(GgmlType.F32, (64, 256), np.ones((256, 64)), name="blk.0.ffn_up.weight")
        # Uploads have no answer; what comes after one has.
        await c.get_alignment()
        local, remote = (await status_of(coordinator.port, capsys)).parts
        assert (local.rows, remote.rows) == (64, 192)
        assert (local.bytes, remote.bytes) == (64 * 256, 192 * 256)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.split_status", *arguments]
    return subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_table(coordinator: ServerProcess, worker: ServerProcess) -> None:
    shown = run(f"{HOST}:{coordinator.port}")
    assert shown.returncode == 0, shown.stderr
    first, head, local, remote = shown.stdout.splitlines()
    assert first.startswith(f"{HOST}:{coordinator.port}: 2 parts, ")
    assert head.split()[:2] == ["part", "rows"]
    assert local.split()[0] == "local"
    assert remote.split()[0] == f"{HOST}:{worker.port}"
    assert " us " in remote


def test_again_and_again(coordinator: ServerProcess) -> None:
    endpoint = f"{HOST}:{coordinator.port}"
    with subprocess.Popen(
        [sys.executable, "-m", "tools.split_status", endpoint, "--watch", "0.1", "--json"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert len(lines[0]["parts"]) == 2
    # Nothing has run in between.
    assert [line["graphs"] for line in lines[1:]] == [0, 0]
    assert lines[2]["tokens_per_second"] is None


# -- servers that have no status


def test_a_worker_is_no_coordinator(
    worker: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"{HOST}:{worker.port}"]) == 1
    assert "is no coordinator" in capsys.readouterr().err


def test_a_server_of_an_older_protocol(capsys: pytest.CaptureFixture[str]) -> None:
    with running("--protocol", "5.1") as old:
        assert main([f"{HOST}:{old.port}"]) == 1
        assert "protocol 5.1.0 without the split extension" in capsys.readouterr().err


@pytest.mark.upstream
def test_upstreams_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running_upstream(tmp_path / "log") as endpoint:
        assert main([f"{endpoint.host}:{endpoint.port}"]) == 1
    error = capsys.readouterr().err
    assert "without the split extension" in error
    assert "started with --split" in error


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{HOST}:{free_port()}"]) == 1
    assert "can't ask" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["", "host:", "host:0", ":50052", "host:x"])
def test_what_is_no_endpoint(wrong: str) -> None:
    with pytest.raises(SystemExit):
        main([wrong])


async def test_a_device_that_is_not_there_ends_it(
    coordinator: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint = f"{HOST}:{coordinator.port}"
    assert await asyncio.to_thread(main, [endpoint, "--device", "5"]) == 1
    assert "SPLIT_STATUS" in capsys.readouterr().err
    async with await connect(HOST, coordinator.port) as still:
        assert await still.device_count() == 1


# -- arithmetic


def part(name: str, exchanges: int, waited: float) -> PartStatus:
    return PartStatus(name, 10, 1 << 20, exchanges, 100 * exchanges, 10 * exchanges, 1e-4, waited)


def test_what_was_added() -> None:
    earlier = CoordinatorStatus(10, 2.0, 20, (part("a", 5, 1.0), part("b", 50, 2.0)))
    later = CoordinatorStatus(16, 5.0, 80, (part("a", 8, 1.5), part("b", 3, 0.25)))
    added = later.since(earlier)
    assert (added.graphs, added.tokens, added.tokens_per_second) == (6, 60, 20.0)
    assert added.parts[0] == part("a", 3, 0.5)
    # It was reached anew: its counts began at 0.
    assert added.parts[1] == part("b", 3, 0.25)


def test_the_table_lines_up() -> None:
    text = as_text(
        "here", CoordinatorStatus(4, 2.0, 40, (part("a", 1, 0.5), part("a longer name", 9, 1.0)))
    )
    first, *table = text.splitlines()
    assert first == "here: 2 parts, 4 graphs in 2.0 s, 40 tokens, 20.0 tokens/s"
    assert len({len(line) for line in table}) == 1
    assert table[1].endswith("0.50 s (25 %)")
    local = PartStatus("local", 1, 1, 0, 0, 0, 0.0, 0.0)
    assert (
        as_text("here", CoordinatorStatus(0, 0.0, 0, (local,))).splitlines()[2].split()[3:]
        == ["-"] * 5
    )
    assert CoordinatorStatus(0, 0.0, 0, ()).tokens_per_second is None
