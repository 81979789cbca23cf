"""Starting and stopping as a user sees it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rpc_server.options import memory_size
from tests.server.process import REPOSITORY, ServerProcess, Wire, running


def start(*options: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A start that is expected to end by itself."""
    return subprocess.run(
        [sys.executable, "-m", "rpc_server", *options],
        cwd=REPOSITORY,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_a_plain_server_loads_nothing_that_it_has_no_use_for() -> None:
    """Each of these takes memory for as long as the server runs, some of them megabytes."""
    others = {
        "client.backend", "client.connection", "client.gguf_file", "client.split.survey", "cupy",
        "gguf", "llvmlite", "numba", "prometheus_client", "rich", "rpc_server.devices.cuda.device",
        "rpc_server.devices.split.choice", "rpc_server.devices.split.device", "shutil", "tempfile",
        "yaml", "zeroconf",
    }  # fmt: skip
    code = (
        "import sys, rpc_server.__main__, rpc_server.devices.cpu.plan\n"
        f"print(*sorted({others!r} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_banner() -> None:
    with running() as server:
        server.wait_for(r"CPU: .+ \(\d+ MiB, \d+ MiB free\)")
        lines = server.log.splitlines()
    assert re.fullmatch(r"Starting ggml-rpc-server .+ \(ggml RPC protocol 7\.0\.0.*\)", lines[0])
    assert re.fullmatch(r"  endpoint       : 127\.0\.0\.1:\d+", lines[1])
    assert lines[2] == "  local cache    : n/a"
    assert lines[3] == "  protocol       : auto"
    assert lines[4] == "Devices:"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_it_cleanly(number: signal.Signals) -> None:
    server = ServerProcess()
    with Wire(server.port) as wire:
        wire.alloc(1 << 20)
        server.child.send_signal(number)
        assert server.child.wait(20) == 0
        assert wire.closed_by_server()
    assert "stopping" in server.log
    assert "Traceback" not in server.log
    server.forget()


def test_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = start("--port", str(port))
    assert done.returncode == 1
    assert f"error: port {port} of 127.0.0.1 is in use" in done.stderr


def test_address_that_is_not_ours() -> None:
    done = start("--host", "192.0.2.1", "--port", "0")
    assert done.returncode == 1
    assert "error: can't listen on 192.0.2.1" in done.stderr


def test_unknown_device() -> None:
    done = start("--device", "cpu,toaster0")
    assert done.returncode == 1
    assert "error: unknown device 'toaster0'; this machine has: CPU" in done.stderr


def test_cache_folder_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = start("--cache", LLAMA_CACHE=str(tmp_path / "file"))
    assert done.returncode == 1
    assert re.search(r"error: cache folder \S+ can't be written: ", done.stderr)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--protocol", "9.9"], "protocol 9.9 is not known; known are 7.0"),
        (["--port", "70000"], "'70000' is not a port"),
        (["--threads", "0"], "'0' is not a number above 0"),
        (["--mem", "lots"], "'lots' is not a size"),
        (["--no-mmap"], "--no-mmap is for --models"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_options(options: list[str], message: str) -> None:
    done = start(*options)
    assert done.returncode == 2
    assert message in done.stderr


def test_version() -> None:
    done = start("--version")
    assert done.returncode == 0
    assert "protocol 7.0.0" in done.stdout


def test_more_than_loopback_is_warned_about() -> None:
    with running("--host", "0.0.0.0") as server:
        server.wait_for(r"WARNING: listening on 0\.0\.0\.0, not only on this machine")


def test_memory_sizes() -> None:
    assert memory_size("512") == 512 << 20
    assert memory_size("1.5G") == 3 << 29
    assert memory_size("100 MiB") == 100 << 20


def test_hello_is_answered_soon_after_start() -> None:
    """No model of the machine's speed here: only that nothing slow is done before listening."""
    started = time.monotonic()
    with running() as server, Wire(server.port):
        assert time.monotonic() - started < 10
        maps = Path(f"/proc/{server.child.pid}/maps").read_text()
    assert "llvmlite" not in maps, "numba was loaded before a client needed it"
