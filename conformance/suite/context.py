"""What a case is given: connections, what is known of the server, and ways to a verdict."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NoReturn

from conformance.suite.errors import Closed, Differs, Failed, NotOffered, Skipped
from conformance.suite.peer import Peer
from conformance.suite.transcript import Transcript
from protocol.commands import Command
from protocol.dialects import Dialect, Version
from protocol.negotiation import retry_pause
from protocol.observe.conversation import dialect_of_version
from protocol.split import split_caps


@dataclass(frozen=True, slots=True)
class Facts:
    """The facts about the server, found out before the first case.

    ``version`` is what it answered HELLO with; ``concurrent`` tells whether a second client is
    served while a first is connected; ``zeroed`` whether new memory was all zeros.
    """

    version: Version
    dialect: Dialect
    devices: int = 1
    concurrent: bool = True
    cache: bool = False
    # Version of the split extension that is spoken with the server, 0 for none.
    split: int = 0


class Context:
    """One case's view of the server at ``address``; ``patience`` as of Peer."""

    def __init__(
        self,
        address: tuple[str, int],
        facts: Facts,
        *,
        seconds: float = 30.0,
        patience: float = 10.0,
        seed: int = 0,
    ) -> None:
        self.address = address
        self.facts = facts
        self.dialect = facts.dialect
        self.seed = seed
        self.transcript = Transcript()
        self.deadline = time.monotonic() + seconds
        self.patience = patience
        self._peers: list[Peer] = []

    # -- connections ---------------------------------------------------------------------------

    def connect(
        self,
        name: str = "",
        *,
        hello: bool = True,
        split: bool = False,
        dialect: Dialect | None = None,
    ) -> Peer:
        """Connect, with HELLO and one further request, or with ``hello`` false without.

        ``split`` asks for the split extension.
        """
        speaks = dialect or self.dialect
        offered: list[Version] = []
        while True:
            peer = self._open(name, speaks)
            if not hello:
                return peer
            theirs = peer.hello(*([split_caps()] if split else []))
            if accepts(speaks, theirs) and same_messages(speaks, theirs):
                # Servers that guess take a client that goes on for one that accepted.
                peer.ping()
                return peer
            peer.drop()
            offered.append(theirs)
            # A server that guesses a client's version offers another one at some later try.
            pause = retry_pause(offered)
            if pause is None:
                break
            time.sleep(pause)
        raise NotOffered(speaks, offered)

    def _open(self, name: str, dialect: Dialect) -> Peer:
        number = len(self._peers) + 1
        try:
            peer = Peer(
                self.address,
                dialect,
                name=name or ("client" if number == 1 else f"client {number}"),
                transcript=self.transcript,
                deadline=self.deadline,
                patience=self.patience,
            )
        except OSError as error:
            raise Closed(f"the server takes no connection: {error}") from None
        self._peers.append(peer)
        return peer

    def close(self) -> None:
        """Close what the case has opened."""
        for peer in self._peers:
            peer.drop()

    # -- verdicts ------------------------------------------------------------------------------

    def fail(self, message: str) -> NoReturn:
        raise Failed(message)

    def differs(self, message: str) -> NoReturn:
        raise Differs(message)

    def skip(self, message: str) -> NoReturn:
        raise Skipped(message)

    def expect(self, condition: bool, message: str) -> None:
        """Fail with ``message`` unless ``condition`` holds."""
        if not condition:
            raise Failed(message)

    def equal(self, actual: object, expected: object, what: str) -> None:
        """Fail unless both are equal; of bytes the first difference is told."""
        if actual == expected:
            return
        if isinstance(actual, bytes) and isinstance(expected, bytes):
            raise Failed(f"{what}: {_difference(actual, expected)}")
        raise Failed(f"{what} is {actual!r}, not {expected!r}")

    def refused(
        self, peer: Peer, command: Command | None = None, *, differs: str | None = None
    ) -> None:
        """Expect the server to end the connection for what ``peer`` sent last.

        ``command`` is whose answer may come if it doesn't. If it goes on the case fails, or
        differs if ``differs`` says what a server may do instead.
        """
        outcome = peer.outcome(command)
        if outcome.closed:
            return
        answered = "" if outcome.answer is None else f" and answered {_short(outcome.answer)}"
        came = f"the server went on{answered}"
        if differs is not None:
            raise Differs(f"{came}: {differs}")
        raise Failed(came)


def accepts(dialect: Dialect, theirs: Version) -> bool:
    """Return whether llama.cpp of this protocol goes on with a server of that version."""
    return theirs[0] == dialect.version[0] and theirs[1] <= dialect.version[1]


def same_messages(dialect: Dialect, theirs: Version) -> bool:
    """Return whether a server of that version has the messages of ``dialect``, as far as known.

    A server that guesses may offer an older minor version with others.
    """
    known = dialect_of_version(theirs, dialect.hello_size)
    return known is None or known.commands is dialect.commands


def _short(answer: object) -> str:
    if isinstance(answer, bytes):
        return f"{len(answer)} bytes {answer[:16].hex(' ')}"
    return ", ".join(f"{name} {value}" for name, value in vars(answer).items()) or "empty"


def _difference(actual: bytes, expected: bytes) -> str:
    if len(actual) != len(expected):
        return f"{len(actual)} bytes, not {len(expected)}"
    at = next(i for i, (a, b) in enumerate(zip(actual, expected, strict=True)) if a != b)
    wrong = sum(a != b for a, b in zip(actual, expected, strict=True))
    return (
        f"{wrong} of {len(actual)} bytes differ, the first at {at}: "
        f"{actual[at : at + 8].hex(' ')} instead of {expected[at : at + 8].hex(' ')}"
    )
