"""A picture of networks: milliseconds a token over each, measured and predicted, as one SVG file.

The line is one machine alone: where a bar ends left of it, the second machine pays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tools.bench.picture import STYLE, text

_LABEL, _PLOT, _VALUE = 190, 420, 150
_WIDTH = _LABEL + _PLOT + _VALUE
_ROW, _BAR, _TOP, _TITLE = 22, 13, 58, 30


@dataclass(frozen=True)
class Bar:
    """One network in one mode, seconds a token."""

    group: str
    name: str
    measured: float
    predicted: float


def svg(title: str, bars: Sequence[Bar], alone: float) -> str:
    """Return the picture as the text of an SVG file; ``alone`` is one machine's seconds a token."""
    # Long waits would make everything else short: the axis ends at four times one machine.
    most = min(max(alone * 1.2, *(max(b.measured, b.predicted) for b in bars)), 4 * alone)

    def x(seconds: float) -> float:
        return round(_LABEL + min(seconds / most, 1.0) * _PLOT, 1)

    y, parts, group = float(_TOP), [], ""
    for bar in bars:
        if bar.group != group:
            group = bar.group
            parts.append(text(10, y + 20, f"--split-mode {group}", kind="title"))
            y += _TITLE
        kind = "ahead" if bar.measured < alone else "behind"
        at = x(bar.predicted)
        parts += [
            text(_LABEL - 10, y + 11, bar.name, anchor="end"),
            f'<rect class="{kind}" x="{_LABEL}" y="{y}" height="{_BAR}" rx="2" '
            f'width="{max(x(bar.measured) - _LABEL, 1):.1f}"/>',
            f'<line class="one" x1="{at}" y1="{y - 3}" x2="{at}" y2="{y + _BAR + 3}"/>',
            text(
                _LABEL + _PLOT + 10,
                y + 11,
                f"{bar.measured * 1e3:.0f} ms, {alone / bar.measured:.2f}\N{MULTIPLICATION SIGN}",
            ),
        ]
        y += _ROW
    height = math.ceil(y) + 12
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
            f'width="{_WIDTH}" height="{height}" role="img">',
            f"<title>{title}</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="page" width="{_WIDTH}" height="{height}"/>',
            text(10, 20, title, kind="title"),
            text(10, 40, "bars measured, ticks predicted; the line is one machine alone"),
            f'<line class="grid" x1="{x(alone)}" y1="{_TOP - 8}" x2="{x(alone)}" y2="{y}"/>',
            *parts,
            "</svg>\n",
        ]
    )
