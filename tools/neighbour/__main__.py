"""Has a server attacked in every way of a catalogue, beside a client that must not notice.

    python -m tools.neighbour                       # all of it, some minutes
    python -m tools.neighbour --only "event loop"   # those whose name or kind has these words
    python -m tools.neighbour --list

Servers are started here, of this project's own, and nothing else is ever attacked. The client
compares its bytes, and measures how long HELLO and a graph of one node take, all the time; after
each attack the server's memory, mappings, files and descriptors, and the speed of its kernels, are
held against those before. The machine should have nothing else to do.

Exit codes: 0 nothing was noticed, 1 something was (printed), 2 wrong options.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tools.neighbour import catalogue  # noqa: F401  (fills the table)
from tools.neighbour.attack import CATALOGUE, Attack
from tools.neighbour.harness import AttackResult, alone, run
from tools.neighbour.report import as_json, markdown, summary, table
from tools.serving.processes import ProgramError


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all options."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.neighbour",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="Exit codes: 0 nothing was noticed, 1 something was, 2 wrong options.",
    )
    parser.add_argument("--list", action="store_true", help="print the catalogue, and end")
    parser.add_argument(
        "--only", default="", metavar="TEXT[,TEXT]", help="attacks whose name or kind has this"
    )
    parser.add_argument(
        "--seconds", type=float, default=2.0, metavar="N", help="of each attack (default: 2)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    return parser


def chosen(only: str) -> list[Attack]:
    """Return the attacks whose name or kind has one of the texts; all if there are none."""
    texts = [text.strip() for text in only.split(",") if text.strip()]
    found = [
        attack
        for attack in CATALOGUE.values()
        if not texts or any(text in attack.name or text in attack.kind for text in texts)
    ]
    return sorted(found, key=lambda attack: attack.server)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    attacks = chosen(options.only)
    if not attacks:
        parser.error(f"no attack has {options.only!r} in its name or kind")
    if not 0.1 <= options.seconds <= 600:
        parser.error("--seconds is from 0.1 to 600")
    console = Console()
    if options.list:
        for attack in attacks:
            console.print(f"{attack.name}  ({attack.kind})\n    {attack.does}", highlight=False)
        return 0
    results: list[AttackResult] = []
    quiet = alone(options.seconds)
    try:
        for result in run(attacks, options.seconds):
            results.append(result)
            if console.is_terminal:
                console.print(f"{len(results)} of {len(attacks)}: {result.attack.name}", end="\r")
    except ProgramError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    results.sort(key=lambda result: list(CATALOGUE).index(result.attack.name))
    console.print(table(results))
    print(summary(results))
    if options.json:
        options.json.write_text(as_json(results, quiet) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(results, quiet) + "\n")
    return 0 if all(result.passed or result.skipped for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
