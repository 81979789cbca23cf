"""What a person sees of the server's work: the texts, and that a terminal shows them."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
import time

import pytest

from protocol.commands import Command
from rpc_server.observability.console import Snapshot, Snapshots, describe
from rpc_server.observability.metrics import ClientStats, ServerStats
from tests.server.process import tensor
from tools.serving.ports import free_port
from tools.serving.processes import PROJECT, own_command
from tools.wire import Wire

MIB = 1 << 20


def client(**counts: float) -> ClientStats:
    stats = ClientStats(number=1, name="client 1 (10.0.0.7)", since=0.0)
    for name, value in counts.items():
        setattr(stats, name, value)
    return stats


START = Snapshot(0.0, 0, 0, 0, 0, 0.0, 0)


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        (
            {"upload_bytes": 300 * MIB, "uploads": 40},
            "40 tensors, 300 MiB (150 MiB/s)",
        ),
        (
            {"upload_bytes": 100 * MIB, "uploads": 9, "cache_hit_bytes": 2 << 30, "cache_hits": 1},
            "10 tensors, 2.10 GiB (1074 MiB/s), 2.00 GiB of it from the cache",
        ),
        (
            {"graphs": 80, "graph_seconds": 1.6, "tokens": 78},
            "39.0 tokens/s, 40.0 graphs/s, 20.0 ms each",
        ),
        ({"graphs": 3, "graph_seconds": 0.3, "upload_bytes": 4096}, "1.5 graphs/s, 100.0 ms each"),
        ({"upload_bytes": 4096}, ""),
        ({}, ""),
    ],
)
def test_what_a_client_did_in_two_seconds(counts: dict[str, float], text: str) -> None:
    stats = client(**counts)
    assert describe(stats, START, Snapshot.at(stats, 2.0)) == text


def test_only_what_is_new_is_told() -> None:
    stats = ServerStats()
    one = client(graphs=10, graph_seconds=0.1)
    stats.connected(one)
    looks = Snapshots(stats)
    assert [c for c, _ in looks.news()] == [one]
    assert not list(looks.news())
    one.graphs += 1
    assert [c for c, _ in looks.news()] == [one]
    stats.disconnected(one)
    assert not list(looks.news())


class Terminal:
    """The server as a person starts it: its output is a terminal, and all that came is kept."""

    def __init__(self, port: int, *options: str) -> None:
        ours, its = pty.openpty()
        env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
        self.child = subprocess.Popen(
            own_command(port, "-t", "1", *options), cwd=PROJECT, stdout=its, stderr=its, env=env
        )
        os.close(its)
        self.text = ""
        self._fd = ours
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while data := os.read(self._fd, 4096):
                self.text += data.decode(errors="replace")
        except OSError:
            pass

    def wait_for(self, text: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while text not in self.text:
            assert time.monotonic() < end, f"no {text!r} in:\n{self.text}"
            time.sleep(0.02)

    def stop(self) -> None:
        self.child.terminate()
        self.child.wait(20)
        self._reader.join(5)
        os.close(self._fd)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a pseudo-terminal")
def test_a_terminal_shows_weights_arriving() -> None:
    """In place; what is logged meanwhile stays readable above."""
    port = free_port()
    terminal = Terminal(port)
    try:
        terminal.wait_for("Devices:")
        with Wire(port) as wire:
            handle, base = wire.alloc(64 * MIB)
            weights = tensor(1, (16 * MIB,), handle, base)
            data = bytes(16 * MIB)
            for i in range(4):
                wire.set_tensor(weights, data, i * len(data))
            wire.call(Command.GET_ALIGNMENT, {"device": 0})
            terminal.wait_for("4 tensors, 64 MiB (")
        terminal.wait_for("disconnected; freed 1 buffers")
    finally:
        terminal.stop()


def test_quiet_prints_nothing() -> None:
    port = free_port()
    terminal = Terminal(port, "--quiet")
    try:
        end = time.monotonic() + 20
        while True:
            try:
                with Wire(port) as wire:
                    wire.alloc(MIB)
                break
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.05)
    finally:
        terminal.stop()
    assert terminal.text == ""
