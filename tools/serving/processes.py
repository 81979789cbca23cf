"""Server programs as child processes: started, waited for, read, ended.

For whatever starts servers for itself, measurements and tests alike: this project's server,
upstream's, or any other program that listens.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from tools import upstream

PROJECT = Path(__file__).parents[2]
HOST = "127.0.0.1"
# Nothing takes longer than this, however busy the machine is; more is a hang.
PATIENCE = 120.0
# What an aborting ggml prints by way of a debugger takes seconds, in which it isn't gone.
NO_BACKTRACE = {"GGML_NO_BACKTRACE": "1"}


class ProgramError(RuntimeError):
    """A program failed, or didn't print what it should; the message has the end of its log."""


def own_command(port: int | str, *options: str, module: str = "rpc_server") -> list[str]:
    """Return what starts this project's server; port 0 lets the system choose one.

    ``module`` is what is run as the server.
    """
    return [sys.executable, "-m", module, "--port", str(port), *options]


def emulation_command(port: int | str, *options: str) -> list[str]:
    """Return what starts this project's server with an emulated card.

    Raises ProgramError where the emulation is not.
    """
    if not (PROJECT / "tests" / "cuda" / "serve.py").is_file():
        raise ProgramError("the emulation is in the repository's tests/, not in packages")
    return own_command(port, *options, module="tests.cuda.serve")


def upstream_command(
    port: int, *options: str, build: int = upstream.DEFAULT_BUILD
) -> list[str] | None:
    """Return what starts upstream's server; None where it hasn't been built."""
    program = upstream.find_program("ggml-rpc-server", build)
    if program is None:
        return None
    return [str(program), "-H", HOST, "-p", str(port), *options]


def filled(command: str, port: int) -> list[str]:
    """Return a command as somebody wrote it as its words, with ``{port}`` put in."""
    return [word.replace("{port}", str(port)) for word in shlex.split(command)]


def listens(port: int, host: str = HOST) -> bool:
    """Return whether somebody accepts connections there."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), 1):
        return True
    return False


def end_of(path: Path, size: int, since: int = 0) -> str:
    """Return the last ``size`` bytes of a log as text, of those behind the first ``since``."""
    with path.open("rb") as log:
        log.seek(max(since, log.seek(0, os.SEEK_END) - size))
        return log.read(size).decode(errors="replace")


def tail(log: str, lines: int = 25) -> str:
    """Return the last lines of a log."""
    return "\n".join(log.splitlines()[-lines:])


class Process:
    """A running program; leaving its context stops it.

    Its stdout and stderr go to ``log_path``: by default to a file of its own, which the context
    removes; ``appended`` keeps what such a file has. ``env`` are variables beside those of this
    process; it runs in ``folder``. One that is ``detached`` isn't ended by the terminal's Ctrl-C.
    """

    def __init__(
        self,
        command: Sequence[str],
        log_path: Path | None = None,
        env: Mapping[str, str] | None = None,
        folder: Path = PROJECT,
        *,
        appended: bool = False,
        detached: bool = False,
    ) -> None:
        self.command = list(command)
        self._scratch = None if log_path else Path(tempfile.mkdtemp(prefix="serving-"))
        self.log_path = log_path or Path(str(self._scratch)) / "log"
        with self.log_path.open("ab" if appended else "wb") as log:
            self.child = subprocess.Popen(
                self.command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
                start_new_session=detached,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.forget()

    @property
    def log(self) -> str:
        """All it has printed so far."""
        return self.log_path.read_text(errors="replace")

    @property
    def alive(self) -> bool:
        return self.child.poll() is None

    def rss(self) -> int:
        """Return the bytes of memory in use by the process now."""
        return self._memory("VmRSS")

    def peak_rss(self) -> int:
        """Return the most bytes of memory it has used at once."""
        return self._memory("VmHWM")

    def _memory(self, field: str) -> int:
        status = Path(f"/proc/{self.child.pid}/status").read_text()
        found = re.search(rf"{field}:\s+(\d+) kB", status)
        if not found:
            raise ProgramError(f"no {field} of process {self.child.pid}")
        return int(found[1]) * 1024

    def wait_until(
        self, ready: Callable[[], bool], seconds: float, what: str, pause: float = 0.02
    ) -> None:
        """Wait for a condition; raise ProgramError when the process ends or time is over."""
        end = time.monotonic() + seconds
        while not ready():
            if not self.alive and not ready():
                raise ProgramError(f"{self.command[0]} ended before {what}:\n{tail(self.log)}")
            if time.monotonic() > end:
                raise ProgramError(f"no {what} within {seconds} s:\n{tail(self.log)}")
            time.sleep(pause)

    def wait_for(self, pattern: str, seconds: float = PATIENCE) -> re.Match[str]:
        """Wait for ``pattern`` in the log as wait_until does; return its first match."""
        found: list[re.Match[str]] = []

        def appeared() -> bool:
            found.extend(re.finditer(pattern, self.log))
            return bool(found)

        self.wait_until(appeared, seconds, repr(pattern))
        return found[0]

    def wait(self, seconds: float) -> int | None:
        """Return its exit status once it has ended; None where it hasn't within ``seconds``."""
        try:
            return self.child.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """End the process at once, as a crash or a power cut would."""
        self.child.send_signal(signal.SIGKILL)
        self.child.wait()

    def stop(self, seconds: float = 20.0) -> int:
        """Ask the process to end, and end it if it doesn't; return its exit status."""
        if self.alive:
            self.child.terminate()
            if self.wait(seconds) is None:
                self.kill()
        return int(self.child.returncode)

    def forget(self) -> None:
        """Remove the log, unless it is a file that the caller named."""
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
