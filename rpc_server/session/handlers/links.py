"""Requests by which the servers of a split link to one another, to exchange tensors by themselves.

A client that splits says who they are and hands out a secret (SPLIT_PEERS). Who presents it at this
server's port (SPLIT_JOIN) is one of them: nothing listens for anybody else.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Mapping

from protocol.commands import Command
from protocol.endpoint import format_endpoint
from protocol.errors import ProtocolError
from protocol.requests import Request
from protocol.split import MAX_PARTS, peers_answer
from rpc_server.devices.planning.group import LinkGroup
from rpc_server.session.handlers.base import Handler, device_index
from rpc_server.session.state import Session

_CLIENT = "the client"


def _split_peers(s: Session, request: Request) -> None:
    index, fields = device_index(s, request), request.fields
    number, n_parts = fields.number, fields.n_parts
    if not (2 <= n_parts <= MAX_PARTS and number < n_parts and fields.timeout_ms):
        raise ProtocolError(
            f"SPLIT_PEERS as number {number} of {n_parts}, to wait {fields.timeout_ms} ms"
        )
    if not any(fields.secret):
        raise ProtocolError("SPLIT_PEERS without a secret")
    names: dict[int, str] = {}
    wanted: dict[int, tuple[str, int]] = {}
    for i, part in enumerate(fields.parts[:n_parts]):
        host = bytes(part.host).rstrip(b"\0").decode("ascii", "replace")
        if i == number:
            continue
        names[i] = format_endpoint(host, part.port) if host else _CLIENT
        if part.reach:
            wanted[i] = (_checked_address(host), part.port)
    reason = s.device(index).no_swaps
    if reason:
        s.answer(request.command, peers_answer(reason))
        return
    timeout = min(fields.timeout_ms / 1000, s.context.limits.peer)
    expected = frozenset(names) - frozenset(wanted)
    group = LinkGroup(number, names, timeout, bytes(fields.secret), expected)
    s.enter_group(group)
    s.wait(_reach(s, request, group, wanted))


def _checked_address(host: str) -> str:
    """Return a numeric address. Raises ProtocolError: no names are looked up for clients."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise ProtocolError(f"SPLIT_PEERS with a part at {host!r}, which is no address") from None
    return host


async def _reach(
    s: Session, request: Request, group: LinkGroup, wanted: Mapping[int, tuple[str, int]]
) -> None:
    """Link to all that are to be connected to, and answer."""
    # Brings the client, which a server that no coordinator uses has no need for.
    from client.split.links import LinkError, open_link

    async def one(number: int, host: str, port: int) -> str:
        if not s.context.lets_in(host):
            return f"{format_endpoint(host, port)} is not among those of --allow"
        try:
            link = await open_link(host, port, group.secret, group.number)
        except LinkError as error:
            return str(error)
        try:
            group.add(number, link.fileno())
        finally:
            link.abort()
        return ""

    found = await asyncio.gather(*(one(i, *endpoint) for i, endpoint in wanted.items()))
    reason = next(filter(None, found), "")
    if reason:
        s.log.warning("links to other parts of a split: %s", reason)
        s.leave_group()
    s.answer(request.command, peers_answer(reason))


def _split_join(s: Session, request: Request) -> None:
    secret, number = bytes(request.fields.secret), request.fields.number
    # All of them are looked at, whichever it is.
    found = [group for group in s.context.groups if group.knows(secret)]
    if not found:
        raise ProtocolError("SPLIT_JOIN with a secret that no client here has handed out")
    group = found[0]
    if number not in group.expected or s.holds_anything:
        raise ProtocolError(f"SPLIT_JOIN as part {number}, which is not expected")
    s.answer(request.command, {"result": 1})
    s.become_link(group, number)


HANDLERS: dict[int, Handler] = {
    Command.SPLIT_PEERS: _split_peers,
    Command.SPLIT_JOIN: _split_join,
}
