"""Rules of one form as rows of tables: whoever sends this is hung up on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from conformance.suite.context import Context
from conformance.suite.peer import Peer
from conformance.suite.registry import Group
from protocol.commands import Command

CLOSED = "the connection is closed"

Send = Callable[[Context, Peer], None]
Judge = Callable[[Context, Peer, "Refusal"], None]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A case about what a server must not serve.

    ``sends`` says in words what ``tries`` send: one function or several, each on a connection of
    its own. ``command`` is whose answer may come if a server serves it, ``differs`` says why it may
    (None: it must not). ``needs`` as of Case.
    """

    number: int
    name: str
    sends: str
    tries: Send | tuple[Send, ...]
    command: Command | None = None
    why: str = ""
    source: str = ""
    differs: str | None = None
    needs: tuple[Command, ...] = ()


def refused(c: Context, peer: Peer, row: Refusal) -> None:
    """Judge by a request behind what was sent: there must be no answer to it."""
    c.refused(peer, row.command, differs=row.differs)


def hung_up(c: Context, peer: Peer, row: Refusal) -> None:
    """Judge by waiting: the server must close the connection without being sent more."""
    c.expect(peer.closed_by_server(), "the connection stays open")


def endured(c: Context, peer: Peer, row: Refusal) -> None:
    """Judge by the server's life alone: what becomes of the connection is left open."""
    peer.outcome(row.command)


def declare(
    group: Group,
    rows: Iterable[Refusal],
    *,
    expects: str = CLOSED,
    why: str = "",
    source: str = "",
    judge: Judge = refused,
    hello: bool = True,
    split: bool = False,
    **options: Any,
) -> None:
    """Declare a case for each row; ``why`` and ``source`` are of rows that have none.

    ``hello`` and ``split`` are as of Context.connect, ``options`` as of Group.case.
    """
    for row in rows:
        _declare(
            group,
            row,
            judge,
            hello,
            {
                "expects": expects,
                "why": row.why or why,
                "source": row.source or source,
                "split": split,
                **options,
            },
        )


def _declare(
    group: Group, row: Refusal, judge: Judge, hello: bool, options: dict[str, Any]
) -> None:
    @group.case(
        row.number, name=row.name, sends=row.sends, needs=row.needs, hostile=True, **options
    )
    def check(c: Context) -> None:
        for send in row.tries if isinstance(row.tries, tuple) else (row.tries,):
            peer = c.connect(hello=hello, split=options["split"])
            send(c, peer)
            judge(c, peer, row)
            peer.close()
