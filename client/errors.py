"""What can go wrong between this client and a server."""

# ruff: noqa: N818 - each name says what happened

from __future__ import annotations

from protocol.dialects import Version


class ConnectionLost(ConnectionError):
    """The connection ended, by the server or by us; nothing more can be asked on it."""


class VersionMismatch(ConnectionError):
    """The server speaks another protocol version than this connection asked for."""

    def __init__(self, ours: Version, theirs: Version) -> None:
        self.ours = ours
        self.theirs = theirs
        super().__init__(
            f"the server speaks protocol {'.'.join(map(str, theirs))}, "
            f"this client {'.'.join(map(str, ours))}"
        )


class UnsupportedCommand(ValueError):
    """The connection's protocol version has no such command, or no room for what was asked."""


class AllocationFailed(MemoryError):
    """The server has no room for a buffer of that size."""


class GraphFailed(RuntimeError):
    """The server answered a graph with a failure, and goes on.

    A graph is answered so in versions up to 3.0 (later ones hang up), a program in all.
    """


class ServerLost(ConnectionError):
    """One of several servers can't be reached, or its connection ended.

    The message begins with ``server``, its host:port, and says why.
    """

    def __init__(self, server: str, reason: str) -> None:
        self.server = server
        self.reason = reason
        super().__init__(f"server {server}: {reason}")


class MissingPackageError(Exception):
    """A package that is an extra isn't installed; the message says what for, and how to get it."""

    def __init__(self, wanted_by: str, package: str, extra: str) -> None:
        super().__init__(f"{wanted_by} needs {package}: pip install 'ggml-rpc-server[{extra}]'")
