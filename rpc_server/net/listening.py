"""Sockets to listen on: every address of a host, on one port, waited for if that is about free.

A host of ``::`` (or ``*``) is every address of the machine, of both families. Each family has a
socket of its own, so that a client's address always reads as its network writes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import socket
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from protocol.endpoint import format_endpoint

log = logging.getLogger(__name__)

# The system keeps the number of a connection that was closed for a minute.
WAIT_SECONDS = 65.0
_AGAIN_SECONDS = 0.5
_BACKLOG = 64
# How often all sockets are tried where the system chooses the port: it is free for each.
_TRIES = 20
_EVERYWHERE = frozenset({"::", "*", ""})
# What a machine without one of the families says of it.
_NO_FAMILY = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})
_LISTENING = "0A"
_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))

Address = tuple[socket.AddressFamily, str, int]


class PortInUseError(OSError):
    """Another server listens on the port, or another program's connections have it for long."""


async def listen(
    host: str, port: int, say: Callable[[str], None] = log.warning, wait: float = WAIT_SECONDS
) -> list[socket.socket]:
    """Return sockets that listen on all addresses of ``host``, all on the same port.

    With ``port`` 0 the system chooses it. Where the port belongs to connections that end, and to no
    server, it is tried for ``wait`` seconds, and ``say`` is told so. Raises PortInUseError,
    OSError.
    """
    addresses = await _addresses(host)
    end, said = time.monotonic() + wait, False
    while True:
        try:
            return _sockets(addresses, port, optional=host in _EVERYWHERE)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        if _has_listener(addresses, port):
            raise PortInUseError(errno.EADDRINUSE, "another server listens there")
        if time.monotonic() >= end:
            raise PortInUseError(errno.EADDRINUSE, "connections of other programs have this number")
        if not said:
            said = True
            say(
                f"port {port} of {host} belongs to a connection of this machine that has ended or "
                f"is about to; trying for up to {wait:g} s"
            )
        await asyncio.sleep(_AGAIN_SECONDS)


def is_loopback(sockets: Iterable[socket.socket]) -> bool:
    """Return whether sockets are reached from this machine only."""
    return all(
        ipaddress.ip_address(s.getsockname()[0].partition("%")[0]).is_loopback for s in sockets
    )


def is_name(host: str) -> bool:
    """Return whether ``host`` is a name rather than an address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host not in _EVERYWHERE
    return False


async def is_here(host: str, port: int, own_host: str, own_port: int) -> bool:
    """Return whether ``host:port`` is reached by listening on ``own_host:own_port`` here."""
    if port != own_port:
        return False
    with contextlib.suppress(OSError):
        own = {(family, address) for family, address, _ in await _addresses(own_host)}
        for family, address, _ in await _addresses(host):
            everywhere = "::" if family is socket.AF_INET6 else "0.0.0.0"
            if (family, address) in own:
                return True
            if (family, everywhere) in own and _is_local(family, address):
                return True
    return False


async def _addresses(host: str) -> list[Address]:
    """Return what ``host`` means, without repetition. Raises OSError."""
    if host in _EVERYWHERE:
        return [(socket.AF_INET6, "::", 0), (socket.AF_INET, "0.0.0.0", 0)]
    found = await asyncio.get_running_loop().getaddrinfo(
        host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    made: list[Address] = []
    for family, _, _, _, address in found:
        scope = int(address[3]) if len(address) > 3 else 0
        made.append((socket.AddressFamily(family), str(address[0]), scope))
    return list(dict.fromkeys(made))


def _sockets(addresses: list[Address], port: int, *, optional: bool) -> list[socket.socket]:
    """Return a listening socket for each address; with ``optional`` a family may be missing."""
    for tries_left in reversed(range(_TRIES)):
        made: list[socket.socket] = []
        missing: OSError | None = None
        number = port
        try:
            for address in addresses:
                try:
                    made.append(_socket(address, number))
                except OSError as error:
                    if not optional or error.errno not in _NO_FAMILY:
                        raise
                    missing = error
                    continue
                number = number or int(made[0].getsockname()[1])
        except OSError as error:
            for other in made:
                other.close()
            # The number that the first one got is taken at another address.
            if port == 0 and tries_left and error.errno == errno.EADDRINUSE:
                continue
            raise
        if not made and missing is not None:
            raise missing
        return made
    raise AssertionError("the last try returns or raises")


def _socket(address: Address, port: int) -> socket.socket:
    family, host, scope = address
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        if sys.platform != "win32":
            # What a server before this one left behind does not matter.
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind((host, port, 0, scope))
        else:
            made.bind((host, port))
        made.listen(_BACKLOG)
        made.setblocking(False)
    except BaseException:
        made.close()
        raise
    return made


def _has_listener(addresses: list[Address], port: int) -> bool:
    """Return whether some server listens on ``port``, at any address where that can be seen."""
    with contextlib.suppress(OSError):
        if tables := [table.read_text() for table in _TABLES if table.exists()]:
            return any(_listens_in(table, port) for table in tables)
    for family, host, scope in addresses:
        everywhere = {"::": "::1", "0.0.0.0": "127.0.0.1"}
        with contextlib.suppress(OSError), socket.socket(family) as probe:
            probe.settimeout(1)
            at = everywhere.get(host, host)
            probe.connect((at, port, 0, scope) if family == socket.AF_INET6 else (at, port))
            return True
    return False


def _listens_in(table: str, port: int) -> bool:
    """Return whether a table of Linux's sockets has one that listens on ``port``."""
    for line in table.splitlines()[1:]:
        fields = line.split()
        if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
            return True
    return False


def _is_local(family: socket.AddressFamily, host: str) -> bool:
    """Return whether an address is one of this machine's."""
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.bind((host, 0))
        return True
    return False


def endpoint_of(listener: socket.socket) -> str:
    """Return the address of a listening socket, as it is written."""
    host, port = listener.getsockname()[:2]
    return format_endpoint(host, port)
