"""What came of each case, for the reports."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass, field

from conformance.suite.context import Facts
from conformance.suite.registry import Case
from conformance.suite.transcript import Transcript


class Verdict(enum.StrEnum):
    """The verdict on a case.

    ``DIFFERS``: the protocol leaves it open, and the server does it otherwise than it had better;
    ``NOT_RUN``: for want of a server.
    """

    PASS = "pass"
    DIFFERS = "differs"
    FAIL = "fail"
    SKIPPED = "skipped"
    NOT_RUN = "not run"


@dataclass(slots=True)
class CaseResult:
    """``came`` says what came where that isn't what was expected, or why a case did not run.

    ``ended`` says how the server's process ended in this case, ``output`` what it wrote last.
    """

    case: Case
    verdict: Verdict
    came: str = ""
    seconds: float = 0.0
    transcript: Transcript = field(default_factory=Transcript)
    ended: str = ""
    output: str = ""


@dataclass(slots=True)
class SuiteRun:
    """All results of a run; ``server`` names what was tested."""

    server: str
    facts: Facts
    results: list[CaseResult] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def counts(self) -> dict[Verdict, int]:
        found = Counter(result.verdict for result in self.results)
        return {verdict: found[verdict] for verdict in Verdict}

    @property
    def deaths(self) -> int:
        """In how many cases the server ended or no longer answered."""
        return sum(1 for result in self.results if result.ended)

    @property
    def gone(self) -> bool:
        """True if the server was lost before the end."""
        return any(result.verdict is Verdict.NOT_RUN for result in self.results)
