"""Who may connect: the networks of --allow, and how many connections there may be."""

from __future__ import annotations

import ipaddress
import logging
import time
from collections import Counter
from collections.abc import Sequence

from rpc_server.limits import ServerLimits
from rpc_server.observability.metrics import ServerStats

log = logging.getLogger(__name__)

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Connections to the TLS port that have not shown who they are: in all, and from one address.
_MOST_KNOCKING = 64
_MOST_KNOCKING_PER_ADDRESS = 8

# Lines about connections that are not let in, of each reason: one in so many seconds.
_QUIET_SECONDS = 10.0


_NOT_ALLOWED = "its address is not among those of --allow"


def is_allowed(address: str, networks: Sequence[Network]) -> bool:
    """Return whether an address is in one of these networks; where there is none, any is."""
    if not networks:
        return True
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    parsed = mapped or parsed
    return any(parsed in network for network in networks)


class Admission:
    """Admits connections by address. All on the event loop's thread."""

    def __init__(
        self, allowed: Sequence[Network], limits: ServerLimits, stats: ServerStats
    ) -> None:
        """``allowed`` empty lets in any address."""
        self._allowed = allowed
        self._limits = limits
        self._stats = stats
        self._present: Counter[str] = Counter()
        self._total = 0
        self._knocking: Counter[str] = Counter()
        self._told: dict[str, float] = {}
        self._untold: Counter[str] = Counter()

    def knock(self, address: str, name: str) -> bool:
        """Return whether a connection may go on to show who it is; if so, :meth:`let_go` has to
        follow.

        It counts for none of the limits of clients until it has, so nobody is kept out by those
        who have nothing to show.
        """
        if not is_allowed(address, self._allowed):
            return self.refuse("address", name, _NOT_ALLOWED)
        if (
            self._knocking.total() >= _MOST_KNOCKING
            or self._knocking[address] >= _MOST_KNOCKING_PER_ADDRESS
        ):
            return self.refuse("knocking", name, "too many others are in their TLS handshake")
        self._knocking[address] += 1
        return True

    def let_go(self, address: str) -> None:
        """Let go of a connection that knocked: it has shown who it is, or is gone."""
        self._knocking[address] -= 1
        if not self._knocking[address]:
            del self._knocking[address]

    def admit(self, address: str, name: str) -> bool:
        """Return whether a connection from ``address`` may stay; if so, :meth:`leave` has to
        follow.

        ``name`` is for the log, which says why not.
        """
        limits = self._limits
        if self._stats.lost:
            return self.refuse("device", name, self._stats.lost)
        if not is_allowed(address, self._allowed):
            return self.refuse("address", name, _NOT_ALLOWED)
        if self._total >= limits.clients:
            return self.refuse(
                "clients", name, f"there are {self._total} connections already (--max-clients)"
            )
        if self._present[address] >= limits.clients_per_address:
            return self.refuse(
                "clients_per_address",
                name,
                f"there are {self._present[address]} connections from {address} already "
                "(--max-clients-per-address)",
            )
        self._total += 1
        self._present[address] += 1
        return True

    def leave(self, address: str) -> None:
        """Take note that an admitted connection has ended."""
        self._total -= 1
        self._present[address] -= 1
        if not self._present[address]:
            del self._present[address]

    def refuse(self, reason: str, name: str, why: str) -> bool:
        """Count and log a connection that is not let in; False.

        Whoever tries again and again doesn't fill the log.
        """
        self._stats.refused[reason] += 1
        now = time.monotonic()
        if now - self._told.get(reason, -_QUIET_SECONDS) < _QUIET_SECONDS:
            self._untold[reason] += 1
            return False
        more = self._untold.pop(reason, 0)
        self._told[reason] = now
        log.warning(
            "%s: refused, %s%s",
            name,
            why,
            f"; so were {more} others since the last such line" if more else "",
            extra={"event": "refused", "reason": reason},
        )
        return False
