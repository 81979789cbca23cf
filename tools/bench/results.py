"""What a run measured: samples of figures, their medians and ratios, and the file they are kept in.

Nothing here knows how a figure is measured or shown.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OURS, UPSTREAM = "ours", "upstream"
SERVERS = (OURS, UPSTREAM)


@dataclass(frozen=True)
class Sample:
    """One measured value. ``more``: whether a larger one is better."""

    name: str
    unit: str
    more: bool
    value: float


@dataclass
class Figure:
    """All samples of one figure by server; those at the same index are from the same round."""

    name: str
    unit: str
    more: bool
    samples: dict[str, list[float]] = field(default_factory=lambda: {s: [] for s in SERVERS})

    def median(self, server: str) -> float:
        return statistics.median(self.samples[server])

    @property
    def ratios(self) -> list[float]:
        """Ours over upstream's of each round: what drifts with the machine falls out."""
        pairs = zip(self.samples[OURS], self.samples[UPSTREAM], strict=True)
        return [ours / theirs for ours, theirs in pairs]

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios."""
        return statistics.median(self.ratios)

    @property
    def times_better(self) -> float:
        """The ratio turned so that above one this server is the better one."""
        return self.ratio if self.more else 1 / self.ratio


@dataclass
class ResultTable:
    """The figures of one subject: a model, or the server by itself."""

    title: str
    figures: list[Figure] = field(default_factory=list)

    def add(self, server: str, samples: list[Sample]) -> None:
        """Take what was measured of a server in one round."""
        for sample in samples:
            self._figure(sample).samples[server].append(sample.value)

    def _figure(self, sample: Sample) -> Figure:
        for figure in self.figures:
            if figure.name == sample.name:
                return figure
        self.figures.append(Figure(sample.name, sample.unit, sample.more))
        return self.figures[-1]


@dataclass
class BenchResult:
    """A whole run. ``machine``, ``versions`` and ``options`` say what it was made with."""

    machine: dict[str, Any]
    versions: dict[str, str]
    options: dict[str, Any]
    tables: list[ResultTable] = field(default_factory=list)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> BenchResult:
        """Return what :meth:`save` wrote.

        Raises ValueError, KeyError or TypeError for anything else.
        """
        data = json.loads(path.read_text())
        tables = [
            ResultTable(table["title"], [Figure(**figure) for figure in table["figures"]])
            for table in data.pop("tables")
        ]
        return cls(**data, tables=tables)
