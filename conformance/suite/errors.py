"""How a case ends when it doesn't return."""

# ruff: noqa: N818 - each name says what happened

from __future__ import annotations


class CaseEnded(Exception):
    """Ends a case; the message is what came, for the report."""


class Failed(CaseEnded):
    """The server broke the rule."""


class Differs(CaseEnded):
    """The protocol leaves it open, and the server does it otherwise than it had better."""


class Skipped(CaseEnded):
    """The rule can't be checked on this server; the message says why."""


class Closed(Failed):
    """The server ended the connection; a failure unless the case expects it."""


class NoAnswer(Failed):
    """Nothing came within the time that the case has."""


class Malformed(Failed):
    """The server answered with what is no answer to the request."""
