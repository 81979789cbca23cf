"""HELLO of one connection: which version is offered, and whether the client went on with it."""

from __future__ import annotations

import logging
from typing import Any

from protocol.dialects import Dialect
from protocol.framing import Hello
from protocol.messages import CONN_CAPS_SIZE
from protocol.negotiation import Negotiator, Offer
from protocol.split import VERSION, caps_version, split_caps, with_split
from rpc_server.logs import ClientLog


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
        self.offer: Offer | None = None
        # Whether a request came after HELLO: the client takes the version.
        self.done = False
        # By which op numberings its graphs may be read, the likeliest first.
        self.dialects: list[Dialect] = []

    def hello(self, hello: Hello) -> tuple[Dialect, dict[str, Any]]:
        """The dialect of the connection from here on, and the fields of the answer."""
        offer = self.offer = self._negotiator.choose(self._address, len(hello.caps))
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

    def went_on(self) -> None:
        """A request came: from now on this address is offered the version first."""
        self.done = True
        offer = self.offer
        if offer is None:
            return
        news = self._negotiator.accepted(self._address, offer)
        how = "24 bytes, so 4.0 or later" if offer.dialect.hello_size else "empty, so 1.0 to 3.x"
        self._log.log(
            logging.INFO if news else logging.DEBUG,
            "speaks protocol %s (its HELLO is %s; it accepted %d.%d.%d)",
            offer.name,
            how,
            *offer.version,
        )

    def hung_up(self) -> None:
        """The client left: if that is how it refuses the version, offer another one next time."""
        if self.done or self.offer is None:
            return
        offer = self.offer
        following = self._negotiator.refused(self._address, offer)
        if following is None:
            self._log.warning(
                "hung up on protocol %s, the last one it was not offered yet; "
                "its next try starts over with the newest",
                offer.name,
            )
            return
        self._log.warning(
            "hung up on protocol %s; the next try from %s is offered %s "
            "(start the client again, or pin a version with --protocol)",
            offer.name,
            self._address,
            following.name,
        )

    def broken(self) -> None:
        """What came was no message of the version: forget what was assumed of the peer."""
        if self.offer is not None:
            self._negotiator.forget(self._address, self.offer)
