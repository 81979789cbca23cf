"""Documents that programs write: kept up to date, or checked."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path


def keep(
    document: Path, program: str, make: Callable[[], str], arguments: Sequence[str] | None
) -> int:
    """Run the command line of a program that writes ``document``; return the exit status.

    With ``--check`` nothing is written, and a document that is out of date is an error.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {program}")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if out of date")
    check = parser.parse_args(arguments).check
    made = make()
    if not check:
        document.write_text(made)
        return 0
    if not document.exists() or made != document.read_text():
        print(f"{document} is out of date: run python -m {program}")
        return 1
    return 0


def with_tables(document: Path, program: str, tables: str) -> str:
    """Return the text of a document with the tables anew that ``program`` writes there.

    They stand between a line that names it and one that ends them; ValueError if these are missing.
    """
    begin, end = f"<!-- tables: written by {program} -->", "<!-- end of tables -->"
    before, _, rest = document.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{document} lacks the marks that its tables stand between")
    return f"{before}{begin}\n\n{tables}\n\n{end}{after}"
