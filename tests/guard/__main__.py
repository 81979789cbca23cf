"""Runs random valid graphs with each tensor's memory at a page that nobody may touch.

    python -m tests.guard [--only OP[,OP]] [--share X] [--seed N]
    python -m tests.guard --overlaps RUNS [--card] [--only OP[,OP]] [--seed N]

A kernel or reference that reads or writes a byte too far ends the process that runs it; which case
it was is printed, and the run goes on with the next variant. So is one that changes bytes between
the rows of its result, or whose result depends on bytes that are none of its sources'. Graphs are
those of the differential tester's families, and chains of them; each runs by kernels and by
references, with the guard behind and in front of the memory.

With --overlaps results lie over their sources instead, all in one arena, and what they write is
wrong as an index: see overlap_run.py.

Exit codes: 0 nothing found, 1 findings, 2 wrong options.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conformance.differential.case import GraphCase
from conformance.differential.sketch import FAMILIES, label
from tests.guard import overlap_run, overlaps
from tests.guard.cases import chains, draw_cases
from tests.guard.check import Layout, findings
from tests.guard.mapping import Side
from tools.arguments import command_line

_CHAINS = "chains"

# Runs the items that it reads, as JSON.
COMMAND = [sys.executable, "-m", "tests.guard", "--child"]


@dataclass(frozen=True, slots=True)
class Item:
    """Some cases of one variant of a family."""

    family: str
    variant: int
    count: int
    seed: int

    @property
    def name(self) -> str:
        if self.family == _CHAINS:
            return f"{_CHAINS} {self.variant}"
        return f"{self.family} {label(FAMILIES[self.family].variants[self.variant])}".strip()

    def cases(self) -> list[GraphCase]:
        """The same ones each time."""
        seed = zlib.crc32(f"{self.seed} {self.name}".encode())
        if self.family == _CHAINS:
            return draw_cases(chains(), self.count, seed)
        family = FAMILIES[self.family]
        return draw_cases(family.strategy(family.variants[self.variant]), self.count, seed)


def items(only: Sequence[str], share: float, seed: int) -> list[Item]:
    """What there is to run: ``share`` of each family's cases, and as many chains as variants."""
    found = []
    for name, family in FAMILIES.items():
        if only and name not in only:
            continue
        count = max(round(family.examples * share), 1)
        found += [Item(name, i, count, seed) for i in range(len(family.variants))]
    if not only or _CHAINS in only:
        found += [Item(_CHAINS, i, 50, seed) for i in range(max(round(60 * share), 1))]
    return found


def _child(chosen: Sequence[Item]) -> None:
    """Runs items, a line of JSON for each case before it runs and when something is wrong."""
    faulthandler.enable()

    def say(kind: str, *values: object) -> None:
        print(json.dumps([kind, *values]), flush=True)

    for number, item in enumerate(chosen):
        say("item", number)
        for i, case in enumerate(item.cases()):
            layout = Layout.of(case)
            for side in Side:
                for kernels in (True, False):
                    say("case", i, side, kernels)
                    refused, wrong = findings(case, layout, side, kernels)
                    if refused:
                        say("refused", refused)
                    for text in wrong:
                        say("wrong", text)


@dataclass(slots=True)
class Tally:
    """What was run, and the findings as text."""

    runs: int = 0
    refused: int = 0
    found: list[str] = field(default_factory=list)
    cases: list[tuple[str, GraphCase]] = field(default_factory=list)
    _told: tuple[int, int] = (0, 0)

    def finished(self, family: str) -> None:
        """Print what was done of a family."""
        runs, found = self.runs - self._told[0], len(self.found) - self._told[1]
        self._told = self.runs, len(self.found)
        print(f"{family}: {runs} runs, {found} findings", flush=True)


