"""Searches for a case on which two servers differ, shrinks it, and counts what was tried."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np

from conformance.differential.case import GraphCase
from conformance.differential.compare import CaseMemory, difference
from conformance.differential.endpoint import Endpoint
from conformance.differential.runner import CaseRunner, Image, ServerRefused
from conformance.differential.sketch import Family, label
from conformance.properties.search import search
from tools.serving.processes import PATIENCE

T = TypeVar("T")

# A case that upstream refuses proves nothing; a strategy that draws little else is wrong.
MOST_REFUSED = 0.5


class Mismatch(AssertionError):  # noqa: N818
    """The server under test did something else than the reference; the message says what."""


class Difference(NamedTuple):
    """The smallest case found that differs."""

    family: str
    variant: str
    case: GraphCase
    reason: str


@dataclass(slots=True)
class FamilyTally:
    """The tally of one family's variant; sums of several are tallies too."""

    cases: int = 0
    refused: int = 0
    seconds: float = 0.0
    keys: set[str] = field(default_factory=set)
    reasons: Counter[str] = field(default_factory=Counter)
    findings: list[Difference] = field(default_factory=list)

    def add(self, other: FamilyTally) -> None:
        self.cases += other.cases
        self.refused += other.refused
        self.seconds += other.seconds
        self.keys |= other.keys
        self.reasons += other.reasons
        self.findings += other.findings


class Judge:
    """Holds the server under test against the reference, case by case.

    ``flushes``: one of them takes what is below the normal numbers for 0, as cards do. With
    ``stepwise`` graphs of several nodes run a second time on the server under test, node by
    node: what its planner makes of neighbours must not show.
    """

    def __init__(
        self,
        tested: Endpoint,
        reference: Endpoint,
        *,
        flushes: bool = False,
        timeout: float = PATIENCE,
    ) -> None:
        self._flushes = flushes
        self._loop = asyncio.new_event_loop()
        self._tested = CaseRunner(tested, timeout=timeout)
        self._reference = CaseRunner(reference, timeout=timeout)

    def close(self) -> None:
        """Hang up on both."""
        self._wait(self._tested.close())
        self._wait(self._reference.close())
        self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(work)

    def judge(self, case: GraphCase) -> str:
        """Raise Mismatch if the servers differ; return why the reference refused, or nothing."""
        image = Image.of(case, flushes=self._flushes)
        try:
            expected = self._wait(self._reference.run(case, image))
        except (ServerRefused, TimeoutError) as error:
            return str(error) or "no answer in time"
        for stepwise in (False, True) if len(case.graph.nodes) > 1 else (False,):
            how = "node by node: " if stepwise else ""
            try:
                actual = self._wait(self._tested.run(case, image, stepwise=stepwise))
            except ServerRefused as error:
                raise Mismatch(f"{how}refused: {error}") from None
            except TimeoutError:
                raise Mismatch(f"{how}no answer in time") from None
            self._compare(case, image, expected, actual, how)
        return ""

    @staticmethod
    def _compare(
        case: GraphCase, image: Image, expected: CaseMemory, actual: CaseMemory, how: str
    ) -> None:
        quiet = image.untouched(case)
        changed = np.flatnonzero(quiet & (actual.image != image.data))
        if len(changed):
            raise Mismatch(f"{how}wrote outside its tensors: byte {int(changed[0])} of the image")
        for i, (t, check) in enumerate(case.outputs):
            wrong = difference(check, t, expected, actual)
            if wrong:
                raise Mismatch(f"{how}output {i}: {wrong}")

    def explore(self, family: Family, variant: Any, examples: int, seed: int) -> FamilyTally:
        """Draw ``examples`` cases; a difference is shrunk and becomes a finding."""
        tally = FamilyTally()

        def attempt(case: GraphCase) -> None:
            tally.cases += 1
            tally.keys.add(case.key())
            if refusal := self.judge(case):
                tally.refused += 1
                tally.reasons[refusal] += 1

        done = search(family.strategy(variant), attempt, examples, seed)
        if done.found is not None:
            case, reason = done.found.value, done.found.reason
            tally.findings.append(Difference(family.name, label(variant), case, reason))
        tally.seconds = done.seconds
        return tally
