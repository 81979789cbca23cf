"""Ports for servers that a program starts for itself."""

from __future__ import annotations

import contextlib
import random
import re
import socket
from pathlib import Path

_HOST = "127.0.0.1"
# What the system gives to connections, and to servers that leave the choice to it.
_OF_THE_SYSTEM = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FROM = 20_000
_TRIES = 100
_chosen = random.SystemRandom()
_given: set[int] = set()


def free_port() -> int:
    """Return a TCP port of this machine's loopback that nothing listens on now.

    No port is returned twice, and none of those that the system gives away, as far as it leaves
    others: a server takes a while until it listens, in which nobody else should get its port.
    """
    below = _system_ports().start
    for _ in range(_TRIES if below > _FROM else 0):
        port = _chosen.randrange(_FROM, below)
        if port not in _given and _is_free(port):
            _given.add(port)
            return port
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _system_ports() -> range:
    """Return the ports that the system gives away; an empty range where that isn't known."""
    with contextlib.suppress(OSError):
        first, last = map(int, re.findall(r"\d+", _OF_THE_SYSTEM.read_text()))
        return range(first, last + 1)
    return range(0)


def _is_free(port: int) -> bool:
    with contextlib.suppress(OSError), socket.socket() as probe:
        probe.bind((_HOST, port))
        return True
    return False