def run(chosen: Sequence[Item]) -> Tally:
    """Run items in child processes, one after the other; a new one when one dies."""
    tally = Tally()
    left = list(chosen)
    while left:
        left = left[_run_until_death(left, tally) :]
    if chosen:
        tally.finished(chosen[-1].family)
    return tally


def _run_until_death(chosen: Sequence[Item], tally: Tally) -> int:
    """How many items are done with: all of them, or those up to the one that ended the child."""
    rows = json.dumps([[i.family, i.variant, i.count, i.seed] for i in chosen])
    with tempfile.TemporaryFile() as trace, tempfile.TemporaryFile("w+") as todo:
        todo.write(rows)
        todo.seek(0)
        with subprocess.Popen(
            COMMAND, stdin=todo, stdout=subprocess.PIPE, stderr=trace, text=True
        ) as child:
            assert child.stdout is not None
            item, at = 0, (0, "", False)
            for kind, *values in _messages(child.stdout):
                if kind == "item":
                    if values[0] and chosen[values[0]].family != chosen[values[0] - 1].family:
                        tally.finished(chosen[values[0] - 1].family)
                    item = values[0]
                elif kind == "case":
                    at = (values[0], values[1], values[2])
                    tally.runs += 1
                elif kind == "refused":
                    tally.refused += 1
                else:
                    _found(tally, chosen[item], at, values[0])
        if child.returncode == 0:
            return len(chosen)
        trace.seek(0)
        text = trace.read().decode(errors="replace")
        ended = f"exit status {child.returncode}"
        if child.returncode < 0:
            ended = signal.Signals(-child.returncode).name
        _found(tally, chosen[item], at, f"{ended}\n{text[-2000:]}")
        return item + 1


def _messages(lines: Iterator[str]) -> Iterator[list[Any]]:
    for line in lines:
        yield json.loads(line)


def _found(tally: Tally, item: Item, at: tuple[int, str, bool], what: object) -> None:
    i, side, kernels = at
    case = item.cases()[i]
    how = "kernels" if kernels else "references"
    head = f"{item.name}, case {i} of seed {item.seed}, guard at the {side}, by {how}: {what}"
    tally.found.append(f"{head}\n{case.describe()}")
    tally.cases.append((f"{item.name}-{i}".replace(" ", "_"), case))
    print(tally.found[-1], flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = command_line("tests.guard", __doc__)
    add = parser.add_argument
    add("--only", default="", metavar="OP[,OP]", help="these families only ('chains': of several)")
    add("--share", type=float, default=1.0, help="of each family's cases (%(default)s)")
    add("--seed", type=int, default=0, help="of the cases (%(default)s)")
    add("--save", type=Path, metavar="DIR", help="write cases with findings here")
    add("--overlaps", type=int, metavar="RUNS", help="so many runs with results over their sources")
    add("--card", action="store_true", help="those by the GPU's kernels, in emulation")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    add("--overlap-child", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.overlap_child:
        overlap_run.child_main(options.overlap_child)
        return 0
    if options.child:
        _child([Item(*row) for row in json.load(sys.stdin)])
        return 0
    only = [name.strip() for name in options.only.split(",") if name.strip()]
    known = {*FAMILIES, _CHAINS} if options.overlaps is None else set(overlaps.families())
    unknown = [name for name in only if name not in known]
    if unknown:
        parser.error(f"no family {', '.join(unknown)}")
    if options.overlaps is not None:
        return overlap_run.main(options.overlaps, only, options.seed, card=options.card)
    started = time.monotonic()
    chosen = items(only, options.share, options.seed)
    tally = run(chosen)
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        for name, case in tally.cases:
            (options.save / f"{name}.json").write_text(case.dumps())
    print(
        f"seed {options.seed}: {tally.runs} runs of {len(chosen)} variants in "
        f"{time.monotonic() - started:.0f} s, {tally.refused} refused, {len(tally.found)} findings"
    )
    return 1 if tally.found else 0


if __name__ == "__main__":
    sys.exit(main())
