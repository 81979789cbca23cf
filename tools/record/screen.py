"""Shows the statistics of a recording while it runs: a table in a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from protocol.observe.events import Side
from tools.record.recorder import Recorder
from tools.record.stats import RecordStats

# Commands shown: those that took longest on average.
_SHOWN = 6


def format_bytes(count: float) -> str:
    """Return a number of bytes for people: 3.1 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


@dataclass(frozen=True, slots=True)
class _Mark:
    """Totals at one time."""

    time: float
    to_server: int
    to_client: int
    graphs: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Rates:
    """The growth per second between two looks."""

    to_server: float
    to_client: float
    graphs: float
    tokens: float

    @property
    def idle(self) -> bool:
        return not (self.to_server or self.to_client)


class RateClock:
    """Turns totals into rates, from one look to the next."""

    def __init__(self, stats: RecordStats) -> None:
        self._stats = stats
        self._last = self._mark()

    def _mark(self) -> _Mark:
        f = self._stats
        sent = f.sent[Side.CLIENT], f.sent[Side.SERVER]
        return _Mark(time.monotonic(), *sent, f.graphs, f.tokens)

    def rates(self) -> Rates:
        """Return the rates since the call before."""
        before, self._last = self._last, self._mark()
        now = self._last
        seconds = max(now.time - before.time, 1e-9)
        return Rates(
            (now.to_server - before.to_server) / seconds,
            (now.to_client - before.to_client) / seconds,
            (now.graphs - before.graphs) / seconds,
            (now.tokens - before.tokens) / seconds,
        )


def _recording(recorder: Recorder) -> str:
    state = f"{recorder.path} {format_bytes(recorder.size)}"
    if recorder.stopped:
        state += f" (stopped: {recorder.stopped})"
    return state


def rate_line(stats: RecordStats, rates: Rates, recorder: Recorder) -> str:
    """Return what happens now, in one line."""
    return (
        f"{stats.open} open  "
        f"{rates.tokens:.1f} tokens/s  {rates.graphs:.1f} graphs/s  "
        f"to server {format_bytes(rates.to_server)}/s  to client {format_bytes(rates.to_client)}/s"
        f"  {_recording(recorder)}"
    )


def _slowest(stats: RecordStats) -> list[tuple[str, ...]]:
    answered = [(c, f) for c, f in stats.commands.items() if f.answers]
    answered.sort(key=lambda entry: entry[1].mean, reverse=True)
    return [
        (
            *(command.name, str(f.requests), format_bytes(f.size)),
            *(f"{f.mean * 1e3:.2f}", f"{f.longest * 1e3:.2f}", f"{f.seconds:.2f}"),
        )
        for command, f in answered[:_SHOWN]
    ]


_COLUMNS = ("command", "requests", "bytes", "mean ms", "longest ms", "total s")


def summary(stats: RecordStats, recorder: Recorder) -> str:
    """Return all that passed, for the end of a recording."""
    spoken = ", ".join(f"{name} ({n})" for name, n in stats.dialects.most_common())
    lines = [
        f"{stats.connections} connections; protocol {spoken or 'unknown'}; "
        f"to server {format_bytes(stats.sent[Side.CLIENT])}, "
        f"to client {format_bytes(stats.sent[Side.SERVER])}; "
        f"{stats.graphs} graphs, {stats.tokens} tokens",
    ]
    rows = _slowest(stats)
    if rows:
        table = [_COLUMNS, *rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            name, *numbers = row
            padded = [n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True)]
            lines.append("  ".join(["  " + name.ljust(widths[0]), *padded]))
    lines.append(f"recorded: {_recording(recorder)}")
    return "\n".join(lines)


class Lines:
    """Shows a line when something has passed since the one before."""

    interval = 5.0

    def __init__(self, stats: RecordStats, recorder: Recorder) -> None:
        self._stats, self._recorder = stats, recorder
        self._clock = RateClock(stats)

    def say(self, line: str) -> None:
        """Print a line for the user at any time."""
        print(line, flush=True)

    def update(self) -> None:
        """Show what is new."""
        rates = self._clock.rates()
        if not rates.idle:
            self.say(rate_line(self._stats, rates, self._recorder))


class LiveTable:
    """Shows a table that changes in place (rich)."""

    interval = 0.5

    def __init__(self, stats: RecordStats, recorder: Recorder, live: Any) -> None:
        self._stats, self._recorder, self._live = stats, recorder, live
        self._clock = RateClock(stats)

    def say(self, line: str) -> None:
        """Print a line for the user, above the table."""
        self._live.console.print(line, markup=False, highlight=False)

    def update(self) -> None:
        """Draw the table anew."""
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        line = rate_line(self._stats, self._clock.rates(), self._recorder)
        table = RichTable(box=None)
        for i, column in enumerate(_COLUMNS):
            table.add_column(column, justify="right" if i else "left")
        for row in _slowest(self._stats):
            table.add_row(*row)
        self._live.update(Group(Text(line, style="bold"), table), refresh=True)


@contextlib.contextmanager
def screen(stats: RecordStats, recorder: Recorder, *, plain: bool) -> Iterator[Lines | LiveTable]:
    """Show the display that suits where the output goes; ``plain`` asks for lines."""
    if not plain:
        try:
            from rich.console import Console
            from rich.live import Live
        except ImportError:
            plain = True
    if plain or not (console := Console()).is_terminal:
        yield Lines(stats, recorder)
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield LiveTable(stats, recorder, live)
