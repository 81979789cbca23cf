"""What parts of a split are called: the place of a server, or a card of the coordinator's own."""

from __future__ import annotations

import re
from dataclasses import dataclass

from protocol.endpoint import DEFAULT_PORT, format_endpoint, parse_endpoint

_TLS = "tls://"
_CARD = re.compile(r"cuda(\d{1,3})", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """A place where a server listens, perhaps inside of TLS.

    ``name`` is what it is announced as.
    """

    host: str
    port: int = DEFAULT_PORT
    tls: bool = False
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> ServerAddress:
        """Return what ``host[:port]`` or ``tls://host[:port]`` names. Raises ValueError."""
        address = text.strip()
        host, port = parse_endpoint(address.removeprefix(_TLS))
        return cls(host, port, address.startswith(_TLS))

    @property
    def endpoint(self) -> str:
        """Return the address as it is written for --split."""
        return (_TLS if self.tls else "") + format_endpoint(self.host, self.port)


@dataclass(frozen=True, slots=True)
class OwnCard:
    """A GPU of the coordinator's own machine as a part; ``index`` is CUDA's number of it."""

    index: int

    @classmethod
    def parse(cls, text: str) -> OwnCard | None:
        """Return the card that ``cuda0`` names, in any case; None for what names no card."""
        found = _CARD.fullmatch(text.strip())
        return cls(int(found[1])) if found else None

    @property
    def name(self) -> str:
        """Return what it is called as a part."""
        return f"cuda{self.index}"

    @property
    def device(self) -> str:
        """Return what it is called as a device of a server."""
        return f"CUDA{self.index}"
