"""What a client uploads, told in one line when it has come to an end."""

from __future__ import annotations

import time

from rpc_server.observability.logs import ClientLog

# Inputs of graphs are uploads too; only a load of weights is worth a line.
_WORTH_TELLING = 1 << 20


class UploadMeter:
    """Counts the uploads between two other requests of one client, whose log is ``log``."""

    def __init__(self, log: ClientLog) -> None:
        self._log = log
        self._clear()

    def _clear(self) -> None:
        self._tensors = 0
        self._bytes = 0
        self._cached = 0
        self._started = 0.0
        self._last = 0.0

    def upload(self, size: int, *, cached: bool) -> None:
        """Count an upload of ``size`` bytes that starts, or was served from the cache."""
        self._last = time.monotonic()
        if not self._tensors:
            self._started = self._last
        self._tensors += 1
        self._bytes += size
        if cached:
            self._cached += size

    def other(self) -> None:
        """Tell at another request what was uploaded before it, once it is a load of weights."""
        if self._bytes >= _WORTH_TELLING:
            self.finish()
        elif self._tensors:
            self._clear()

    def finish(self) -> None:
        """Tell what was uploaded since the last line."""
        if self._bytes >= _WORTH_TELLING:
            seconds = max(time.monotonic() - self._started, 1e-6)
            self._log.info(
                "%d tensors, %.1f MiB in %.1f s (%.0f MiB/s), %.1f MiB of it from the cache",
                self._tensors,
                self._bytes / (1 << 20),
                seconds,
                self._bytes / (1 << 20) / seconds,
                self._cached / (1 << 20),
            )
        self._clear()
