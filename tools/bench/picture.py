"""A picture of a result: bars of how many times better this server is, as one SVG file.

The scale is logarithmic, so twice as good and half as good are bars of the same length to the right
and to the left of the line at 1. The file needs nothing else, and follows the reader's colours,
light or dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from xml.sax.saxutils import escape

from tools.bench.report import number
from tools.bench.results import OURS, UPSTREAM, BenchResult, Figure

_LABEL, _PLOT, _VALUE = 250, 380, 90
_WIDTH = _LABEL + _PLOT + _VALUE
_ROW, _BAR, _TITLE, _TOP, _BOTTOM = 22, 13, 34, 46, 12
# Room at the ends of the axis, in powers of two.
_MARGIN = 0.15

STYLE = """\
text { font: 12px system-ui, sans-serif; fill: #24292f }
.title { font-weight: 600 }
.faint { fill: #656d76 }
.grid { stroke: #d0d7de }
.one { stroke: #24292f; stroke-width: 1.5 }
.ahead { fill: #1a7f64 }
.behind { fill: #bc4c00 }
.page { fill: #ffffff }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .faint { fill: #9198a1 }
  .grid { stroke: #3d444d }
  .one { stroke: #e6edf3 }
  .ahead { fill: #3fb68b }
  .behind { fill: #f0883e }
  .page { fill: #0d1117 }
}"""


class _Scale:
    """The place of a ratio: powers of two from the smallest to the largest, one always within."""

    def __init__(self, ratios: Iterable[float]) -> None:
        logs = [0.0, *(math.log2(ratio) for ratio in ratios)]
        # At least half to twice: small differences then look small.
        self._low = min(-1.0, *logs) - _MARGIN
        self._high = max(1.0, *logs) + _MARGIN

    def x(self, ratio: float) -> float:
        part = (math.log2(ratio) - self._low) / (self._high - self._low)
        return round(_LABEL + part * _PLOT, 1)

    def ticks(self) -> list[float]:
        """The powers of two that the axis has room for; every second one of many."""
        powers = range(math.ceil(self._low), math.floor(self._high) + 1)
        step = 1 + len(powers) // 10
        return [2.0**power for power in powers if power % step == 0]


def _tick(power: float) -> str:
    return f"{power:.0f}" if power >= 1 else f"1/{1 / power:.0f}"


def text(x: float, y: float, words: str, *, kind: str = "", anchor: str = "start") -> str:
    """Return an SVG text."""
    attribute = f' class="{kind}"' if kind else ""
    return f'<text{attribute} x="{x}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>'


def _line(kind: str, x: float, top: float, bottom: float) -> str:
    return f'<line class="{kind}" x1="{x}" y1="{top}" x2="{x}" y2="{bottom}"/>'


def _bar(figure: Figure, axis: _Scale, y: float) -> list[str]:
    """A bar from 1 to the ratio, its name to the left, its value to the right."""
    better = figure.times_better
    left, right = sorted((axis.x(1), axis.x(better)))
    kind = "ahead" if better >= 1 else "behind"
    medians = f"{OURS} {number(figure.median(OURS))}, {UPSTREAM} {number(figure.median(UPSTREAM))}"
    hint = escape(f"{figure.name}: {medians} {figure.unit}")
    return [
        text(_LABEL - 10, y + 11, f"{figure.name}, {figure.unit}", anchor="end"),
        f'<rect class="{kind}" x="{left}" y="{y}" width="{max(right - left, 1):.1f}" '
        f'height="{_BAR}" rx="2"><title>{hint}</title></rect>',
        text(_LABEL + _PLOT + 10, y + 11, f"{number(better)}\N{MULTIPLICATION SIGN}"),
    ]


def svg(result: BenchResult) -> str:
    """Return the picture as the text of an SVG file."""
    axis = _Scale(f.times_better for table in result.tables for f in table.figures)
    parts: list[str] = []
    y = float(_TOP)
    for table in result.tables:
        parts.append(text(10, y + 22, table.title, kind="title"))
        y += _TITLE
        top = y - 4
        bars = []
        for figure in table.figures:
            bars += _bar(figure, axis, y)
            y += _ROW
        for tick in axis.ticks():
            parts.append(_line("one" if tick == 1 else "grid", axis.x(tick), top, y))
        parts += bars
    header = [
        text(10, 20, "Times better than upstream's server", kind="title"),
        *(text(axis.x(t), 40, _tick(t), kind="faint", anchor="middle") for t in axis.ticks()),
    ]
    height = math.ceil(y) + _BOTTOM
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
            f'width="{_WIDTH}" height="{height}" role="img">',
            "<title>This server beside upstream's: to the right of 1 it is the better one</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="page" width="{_WIDTH}" height="{height}"/>',
            *header,
            *parts,
            "</svg>\n",
        ]
    )
