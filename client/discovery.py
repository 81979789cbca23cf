"""Finds servers that announce themselves on this machine's networks (DNS-SD over multicast DNS).

    async with Browser() as browser:
        await asyncio.sleep(3)
        print(browser.servers)

Whoever is on the network can announce anything. So what is found is bounded in number and size, has
been made fit to be shown, and says no more than where to ask: see ``client/split/survey.py``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from client.errors import MissingPackageError
from protocol.announcement import SERVICE_TYPE, Announcement, reachable, shown_name

if TYPE_CHECKING:
    from zeroconf.asyncio import AsyncServiceBrowser, AsyncZeroconf


@dataclass(frozen=True, slots=True)
class FoundServer:
    """A server as it is announced: its name for people, and where it says that it listens."""

    name: str
    addresses: tuple[str, ...]
    port: int
    announcement: Announcement


# How many servers are kept, and addresses of each.
MOST_SERVERS = 64
MOST_ADDRESSES = 4
# Names that wait for room among those: one that leads nowhere gives up its own.
_MOST_WAITING = 1024
# How long a server is given to send what a record says, each time it is asked.
_RESOLVE_SECONDS = 1.5
# Multicast has no acknowledgement: questions and answers are lost now and then.
_TRIES = 4


class Browser:
    """Looks for servers while it is open; ``interfaces`` are addresses of this machine (all).

    ``ignored`` is how many names there was no room for. Raises MissingPackageError, OSError when
    entered.
    """

    def __init__(self, interfaces: Sequence[str] | None = None) -> None:
        self._interfaces = interfaces
        self._found: dict[str, FoundServer] = {}
        self._wanted: set[str] = set()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._waiting: dict[str, None] = {}
        self.ignored = 0
        self._zeroconf: AsyncZeroconf
        self._browser: AsyncServiceBrowser

    async def __aenter__(self) -> Self:
        try:
            from zeroconf import InterfaceChoice
            from zeroconf.asyncio import AsyncServiceBrowser, AsyncZeroconf
        except ImportError:
            raise MissingPackageError("finding servers", "zeroconf", "announce") from None
        where = InterfaceChoice.All if self._interfaces is None else list(self._interfaces)
        self._zeroconf = AsyncZeroconf(interfaces=where)
        await self._zeroconf.zeroconf.async_wait_for_start()
        self._browser = AsyncServiceBrowser(
            self._zeroconf.zeroconf, SERVICE_TYPE, handlers=[self._changed]
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        self._waiting.clear()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._browser.async_cancel()
        await self._zeroconf.async_close()

    @property
    def servers(self) -> list[FoundServer]:
        """Return those that are there now, by name."""
        return sorted(self._found.values(), key=lambda found: found.name)

    def _changed(self, zeroconf: Any, service_type: str, name: str, state_change: Any) -> None:
        """Called by the browser, on the event loop's thread."""
        if state_change.name == "Removed":
            self._waiting.pop(name, None)
            self._forget(name)
        elif name in self._wanted or len(self._wanted) < MOST_SERVERS:
            self._look_up(name)
        elif len(self._waiting) < _MOST_WAITING:
            self._waiting[name] = None
        else:
            self.ignored += 1

    def _forget(self, name: str) -> None:
        """Make room for the next one."""
        self._wanted.discard(name)
        self._found.pop(name, None)
        while self._waiting and len(self._wanted) < MOST_SERVERS:
            following = next(iter(self._waiting))
            del self._waiting[following]
            self._look_up(following)

    def _look_up(self, name: str) -> None:
        self._wanted.add(name)
        if name not in self._tasks:
            task = self._tasks[name] = asyncio.create_task(self._resolve(name))
            task.add_done_callback(lambda _: self._tasks.pop(name, None))

    async def _resolve(self, name: str) -> None:
        """Ask what is behind a name; one that leads nowhere makes room for others."""
        from zeroconf import Error
        from zeroconf.asyncio import AsyncServiceInfo

        found = None
        try:
            for _ in range(_TRIES):
                info = AsyncServiceInfo(SERVICE_TYPE, name)
                if await info.async_request(self._zeroconf.zeroconf, _RESOLVE_SECONDS * 1e3):
                    found = _server(name, info)
                    break
        except (Error, OSError, ValueError):
            pass
        if found is None:
            self._forget(name)
        elif name in self._wanted:
            self._found[name] = found


def _server(name: str, info: Any) -> FoundServer | None:
    """Return what a sound record says, None for any other."""
    addresses = [a for a in info.parsed_scoped_addresses() if reachable(a)]
    if not addresses or not 0 < (info.port or 0) < 1 << 16:
        return None
    said = Announcement.read(info.properties)
    return FoundServer(shown_name(name), tuple(addresses[:MOST_ADDRESSES]), info.port, said)


async def find_servers(
    seconds: float = 3.0, interfaces: Sequence[str] | None = None
) -> list[FoundServer]:
    """Return the servers that are found within ``seconds``. Raises as Browser does."""
    async with Browser(interfaces) as browser:
        await asyncio.sleep(seconds)
        return browser.servers
