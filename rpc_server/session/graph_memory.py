"""Memory that clients have the server take beside their buffers: messages, plans and programs.

A graph of a megabyte is a plan of several, and eight of them are kept for each client; a program is
kept until its client leaves, and a message that never ends as long as it goes on. All of it is
counted against the client's address and against the whole, and what doesn't fit is refused.
"""

from __future__ import annotations

import threading
from collections import Counter

from rpc_server.limits import LimitReached

OPTION = "--mem-graphs"
# What an address may have however much others have taken: no client is refused because of them.
_FLOOR_PART = 16


class GraphMemory:
    """An account of bytes by address: ``limit`` for all, half of it for clients of one address.

    An address that has less than a sixteenth of the limit is always given what it asks for, up to
    that. Devices' threads use it too.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held: Counter[str] = Counter()
        self._total = 0
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """The number of bytes that are taken."""
        return self._total

    def fits(self, owner: str, size: int) -> bool:
        """Return whether ``size`` bytes more may be taken for a client at address ``owner``."""
        held = self._held[owner] + size
        if held > self.limit // 2:
            return False
        return self._total + size <= self.limit or held <= self.limit // _FLOOR_PART

    def take(self, owner: str, size: int, what: str) -> None:
        """Count ``size`` bytes against ``owner``. Raises LimitReached, which names ``what``."""
        with self._lock:
            if not self.fits(owner, size):
                held = self._held[owner]
                raise LimitReached(
                    OPTION,
                    f"{what} of {size} bytes; clients of its address have {held}, all together "
                    f"{self._total} of {self.limit}",
                )
            self._held[owner] += size
            self._total += size

    def give_back(self, owner: str, size: int) -> None:
        """Take back what was counted."""
        with self._lock:
            self._held[owner] -= size
            self._total -= size
            if not self._held[owner]:
                del self._held[owner]


class Share:
    """The share of one client in a GraphMemory.

    Whatever is left of it is given back by :meth:`close`.

    ``owner`` is the client's address.
    """

    def __init__(self, memory: GraphMemory, owner: str) -> None:
        self._memory = memory
        self._owner = owner
        # Bytes of the message that is being received.
        self._message = 0
        self.nbytes = 0

    def fits(self, size: int) -> bool:
        """Return whether ``size`` bytes more may be taken."""
        return self._memory.fits(self._owner, size)

    def take(self, size: int, what: str) -> None:
        """Count bytes. Raises LimitReached, which names ``what`` they are for."""
        self._memory.take(self._owner, size, what)
        self.nbytes += size

    def give_back(self, size: int) -> None:
        """Take back what was counted."""
        self.nbytes -= size
        self._memory.give_back(self._owner, size)

    def message(self, size: int) -> None:
        """Count the bytes of the message that is being received. Raises LimitReached."""
        if size > self._message:
            self.take(size - self._message, "a message")
        elif size < self._message:
            self.give_back(self._message - size)
        self._message = size

    def close(self) -> None:
        """Give all of it back."""
        self._message = 0
        self.give_back(self.nbytes)
