"""The command line: runs the matrix and prints it as a table."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

import tests.e2e.matrix as package
from tests.e2e.matrix.combinations import (
    FACTORS,
    RULES,
    SERVER,
    Combination,
    pairwise,
    representative,
)
from tests.e2e.matrix.run import Outcome, run_all
from tools import smollm2, upstream
from tools.arguments import command_line

WIDTH = 180


def numbered() -> dict[int, Combination]:
    """All combinations by the numbers that people call them by."""
    return dict(enumerate(pairwise(), start=1))


def table(rows: Sequence[tuple[int, Combination, Outcome | None]]) -> Table:
    """A row for each combination: its values, and how it went where it ran."""
    made = Table(show_lines=False, box=None, pad_edge=False)
    made.add_column("no", justify="right")
    for factor in FACTORS:
        made.add_column(factor)
    if any(outcome for *_, outcome in rows):
        made.add_column("answer")
        made.add_column("s", justify="right")
    for number, combination, outcome in rows:
        words = [str(number), *combination]
        if outcome:
            what = outcome.words if outcome.ok else f"FAILED: {outcome.reason}"
            words += [what, f"{outcome.seconds:.0f}"]
        made.add_row(*words, style=None if outcome is None or outcome.ok else "red")
    return made


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line says; 0 where all went well, 1 where something failed."""
    parser = command_line("tests.e2e.matrix", package.__doc__)
    parser.add_argument("--list", action="store_true", help="print the combinations and the rules")
    parser.add_argument("--only", type=_numbers, metavar="N,N", help="run these alone")
    parser.add_argument("--few", action="store_true", help="run those of the ordinary tests")
    parser.add_argument("--folder", type=Path, help="keep logs and models in this folder")
    options = parser.parse_args(arguments)

    wanted = numbered()
    if options.only:
        wanted = {number: wanted[number] for number in options.only}
    if options.few:
        few = set(representative())
        wanted = {number: c for number, c in wanted.items() if c in few}
    console = Console(width=WIDTH)
    if options.list:
        console.print(table([(number, c, None) for number, c in wanted.items()]))
        console.print("\nLeft out:", *(f"- {rule.reason}" for rule in RULES), sep="\n")
        return 0
    if upstream.find_program(SERVER) is None or smollm2.find() is None:
        parser.error(
            "llama.cpp's programs are made by: python -m tools.upstream; "
            f"the model is downloaded by: {smollm2.COMMAND}"
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        return _run(wanted, folder, console)


def _run(wanted: dict[int, Combination], folder: Path, console: Console) -> int:
    start = time.monotonic()
    outcomes: list[Outcome] = []
    for number, outcome in zip(wanted, run_all(list(wanted.values()), folder), strict=True):
        outcomes.append(outcome)
        said = outcome.words if outcome.ok else f"FAILED\n{outcome.fault}"
        print(f"{number}: {outcome.combination}: {said} ({outcome.seconds:.0f} s)", flush=True)
    rows = list(zip(wanted, wanted.values(), outcomes, strict=True))
    console.print(table(rows))
    failed = sum(not outcome.ok for outcome in outcomes)
    minutes = (time.monotonic() - start) / 60
    console.print(f"{len(outcomes)} combinations, {failed} failed, in {minutes:.0f} minutes")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
