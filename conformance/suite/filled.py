"""A buffer with known content: what transfers are checked against."""

from __future__ import annotations

import random

from conformance.suite.context import Context
from conformance.suite.peer import Peer
from conformance.suite.tensors import RemoteBuffer

SIZE = 4096


def filled(c: Context, size: int = SIZE) -> tuple[Peer, RemoteBuffer, bytes]:
    """Return a connection with a buffer of at least that size, and the random bytes all over it."""
    peer = c.connect()
    buffer = peer.alloc(size)
    content = random.Random(c.seed + buffer.size).randbytes(buffer.size)
    peer.set(buffer.whole(), content)
    return peer, buffer, content


def check_content(
    c: Context, peer: Peer, buffer: RemoteBuffer, content: bytes, what: str = "the buffer"
) -> None:
    """Fail unless the whole buffer is as given."""
    c.equal(peer.get(buffer.whole(), buffer.size), content, what)
