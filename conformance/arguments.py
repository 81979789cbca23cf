"""Values that several command lines of the suite take."""

from __future__ import annotations

import argparse

from protocol.endpoint import parse_endpoint


def endpoint(text: str) -> tuple[str, int]:
    """Return host and port of the server to be tested, ``host[:port]``; argparse's error if not."""
    try:
        return parse_endpoint(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
