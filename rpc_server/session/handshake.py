"""HELLO of one connection: which version is offered, and whether the client went on with it."""

from __future__ import annotations

import logging
import time
from typing import Any

from protocol.dialects import Dialect
from protocol.messages import CONN_CAPS_SIZE
from protocol.negotiation import Greeting, HangUp, Negotiator
from protocol.requests import Hello
from protocol.split import VERSION, caps_version, split_caps, with_split
from rpc_server.observability.logs import ClientLog


class Handshake:
    """The state of one connection's negotiation; see protocol.negotiation."""

    def __init__(
        self, negotiator: Negotiator, address: str, log: ClientLog, *, extension: bool
    ) -> None:
        """``extension``: whether the split extension is offered to those who ask for it."""
        self._negotiator = negotiator
        self._extension = extension
        self._address = address
        self._log = log
        self._greeting: Greeting | None = None
        # Whether a request came after HELLO: the client takes the version.
        self.done = False
        # By which op numberings its graphs may be read, the likeliest first.
        self.dialects: list[Dialect] = []

    def hello(self, hello: Hello) -> tuple[Dialect, dict[str, Any]]:
        """Return the dialect of the connection from here on, and the fields of the answer."""
        self._greeting = self._negotiator.greet(self._address, hello.caps, time.monotonic())
        offer = self._greeting.offer
        self.dialects = list(offer.dialects)
        dialect = offer.dialect
        # Capabilities are those of RDMA, or of our own extension for those who asked for it;
        # all-zero caps keep the connection on plain TCP.
        caps = bytes(CONN_CAPS_SIZE)
        version = min(caps_version(hello.caps), VERSION)
        if self._extension and version:
            caps = split_caps()
            dialect = with_split(dialect, version)
        major, minor, patch = offer.version
        return dialect, {"major": major, "minor": minor, "patch": patch, "conn_caps": caps}

    def accepted(self) -> None:
        """Note that a request came: from now on this address is offered the version first."""
        self.done = True
        greeting = self._greeting
        if greeting is None:
            return
        news = greeting.accepted(time.monotonic())
        offer = greeting.offer
        how = "24 bytes, so 4.0 or later" if offer.dialect.hello_size else "empty, so 1.0 to 3.x"
        self._log.log(
            logging.INFO if news else logging.DEBUG,
            "speaks protocol %s (its HELLO is %s; it accepted %d.%d.%d)",
            offer.name,
            how,
            *offer.version,
        )

    def ended(self, *, by_server: bool) -> None:
        """Note the connection's end: without a request it may be how a client refuses a version.

        ``by_server``: it was this server that had enough of it, which says nothing of the client.
        """
        if self._greeting is None or (by_server and not self.done):
            return
        hang_up = self._greeting.ended(time.monotonic())
        if hang_up is not None:
            self._tell(self._greeting, hang_up)

    def _tell(self, greeting: Greeting, hang_up: HangUp) -> None:
        """Log a hang-up: a warning only where it may be a user's client that was refused."""
        offered, following = greeting.offer.name, hang_up.following.name
        if hang_up.accepted is not None:
            self._log.log(
                logging.INFO if hang_up.evidence else logging.DEBUG,
                "hung up right after HELLO (offered: protocol %s); %s, which has accepted %s, "
                "is offered %s next",
                offered,
                self._address,
                hang_up.accepted.name,
                following,
            )
        elif following == offered:
            self._log.warning(
                "hung up right after HELLO; protocol %s is the only one of that HELLO here "
                "(--protocol pins another)",
                offered,
            )
        else:
            self._log.warning(
                "hung up right after HELLO; if that was a client refusing protocol %s, start it "
                "again: the next try from %s is offered %s (or pin a version with --protocol)",
                offered,
                self._address,
                following,
            )

    def broken(self) -> None:
        """Note that what came was no message of the version."""
        if self._greeting is not None:
            self._greeting.broken()
