"""A run in the terminal: progress while it goes, findings as they come, a table at the end."""

from __future__ import annotations

from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from conformance.suite.registry import Case
from conformance.suite.results import CaseResult, SuiteRun, Verdict

_STYLES = {
    Verdict.PASS: "green",
    Verdict.DIFFERS: "yellow",
    Verdict.FAIL: "bold red",
    Verdict.SKIPPED: "dim",
    Verdict.NOT_RUN: "dim",
}
_PLAIN_WIDTH = 160
_VERDICT_WIDTH = 9


class TerminalReport:
    """Prints to ``console``; ``verbose`` lists every case and not only what was found."""

    def __init__(self, total: int, *, verbose: bool = False, console: Console | None = None):
        self.console = make_console() if console is None else console
        self._verbose = verbose
        self._progress = Progress(
            TextColumn("[dim]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=total)
        self._group = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def head(self, run: SuiteRun) -> None:
        """Print what is tested."""
        facts = run.facts
        version = ".".join(map(str, facts.version))
        spoken = (
            "" if facts.dialect.version == facts.version else f", spoken as {facts.dialect.name}"
        )
        has = [
            f"{facts.devices} device{'s' * (facts.devices != 1)}",
            "several clients at once" if facts.concurrent else "one client at a time",
            "tensor cache" if facts.cache else "no tensor cache",
        ]
        if facts.split:
            has.append("split extension")
        self.console.print(f"[bold]{escape(run.server)}[/]: protocol {version}{spoken}")
        self.console.print(f"[dim]{', '.join(has)}[/]")

    def add(self, result: CaseResult) -> None:
        """Show one more result."""
        case = result.case
        self._progress.update(self._task, advance=1, description=str(case))
        shown = self._verbose or result.verdict in (Verdict.FAIL, Verdict.DIFFERS)
        if not shown:
            return
        if self._group != case.group.number:
            self._group = case.group.number
            self.console.print(f"\n[bold]{case.group.number} {case.group.title}[/]")
        self._print_finding(result)

    def _print_finding(self, result: CaseResult) -> None:
        case, style = result.case, _STYLES[result.verdict]
        verdict = f"[{style}]{result.verdict.value}[/]"
        text = case.name + (f": {escape(result.came)}" if result.came else "")
        lines = [(verdict, case.id, text)]
        if result.verdict is Verdict.FAIL:
            lines.append(("", "", f"[dim]expected: {escape(case.expects)}[/]"))
        if not self.console.is_terminal:
            # One line each, for programs that look for them.
            for mark, id_, line in lines:
                width = _VERDICT_WIDTH + len(mark) - len(Text.from_markup(mark))
                self.console.print(f"  {mark:{width}}{id_:>6} {line}")
            return
        table = Table.grid(padding=(0, 1))
        table.add_column(width=_VERDICT_WIDTH + 1)
        table.add_column(width=5, justify="right")
        table.add_column()
        for mark, id_, line in lines:
            table.add_row(f"  {mark}", id_, line)
        self.console.print(table)

    def finish(self, run: SuiteRun) -> None:
        """Print the table."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("group")
        for verdict in Verdict:
            table.add_column(verdict.value, justify="right")
        rows: dict[str, dict[Verdict, int]] = {}
        for result in run.results:
            group = result.case.group
            counts = rows.setdefault(f"{group.number} {group.title}", dict.fromkeys(Verdict, 0))
            counts[result.verdict] += 1
        for name, counts in rows.items():
            table.add_row(name, *(_count(verdict, n) for verdict, n in counts.items()))
        table.add_row("all", *(_count(verdict, n) for verdict, n in run.counts.items()))
        self.console.print()
        self.console.print(table)
        died = f"; the server died or hung in {run.deaths}" if run.deaths else ""
        self.console.print(f"\n{len(run.results)} cases in {run.seconds:.1f} s{died}")


def _count(verdict: Verdict, n: int) -> str:
    return f"[{_STYLES[verdict]}]{n}[/]" if n else "[dim]-[/]"


def make_console() -> Console:
    """Return standard output; without a terminal lines are not broken."""
    console = Console(highlight=False)
    if console.is_terminal:
        return console
    return Console(width=_PLAIN_WIDTH, soft_wrap=True, highlight=False)


def print_list(console: Console, cases: list[Case]) -> None:
    """Print the cases, by group."""
    group = 0
    for case in cases:
        if case.group.number != group:
            group = case.group.number
            console.print(
                f"[bold]{case.group.number} {case.group.title}[/] [dim]({case.group.name})[/]"
            )
        console.print(f"  {case.id:>6} {case.name}")


def print_explanation(console: Console, case: Case) -> None:
    """Print all that there is to say of a case."""
    console.print(f"[bold]{case}[/] [dim]({case.group.title})[/]")
    lines = [("sends", case.sends), ("expects", case.expects), ("why", case.why)]
    lines.append(("source", case.source))
    if case.needs:
        lines.append(("needs", ", ".join(command.name for command in case.needs)))
    for name, text in lines:
        console.print(f"  [bold]{name:8}[/]{escape(text)}")
