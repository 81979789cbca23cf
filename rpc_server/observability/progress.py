"""Shows how far long things are: bars on a terminal, plain lines elsewhere.

Whoever does something long says so, and how far it is; from any thread::

    with begin("indexing models", total=size, unit=BYTES) as task:
        task.advance(n, "model.gguf")

Whoever runs the program decides where that is seen. A tool does its work ``with shown():``, the
server's console draws :func:`bars` beside what clients do. Where nobody does either, a line
goes to the log every ``SECONDS``.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from protocol.text import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

log = logging.getLogger(__name__)

# The unit of what is counted in bytes; anything else is only counted.
BYTES = "bytes"
# Between two lines of one task.
SECONDS = 10.0
_BAR_WIDTH = 30
_REDRAWS_A_SECOND = 4
# What the rest takes is guessed once this much was seen of the speed.
_GUESS_AFTER = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """A place where it is shown.

    What is done with a line, and when there is something new to draw.
    """

    tell: Callable[[str], None] = lambda line: None
    redraw: Callable[[], object] = lambda: None


class Task:
    """Something long that is under way: a context, which ends it. Made by :func:`begin`."""

    def __init__(self, board: _Board, label: str, total: int | None, unit: str) -> None:
        self.label = printable(label)
        self._board = board
        self._unit = unit
        self._lock = threading.Lock()
        self._total = total
        self._done = 0
        self._in_step = False
        self._detail = ""
        self._began = self._told = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def advance(self, n: int = 1, detail: str | None = None) -> None:
        """Note that ``n`` more are done, and what it is at now, if ``detail`` says so."""
        now = time.monotonic()
        with self._lock:
            self._done += n
            self._detail = self._detail if detail is None else detail
            due = now - self._told >= SECONDS
            if due:
                self._told = now
        if due:
            self._board.tell(self.describe())

    def step(self, detail: str) -> None:
        """Note that the next of ``total`` steps begins; elsewhere than on a terminal a line."""
        with self._lock:
            self._done += self._in_step
            self._in_step = True
            self._detail = detail
        self._board.tell(self.describe())

    def expect(self, n: int) -> None:
        """Note that there are ``n`` more to do."""
        with self._lock:
            self._total = (self._total or 0) + n

    def end(self) -> None:
        """Show it no longer."""
        self._board.remove(self)

    @property
    def seconds(self) -> float:
        """Return how long it has been under way."""
        return time.monotonic() - self._began

    def numbers(self) -> tuple[int, int | None]:
        """Return how much is done, and of how much if that is known."""
        with self._lock:
            return self._done, self._total

    def amount(self) -> str:
        """Return in words how much is done."""
        done, total = self.numbers()
        if self._in_step and total:
            return f"{min(done + 1, total)} of {total}" if total > 1 else ""
        if self._unit != BYTES:
            return str(done) if total is None else f"{done} of {total}"
        unit, size = ("GiB", 1 << 30) if max(done, total or 0) >= 1 << 30 else ("MiB", 1 << 20)
        of = "" if total is None else f" of {total / size:.1f}"
        return f"{done / size:.1f}{of} {unit}"

    def pace(self) -> str:
        """Return in words how fast it goes and when it ends, as far as that can be told."""
        done, total = self.numbers()
        seconds = self.seconds
        if not done or seconds < _GUESS_AFTER:
            return ""
        said = [f"{done / seconds / (1 << 20):.0f} MiB/s"] if self._unit == BYTES else []
        if total is not None and done < total:
            said.append(f"{_duration(seconds / done * (total - done))} left")
        return ", ".join(said)

    def detail(self) -> str:
        """Return what it is at, fit to be shown."""
        return printable(self._detail)

    def describe(self) -> str:
        """Return a line that says all of it."""
        said = ", ".join(filter(None, (self.amount(), self.pace())))
        return ": ".join(filter(None, (self.label, said, self.detail())))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


class _Board:
    """The work that is under way in this process, and who shows it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tasks: list[Task] = []
        # Whoever came last shows it.
        self._places = [_Place(_to_log)]

    def add(self, task: Task) -> None:
        with self._lock:
            self._tasks.append(task)
            place = self._places[-1]
        place.redraw()

    def remove(self, task: Task) -> None:
        with self._lock, contextlib.suppress(ValueError):
            self._tasks.remove(task)

    def tasks(self) -> list[Task]:
        with self._lock:
            return list(self._tasks)

    def tell(self, line: str) -> None:
        """Send a line to where lines go now."""
        with self._lock:
            place = self._places[-1]
        place.tell(line)
        place.redraw()

    @contextlib.contextmanager
    def showing(self, place: _Place) -> Iterator[None]:
        with self._lock:
            self._places.append(place)
        try:
            yield
        finally:
            with self._lock:
                self._places.remove(place)


def _to_log(line: str) -> None:
    log.info("%s", line, extra={"event": "progress"})


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


_BOARD = _Board()


def begin(label: str, total: int | None = None, unit: str = "") -> Task:
    """Return a new task, shown from now on until it ends.

    ``total`` is how much there is to do, None where nobody knows (yet): bytes with ``unit`` BYTES.
    """
    task = Task(_BOARD, label, total, unit)
    _BOARD.add(task)
    return task


def under_way() -> list[Task]:
    """Return the tasks that are under way in this process, the oldest first."""
    return _BOARD.tasks()


def drawn() -> contextlib.AbstractContextManager[None]:
    """Return a context for whoever draws :func:`bars`: meanwhile no lines are told."""
    return _BOARD.showing(_Place())


def bars() -> RenderableType:
    """Return what a terminal shows of the tasks that are under way: a row for each."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    for task in under_way():
        done, total = task.numbers()
        bar = ProgressBar(total=total, completed=done, width=_BAR_WIDTH, pulse=total is None)
        cells = (task.amount(), task.pace(), task.detail())
        table.add_row(Text(f"  {task.label}"), bar, *(Text(c, style="cyan") for c in cells))
    return table


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Show on stderr what is under way inside: bars on a terminal, else a line now and then."""
    if not sys.stderr.isatty():
        with _BOARD.showing(_Place(_to_stderr)):
            yield
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, highlight=False)
    live = Live(
        get_renderable=bars,
        console=console,
        transient=True,
        refresh_per_second=_REDRAWS_A_SECOND,
        redirect_stdout=sys.stdout.isatty(),
    )
    with live, _BOARD.showing(_Place(redraw=live.refresh)):
        yield
