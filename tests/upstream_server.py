"""llama.cpp's own ggml-rpc-server as a process, for tests that need a real peer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tools.serving.ports import free_port
from tools.serving.processes import HOST, PATIENCE, Process, listens, upstream_command
from tools.upstream import DEFAULT_BUILD


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens."""

    host: str
    port: int


@contextlib.contextmanager
def running_upstream(
    log: Path, *options: str, build: int = DEFAULT_BUILD, patience: float = PATIENCE
) -> Iterator[Endpoint]:
    """A running server on a free port; skips the test where the program hasn't been built.

    ``options`` go to the program (such as -t 2, -c), its output to ``log``; a cache (-c) is kept
    beside it.
    """
    endpoint = Endpoint(HOST, free_port())
    command = upstream_command(endpoint.port, *options, build=build)
    if command is None:
        pytest.skip(f"no ggml-rpc-server of llama.cpp b{build}: run python -m tools.upstream")
    process = Process(command, log, {"LLAMA_CACHE": str(log.parent)})
    try:
        process.wait_until(lambda: listens(endpoint.port), patience, "listening socket")
        yield endpoint
    finally:
        process.kill()
