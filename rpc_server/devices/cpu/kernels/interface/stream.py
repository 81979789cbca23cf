"""The memory by which compiled plans send to and receive from a socket.

A decode step of a split model is a hundred exchanges of a few kilobytes with as little as 30 us of
computing between them: none of them may pass through Python or an event loop. So kernels do them,
see ``devices/cpu/kernels/stream.py``. The socket is lent by its transport for the time of a run and
is non-blocking.

A *stream* is 32 words of memory that live as long as the link: see the constants below.

Patience is counted in what is moved, since a device waits with whoever waits: a stream has
``TIMEOUT_MS`` of it at most, waiting uses it up, each byte that comes or goes restores a little (a
second for 64 KiB), and where none is left the status is SILENT. A peer that trickles bytes singly
is no better than one that says nothing. A coordinator (``renewed``) is as patient as ever with each
exchange, in which its workers compute; a worker has one measure of it for all the steps of a run.

A *swap* sends to several streams and receives from them at the same time: two sides that both send
first, more than their sockets hold, would wait for each other. It counts patience for each stream,
anew in each swap, as all of them compute between two.

While a transfer waits, others may have the device: it then returns AGAIN
(``rpc_server.devices.cpu.kernels.interface.sync``), and goes on from where it was when it is called
the next time. Time that it was away from the device uses up patience too, unless something has come
meanwhile.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

STREAM_WORDS = 32
FD = 0
# Bytes that the transport had received already when it lent the socket.
EARLY_ADDRESS = 1
EARLY_LEFT = 2
TIMEOUT_MS = 3
# How long to try again before going to sleep, nanoseconds.
SPIN_NS = 4
BYTES_SENT = 5
BYTES_RECEIVED = 6
EXCHANGES = 7
WAIT_NS = 8
# A pollfd; a timespec, which takes two words.
POLL = 9
TIME = 10
# How long the peer is still waited for, nanoseconds, and whether that begins anew with each
# exchange.
PATIENCE_NS = 12
RENEWED = 13
# How far the transfer at hand has come that has been paused: its pieces that are done, bytes of the
# next one, since when it waits, and when it was paused (nanoseconds, 0 if it doesn't wait).
PIECES = 14
WITHIN = 15
WAITS_SINCE = 16
PAUSED_AT = 17
# Of a swap that has begun: bytes sent and received, and how often poll() was wrong about it.
SWAP_SENT = 18
SWAP_GOT = 19
SWAP_ALARMS = 20
# Since when bytes of the stream are waited for, nanoseconds; 0 while they aren't.
AWAITED_SINCE = 21
# Until when nobody tries again and all sleep at once, nanoseconds.
SLEEPS_UNTIL = 22
# What a byte that is moved is worth.
NS_PER_BYTE = 1_000_000_000 // (64 << 10)

# Statuses of these kernels, beside those of rpc_server.devices.cpu.kernels.interface.abi.
CLOSED = 16
SILENT = 17
CONFUSED = 18
# Of a swap, with the number of the part at the other end added.
PEER_CLOSED = 128
PEER_SILENT = 160
MOST_PEERS = 16
STATUS_TEXT = {
    CLOSED: "hung up",
    SILENT: "did not answer in time",
    CONFUSED: "sent something else than the result",
    **{PEER_CLOSED + i: f"part {i} hung up" for i in range(MOST_PEERS)},
    **{PEER_SILENT + i: f"part {i} did not answer in time" for i in range(MOST_PEERS)},
}

# What a swap knows of each of its peers, in words: the stream, where to put what comes and how many
# bytes that is, and the number of the part. As many pollfds follow, a word each.
SWAP_PEER_WORDS = 4


# Longer than most waits within a token: being woken up takes as long as a small product. Whoever
# shares the core with a waiting thread is let through at each try.
_SPIN_NS = 1_000_000
# Once another thread kept the core for so long that it was let through, it has work of its own, and
# the core comes back only when the scheduler takes it from there; a thread that sleeps is put in
# front when it is woken up. So for a while it sleeps instead.
TAKEN_NS = 50_000
SLEEP_NS = 50_000_000


class Stream:
    """The words of one link's stream, and what Python reads and sets of them."""

    def __init__(self, timeout: float, *, renewed: bool) -> None:
        """``timeout`` (seconds) is the longest that one side waits for the other.

        ``renewed``: in one exchange, instead of in one run.
        """
        self._words = np.zeros(STREAM_WORDS, np.int64)
        self._early: Any = None
        self._words[TIMEOUT_MS] = int(timeout * 1000)
        self._words[SPIN_NS] = _SPIN_NS
        self._words[RENEWED] = int(renewed)
        self.address = int(self._words.ctypes.data)

    def open(self, fd: int, early: bytes = b"") -> None:
        """Use ``fd``; ``early`` are bytes of the stream that were received already."""
        self._early = np.frombuffer(early, np.uint8)
        self._words[FD] = fd
        self._words[PATIENCE_NS] = self._words[TIMEOUT_MS] * 1_000_000
        self._words[PIECES : AWAITED_SINCE + 1] = 0
        self._words[EARLY_ADDRESS] = self._early.ctypes.data
        self._words[EARLY_LEFT] = len(early)

    def count(self, word: int) -> int:
        """Return a count since the link was made."""
        return int(self._words[word])

    @property
    def awaited(self) -> float:
        """Return for how long bytes of the stream have been waited for now, seconds."""
        since = int(self._words[AWAITED_SINCE])
        return (time.monotonic_ns() - since) / 1e9 if since else 0.0

    @property
    def early_left(self) -> bytes:
        """The bytes received before the run that belong to what follows it."""
        left = int(self._words[EARLY_LEFT])
        return bytes(self._early[len(self._early) - left :]) if left else b""


# Up to this much is gathered for one call to the system.
STAGING_BYTES = 64 << 10


class StreamPeer:
    """The other side: its name for messages, its stream, and memory to gather small sends in.

    ``timeout`` (seconds) and ``renewed`` as of Stream.
    """

    def __init__(self, name: str, timeout: float, *, renewed: bool = False) -> None:
        self.name = name
        self.stream = Stream(timeout, renewed=renewed)
        self._staging = np.empty(STAGING_BYTES, np.uint8)
        self.staging_address = int(self._staging.ctypes.data)

    def staged(self, size: int) -> bytes:
        """Return the first bytes of what was gathered last."""
        return self._staging[:size].tobytes()
