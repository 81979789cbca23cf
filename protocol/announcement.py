"""What a server publishes of itself by DNS-SD, and how others' records are read.

A record comes from anybody on the network, so nothing in it is believed: it says where to ask, and
a few words to show until somebody has asked. Reading one never fails; what isn't sound is left out.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass

from protocol.text import printable

SERVICE_TYPE = "_ggml-rpc._tcp.local."
# Of a value in a TXT record; names of services have 63 bytes by themselves.
_LONGEST = 64
# Of the layout of these records.
_TXT_VERSION = "1"
_LABEL = re.compile(r"[^A-Za-z0-9-]+")


@dataclass(frozen=True, slots=True)
class Announcement:
    """The fields of a record: ``software`` with its version, ``device``, whether it has TLS."""

    software: str = ""
    device: str = ""
    tls: bool = False

    def properties(self) -> dict[str, str]:
        """Return the pairs of the TXT record."""
        return {
            "txtvers": _TXT_VERSION,
            "software": self.software[:_LONGEST],
            "device": self.device[:_LONGEST],
            "tls": str(int(self.tls)),
        }

    @classmethod
    def read(cls, properties: Mapping[bytes, bytes | None]) -> Announcement:
        """Return what the pairs of a TXT record say."""

        def text(key: bytes) -> str:
            value = properties.get(key) or b""
            return printable(value[:_LONGEST].decode("utf-8", "replace"))

        return cls(text(b"software"), text(b"device"), text(b"tls") == "1")


def instance_name(host: str, port: int, number: int) -> str:
    """Return the name of a service: the machine's, the port, and what tells two apart."""
    label = _LABEL.sub("-", host.partition(".")[0]).strip("-")[:32] or "server"
    return f"{label}-{port}-{number & 0xFFFF:04x}.{SERVICE_TYPE}"


def shown_name(name: str) -> str:
    """Return the name of a service for people: without its type, nothing in it but text."""
    return printable(name.removesuffix("." + SERVICE_TYPE)[:_LONGEST])


def reachable(address: str) -> bool:
    """Return whether a record's address can be that of one server."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    return not (ip.is_multicast or ip.is_unspecified or ip.is_reserved or str(ip).endswith(".255"))
