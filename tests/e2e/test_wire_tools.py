"""A real run by tcpdump's capture: our dump, the dissector and the metrics agree."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest

from protocol.commands import Command
from tests.e2e import llama
from tests.e2e.conftest import needs_own_server
from tests.tools.test_wireshark import script, tshark
from tools.models import write_tiny_model
from tools.serving.ports import free_port
from tools.serving.processes import HOST, PROJECT

__all__ = ["script"]

pytestmark = needs_own_server


def commands_by_metrics(port: int) -> dict[str, int]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    found = {}
    for line in lines:
        if line.startswith('ggml_rpc_commands_total{command="'):
            found[line.split('"')[1]] = int(float(line.rsplit(" ", 1)[1]))
    return found


def value_by_metrics(port: int, name: str) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    (line,) = [x for x in lines if x.startswith(f"ggml_rpc_{name} ")]
    return int(float(line.rsplit(" ", 1)[1]))


def dump(capture: Path, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tools.dump", str(capture), *options],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for_packets(capture: Path, port: int) -> None:
    """Wait until all packets so far are in a capture.

    The system hands them over in blocks, most of a second later and more on a busy machine. Behind
    them is a connection on which nothing is said, known by its ports.
    """
    with socket.create_connection((HOST, port)) as last:
        mark = struct.pack(">HH", last.getsockname()[1], port)
    end = time.monotonic() + 60
    while mark not in last_bytes(capture):
        assert time.monotonic() < end, "tcpdump doesn't get on"
        time.sleep(0.1)


def last_bytes(path: Path) -> bytes:
    """The end of a file that grows."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        return file.read()


Run = tuple[Path, dict[str, int], tuple[int, int]]


def captured(folder: Path, log_folder: Path, model: Path, prompt: str) -> Run:
    """A capture of llama-completion with ``model``; what the server counted: commands, bytes."""
    tcpdump = shutil.which("tcpdump")
    if tcpdump is None:
        pytest.skip("no tcpdump: apt-get install tcpdump")
    metrics = free_port()
    server = llama.RpcServer(log_folder, "--metrics-port", str(metrics))
    capture = folder / "run.pcap"
    port = server.address.rpartition(":")[2]
    # Its buffer, in KiB, has room for the whole run: while it gets no processor nothing is lost.
    buffer = ("-B", str(256 << 10), "-U")
    filter_ = ("-i", "lo", *buffer, "-w", str(capture), "tcp", "port", port)
    listening = subprocess.Popen([tcpdump, *filter_], stderr=subprocess.PIPE, text=True)
    try:
        assert listening.stderr is not None
        first = listening.stderr.readline()
        if "permission" in first.lower():
            pytest.skip("tcpdump may not capture here: it needs to be root")
        server.wait_for("metrics at")
        before = commands_by_metrics(metrics)
        received, sent = (
            value_by_metrics(metrics, f"{x}_bytes_total") for x in ("received", "sent")
        )
        llama.completion(model, prompt, 6, rpc=server.address)
        wait_for_packets(capture, int(port))
        counted = Counter(commands_by_metrics(metrics))
        counted.subtract(before)
        received = value_by_metrics(metrics, "received_bytes_total") - received
        sent = value_by_metrics(metrics, "sent_bytes_total") - sent
    finally:
        listening.terminate()
        listening.wait(10)
        server.stop()
    return capture, {name: n for name, n in counted.items() if n}, (received, sent)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, log_folder: Path) -> Run:
    """With a real model."""
    model = llama.smollm2(llama.SMOLLM2_TYPE)
    return captured(tmp_path_factory.mktemp("real"), log_folder, model, "Once upon a time")


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, log_folder: Path) -> Run:
    """With a model of a few kilobytes.

    At loopback's full speed packets are captured out of order and again, which tshark, unlike our
    dump, does not put together.
    """
    folder = tmp_path_factory.mktemp("tiny")
    model = folder / "tiny.gguf"
    write_tiny_model(model)
    return captured(folder, log_folder, model, "onceupon")


@pytest.mark.slow
def test_statistics_equal_the_servers_metrics(run: Run) -> None:
    """Every command, and every byte in both directions."""
    capture, counted, (received, sent) = run
    figures = json.loads(dump(capture, "--stats", "--json"))
    if figures["missing_bytes"]:
        pytest.skip(f"tcpdump lost {figures['missing_bytes']} bytes: the machine is too busy")
    by_dump = figures["commands"]
    assert {name: x["requests"] for name, x in by_dump.items()} == counted
    assert sum(x["sent"] for x in by_dump.values()) == received
    assert sum(x["received"] for x in by_dump.values()) == sent


def test_graphs_and_tensors_are_named(run: Run) -> None:
    """And every request that has an answer has it beside it, with the time it took."""
    capture, _, _ = run
    text = dump(capture)
    assert "SET_TENSOR 'blk.0.attn_q.weight' Q4_1 576x576" in text
    assert "GRAPH_COMPUTE graph 1" in text
    assert text.count("<- GET_TENSOR = 192.0 KiB (after ") == 6
    graph = dump(capture, "--graph", "1")
    assert "Qcur-0  F32 64x9x" in graph
    assert "result_output" in graph


def test_the_dissector_sees_the_same(tiny_run: Run, script: Path) -> None:
    """As many requests of each command, of which as many have an answer as our decoder paired."""
    capture, counted, _ = tiny_run
    fields = ("-T", "fields", "-e", "ggml_rpc.kind", "-e", "ggml_rpc.command")
    seen: Counter[tuple[str, str]] = Counter()
    for line in tshark(script, capture, *fields).decode().splitlines():
        kinds, _, numbers = line.partition("\t")
        if kinds:
            names = [Command(int(n)).name for n in numbers.split(",")]
            seen.update(zip(kinds.split(","), names, strict=True))
    assert {name: n for (kind, name), n in seen.items() if kind == "request"} == counted
    answers = Counter(
        line.split()[3] for line in dump(capture).splitlines() if line.split()[2] == "<-"
    )
    assert {name: n for (kind, name), n in seen.items() if kind == "answer"} == answers
