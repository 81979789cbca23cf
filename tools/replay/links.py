"""The groups of a recording: which servers are their members, and which connections are links.

Of a group one member is played to: the server. The player is all others, with the bytes that these
have sent; so what each of them and the server said to each other has to be in the recording, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from protocol.commands import Command
from protocol.endpoint import format_endpoint
from protocol.observe.annotate import text_of
from protocol.observe.events import Event, MessageKind, ObservedMessage
from tools.capture.connections import CapturedConnection, Connections, ReadOptions
from tools.capture.files import read_capture
from tools.replay.errors import ReplayError


@dataclass(frozen=True, slots=True)
class Member:
    """A server that is member ``number`` of the group that has ``secret``.

    ``parts`` are the addresses of all members as it was told them, '' for the client itself.
    """

    server: str
    secret: bytes
    number: int
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RecordedLink:
    """A connection by which member ``number`` of a group came to ``server``."""

    connection: int
    server: str
    secret: bytes
    number: int


@dataclass(slots=True)
class Groups:
    """The groups of a recording and their links, in its order."""

    members: list[Member] = field(default_factory=list)
    links: list[RecordedLink] = field(default_factory=list)

    @classmethod
    def of(cls, path: Path) -> Groups:
        """Read a capture for them. Raises CaptureError, OSError."""
        found = cls()
        Connections(found, ReadOptions(keep=0)).run(read_capture(path))
        return found

    # -- what the reader tells

    def opened(self, connection: CapturedConnection) -> None:
        """Do nothing before the first request."""

    def event(self, connection: CapturedConnection, event: Event) -> None:
        """Take note of a group that was entered, and of a link."""
        if not isinstance(event, ObservedMessage) or event.kind is not MessageKind.ANSWER:
            return
        asked = None if event.request is None else event.request.fields
        if asked is None or event.fields is None:
            return
        if event.command is Command.SPLIT_PEERS and not event.fields.result:
            self.members.append(
                Member(connection.server, bytes(asked.secret), asked.number, _addresses(asked))
            )
        elif event.command is Command.SPLIT_JOIN and event.fields.result:
            self.links.append(
                RecordedLink(connection.number, connection.server, bytes(asked.secret),
                             asked.number)
            )  # fmt: skip

    def closed(self, connection: CapturedConnection) -> None:
        """Do nothing: what was said is known."""

    # -- what is played

    def server(self, wanted: str) -> str:
        """Return the recorded server that is played, '' where there are no groups and all are.

        ``wanted`` is what the user says, '' for nothing. Raises ReplayError.
        """
        servers = list(dict.fromkeys(member.server for member in self.members))
        if wanted and wanted not in servers:
            named = ", ".join(servers) or "none"
            raise ReplayError(
                f"{wanted} is none of the servers that add up with others there ({named})"
            )
        if len(servers) > 1 and not wanted:
            raise ReplayError(
                f"it has several servers that add up among themselves ({', '.join(servers)}), and "
                "one can be played at a time: say which by --recorded"
            )
        return wanted or (servers[0] if servers else "")

    def role(self, link: RecordedLink, server: str) -> int | None:
        """Return as which member a link is played to ``server``; None if it isn't one of its own.

        One that came to the server is played as it was. One that the server made itself is played
        to it by the member at the other end.
        """
        for member in self.members:
            if member.server != server or member.secret != link.secret:
                continue
            if link.server == server:
                return link.number
            if link.number == member.number:
                return _number_of(link.server, member)
        return None

    def missing(self, server: str, secret: bytes) -> list[str]:
        """Return the members of a group whose links with ``server`` were not recorded."""
        found = []
        for member in self.members:
            if member.server == server and member.secret == secret:
                there = {self.role(a, server) for a in self.links if a.secret == secret}
                found += [
                    f"part {i} ({where or 'the client'})"
                    for i, where in enumerate(member.parts)
                    if i != member.number and i not in there
                ]
        return found


def _addresses(peers: Any) -> tuple[str, ...]:
    """Return where the members of a SPLIT_PEERS are."""
    named = [(text_of(part.host), part.port) for part in peers.parts[: peers.n_parts]]
    return tuple(format_endpoint(host, port) if host else "" for host, port in named)


def _number_of(address: str, member: Member) -> int | None:
    """Return the number of the member at an address."""
    return member.parts.index(address) if address in member.parts else None
