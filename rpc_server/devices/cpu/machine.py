"""What there is of processors and memory on this machine."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import NamedTuple


def available_cores() -> int:
    """Return the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_name() -> str:
    """Return the processor's own name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def system_memory() -> tuple[int, int]:
    """Return available and total bytes of RAM.

    They are no more than this process's control group may have.
    """
    try:
        fields = {}
        for line in Path("/proc/meminfo").read_text().splitlines():
            key, _, rest = line.partition(":")
            fields[key] = int(rest.split()[0]) * 1024
        free, total = fields["MemAvailable"], fields["MemTotal"]
    except (OSError, KeyError, ValueError):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for group in _limited_groups():
        limit, used = group.memory(total)
        free, total = min(free, max(0, limit - used)), min(total, limit)
    return free, total


# More than any machine has; what groups without a limit have as theirs is more than this.
_UNLIMITED = 1 << 62


class ControlGroup(NamedTuple):
    """A control group's folder, and how its version calls the files."""

    folder: Path
    limit: str
    used: str
    reclaimable: str

    def memory(self, total: int) -> tuple[int, int]:
        """Return its limit (``total`` if it has none any more), and how much of it can't be had."""
        try:
            text = (self.folder / self.limit).read_text().strip()
            limit = total if text == "max" else min(int(text), total)
            used = int((self.folder / self.used).read_text())
            # Cached files count as used, and go when the memory is needed.
            for line in (self.folder / "memory.stat").read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == self.reclaimable:
                    used -= int(value)
        except (OSError, ValueError):
            return total, 0
        return limit, max(0, used)


@functools.cache
def _limited_groups() -> tuple[ControlGroup, ...]:
    try:
        text = Path("/proc/self/cgroup").read_text()
    except OSError:
        return ()
    groups = find_groups(text, Path("/sys/fs/cgroup"))
    return tuple(g for g in groups if g.memory(_UNLIMITED)[0] < _UNLIMITED)


def find_groups(listing: str, root: Path) -> list[ControlGroup]:
    """Return the groups of ``/proc/self/cgroup`` that may limit memory, with those they are in.

    In a container the folder at ``root`` is the container's own, whatever the listing says.
    """
    found: list[ControlGroup] = []
    for line in listing.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        for n in range(len(parts), -1, -1):
            group = ControlGroup(base.joinpath(*parts[:n]), *names)
            if (group.folder / group.limit).exists():
                found.append(group)
    return found
