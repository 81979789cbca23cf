"""Links between the parts of a split, so that they can add up sums without this server.

Each pair of parts has one: the one with the larger number connects to the other's ordinary port,
and shows a secret that is made anew each time. This server's own share is a part like others. Where
some part can't be reached by another, sums go through this server as ever.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from client.split.links import LinkError, open_link
from protocol.split import SECRET_SIZE, peers_fields
from rpc_server.devices.planning.group import LinkGroup
from rpc_server.devices.split.worker import Worker

log = logging.getLogger(__name__)

Parts = Sequence[Worker | None]


@dataclass(slots=True, eq=False)
class Linked:
    """Parts with links; ``group`` has this server's own, if it has a share."""

    parts: Parts
    group: LinkGroup | None = None

    def close(self) -> None:
        """Hang up on the others."""
        if self.group is not None:
            self.group.close()


class Links:
    """Links parts when they are first needed. All methods run on the event loop's thread.

    ``timeout`` (seconds) is how long one part may wait for another.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        # The parts that were tried last, and what came of it.
        self._tried: Parts = ()
        self._found: Linked | None = None
        self._linking = asyncio.Lock()

    def may_be(self, parts: Parts) -> bool:
        """Return False if it is known that these parts can't be linked; from any thread."""
        return self._found is not None or not _are_same(parts, self._tried)

    async def between(self, parts: Parts) -> Linked | None:
        """Return the links of ``parts``, made if there are none; None: there can't be any.

        What is in the way is told once. Raises WorkerLost.
        """
        async with self._linking:
            broken = self._found is not None and _is_closed(self._found)
            if _are_same(parts, self._tried) and not broken:
                return self._found
            return await self._renew(parts)

    async def _renew(self, parts: Parts) -> Linked | None:
        self.close()
        linked = Linked(list(parts))
        reason = await self._link(linked)
        self._tried, self._found = list(parts), None if reason else linked
        if reason:
            linked.close()
            lacking = any(worker is not None and worker.no_links for worker in parts)
            level = logging.INFO if lacking else logging.WARNING
            log.log(level, "%s: sums of the parts go through this server", reason)
        else:
            log.info("the parts are linked: they add up sums among themselves")
        return self._found

    def close(self) -> None:
        """Hang up on all links that this server has."""
        if self._found is not None:
            self._found.close()
        self._tried, self._found = (), None

    async def _link(self, linked: Linked) -> str:
        """Link all parts; return why that can't be, '' if it is done. Raises WorkerLost."""
        parts = linked.parts
        for worker in parts:
            if worker is not None and worker.no_links:
                return f"worker {worker.name} {worker.no_links}"
        secret = secrets.token_bytes(SECRET_SIZE)
        for number, worker in enumerate(parts):
            if worker is None:
                continue
            rows = [_row(worker, other, i < number) for i, other in enumerate(parts)]
            reason = await worker.link(peers_fields(secret, self._timeout, number, rows))
            if reason:
                return f"worker {worker.name}: {reason}"
        own = next((i for i, worker in enumerate(parts) if worker is None), None)
        if own is None:
            return ""
        others = {i: worker for i, worker in enumerate(parts) if worker is not None}
        names = {i: f"worker {worker.name}" for i, worker in others.items()}
        group = linked.group = LinkGroup(own, names, self._timeout, secret)
        for i, worker in others.items():
            try:
                link = await open_link(*worker.peer_address, secret, own)
            except LinkError as error:
                return f"worker {error}"
            try:
                group.add(i, link.fileno())
            finally:
                link.abort()
        return ""


def _are_same(one: Parts, other: Parts) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _is_closed(linked: Linked) -> bool:
    return linked.group is not None and linked.group.closed


def _row(seen_by: Worker, part: Worker | None, reach: bool) -> tuple[str, int, bool]:
    """Return where a worker finds a part, and whether it is to connect there.

    This server comes to it; its address is left out.
    """
    if part is None:
        return "", 0, False
    host, port = part.peer_address
    if _is_loopback(host) and not _is_loopback(seen_by.peer_address[0]):
        # A worker on this machine, seen from another.
        host = seen_by.own_address
    return host, port, reach


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback
