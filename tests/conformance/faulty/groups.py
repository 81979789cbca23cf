"""Faults of groups: who is let in, what becomes of links, and what is told of swaps that fail."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from client.split import links
from protocol.commands import Command
from protocol.requests import Request
from rpc_server.devices.planning import program
from rpc_server.devices.planning.group import LinkGroup
from rpc_server.session import state
from rpc_server.session.handlers import links as handlers
from rpc_server.session.state import Session
from tests.conformance.faulty.registry import Handler, fault, instead_of


@fault("any secret is that of a group", "secret-of-another-group")
@instead_of(LinkGroup, "knows")
def secret_that_is_not_compared(right: Any, self: LinkGroup, secret: bytes) -> bool:
    return True


@fault("a member of any number is let in, again and again", "number-that-is-not-expected")
@instead_of(Command.SPLIT_JOIN)
def number_that_is_not_looked_at(right: Handler, s: Session, request: Request) -> None:
    (group,) = s.context.groups
    s.answer(request.command, {"result": 1})
    s.become_link(group, request.fields.number)


@fault("links outlive the client of their group", "group-that-ends-with-its-client",
       "group-in-the-place-of-another")  # fmt: skip
@instead_of(LinkGroup, "close")
def links_that_outlive_their_client(right: Any, self: LinkGroup) -> None:
    self._closed = True


@fault("a server comes to another member by that one's number", "member-that-is-connected-to")
@instead_of(links, "open_link")
def number_of_the_other(right: Any, host: str, port: int, secret: bytes, number: int) -> Any:
    return right(host, port, secret, 1 - number)


@fault("a member that can't be reached counts as reached", "member-that-can-not-be-reached")
@instead_of(handlers, "peers_answer")
def reach_that_failed(right: Any, reason: str) -> Any:
    return right("")


@fault("a program with swaps that fails ends without a word", "member-that-is-silent",
       "member-that-goes-away")  # fmt: skip
@instead_of(state, "encode_report")
def failure_that_is_not_told(right: Any, text: str) -> bytes:
    return b""


@fault("a swap may bring a tensor into the one that is sent", "swaps-over-one-another")
@instead_of(program, "pairwise")
def swaps_that_are_not_kept_apart(right: Any, tensors: Any) -> Iterator[Any]:
    return iter(())
