"""Ports for servers that a program starts for itself."""

from __future__ import annotations

import socket


def free_port() -> int:
    """Return a TCP port of this machine's loopback that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
