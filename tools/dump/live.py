"""Listening to an interface, through tcpdump."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from types import FrameType
from typing import IO, Any, Self

from tools.capture.errors import CaptureError, MissingToolError

# Room for what arrives faster than it is decoded, KiB.
_KERNEL_BUFFER = 262144


class Listening:
    """The packets that tcpdump captures of TCP on ``interface``, of all ports if none are given.

    They come out of ``pipe``.

    Within its context, Ctrl-C ends tcpdump, so that what it has captured is read to the end; a
    second one interrupts. ``dropped`` is how many packets the kernel had no room for, known after.

    Raises MissingToolError without tcpdump, CaptureError where it may not or can't listen.
    """

    def __init__(self, interface: str, ports: frozenset[int]) -> None:
        program = shutil.which("tcpdump")
        if program is None:
            raise MissingToolError("listening needs tcpdump (apt install tcpdump)")
        only = " or ".join(f"tcp port {port}" for port in sorted(ports)) or "tcp"
        self.dropped = 0
        self._interface = interface
        self._process = subprocess.Popen(
            [
                *(program, "-i", interface, "-s", "0", "-B", str(_KERNEL_BUFFER)),
                *("-U", "-w", "-", only),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # The terminal's Ctrl-C is for this process.
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self.pipe: IO[bytes] = self._process.stdout
        self._previous: Any = None

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._stop)
        # The header of the capture comes as soon as tcpdump listens.
        if not self.pipe.peek(1):  # type: ignore[attr-defined]
            said = self._end()
            raise CaptureError(_why(self._interface, said))
        return self

    def __exit__(self, *_: object) -> None:
        said = self._end()
        found = re.search(r"(\d+) packets? dropped by kernel", said)
        self.dropped = int(found[1]) if found else 0

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._process.terminate()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _end(self) -> str:
        """End tcpdump; what it said."""
        signal.signal(signal.SIGINT, self._previous)
        self._process.terminate()
        _, said = self._process.communicate()
        return said.decode(errors="replace")


def _why(interface: str, said: str) -> str:
    last = said.strip().splitlines()[-1] if said.strip() else "tcpdump ended"
    if "permission" in said.lower() or "not permitted" in said.lower():
        return (
            f"listening on {interface} takes the privilege CAP_NET_RAW: run this as root (sudo), "
            f"or pipe: sudo tcpdump -i {interface} -U -w - | python -m tools.dump -"
        )
    return f"{interface}: {last}"
