"""What can keep a capture from being read."""

from __future__ import annotations


class CaptureError(Exception):
    """The capture can't be read; the message says why, for the user."""


class MissingToolError(Exception):
    """A package or program isn't installed; the message says how to get it."""
