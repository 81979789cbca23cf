"""A client program: started against a port, watched until it ends."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass

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
    words = [word.replace("{port}", str(port)) for word in shlex.split(command)]
    started = time.monotonic()
    # What an aborting ggml prints by way of a debugger takes seconds, in which it isn't gone.
    env = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env
        )
        status: int | None
        try:
            status = child.wait(timeout)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        output.seek(0, 2)
        output.seek(max(0, output.tell() - _OUTPUT))
        text = output.read().decode(errors="replace")
    return Ended(status, time.monotonic() - started, text)
