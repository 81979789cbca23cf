"""What a server is called where several are named: its place, and whether it is inside of TLS."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.endpoint import DEFAULT_PORT, format_endpoint, parse_endpoint

_TLS = "tls://"


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
