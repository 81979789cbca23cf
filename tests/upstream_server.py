"""llama.cpp's own ggml-rpc-server as a process, for tests that need a real peer."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tools.ports import free_port
from tools.upstream import DEFAULT_BUILD, find_program

PROGRAM = "ggml-rpc-server"


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens."""

    host: str
    port: int


def _accepts(endpoint: Endpoint) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((endpoint.host, endpoint.port), 1):
        return True
    return False


@contextlib.contextmanager
def running_upstream(
    log: Path, *options: str, build: int = DEFAULT_BUILD, patience: float = 20.0
) -> Iterator[Endpoint]:
    """A running server on a free port; skips the test where the program hasn't been built.

    ``options`` go to the program (such as -t 2, -c), its output to ``log``; a cache (-c) is kept
    beside it.
    """
    program = find_program(PROGRAM, build)
    if program is None:
        pytest.skip(f"no {PROGRAM} of llama.cpp b{build}: run python -m tools.upstream")
    endpoint = Endpoint("127.0.0.1", free_port())
    with log.open("wb") as output:
        process = subprocess.Popen(
            [program, "-H", endpoint.host, "-p", str(endpoint.port), *options],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "LLAMA_CACHE": str(log.parent)},
        )
    try:
        deadline = time.monotonic() + patience
        while not _accepts(endpoint):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{PROGRAM} did not start:\n{log.read_text(errors='replace')}")
            time.sleep(0.02)
        yield endpoint
    finally:
        process.kill()
        process.wait()
