"""Starts one of the two servers, and says what starting it and keeping it took."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from protocol.commands import Command
from rpc_server.options import NO_PREPARE_VARIABLE
from tools.bench.results import OURS, Sample
from tools.serving.ports import free_port
from tools.serving.processes import Process, ProgramError, own_command, upstream_command
from tools.wire import ClosedError, Wire

_START_SECONDS = 60.0
# Fine enough for a server that is there within milliseconds.
_POLL_SECONDS = 0.002
# Variables of servers that are measured: nothing is to be compiled beside that.
ALONE = {NO_PREPARE_VARIABLE: "1"}


@dataclass(frozen=True)
class Running:
    """A server that has answered HELLO."""

    name: str
    port: int
    process: Process
    start_seconds: float

    def startup(self) -> list[Sample]:
        """Return how long it took to answer."""
        return [Sample("start to HELLO", "s", False, self.start_seconds)]

    def memory(self) -> list[Sample]:
        """Return the most memory it has taken up to now."""
        return [Sample("peak memory", "MiB", False, self.process.peak_rss() / (1 << 20))]


def command(server: str, port: int, threads: int) -> list[str]:
    """Return what starts a server. Raises ProgramError where it isn't there."""
    options = ("-t", str(threads))
    if server == OURS:
        return own_command(port, *options)
    found = upstream_command(port, *options)
    if found is None:
        raise ProgramError("no ggml-rpc-server: run python -m tools.upstream")
    return found


def answers(port: int) -> bool:
    """Return whether a server on this machine answers there."""
    try:
        # A second command shows that HELLO's answer was no refusal.
        with Wire(port, timeout=5) as wire:
            return bool(wire.call(Command.DEVICE_COUNT).device_count)
    except (OSError, ClosedError):
        return False


@contextmanager
def serving(server: str, threads: int, env: Mapping[str, str] | None = None) -> Iterator[Running]:
    """Run a server with this environment beside our own.

    Raises ProgramError if it doesn't start.
    """
    port = free_port()
    started = time.perf_counter()
    with Process(command(server, port, threads), env={**ALONE, **(env or {})}) as process:
        process.wait_until(
            lambda: answers(port), _START_SECONDS, "answer to HELLO", pause=_POLL_SECONDS
        )
        yield Running(server, port, process, time.perf_counter() - started)
