"""A client program: started against a port, watched until it ends."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from pathlib import Path

from tools.serving.processes import NO_BACKTRACE, Process, end_of, filled

_OUTPUT = 4000


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a run of the client; ``status`` None for one that had to be killed."""

    status: int | None
    seconds: float
    output: str

    @property
    def signal(self) -> str:
        """The name of the signal that ended it, by which a crash or an abort is seen."""
        if self.status is None or self.status >= 0:
            return ""
        try:
            return signal.Signals(-self.status).name
        except ValueError:
            return f"signal {-self.status}"

    @property
    def words(self) -> str:
        """The way it ended, in words."""
        if self.status is None:
            return f"it was still running after {self.seconds:.0f} s"
        if self.signal:
            return f"it was ended by {self.signal}"
        return f"it ended with status {self.status}"


def run_client(command: str, port: int, timeout: float) -> Ended:
    """Run ``command`` ({port} put in) to its end, or kill it after ``timeout`` seconds."""
    started = time.monotonic()
    with Process(filled(command, port), env=NO_BACKTRACE, folder=Path.cwd()) as client:
        status = client.wait(timeout)
        if status is None:
            client.kill()
        return Ended(status, time.monotonic() - started, end_of(client.log_path, _OUTPUT))
