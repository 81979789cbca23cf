"""The members of a split that exchange tensors among themselves, as one of them sees the others.

Each pair has one connection, a *link*, whose socket belongs to the group and to no event loop:
nothing but the kernels of a plan reads or writes it (stream_swap of ``cpu/kernels/stream.py``), and
only while a run has the group.
"""

from __future__ import annotations

import hmac
import os
import socket
from collections.abc import Callable, Mapping

from rpc_server.devices.cpu.kernels.interface.stream import StreamPeer


class LinkGroup:
    """Member ``number`` of a group, whose others have ``names``, by their numbers.

    ``timeout`` (seconds) is how long one waits for another in a swap. Those ``expected`` come by
    themselves, and show ``secret``. All methods run on the event loop's thread.
    """

    def __init__(
        self,
        number: int,
        names: Mapping[int, str],
        timeout: float,
        secret: bytes,
        expected: frozenset[int] = frozenset(),
    ) -> None:
        self.number = number
        self.n_parts = len(names) + 1
        self.secret = secret
        self.expected = expected
        self._sockets: dict[int, socket.socket] = {}
        # What is to be done at the end.
        self._leaving: list[Callable[[], None]] = []
        self._running = False
        self._closed = False
        self.peers = {i: StreamPeer(name, timeout, renewed=True) for i, name in names.items()}

    @property
    def missing(self) -> list[int]:
        """The members that there is no link to."""
        return [i for i in self.peers if i not in self._sockets]

    @property
    def closed(self) -> bool:
        return self._closed

    def knows(self, secret: bytes) -> bool:
        """Return whether this is the group's secret, in a time that doesn't depend on it."""
        return hmac.compare_digest(self.secret, secret)

    def add(self, number: int, fd: int, leave: Callable[[], None] | None = None) -> None:
        """Make the connection of ``fd`` the link to a member; a twin of ``fd`` is used.

        ``leave`` is called at the group's end. Raises OSError.
        """
        twin = socket.socket(fileno=os.dup(fd))
        twin.setblocking(False)
        self._sockets[number] = twin
        self.expected -= {number}
        if leave is not None:
            self._leaving.append(leave)

    def begin(self) -> None:
        """Let a run have all links, from now until :meth:`end`. Raises LookupError without."""
        if self._closed or self.missing:
            raise LookupError("a swap among parts that are not linked")
        self._running = True
        for i, link in self._sockets.items():
            self.peers[i].stream.open(link.fileno())

    def end(self, *, failed: bool = False) -> None:
        """End a run; where it failed, nobody can say what the next bytes of a link belong to."""
        self._running = False
        if failed or self._closed:
            self.close()

    def close(self) -> None:
        """Hang up on all members; a run that waits for one gets to know."""
        self._closed = True
        for link in self._sockets.values():
            shut_down(link)
        if self._running:
            return
        for link in self._sockets.values():
            link.close()
        self._sockets.clear()
        leaving, self._leaving = self._leaving, []
        for leave in leaving:
            leave()


def shut_down(link: socket.socket) -> None:
    """End both directions of a link, whoever else has its socket."""
    try:
        link.shutdown(socket.SHUT_RDWR)
    except OSError:
        # The other end was faster.
        return
