"""What command lines have in common: how they are made, and some values."""

from __future__ import annotations

import argparse
import re

from conformance.arguments import command_line, endpoint
from protocol.endpoint import DEFAULT_PORT, parse_endpoint
from rpc_server.options import port

__all__ = [
    "DEFAULT_PORT",
    "add_server",
    "command_line",
    "endpoint",
    "listening",
    "numbers",
    "port",
    "positive",
    "seconds",
    "size",
]

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def add_server(parser: argparse.ArgumentParser) -> None:
    """Add ``--to``, the server to talk to."""
    parser.add_argument(
        "--to",
        type=endpoint,
        required=True,
        metavar="HOST[:PORT]",
        help=f"the server (port: {DEFAULT_PORT})",
    )


def listening(text: str) -> tuple[str, int]:
    """Parse ``[HOST:]PORT``, where to accept connections.

    This machine only unless told otherwise.
    """
    host, _, number = text.rpartition(":")
    if not host:
        return "127.0.0.1", port(number)
    try:
        # It may be any free one, which is no port to connect to.
        return parse_endpoint(f"{host}:1")[0], port(number)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def numbers(text: str) -> tuple[int, ...]:
    """Return '0,4096' as numbers; ArgumentTypeError for anything else."""
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"not numbers with commas between: {text!r}") from None


def size(text: str) -> int:
    """Parse a number of bytes: 1000, 512K, 10M, 2G."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)(?:i?b)?", text.strip().lower())
    if not found:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size such as 500M or 2G")
    return int(float(found[1]) * _UNITS[found[2]])


def seconds(text: str) -> float:
    """Parse a time above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds")
    return number


def positive(text: str) -> int:
    """Parse a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")
    return int(text)
