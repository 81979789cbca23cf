"""Values that several command lines take."""

from __future__ import annotations

import argparse
import re

from rpc_server.options import DEFAULT_PORT, port

__all__ = ["DEFAULT_PORT", "endpoint", "listening", "port", "size"]

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def endpoint(text: str) -> tuple[str, int]:
    """``HOST[:PORT]``, IPv6 addresses in brackets."""
    host, colon, number = text.rpartition(":")
    if not colon or (host.count(":") and not host.startswith("[")):
        host, number = text, str(DEFAULT_PORT)
    if not host or not number.isdecimal() or not 0 < int(number) < 65536:
        raise argparse.ArgumentTypeError(f"'{text}' is not host:port")
    return host.strip("[]"), int(number)


def listening(text: str) -> tuple[str, int]:
    """``[HOST:]PORT``: where to accept connections; this machine only unless told otherwise."""
    host, _, number = text.rpartition(":")
    return host.strip("[]") or "127.0.0.1", port(number)


def size(text: str) -> int:
    """A number of bytes: 1000, 512K, 10M, 2G."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)(?:i?b)?", text.strip().lower())
    if not found:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size such as 500M or 2G")
    return int(float(found[1]) * _UNITS[found[2]])
