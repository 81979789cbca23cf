"""What can be wrong with bytes off the wire."""

from __future__ import annotations


class ProtocolError(Exception):
    """The peer sent what no message of its dialect is; the connection can't go on.

    The message says what was sent, without its content.
    """


class TooLargeError(ProtocolError):
    """The peer announced more than it may send."""


class NotInRelease(ValueError):  # noqa: N818 - what is the matter
    """Clients of this dialect can't say it: the op, or what it is to do, came with a later one."""
