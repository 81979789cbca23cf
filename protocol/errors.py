"""What can be wrong with bytes off the wire."""

from __future__ import annotations


class ProtocolError(Exception):
    """The peer sent what no message of its dialect is; the connection can't go on.

    The message says what was sent, without its content.
    """


class TooLargeError(ProtocolError):
    """The peer announced more than it may send."""
