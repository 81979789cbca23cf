"""Tables of what a victim noticed: for a terminal, in Markdown, as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from tools.bench.machine import describe_machine
from tools.neighbour.harness import LEAST_SPEED, MOST_GRAPH, MOST_HELLO, AttackResult
from tools.neighbour.victim import Noticed

COLUMNS = ("attack", "HELLO, ms", "one node, ms", "bytes", "kept", "kernels")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}"


def cells(result: AttackResult) -> tuple[str, ...]:
    """Return a row: what was sent, and what came of it."""
    if result.skipped:
        return (result.attack.does, "skipped", result.skipped, "", "", "")
    seen = result.noticed
    return (
        result.attack.does,
        _ms(seen.hello),
        _ms(seen.graph),
        seen.changed or "; ".join(result.findings) or "same",
        result.kept or "nothing",
        f"{result.speed:.2f}",
    )


def promise() -> str:
    """Return in a sentence what each row is held against."""
    return (
        f"At most: HELLO {_ms(MOST_HELLO)} ms, one node {_ms(MOST_GRAPH)} ms; kernels afterwards "
        f"at {LEAST_SPEED} of their speed or better."
    )


def table(results: Sequence[AttackResult]) -> Table:
    """Return a table for a terminal, with what failed marked."""
    made = Table(caption=promise())
    for name in COLUMNS:
        made.add_column(name, overflow="fold", justify="left" if name == "attack" else "right")
    kind = ""
    for result in results:
        if result.attack.kind != kind:
            kind = result.attack.kind
            made.add_section()
            made.add_row(kind, style="bold")
        style = "" if result.passed else "red" if result.faults else "yellow"
        made.add_row(*cells(result), style=style)
    return made


def markdown(results: Sequence[AttackResult], alone: Noticed) -> str:
    """Return the table for a document, under a line that says where it was made."""
    machine = "; ".join(f"{name}: {value}" for name, value in describe_machine().items())
    lines = [
        f"{machine}. Without any neighbour: HELLO {_ms(alone.hello)} ms, one node "
        f"{_ms(alone.graph)} ms. {promise()}",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|---|{'---:|' * (len(COLUMNS) - 1)}",
    ]
    kind = ""
    for result in results:
        if result.attack.kind != kind:
            kind = result.attack.kind
            lines.append(f"| **{kind}** | | | | | |")
        lines.append(f"| {' | '.join(cells(result))} |")
    return "\n".join(lines)


def as_json(results: Sequence[AttackResult], alone: Noticed) -> str:
    """Return all figures, in seconds."""

    def row(result: AttackResult) -> dict[str, Any]:
        return {
            "attack": result.attack.name,
            "kind": result.attack.kind,
            "does": result.attack.does,
            "hello": result.noticed.hello,
            "graph": result.noticed.graph,
            "typical_hello": result.noticed.typical_hello,
            "typical_graph": result.noticed.typical_graph,
            "speed": result.speed,
            "attempts": result.attempts,
            "faults": result.faults,
            "delays": result.delays,
            "skipped": result.skipped,
        }

    return json.dumps(
        {
            "machine": describe_machine(),
            "alone": {"hello": alone.hello, "graph": alone.graph},
            "attacks": [row(result) for result in results],
        },
        indent=2,
    )


def summary(results: Sequence[AttackResult]) -> str:
    """Return the last line: how many passed, and what is wrong with the others."""
    tried = [result for result in results if not result.skipped]
    failed = [result for result in tried if not result.passed]
    lines = [f"{len(tried) - len(failed)} of {len(tried)} attacks went unnoticed"]
    lines += [
        f"  {result.attack.name}: {', '.join([*result.faults, *result.delays])}"
        for result in failed
    ]
    return "\n".join(lines)
