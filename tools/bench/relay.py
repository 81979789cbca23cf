"""A TCP relay that makes one machine's loopback behave like a network between two.

    python -m tools.bench.relay --listen 50060 --to 127.0.0.1:50052 --delay 0.25 --rate 1

What comes in goes out ``--delay`` milliseconds later, and no faster than ``--rate`` Gbit/s. The
relay takes processor time of its own and the system's timers are coarse, so what a round trip
really takes is to be measured through it. It prints how many bytes have passed, a line for those
between two pauses.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence

from tools.arguments import command_line, endpoint

_CHUNK = 256 << 10
# So long nothing comes in a pause.
_PAUSE_SECONDS = 0.2


class _Direction:
    """Bytes on their way from one socket to the other."""

    def __init__(self, source: socket.socket, target: socket.socket, delay: float, rate: float):
        self._source, self._target = source, target
        # Before each read it is looked whether something is there.
        self._selector = selectors.DefaultSelector()
        self._selector.register(source, selectors.EVENT_READ)
        self._delay, self._rate = delay, rate
        self._chunks: deque[tuple[float, bytes]] = deque()
        self._arrived = threading.Semaphore(0)
        self._line_free = 0.0
        self._count = 0

    def start(self) -> None:
        for work in (self._receive, self._send):
            threading.Thread(target=work, daemon=True).start()

    def _receive(self) -> None:
        while True:
            try:
                if not self._selector.select(_PAUSE_SECONDS):
                    self._tell()
                    self._selector.select()
                data = self._source.recv(_CHUNK)
            except OSError:
                data = b""
            now = time.perf_counter()
            self._count += len(data)
            # The line is busy for as long as the bytes take; then they travel.
            self._line_free = max(self._line_free, now) + len(data) / self._rate
            self._chunks.append((self._line_free + self._delay, data))
            self._arrived.release()
            if not data:
                self._tell()
                self._selector.close()
                return

    def _tell(self) -> None:
        if self._count:
            print(f"relayed {self._count} bytes", flush=True)
        self._count = 0

    def _send(self) -> None:
        while True:
            self._arrived.acquire()
            due, data = self._chunks.popleft()
            while (left := due - time.perf_counter()) > 0:
                # Sleeping is too coarse for the last bit.
                time.sleep(left - 60e-6 if left > 120e-6 else 0)
            with contextlib.suppress(OSError):
                if not data:
                    self._target.shutdown(socket.SHUT_WR)
                    return
                self._target.sendall(data)


def serve(listen: int, to: tuple[str, int], delay: float, rate: float) -> None:
    """Relay connections to ``listen`` until the process ends; seconds and bytes a second."""
    with socket.create_server(("127.0.0.1", listen)) as server:
        while True:
            client, _ = server.accept()
            peer = socket.create_connection(to)
            for s in (client, peer):
                s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _Direction(client, peer, delay, rate).start()
            _Direction(peer, client, delay, rate).start()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = command_line("tools.bench.relay", __doc__)
    add = parser.add_argument
    add("--listen", type=int, required=True, metavar="PORT")
    add("--to", type=endpoint, required=True, metavar="HOST:PORT")
    add("--delay", type=float, default=0.0, metavar="MS", help="one way (default: %(default)s)")
    add("--rate", type=float, default=10.0, metavar="GBIT", help="a second (default: %(default)s)")
    options = parser.parse_args(arguments)
    # Switching threads every 5 ms would be a delay of its own.
    sys.setswitchinterval(20e-6)
    with contextlib.suppress(KeyboardInterrupt):
        serve(options.listen, options.to, options.delay / 1e3, options.rate * 1e9 / 8)
    return 0


if __name__ == "__main__":
    sys.exit(main())
