"""The server under test: one that listens somewhere, or one that is started (again) by a command.

Upstream's server ends when an assertion fails, and takes everything with it: a run over all cases
needs it started again, and the last lines that it wrote say what happened.
"""

from __future__ import annotations

import signal
import tempfile
import time
from pathlib import Path
from typing import Self

from tools.serving.ports import free_port
from tools.serving.processes import HOST, NO_BACKTRACE, Process, end_of, filled, listens, tail

_PAUSE = 0.02
_MOST_OUTPUT = 16384


class ServerGone(Exception):  # noqa: N818 - what happened
    """Nobody listens, and nobody can be started."""


class Target:
    """A server by ``address``, by ``command`` ({port} is put in), or both.

    With a command the server is started where nobody listens yet, and again when it has ended.
    ``patience``: seconds in which it must listen after its start.
    """

    def __init__(
        self,
        address: tuple[str, int] | None = None,
        command: str = "",
        *,
        patience: float = 60.0,
    ) -> None:
        if address is None and not command:
            raise ValueError("a server is given by its address or by a command that starts it")
        self.address = address or (HOST, free_port())
        self._command = command
        self._patience = patience
        self._process: Process | None = None
        # Of all its starts; there from the first one on until close().
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.starts = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_own(self) -> bool:
        """True if the server was started here, by the command: it is nobody else's."""
        return self._process is not None

    def listens(self) -> bool:
        """Return whether somebody takes connections there."""
        host, port = self.address
        return listens(port, host)

    def ensure(self, seconds: float) -> None:
        """Have a server that listens, within ``seconds``; a started one gets its own patience.

        Raises ServerGone.
        """
        if self._process is not None and self._process.alive:
            return
        if self._process is None and self._wait_until_it_listens(
            seconds if not self._command else 0
        ):
            return
        if not self._command:
            raise ServerGone("nobody listens at {}:{}".format(*self.address))
        self._start()
        if not self._wait_until_it_listens(self._patience):
            raise ServerGone(f"'{self._command}' doesn't listen:\n{self.output()}")

    def _wait_until_it_listens(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not self.listens():
            ended = self._process is not None and not self._process.alive
            if ended or time.monotonic() > end:
                return False
            time.sleep(_PAUSE)
        return True

    def _start(self) -> None:
        self.starts += 1
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="conformance-")
        self._process = Process(
            filled(self._command, self.address[1]),
            self._log,
            NO_BACKTRACE,
            Path.cwd(),
            appended=True,
            detached=True,
        )

    @property
    def _log(self) -> Path | None:
        return None if self._folder is None else Path(self._folder.name) / "log"

    def ended(self, seconds: float = 0.0) -> str:
        """Return how the process ended, if it does within ``seconds``; empty while it runs."""
        if self._process is None:
            return ""
        code = self._process.wait(seconds)
        if code is None:
            return ""
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    def mark(self) -> int:
        """Return a position in what the server writes, for output()."""
        return 0 if self._log is None else self._log.stat().st_size

    def output(self, since: int = 0, lines: int = 12) -> str:
        """Return the last lines that the server wrote after the mark ``since``."""
        if self._log is None:
            return ""
        return tail(end_of(self._log, _MOST_OUTPUT, since), lines)

    def stop(self) -> None:
        """End a server that was started here, at once."""
        if self._process is None:
            return
        self._process.kill()
        self._process = None

    def close(self) -> None:
        self.stop()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
