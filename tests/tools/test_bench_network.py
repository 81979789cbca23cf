"""What bench says of machines in a network: the relay between them, tables and the picture."""

from __future__ import annotations

import argparse
import asyncio
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import pytest

from rpc_server.devices.cpu.kernels.interface import stream
from tools import upstream
from tools.bench import llama, relay, sleeping
from tools.bench import split as bench
from tools.bench.link_picture import Bar, svg
from tools.bench.rest import waiting
from tools.bench.split import (
    ONE,
    SETUPS,
    Measured,
    NetworkLink,
    Row,
    RunningSetup,
    Setup,
    TokenCount,
    chosen,
    link_table,
    predicted,
    table,
)
from tools.serving import ports
from tools.serving.ports import free_port
from tools.serving.processes import ProgramError


async def test_the_relay_passes_all_bytes_and_their_end_both_ways() -> None:
    got = bytearray()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.extend(await reader.read(-1))
        writer.write(bytes(got[::-1]))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = free_port()
    to = ("127.0.0.1", server.sockets[0].getsockname()[1])
    threading.Thread(target=relay.serve, args=(port, to, 0.001, 1e9), daemon=True).start()
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            break
        except ConnectionRefusedError:
            await asyncio.sleep(0.01)
    sent = bytes(range(256)) * 4096
    writer.write(sent)
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(-1), 120) == sent[::-1]
    assert got == sent
    writer.close()
    server.close()


def test_a_free_port_is_given_once_and_is_none_of_the_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = tmp_path / "range"
    system.write_text("30000\t60999\n")
    monkeypatch.setattr(ports, "_OF_THE_SYSTEM", system)
    given = [free_port() for _ in range(300)]
    assert len(set(given)) == len(given)
    assert max(given) < 30000
    # One that leaves none: then it is the system's choice.
    for told in ("1024\t65535\n", None):
        system.unlink() if told is None else system.write_text(told)
        with socket.create_server(("127.0.0.1", free_port())):
            pass


def test_networks_are_given_by_delay_and_rate() -> None:
    link = NetworkLink.of("0.25:1")
    assert (link.delay, link.rate) == (0.00025, 125e6)
    assert link.name == "0.25 ms, 1 Gbit/s"
    assert NetworkLink(0.0, 1e9).name == "the relay alone"
    for text in ("", "1", "1:2:3", "a:b"):
        with pytest.raises(argparse.ArgumentTypeError, match="DELAY:RATE"):
            NetworkLink.of(text)


def test_a_token_takes_what_it_took_and_what_the_network_adds() -> None:
    assert predicted(0.1, 60, 2e6, 0.0005, 100e6) == pytest.approx(0.1 + 0.03 + 0.02)


def test_the_tables_have_medians_and_ratios_of_each_round() -> None:
    rows = {
        # The machine was half as fast in the second round.
        "one worker": Measured([20.0, 10.0, 20.0], [100.0] * 3, [], [25.0] * 3),
        "two workers, row": Measured(
            [30.0, 20.0, 36.0], [150.0] * 3, [3 << 20, 5 << 20, 0], [50.0, 50.0, 75.0]
        ),
        "two workers, by layers": Measured([10.0] * 3, [50.0] * 3),
    }
    lines = table(rows).splitlines()
    same = "1.00 (1.00 to 1.00)"
    assert lines[2] == f"| one worker | 20.0 | {same} | 25.0 | {same} | 100 | {same} |  |"
    assert lines[3] == (
        "| two workers, row | 30.0 | 1.80 (1.50 to 2.00) | 50.0 | 2.00 (2.00 to 3.00) "
        "| 150 | 1.50 (1.50 to 1.50) | 5 MiB |"
    )
    assert "| 0.50 (0.50 to 1.00) |  |  | 50.0 |" in lines[4]
    assert any(line.startswith("measured but derived") for line in lines)
    once = {"one worker": Measured([10.0], [100.0])}
    assert table(once).splitlines()[2:] == ["| one worker | 10.0 | 1.00 |  |  | 100 | 1.00 |  |"]
    row = Row("0.25 ms, 1 Gbit/s", "row", 0.001, 60.0, 0.0, 2e6, 0.2, 0.1)
    assert "0.25 ms, 1 Gbit/s" in link_table([row])


class _Spending:
    """A process, and what it has spent when it is asked: a list for the turns."""

    def __init__(self, pid: int) -> None:
        self.child, self.pid = self, pid


