"""Servers with emulated cards for llama.cpp's programs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.e2e import llama
from tools.serving.ports import free_port
from tools.serving.processes import HOST, Process, emulation_command, listens


@contextmanager
def emulated_card(log_folder: Path) -> Iterator[str]:
    """Run a server with a card whose accesses are not checked; its address."""
    port = free_port()
    log = log_folder / f"card-{port}.log"
    command = emulation_command(port, "--log-level", "debug")
    with Process(command, log, env={"EMULATION": "fast"}) as server:
        server.wait_until(lambda: listens(port), llama.START_SECONDS, "its port")
        yield f"{HOST}:{port}"
        assert server.alive, server.log
        for word in ("ERROR", "internal error", "Traceback"):
            assert word not in server.log, server.log
