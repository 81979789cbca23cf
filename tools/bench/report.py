"""Tables of a result: for a terminal, and in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from tools.bench.results import OURS, UPSTREAM, BenchResult, Figure, ResultTable

_HEADER = ("figure", OURS, UPSTREAM, "ratio", "min..max", "better")


def number(value: float) -> str:
    """Return three digits that count, without an exponent."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"


def ratio(values: Sequence[float], base: Sequence[float]) -> str:
    """Return the median of the rounds' ratios, and how far they went if there are several."""
    ratios = [a / b for a, b in zip(values, base, strict=True)]
    between = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{statistics.median(ratios):.2f}{between}"


def cells(figure: Figure) -> tuple[str, ...]:
    """Return one row.

    It has the medians, ours over upstream's, and how far that ratio went over the rounds.
    """
    ratios = figure.ratios
    return (
        f"{figure.name}, {figure.unit}",
        number(figure.median(OURS)),
        number(figure.median(UPSTREAM)),
        f"{figure.ratio:.2f}",
        f"{min(ratios):.2f}..{max(ratios):.2f}",
        "more" if figure.more else "less",
    )


def text(result: BenchResult) -> str:
    """Return the tables with aligned columns."""
    return "\n\n".join(_text_table(table) for table in result.tables)


def _text_table(table: ResultTable) -> str:
    rows = [_HEADER, *(cells(figure) for figure in table.figures)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    ]
    return "\n".join([table.title, *lines])


def markdown(result: BenchResult) -> str:
    """Return the tables for a document, under a line that says what was measured on what."""
    machine = "; ".join(f"{name}: {value}" for name, value in result.machine.items())
    versions = "; ".join(f"{name}: {value}" for name, value in result.versions.items())
    parts = [f"{machine}. {versions}."]
    for table in result.tables:
        rows = [_HEADER, ("---", *("---:",) * 4, "---"), *(cells(f) for f in table.figures)]
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        parts.append("\n".join([f"**{table.title}**", "", *lines]))
    return "\n\n".join(parts)