def test_processor_time_is_that_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what a prompt took, nor what a test takes beside its tokens."""
    spent = {1: [7.0, 8.0, 9.0, 10.0, 13.0], 2: [9.0] * 4 + [9.5], 3: [0.0, 1.0, 2.0, 3.0, 5.25]}
    monkeypatch.setattr(bench, "processor_seconds", lambda pid: spent[pid].pop(0))
    processes = cast(Any, [_Spending(1), _Spending(2), _Spending(3)])
    count = TokenCount(RunningSetup([0], processes[:2], processes[2]))
    for tokens in (0, 4, 4, 14):
        count({"n_prompt": 0 if tokens else 64, "n_gen": tokens, "samples_ts": [9.0, 9.0]})
    assert count.seconds() == ([2 / 20, 0.5 / 20], 1.25 / 20)


def test_a_server_that_sleeps_is_the_server_but_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_SPIN_NS", stream._SPIN_NS)
    assert stream.Stream(1.0, renewed=False)._words[stream.SPIN_NS] > 0
    words: list[Sequence[str] | None] = []

    def serve(arguments: Sequence[str] | None) -> int:
        words.append(arguments)
        return int(stream.Stream(1.0, renewed=False)._words[stream.SPIN_NS])

    monkeypatch.setattr(sleeping, "serve", serve)
    assert sleeping.main(["--port", "1"]) == 0
    assert words == [["--port", "1"]]


def test_parts_compute_at_the_same_time_and_a_coordinator_without_a_share_before_them() -> None:
    workers = Setup("", 2, split=("0", "1"))
    assert workers.token_seconds([0.3, 0.2], 0.01) == pytest.approx(0.31)
    here = Setup("", 2, split=("local", "1"))
    assert here.token_seconds([0.3], 0.4) == 0.4
    assert ONE.token_seconds([0.5], 0.0) == 0.5
    three = Setup("", 3, split=("0", "1", "2"), mode="tensor")
    assert [s.is_counted(2, always=False) for s in (ONE, workers, three)] == [True, False, True]
    assert not three.is_counted(3, always=False)
    never = [s.name for s in SETUPS if not s.is_counted(2, always=True)]
    assert never == [
        "two workers, by layers",
        "upstream, one server",
        "upstream, two servers by layers",
        "upstream, -sm tensor over two",
    ]


def test_setups_are_chosen_by_name_and_compared_with_one_worker() -> None:
    assert chosen([]) == list(SETUPS)
    names = [s.name for s in chosen(["three workers, tensor", "two workers, row"])]
    assert names == ["one worker", "two workers, row", "three workers, tensor"]
    with pytest.raises(SystemExit):
        bench.main(["--model", "m.gguf", "--setup", "no such servers"])


def test_what_was_loaded_is_left_alone_before_it_is_measured(tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    with model.open("wb") as file:
        file.truncate(1_200_000_000)
    assert waiting(model) == ("--delay", "5")


def test_tests_of_llama_bench_are_told_as_they_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "told"
    program = tmp_path / "llama-bench"
    program.write_text(
        f"""#!/bin/sh
echo '{{"n_prompt": 8, "n_gen": 0, "n_depth": 0, "avg_ts": 50.0, "samples_ts": [50.0]}}'
while [ ! -e {told} ]; do sleep 0.01; done
echo '{{"n_prompt": 0, "n_gen": 4, "n_depth": 0, "avg_ts": 5.0, "samples_ts": [5.0]}}'
echo "$@" >&2
[ "$2" = model ]
"""
    )
    program.chmod(0o755)
    monkeypatch.setattr(upstream, "find_program", lambda name: program)
    options = llama.BenchOptions(8, 4, (0,), 1, 1, True)
    heard: list[int] = []

    def tell(test: llama.BenchTest) -> None:
        heard.append(test["n_prompt"])
        told.touch()

    samples = llama.bench_at("here:1", Path("model"), options, (), tell)
    assert [(s.name, s.value) for s in samples] == [("pp8", 50.0), ("tg4", 5.0)]
    assert heard == [8, 0]
    with pytest.raises(ProgramError, match=r"(?s)ended with 1:\n.*--rpc here:1"):
        llama.bench_at("here:1", Path("another"), options)


def test_the_picture_of_networks_is_well_formed_and_shows_each() -> None:
    bars = [
        Bar("row", "1 ms, 1 Gbit/s", 0.2, 0.19),
        Bar("row", "0.1 ms, 10 Gbit/s", 0.05, 0.06),
        Bar("tensor", "1 ms, 1 Gbit/s", 9.0, 9.0),
    ]
    picture = ElementTree.fromstring(svg("A network", bars, alone=0.1))
    texts = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    for name in ("--split-mode row", "--split-mode tensor", "1 ms, 1 Gbit/s"):
        assert name in texts
    assert "200 ms, 0.50\N{MULTIPLICATION SIGN}" in texts
    boxes = picture.iter("{http://www.w3.org/2000/svg}rect")
    kinds = [box.get("class") for box in boxes if box.get("class") != "page"]
    assert kinds == ["behind", "ahead", "behind"]
