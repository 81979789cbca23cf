"""How a case ends when it doesn't return."""

# ruff: noqa: N818 - each name says what happened

from __future__ import annotations

from collections.abc import Sequence

from protocol.dialects import Dialect, Version


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


class NotOffered(Failed):
    """The server never offered the version that the client speaks; ``offered`` is what it did."""

    def __init__(self, dialect: Dialect, offered: Sequence[Version]) -> None:
        self.offered = list(offered)
        names = ", ".join(".".join(map(str, version)) for version in sorted(set(offered)))
        super().__init__(f"a client of protocol {dialect.name} is offered {names}")
