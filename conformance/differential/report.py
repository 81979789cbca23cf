"""The table of a run: per op what was tried and what differed; findings as text and files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from conformance.differential.explore import MOST_REFUSED, FamilyTally
from conformance.differential.sketch import FAMILIES

_HEAD = (
    f"{'op':28} {'variants':>8} {'cases':>7} {'distinct':>8} {'refused':>8} {'failed':>7} {'s':>6}"
)


class Report:
    """Tallies by family, in the order given; prints progress to stderr, the table to stdout."""

    def __init__(self, names: list[str]) -> None:
        self._tallies = {name: FamilyTally() for name in names}
        self._done = 0

    def add(self, name: str, tally: FamilyTally) -> None:
        """Take in what was tried of a family, and say so."""
        self._tallies[name].add(tally)
        self._done += 1
        text = f"[{self._done}/{len(self._tallies)}] {name}: {tally.cases} cases"
        if tally.findings:
            text += f", {len(tally.findings)} failed"
        print(text, file=sys.stderr, flush=True)
        for finding in tally.findings:
            print(
                f"  {finding.family} {finding.variant}: {finding.reason}\n"
                + "\n".join("    " + line for line in finding.case.describe().splitlines()),
                file=sys.stderr,
                flush=True,
            )

    @property
    def failed(self) -> bool:
        """True if anything differed, or a family proved nothing."""
        return any(t.findings or self._idle(t) for t in self._tallies.values())

    @staticmethod
    def _idle(t: FamilyTally) -> bool:
        return t.refused > t.cases * MOST_REFUSED

    def table(self) -> str:
        """Return a line per family and their sum."""
        total = FamilyTally()
        lines = [_HEAD]
        for name, t in self._tallies.items():
            total.add(t)
            lines.append(self._line(name, len(FAMILIES[name].variants), t))
        variants = sum(len(FAMILIES[name].variants) for name in self._tallies)
        lines.append(self._line("all", variants, total))
        return "\n".join(lines)

    def _line(self, name: str, variants: int, t: FamilyTally) -> str:
        line = f"{name:28} {variants:8} {t.cases:7} {len(t.keys):8} {t.refused:8}"
        line += f" {len(t.findings):7} {t.seconds:6.1f}"
        return line + ("  mostly refused by the reference" if self._idle(t) else "")

    def finish(self, save: Path | None, json_file: Path | None) -> None:
        """Print the table; write findings and figures where asked to."""
        print(self.table())
        if save is not None:
            save.mkdir(parents=True, exist_ok=True)
            for name, tally in self._tallies.items():
                for i, finding in enumerate(tally.findings):
                    stem = f"{name}-{finding.variant}-{i}".replace(" ", "_").replace("/", "_")
                    (save / f"{stem}.json").write_text(finding.case.dumps())
        if json_file is not None:
            json_file.write_text(json.dumps(self.figures(), indent=1))

    def figures(self) -> dict[str, dict[str, object]]:
        """Return what was tried of each family and what differed, as plain data."""
        return {
            name: {
                "variants": len(FAMILIES[name].variants),
                "cases": t.cases,
                "distinct": len(t.keys),
                "refused": dict(t.reasons),
                "failed": [f"{f.variant}: {f.reason}" for f in t.findings],
                "seconds": round(t.seconds, 2),
            }
            for name, t in self._tallies.items()
        }
