"""A server's address as people write it: ``host:port``, an IPv6 address in brackets.

One reader and one writer for everything that takes or prints an address.
"""

from __future__ import annotations

import ipaddress
import re

DEFAULT_PORT = 50052

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# Of a name or an address, with the interface of a link-local one; anything else is a mistake.
_HOST = re.compile(r"[^\s/\\@\[\],;#?'\"]+")


def parse_endpoint(text: str, default_port: int | None = DEFAULT_PORT) -> tuple[str, int]:
    """Return host and port of ``host``, ``host:port``, ``[ipv6]``, ``[ipv6]:port`` or ``ipv6``.

    ``default_port`` is for those without one; where it is None one has to be there. Raises
    ValueError, whose message says what is wrong with the text.
    """
    text = text.strip()
    wanted = "host:port" if default_port is None else "host or host:port"
    if scheme := _SCHEME.match(text):
        rest = text[scheme.end() :].rstrip("/")
        raise ValueError(f"'{text}' is a URL; write {rest or wanted}, without '{scheme[0]}'")
    host, number = _divided(text)
    if ":" in host and not _is_ipv6(host):
        raise ValueError(
            f"'{text}' is not {wanted}, and no IPv6 address either; with a port such an address "
            "is in brackets: [::1]:50052"
        )
    if number is None and host.isdecimal():
        raise ValueError(f"'{text}' has no host; write 127.0.0.1:{text} for this machine")
    if not _HOST.fullmatch(host):
        raise ValueError(f"'{text}' is not {wanted}")
    if number is None:
        if default_port is None:
            raise ValueError(f"'{text}' has no port; write {format_endpoint(host, DEFAULT_PORT)}")
        return host, default_port
    if not (number.isascii() and number.isdecimal()) or not 0 < int(number[:6]) < 1 << 16:
        raise ValueError(f"'{text}' is not {wanted}: '{number}' is not a port (1 to 65535)")
    return host, int(number)


def format_endpoint(host: str, port: int | str) -> str:
    """Return ``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _divided(text: str) -> tuple[str, str | None]:
    """Return the host, without brackets, and what stands for the port."""
    if text.startswith("["):
        host, closed, rest = text[1:].partition("]")
        if closed and _is_ipv6(host) and (not rest or rest.startswith(":")):
            return host, rest[1:] if rest else None
        return text, None
    host, colon, number = text.rpartition(":")
    if not _is_ipv6(text):
        return (host, number) if colon else (text, None)
    if _is_ipv6(host) and number.isdecimal() and int(number) > 99:
        raise ValueError(
            f"'{text}' may mean an address or one with a port; write [{text}] or [{host}]:{number}"
        )
    return text, None


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False
