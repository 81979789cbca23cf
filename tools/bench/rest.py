"""Servers at rest: how they get a model's weights, and how long these are left alone.

What was just loaded is at rest when its pages are large. In its first seconds a model is up to a
third slower than from then on, which says nothing about anything but those seconds.
"""

from __future__ import annotations

from pathlib import Path

# Seconds until nothing is made larger any more, and the bytes of which another one's are.
_SECONDS, _RATE = 2.0, 400e6


def from_file(model: Path) -> tuple[str, ...]:
    """Return options of this project's servers that copy ``model`` from disk, in large pages."""
    return ("--models", str(model), "--no-mmap")


def waiting(model: Path) -> tuple[str, ...]:
    """Return arguments of llama-bench that let a loaded ``model`` come to rest."""
    return ("--delay", f"{_SECONDS + model.stat().st_size / _RATE:.0f}")
