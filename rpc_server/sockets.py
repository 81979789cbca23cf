"""What a socket that somebody else owns may be told."""

from __future__ import annotations

import contextlib
import os
import socket


def shut_down(fd: int) -> None:
    """End both directions of a socket that a transport owns; whoever waits on it wakes."""
    with socket.socket(fileno=os.dup(fd)) as twin, contextlib.suppress(OSError):
        twin.shutdown(socket.SHUT_RDWR)
