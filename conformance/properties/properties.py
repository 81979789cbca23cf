"""The properties of a live server, each with the strategy that feeds it and the numbers to try."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from conformance.properties import damage, graphs, session
from conformance.properties.damage import DamagedStream, streams
from conformance.properties.programs import build, programs
from conformance.properties.reduce import simpler_numbers, without_parts
from conformance.properties.steps import ActionSequence, sessions
from conformance.suite.context import Context, Facts
from protocol.dialects import Dialect
from protocol.errors import NotInRelease
from protocol.observe.conversation import dialect_of_version


@dataclass(frozen=True, slots=True)
class PropertyTarget:
    """The server under test; ``reference`` is another that graphs are held against, too."""

    address: tuple[str, int]
    facts: Facts
    reference: graphs.Reference | None = None
    patience: float = 20.0

    @property
    def dialect(self) -> Dialect:
        return self.facts.dialect

    @property
    def clients(self) -> int:
        """The number of clients that a session may have."""
        return 2 if self.facts.concurrent else 1

    @contextlib.contextmanager
    def context(self) -> Iterator[Context]:
        """Yield what makes connections and records what goes over them; close them at the end."""
        made = Context(self.address, self.facts, seconds=10 * self.patience, patience=self.patience)
        try:
            yield made
        finally:
            made.close()


@dataclass(frozen=True, slots=True)
class Property:
    """``hold`` raises AssertionError for a value that breaks it.

    ``smaller`` gives simpler values of the same kind (conformance.properties.reduce).
    ``quick`` and ``nightly`` are how many values are tried, of all protocol versions together.
    ``hostile``: values that a server may well die of if it trusts its clients. ``numbered``: ops
    must be numbered as the server's version says, since what they are shows by nothing else.
    """

    name: str
    title: str
    values: Callable[[PropertyTarget], st.SearchStrategy[Any]]
    hold: Callable[[PropertyTarget, Context, Any], None]
    to_json: Callable[[Any], Any]
    from_json: Callable[[Any], Any]
    lines: Callable[[Any], list[str]]
    smaller: Callable[[Any], Iterator[Any]]
    quick: int
    nightly: int
    hostile: bool = False
    numbered: bool = False

    def fits(self, target: PropertyTarget) -> bool:
        """Return whether it can be tried in this protocol version on this server."""
        if not self.numbered:
            return True
        told = dialect_of_version(target.facts.version, target.dialect.hello_size)
        return told is None or told.ops == target.dialect.ops


def _session_lines(value: ActionSequence) -> list[str]:
    lines = [f"{value.clients} clients, compared after every {value.every} steps"]
    if value.cuts:
        lines.append(f"requests cut into segments of {', '.join(map(str, value.cuts))} bytes")
    for i, step in enumerate(value.steps):
        row = step.to_json()
        kind, client = row.pop("kind"), row.pop("client") % value.clients
        rest = " ".join(f"{name}={number}" for name, number in row.items())
        lines.append(f"{i:3} client {client}: {kind} {rest}".rstrip())
    return lines


def _stream_lines(value: DamagedStream) -> list[str]:
    lines = [f"{r.command.name} with {len(r.body)} bytes behind its head" for r in value.requests]
    lines += [f"damage: {d.kind} at {d.at} (value {d.value})" for d in value.damage]
    return [*lines, "tensors lie in a buffer of the client" if value.placed else "tensors anywhere"]


def _graph_lines(words: Sequence[int]) -> list[str]:
    return build(words).describe().splitlines()


def _smaller_sessions(value: ActionSequence) -> Iterator[ActionSequence]:
    for steps in without_parts(value.steps):
        yield replace(value, steps=steps)
    for plain in ({"cuts": ()}, {"every": 1}, {"clients": 1}):
        simple = replace(value, **plain)  # type: ignore[arg-type]
        if simple != value:
            yield simple
    for i, step in enumerate(value.steps):
        steps_of = [replace(step, words=words) for words in without_parts(step.words)]
        for name in ("a", "b", "at", "size", "seed"):
            numbers = simpler_numbers(getattr(step, name))
            steps_of += [replace(step, **{name: number}) for number in numbers]  # type: ignore[arg-type]
        for simple_step in steps_of:
            yield replace(value, steps=(*value.steps[:i], simple_step, *value.steps[i + 1 :]))


def _smaller_streams(value: DamagedStream) -> Iterator[DamagedStream]:
    for requests in without_parts(value.requests):
        yield replace(value, requests=requests)
    for damages in without_parts(value.damage):
        yield replace(value, damage=damages)


SESSIONS = Property(
    "sessions",
    "a server's memory is what its clients made of it, after every request",
    lambda target: sessions(target.dialect, target.clients),
    lambda target, context, value: session.play(context, value),
    ActionSequence.to_json,
    ActionSequence.from_json,
    _session_lines,
    _smaller_sessions,
    quick=400,
    nightly=10_000,
)


def _judge_graph(target: PropertyTarget, context: Context, value: Any) -> None:
    # A program with an op that came with a later release is none of this version.
    with contextlib.suppress(NotInRelease):
        graphs.judge(context, build(value), target.reference)


GRAPHS = Property(
    "graphs",
    "graphs of many nodes are what numpy makes of them, node by node",
    lambda target: programs(),
    _judge_graph,
    list,
    tuple,
    _graph_lines,
    without_parts,
    quick=30,
    nightly=2_000,
    numbered=True,
)


def _endure(target: PropertyTarget, context: Context, value: DamagedStream) -> None:
    damage.endure(context, value)


DAMAGE = Property(
    "damage",
    "damaged requests end a connection or are others; nothing hangs, no other client notices",
    lambda target: streams(target.dialect),
    _endure,
    DamagedStream.to_json,
    DamagedStream.from_json,
    _stream_lines,
    _smaller_streams,
    quick=60,
    nightly=3_000,
    hostile=True,
)
PROPERTIES = {p.name: p for p in (SESSIONS, GRAPHS, DAMAGE)}
