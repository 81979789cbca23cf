"""What the command lines of the suite have in common: how they are made, and some values."""

from __future__ import annotations

import argparse
from pathlib import Path

from protocol.endpoint import parse_endpoint


def command_line(
    program: str, description: str | None, epilog: str | None = None
) -> argparse.ArgumentParser:
    """Return a parser for ``python -m program``, whose help keeps the lines of these texts."""
    return argparse.ArgumentParser(
        prog=f"python -m {program}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def endpoint(text: str) -> tuple[str, int]:
    """Parse ``HOST[:PORT]``, IPv6 addresses in brackets."""
    try:
        return parse_endpoint(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_reports(parser: argparse._ActionsContainer, passed: str, page: str) -> None:
    """Add the options that say how much is printed and which files are written.

    ``passed`` is what --verbose lists too, ``page`` what the HTML has.
    """
    add = parser.add_argument
    add("--verbose", action="store_true", help=f"list {passed} too")
    add("--json", type=Path, metavar="FILE", help="write the results as JSON")
    add("--junit", type=Path, metavar="FILE", help="write the results as JUnit XML")
    add("--html", type=Path, metavar="FILE", help=f"write a page with {page}")
