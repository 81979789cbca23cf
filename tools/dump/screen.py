"""Lines to a terminal or a pipe: in colour where there is somebody to see it."""

from __future__ import annotations

import os
from typing import IO

_CODES = {
    "time": "2",
    "client": "36",
    "server": "32",
    "command": "1",
    "note": "33",
    "error": "31;1",
    "dim": "2",
}


class Screen:
    """``colour`` is auto, always or never; auto minds NO_COLOR.

    Lines are written at once on a terminal, or where ``prompt`` says that they come one by one.
    """

    def __init__(self, file: IO[str], colour: str = "auto", *, prompt: bool = False) -> None:
        self._file = file
        self.live = file.isatty()
        self._prompt = prompt or self.live
        wanted = self.live and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self._colour = colour == "always" or (colour == "auto" and wanted)

    def style(self, text: str, style: str) -> str:
        """Return ``text`` as it is to be written in a style."""
        return f"\x1b[{_CODES[style]}m{text}\x1b[0m" if self._colour and text else text

    def line(self, text: str) -> None:
        self._file.write(text + "\n")
        if self._prompt:
            self._file.flush()

    def flush(self) -> None:
        self._file.flush()


def printable(text: str) -> str:
    """Return text off the wire without what a terminal would obey."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def duration_text(seconds: float) -> str:
    if abs(seconds) < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    if abs(seconds) < 1:
        return f"{seconds * 1e3:.2f} ms"
    return f"{seconds:.2f} s"
