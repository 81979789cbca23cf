"""A bar on the terminal while a large capture is read."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from tools.capture.files import Capture, Frame

# Smaller files are read before a bar would be seen.
_FROM_BYTES = 64 << 20
_EVERY = 1024


def with_progress(capture: Capture, path: Path | None, *, quiet: bool) -> Iterator[Frame]:
    """The frames of a capture; ``quiet`` if lines go to the same terminal."""
    size = path.stat().st_size if path is not None and path.is_file() else 0
    if quiet or size < _FROM_BYTES or not sys.stderr.isatty():
        yield from capture
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True),
        TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        assert path is not None
        task = progress.add_task(path.name, total=size)
        for i, frame in enumerate(capture):
            if i % _EVERY == 0:
                progress.update(task, completed=capture.position)
            yield frame
