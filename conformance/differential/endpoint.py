"""A server to drive: one that listens somewhere, or one started (again) by a command."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from client.connection import Connection, connect
from client.errors import ConnectionLost
from protocol.dialects import Dialect
from tools.serving.ports import free_port
from tools.serving.processes import HOST, NO_BACKTRACE, PATIENCE, Process, filled

# For a server that others start.
_ELSEWHERE_SECONDS = 30.0


class ServerUnavailable(RuntimeError):  # noqa: N818
    """No server answers, and none can be started."""


class Endpoint:
    """Connections to one server. ``command`` holds ``{port}``; without one ``address`` is used.

    What a started server writes goes to ``log``.
    """

    def __init__(
        self,
        *,
        address: tuple[str, int] | None = None,
        command: str = "",
        log: Path | None = None,
        version: str | Dialect = "7",
    ) -> None:
        if (address is None) == (not command):
            raise ValueError("an endpoint is an address or a command that starts a server")
        self._address = address
        self._command = command
        self._log = log
        self._version = version
        self._process: Process | None = None
        self.starts = 0

    async def connect(self) -> Connection:
        """Open a connection; start the server if it is ours to start and not running.

        Raises ServerUnavailable.
        """
        loop = asyncio.get_running_loop()
        # One that is started has a lot to do, and a card perhaps a kernel to compile.
        deadline = loop.time() + (PATIENCE if self._command else _ELSEWHERE_SECONDS)
        started = False
        while True:
            if self._command and (self._process is None or not self._process.alive):
                if started:
                    raise ServerUnavailable(f"{self}: it ended before it answered")
                self._start()
                started = True
            assert self._address is not None
            try:
                return await connect(*self._address, version=self._version)
            except (OSError, ConnectionLost, TimeoutError) as error:
                if loop.time() > deadline:
                    raise ServerUnavailable(f"{self}: {error or 'no answer'}") from None
            await asyncio.sleep(0.02)

    def _start(self) -> None:
        self.starts += 1
        port = free_port()
        self._address = (HOST, port)
        self._process = Process(
            filled(self._command, port),
            self._log or Path(os.devnull),
            NO_BACKTRACE,
            Path.cwd(),
            appended=True,
        )

    async def died(self, patience: float = 0.5) -> bool:
        """Return whether the process that we started has ended (a crash shows a moment later)."""
        if self._process is None:
            return False
        for _ in range(max(int(patience / 0.02), 1)):
            if not self._process.alive:
                return True
            await asyncio.sleep(0.02)
        return False

    def close(self) -> None:
        """End a server that was started here."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    def __str__(self) -> str:
        return self._command or "{}:{}".format(*(self._address or ("", 0)))
