"""How far the reading of a large capture is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rpc_server.observability.progress import BYTES, begin, shown
from tools.capture.files import Capture, Frame

# Smaller files are read before a bar would be seen.
_FROM_BYTES = 64 << 20
_EVERY = 1024


def with_progress(capture: Capture, path: Path | None, *, quiet: bool) -> Iterator[Frame]:
    """Yield the frames of a capture; ``quiet`` if lines go to the same terminal."""
    size = path.stat().st_size if path is not None and path.is_file() else 0
    if path is None or quiet or size < _FROM_BYTES:
        yield from capture
        return
    with shown(), begin(path.name, size, BYTES) as task:
        before = 0
        for i, frame in enumerate(capture):
            if i % _EVERY == 0:
                task.advance(capture.position - before)
                before = capture.position
            yield frame
