"""Tells networks that this server is there, by DNS-SD over multicast DNS (--announce).

Each port is published on the networks that it listens on and on no other: an address that is bound
is published on its own interface, a port that is open everywhere on all. What a record says is in
``protocol/announcement.py``. Whoever finds a server this way is let in or not as anybody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import secrets
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from client.errors import MissingPackageError
from protocol.announcement import SERVICE_TYPE, Announcement, instance_name

if TYPE_CHECKING:
    from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

log = logging.getLogger(__name__)

# Longest that saying goodbye may hold up the end.
_GOODBYE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class AnnouncedPort:
    """One port: its listening sockets, and what is to be said of it."""

    sockets: Sequence[socket.socket]
    announcement: Announcement


class Announcer:
    """Publishes ports from now on until :meth:`close`. A network that can't be told is logged.

    Made on the event loop's thread. Raises MissingPackageError.
    """

    def __init__(self, ports: Iterable[AnnouncedPort]) -> None:
        try:
            import zeroconf.asyncio  # noqa: F401
        except ImportError:
            raise MissingPackageError("--announce", "zeroconf", "announce") from None
        self._published: list[tuple[AsyncZeroconf, AsyncServiceInfo]] = []
        self._tasks = [asyncio.create_task(self._publish(port)) for port in ports]

    async def _publish(self, port: AnnouncedPort) -> None:
        import zeroconf
        from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

        bound = [str(s.getsockname()[0]).partition("%")[0] for s in port.sockets]
        number = int(port.sockets[0].getsockname()[1])
        interfaces = networks(bound)
        mark = secrets.randbits(16)
        name = instance_name(socket.gethostname(), number, mark)
        info = AsyncServiceInfo(
            SERVICE_TYPE,
            name,
            port=number,
            parsed_addresses=published(interfaces),
            # A name of its own: two servers of a machine may have different addresses.
            server=f"{name.partition('.')[0]}.local.",
            properties=port.announcement.properties(),
        )
        families = {ipaddress.ip_address(address).version for address in interfaces}
        versions = {
            frozenset({4}): zeroconf.IPVersion.V4Only,
            frozenset({6}): zeroconf.IPVersion.V6Only,
        }
        version = versions.get(frozenset(families), zeroconf.IPVersion.All)
        try:
            zc = AsyncZeroconf(interfaces=interfaces, ip_version=version)
            self._published.append((zc, info))
            await (await zc.async_register_service(info, allow_name_change=True))
        except (OSError, RuntimeError, zeroconf.Error) as error:
            log.warning("can't announce port %d: %s", number, error or type(error).__name__)
        else:
            log.info(
                "announced as %s on %s",
                info.name.removesuffix("." + SERVICE_TYPE),
                ", ".join(interfaces),
                extra={"event": "announced"},
            )

    async def close(self) -> None:
        """Take everything back, so that nobody looks for this server any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GOODBYE_SECONDS):
                await asyncio.gather(*(_withdraw(*p) for p in self._published))
        self._published.clear()


async def _withdraw(zc: AsyncZeroconf, info: AsyncServiceInfo) -> None:
    # A network that is gone needs no goodbye.
    with contextlib.suppress(OSError):
        if zc.zeroconf.registry.async_get_info_name(info.name) is not None:
            await (await zc.async_unregister_service(info))
        await zc.async_close()


def networks(bound: Iterable[str]) -> list[str]:
    """Return this machine's addresses on the networks that sockets bound to these listen on."""
    import ifaddr

    families = {
        ipaddress.ip_address(address).version
        for address in bound
        if ipaddress.ip_address(address).is_unspecified
    }
    found = [a for a in bound if not ipaddress.ip_address(a).is_unspecified]
    for adapter in ifaddr.get_adapters() if families else ():
        for ip in adapter.ips:
            address = str(ip.ip if ip.is_IPv4 else ip.ip[0])
            if (4 if ip.is_IPv4 else 6) in families:
                found.append(address)
    return list(dict.fromkeys(found))


def published(interfaces: Sequence[str]) -> list[str]:
    """Return those of a machine's addresses that others may know it by."""

    def of_use(address: str) -> bool:
        # A link-local one means nothing without the interface, which is another's name for it.
        ip = ipaddress.ip_address(address)
        return not ip.is_loopback and not (ip.version == 6 and ip.is_link_local)

    return [a for a in interfaces if of_use(a)] or list(interfaces)
