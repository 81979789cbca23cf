"""Clients with an address of their own, as clients on other machines have.

A server remembers by address what it offers, and takes its time before it believes that another
version has come to the same one. On Linux all of 127.0.0.0/8 is this machine.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

LOOPBACK = "127.0.0.1"


@contextmanager
def coming_from(number: int) -> Iterator[None]:
    """Have this process's connections to 127.0.0.1 come from 127.0.1.``number`` meanwhile."""
    connect = socket.socket.connect

    def from_there(sock: socket.socket, address: Any) -> None:
        if sock.family is socket.AF_INET and address[0] == LOOPBACK:
            sock.bind((f"127.0.1.{number}", 0))
        connect(sock, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", from_there)
        yield
