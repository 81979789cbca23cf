"""Servers that announce themselves, and tools.workers, which lists them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console

from client.split.address import ServerAddress
from client.split.survey import DeviceReport, ServerReport
from tests.server.process import REPOSITORY, running
from tools.models import write_model
from tools.serving.ports import free_port
from tools.serving.processes import Process, own_command
from tools.workers.__main__ import main
from tools.workers.report import servers_json, servers_table

pytest.importorskip("zeroconf", reason="needs zeroconf: pip install '.[announce]'")

PORT = 50052


@dataclass
class Box:
    """A machine of a network: what runs a command there, and its address."""

    prefix: list[str]
    address: str
    port: int = PORT
    server: Process | None = field(default=None)

    def start(self) -> None:
        options = ("-t", "1", "--host", self.address, "--announce")
        self.server = Process([*self.prefix, *own_command(self.port, *options)])
        self.server.wait_for("announced as")

    def stop(self) -> None:
        if self.server is not None:
            self.server.stop()
            self.server.forget()
            self.server = None

    def sees(self) -> set[str]:
        """The addresses that tools.workers lists there."""
        words = ["-m", "tools.workers", "--json", "--no-measure", "--seconds", "1.5"]
        command = [*self.prefix, sys.executable, *words, "--interface", self.address]
        done = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode in (0, 1), done.stderr
        assert not done.stderr, done.stderr
        return {r["endpoint"] for r in json.loads(done.stdout) if not r["error"]}


def wait_to_see(box: Box, wanted: Callable[[set[str]], bool]) -> set[str]:
    """What a box sees once that is as ``wanted``: multicast is lost now and then, and is slow.

    On a machine's loopback it may see servers of others besides.
    """
    end = time.monotonic() + 120
    while not wanted(seen := box.sees()):
        assert time.monotonic() < end, seen
    return seen


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextlib.contextmanager
def namespaces() -> Iterator[list[Box]]:
    """Three machines on one network, each a network namespace. Raises where they are refused."""
    mark = f"rpc{os.getpid() % 100000}"
    names = [f"{mark}{i}" for i in range(3)]
    hub = f"{mark}h"
    made = []
    try:
        for name in (hub, *names):
            _ip("netns", "add", name)
            made.append(name)
        _ip("-n", hub, "link", "add", "hub", "type", "bridge")
        _ip("-n", hub, "link", "set", "hub", "up")
        for i, name in enumerate(names):
            _ip("-n", name, "link", "add", "net0", "type", "veth", "peer", f"p{i}", "netns", hub)
            _ip("-n", name, "addr", "add", f"10.99.0.{i + 1}/24", "dev", "net0")
            _ip("-n", name, "link", "set", "net0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", hub, "link", "set", f"p{i}", "master", "hub", "up")
        yield [
            Box(["ip", "netns", "exec", name], f"10.99.0.{i + 1}") for i, name in enumerate(names)
        ]
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture
def boxes() -> Iterator[list[Box]]:
    with contextlib.ExitStack() as stack:
        try:
            if shutil.which("ip") is None:
                raise OSError
            machines = stack.enter_context(namespaces())
        except (OSError, subprocess.CalledProcessError):
            # Refused here: three servers on this machine's loopback.
            machines = [Box([], "127.0.0.1", free_port()) for _ in range(3)]
        for box in machines:
            stack.callback(box.stop)
        yield machines


@pytest.mark.slow
def test_three_servers_find_one_another(boxes: list[Box]) -> None:
    """One leaves and comes back; each is seen from everywhere while it is there."""
    everybody = {f"{box.address}:{box.port}" for box in boxes}
    for box in boxes:
        box.start()
    for box in boxes:
        wait_to_see(box, everybody.__le__)
    boxes[1].stop()
    left = everybody - {f"{boxes[1].address}:{boxes[1].port}"}
    wait_to_see(boxes[0], lambda seen: seen & everybody == left)
    boxes[1].start()
    wait_to_see(boxes[2], everybody.__le__)


@pytest.mark.slow
def test_a_server_is_not_announced_unless_asked() -> None:
    with running("-t", "1") as server, running("-t", "1", "--announce") as announced:
        announced.wait_for("announced as")
        here, told = Box([], "127.0.0.1"), f"127.0.0.1:{announced.port}"
        seen = wait_to_see(here, lambda found: told in found)
    assert f"127.0.0.1:{server.port}" not in seen


@pytest.mark.slow
def test_an_announced_server_lets_in_whom_it_allows() -> None:
    """Whoever finds it is let in or not as anybody else."""
    with running("-t", "1", "--announce", "--allow", "10.1.2.3") as server:
        server.wait_for("announced as")
        assert f"127.0.0.1:{server.port}" not in Box([], "127.0.0.1").sees()


def test_a_watch_tells_again_and_again() -> None:
    with (
        running("-t", "1") as server,
        subprocess.Popen(
            [sys.executable, "-m", "tools.workers", f"127.0.0.1:{server.port}", "--no-find",
             "--no-measure", "--json", "--watch", "0.1"],
            cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
        ) as process,
    ):  # fmt: skip
        assert process.stdout is not None
        before = json.loads(process.stdout.readline())
        server.stop()
        end = time.monotonic() + 60
        while not (now := json.loads(process.stdout.readline()))[0]["error"]:
            assert time.monotonic() < end
        process.terminate()
    assert not before[0]["error"]
    assert before[0]["devices"][0]["total"] > 0
    assert now[0]["endpoint"] == before[0]["endpoint"]


def test_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"127.0.0.1:{free_port()}", "--no-find"]) == 1
    assert "refused" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--no-find"], ["box:0"], ["--watch", "0"], ["http://box"]])
def test_what_it_is_told_wrong(wrong: Sequence[str]) -> None:
    with pytest.raises(SystemExit):
        main(wrong)


@pytest.mark.slow
def test_advice_for_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path, "llama-gqa", "Q8_0")
    with running("-t", "1", "--mem", "1024") as a, running("-t", "1", "--mem", "1024") as b:
        words = [f"127.0.0.1:{s.port}" for s in (a, b)]
        words += ["--no-find", "--model", str(model), "--context", "64"]
        assert main([*words, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert main(words) == 0
        shown = capsys.readouterr().out
    kinds = [p["arrangement"]["kind"] for p in told["arrangements"]]
    assert {"alone", "layers", "row", "tensor"} == set(kinds)
    rates = [p["tokens_per_second"] for p in told["arrangements"] if p["fits"]]
    assert rates == sorted(rates, reverse=True)
    for arrangement in told["arrangements"]:
        (*coordinator, llama) = arrangement["commands"]
        assert llama.startswith("llama-server -m ")
        assert " --rpc 127.0.0.1:" in llama
        assert bool(coordinator) == (arrangement["arrangement"]["kind"] in ("row", "tensor"))
    assert "Best: " in shown
    assert "llama-server -m" in shown


def test_advice_for_what_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"nothing of the kind")
    assert main(["127.0.0.1", "--no-find", "--model", str(model)]) == 1
    assert "error: " in capsys.readouterr().err


def test_hostile_text_stays_text() -> None:
    """Neither markup of the table's library nor JSON's own signs mean anything in a name."""
    device = DeviceReport("[red]CPU[/red]", "[/]", 1 << 30, 2 << 30)
    report = ServerReport(
        ServerAddress("10.0.0.1", name="[bold]x"),
        software='"},{',
        protocols=("7.0.0",),
        devices=(device,),
    )
    out = io.StringIO()
    Console(file=out, width=240).print(
        servers_table([report, ServerReport(ServerAddress("b"), "[/x]")])
    )
    assert "[red]CPU[/red] [/]" in out.getvalue()
    assert "[bold]x" in out.getvalue()
    assert "[/x]" in out.getvalue()
    (told,) = json.loads(servers_json([report]))
    assert told["software"] == '"},{'
