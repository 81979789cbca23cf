"""Processes that the server starts for itself, and what such a process has of the one it is for.

A server for one of a coordinator's cards is held by its two pipes: on stdout it says in one line
where it listens, or why it can't; stdin says nothing, and ends when the coordinator does, however
that came to end. Then the process ends, too: there is nobody else it could serve.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from dataclasses import dataclass

# The longest line that is read of such a process, bytes.
LONGEST = 1 << 16


def environment() -> dict[str, str]:
    """Return the variables of a process that has to find the modules that are found here."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {**os.environ, "PYTHONPATH": path}


@dataclass(frozen=True, slots=True)
class Told:
    """The line that a process says: the port where it listens, or why it doesn't."""

    port: int = 0
    error: str = ""

    @classmethod
    def parse(cls, line: bytes) -> Told:
        """Return what a line says; nothing where it is none that such a process writes."""
        try:
            fields = json.loads(line)
            port, error = int(fields["port"]), str(fields["error"])
        except (ValueError, TypeError, KeyError):
            return cls()
        return cls(port if 0 <= port <= 65535 else 0, error)


class Leash:
    """The ends of the pipes that this process is held by.

    Signals are the other's: a terminal and a service manager send them to both, and that one
    lets clients have what is under way.
    """

    def __init__(self) -> None:
        self._out = os.dup(sys.stdout.fileno())
        # Whatever else is printed is for people.
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=self._hold, name="leash", daemon=True).start()

    @staticmethod
    def _hold() -> None:
        """End the process, wherever it is, with the other one."""
        with contextlib.suppress(OSError):
            while os.read(0, LONGEST):
                pass
        os._exit(0)

    def tell(self, told: Told) -> None:
        """Say where this process listens, or why it doesn't; once."""
        line = json.dumps({"port": told.port, "error": told.error})
        # Who is gone needs no answer.
        with contextlib.suppress(OSError):
            os.write(self._out, line.encode() + b"\n")
        os.close(self._out)
