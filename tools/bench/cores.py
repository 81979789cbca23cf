"""Which cores a measurement's programs run on, what these use, and what else kept them busy."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

_STAT = Path("/proc/stat")
# Of a process, what the scheduler gave it.
_SCHEDULED = 2


@contextlib.contextmanager
def on_core(core: int) -> Iterator[None]:
    """Have children that are started meanwhile run on one core."""
    before = os.sched_getaffinity(0)
    cores = sorted(before)
    os.sched_setaffinity(0, {cores[core % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class OtherWork:
    """Measures how many cores were busy with what this process and its children didn't do.

    ``cores`` is a mean over the block. Children count once they have been waited for, so those that
    were started within the block end within it.
    """

    cores: float

    def __enter__(self) -> Self:
        self._before = self._read()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        seconds, busy, own = (b - a for a, b in zip(self._before, self._read(), strict=True))
        # Clocks of 10 ms may give the children more than the whole.
        self.cores = max(0.0, busy - own) / seconds

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Return seconds by the clock, of the machine's processors, and of our own work."""
        usages = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        own = sum(usage.ru_utime + usage.ru_stime for usage in usages)
        return time.monotonic(), busy_seconds(_STAT.read_text()), own


def busy_seconds(stat: str) -> float:
    """Return the seconds that all processors together have worked, of the text of /proc/stat.

    Those that a virtual machine's host took away count: nobody here could have them.
    """
    words = stat.split("\n")[0].split()[1:]
    user, nice, system, _idle, _wait, irq, softirq, stolen = map(int, words[:8])
    return (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")


def processor_seconds(pid: int) -> float:
    """Return the processor time that a process has used, that of the system for it too.

    Raises OSError where there is no such process.
    """
    # The number of that clock, as clock_getcpuclockid(3) of Linux makes it: to the nanosecond.
    return time.clock_gettime(~pid << 3 | _SCHEDULED)
