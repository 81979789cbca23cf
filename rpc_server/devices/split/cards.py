"""This machine's own cards as parts: for each a server in a process of its own.

A card is a worker like any other, spoken to over the loopback address: it has its own interpreter,
and what goes wrong with it ends that process and not the coordinator. It is started with the
coordinator and ends with it, however that ends (see rpc_server.children). One that ends by itself
is started again, after longer and longer pauses if it doesn't live for long.
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

from client.split.address import OwnCard
from rpc_server.children import LONGEST, Told, environment
from rpc_server.devices.split.worker import WorkerLost

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
# Longest that a card may take to be ready: CuPy is imported, a kernel compiled, maybe all anew.
START_SECONDS = 300.0
# Pauses before a process is started again; one that has lived for as long as the longest has none.
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
# How long a process may take to end once its pipe has.
_END_SECONDS = 5.0


@dataclass(slots=True, eq=False)
class _Running:
    """A process, when it was started, and what it says of itself, once it does."""

    process: subprocess.Popen[bytes]
    since: float
    said: asyncio.Task[bytes]

    def end(self) -> None:
        """End it, and wait until it has."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class CardServer:
    """The server of one card; ``command`` starts it with the card's name behind it.

    All methods but :meth:`close` run on the event loop's thread.
    """

    def __init__(
        self,
        card: OwnCard,
        command: Sequence[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._card = card
        self._command = [*command, card.name]
        self._clock = clock
        self._running: _Running | None = None
        self._closed = False
        # Why the last one is no more, how long to wait for the next, and until when.
        self._reason = ""
        self._pause = 0.0
        self._not_before = 0.0

    async def port(self, patience: float = START_SECONDS) -> int:
        """Return where it listens on HOST; start it if it doesn't run.

        Raises WorkerLost, which says why it can't be had, also if it isn't ready within
        ``patience`` seconds; it goes on getting ready then.
        """
        if self._closed:
            raise WorkerLost(f"{self._card.name}: this server stops")
        running = self._running
        if running is not None and running.process.poll() is not None and running.said.done():
            self._note_end(running, f"its process ended ({_how(running.process)})")
            running = None
        if running is None:
            if self._clock() < self._not_before:
                raise WorkerLost(f"{self._card.name}: {self._reason}")
            running = self._start()
        await asyncio.wait([running.said], timeout=patience)
        reason = f"it was not ready within {START_SECONDS:g} s"
        if running.said.done():
            told = Told.parse(running.said.result())
            if told.port:
                return told.port
            reason = told.error
        elif self._clock() - running.since < START_SECONDS:
            raise WorkerLost(f"{self._card.name} is being started")
        await asyncio.to_thread(running.end)
        self._note_end(running, reason or f"its process ended early ({_how(running.process)})")
        raise WorkerLost(f"{self._card.name}: {self._reason}")

    async def restart(self, reason: str) -> None:
        """End it because of ``reason``: whoever asks for its port next has it started again."""
        running = self._running
        if running is not None:
            await asyncio.to_thread(running.end)
            self._note_end(running, reason)

    def _start(self) -> _Running:
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
        )
        assert process.stdout is not None
        if self._reason:
            log.warning("%s is started again: %s", self._card.name, self._reason)
        said = asyncio.ensure_future(asyncio.to_thread(_line, process.stdout))
        self._running = _Running(process, self._clock(), said)
        return self._running

    def _note_end(self, running: _Running, reason: str) -> None:
        if self._running is running:
            self._running = None
        lived = self._clock() - running.since
        longer = min(max(2 * self._pause, _FIRST_PAUSE), _LONGEST_PAUSE)
        self._pause = longer if lived < _LONGEST_PAUSE else 0.0
        self._not_before = self._clock() + self._pause
        self._reason = reason

    def close(self) -> None:
        """End it for good, from any thread."""
        self._closed, running = True, self._running
        if running is not None:
            running.end()


def _line(stream: IO[bytes]) -> bytes:
    with stream:
        return stream.readline(LONGEST)


def _how(process: subprocess.Popen[bytes]) -> str:
    """Return in words how a process ended."""
    status = process.wait()
    return f"status {status}" if status >= 0 else f"killed by signal {-status}"
