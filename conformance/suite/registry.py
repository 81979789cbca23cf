"""Cases by number and name: declared by a decorator, found in ``conformance.cases``, selected."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict, Unpack

from protocol.commands import Command

if TYPE_CHECKING:
    from conformance.suite.context import Context

    Check = Callable[[Context], None]

DEADLINE = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One rule: what is sent, what must come and why, and the function that finds out.

    ``source`` names where the rule stands and since when. ``needs`` are commands that the dialect
    must have; ``devices`` is how many the server must have.
    """

    group: Group
    number: int
    name: str
    sends: str
    expects: str
    why: str
    source: str
    check: Check
    hostile: bool = False
    devices: int = 1
    concurrent: bool = False
    cache: bool = False
    split: bool = False
    deadline: float = DEADLINE
    needs: tuple[Command, ...] = ()

    @property
    def id(self) -> str:
        return f"{self.group.number}.{self.number}"

    def __str__(self) -> str:
        return f"{self.id} {self.name}"


class Terms(TypedDict, total=False):
    """On what servers a case is tried, and for how long: fields of :class:`Case`."""

    hostile: bool
    devices: int
    concurrent: bool
    cache: bool
    split: bool
    deadline: float


@dataclass(slots=True)
class Group:
    """Cases about one subject; ``name`` is one word, to select by."""

    number: int
    name: str
    title: str
    cases: dict[int, Case] = field(default_factory=dict)

    def case(
        self,
        number: int,
        *,
        source: str,
        sends: str = "",
        expects: str = "",
        name: str = "",
        why: str = "",
        needs: Sequence[Command] = (),
        **terms: Unpack[Terms],
    ) -> Callable[[Check], Check]:
        """Declare a case; what isn't given is the function's: its name, and its docstring's parts.

        These are the reason, and behind it lines that begin with "Sends:" and "Expects:". Of a
        partial it is the function that it calls.
        ValueError for a number or name that the group has, or a case that lacks one of these.
        """

        def declare(check: Check) -> Check:
            told = _parts(getattr(check, "func", check).__doc__ or "")
            made = Case(
                group=self,
                number=number,
                name=name or check.__name__.strip("_").replace("_", "-"),
                sends=sends or told["sends"],
                expects=expects or told["expects"],
                why=why or told["why"],
                source=source,
                check=check,
                needs=tuple(needs),
                **terms,
            )
            if number in self.cases:
                raise ValueError(f"case {made.id} is there: {self.cases[number]} and {made}")
            if any(made.name == other.name for other in self.cases.values()):
                raise ValueError(f"group {self.name} has two cases '{made.name}'")
            for part in told:
                if not getattr(made, part):
                    raise ValueError(f"case {made} doesn't say '{part}'")
            self.cases[number] = made
            return check

        return declare


def _parts(doc: str) -> dict[str, str]:
    """Return the reason, what is sent and what is expected by a docstring, '' for what it lacks."""
    parts = dict.fromkeys(("why", "sends", "expects"), "")
    current = "why"
    for line in doc.splitlines():
        start, colon, rest = line.strip().partition(": ")
        if colon and start.lower() in ("sends", "expects"):
            current, line = start.lower(), rest
        parts[current] += f" {line}"
    return {name: " ".join(text.split()) for name, text in parts.items()}


def load() -> list[Case]:
    """Load all cases, in order; import every module of ``conformance.cases``."""
    cases = importlib.import_module("conformance.cases")
    for module in sorted(m.name for m in pkgutil.iter_modules(cases.__path__)):
        importlib.import_module(f"conformance.cases.{module}")
    groups: tuple[Group, ...] = importlib.import_module("conformance.cases.groups").GROUPS
    return [group.cases[n] for group in groups for n in sorted(group.cases)]


def select(cases: Iterable[Case], wanted: str) -> list[Case]:
    """Return those that a comma-separated list of ``3``, ``3.4``, groups and cases names.

    ValueError for an item that names none.
    """
    cases = list(cases)
    chosen: set[str] = set()
    for item in filter(None, map(str.strip, wanted.split(","))):
        found = [
            case.id
            for case in cases
            if item in (case.id, case.name, case.group.name, str(case.group.number))
        ]
        if not found:
            raise ValueError(f"no case or group '{item}' (see --list)")
        chosen.update(found)
    return [case for case in cases if case.id in chosen]
