"""Runs cases one after the other, and watches the server while it does.

After each case the server must live. Where it serves several clients, one more is connected
throughout a group: a canary, whose data must be intact after every hostile case.
"""

from __future__ import annotations

import random
import re
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from conformance.suite.context import Context, Facts
from conformance.suite.errors import CaseEnded, Differs, Failed, Skipped
from conformance.suite.probe import introduce_numbering
from conformance.suite.registry import Case, Group
from conformance.suite.results import CaseResult, SuiteRun, Verdict
from conformance.suite.target import ServerGone, Target
from protocol.errors import NotInRelease
from protocol.split import split_commands

# A process that fails an assertion closes its connections while it ends: that it did shows shortly
# after, or somewhat later where others have the processors.
_DEATH_SHOWS = 2.0
# Why what is hostile is skipped.
NOT_TO_OTHERS = "no client sends this: give --restart-command (or --hostile, to your own server)"
_CANARY_BYTES = 16 << 10


# What programs print when they end themselves; paths before it are those of a build.
_LAST_WORDS = re.compile(r"assert|abort|terminate|fatal|panic|error|unsupported", re.IGNORECASE)
_FOLDERS = re.compile(r"(?<!\S)\S*/")


def last_words(output: str) -> str:
    """Return the line in which a server said why it ended, as the end of a sentence."""
    said = [line.strip() for line in output.splitlines() if _LAST_WORDS.search(line)]
    return f": {_FOLDERS.sub('', said[-1], count=1)}" if said else ""


class _Canary:
    """A client beside the cases, with data that nobody may touch."""

    def __init__(self, address: tuple[str, int], facts: Facts, patience: float) -> None:
        self._context = Context(address, facts, seconds=float("inf"), patience=patience)
        self._peer = self._context.connect("canary")
        self._content = random.Random(_CANARY_BYTES).randbytes(_CANARY_BYTES)
        self._buffer = self._peer.alloc(_CANARY_BYTES)
        self._peer.set(self._buffer.whole(), self._content)

    def check(self) -> str:
        """Check the server; return what became of it, empty if all is well."""
        try:
            found = self._peer.get(self._buffer.whole(), len(self._content))
        except Failed as error:
            return f"another client's connection: {error}"
        if found != self._content:
            return "another client's data were changed"
        return ""

    def close(self) -> None:
        self._context.close()


class SuiteRunner:
    """Runs cases on one server. ``patience`` is how many seconds a single answer may take.

    ``reconnect``: for how long a server that is not ours to start is waited for. ``hostile``:
    whether cases that send what a client must not are run (default: on servers started here).
    """

    def __init__(
        self,
        target: Target,
        facts: Facts,
        *,
        patience: float = 10.0,
        reconnect: float = 5.0,
        seed: int = 0,
        hostile: bool | None = None,
    ) -> None:
        self._target = target
        self._hostile = target.is_own if hostile is None else hostile
        self._facts = facts
        self._patience = patience
        self._reconnect = reconnect
        self._seed = seed
        self._canary: _Canary | None = None
        self._group: Group | None = None

    def run(
        self, cases: Sequence[Case], run: SuiteRun, report: Callable[[CaseResult], None]
    ) -> None:
        """Run the cases in order; each result is added to ``run`` and given to ``report``."""
        started = time.monotonic()
        gone = ""
        for case in cases:
            if gone:
                result = CaseResult(case, Verdict.NOT_RUN, gone)
            else:
                result = self._run_one(case)
                gone = self._have_server(result)
            run.results.append(result)
            run.seconds = time.monotonic() - started
            report(result)
        self._drop_canary()

    def _run_one(self, case: Case) -> CaseResult:
        if self._group is not case.group:
            self._drop_canary()
            self._group = case.group
        reason = self.reason_to_skip(case)
        if reason:
            return CaseResult(case, Verdict.SKIPPED, reason)
        if case.hostile and self._facts.concurrent and self._canary is None:
            try:
                self._canary = _Canary(self._target.address, self._facts, self._patience)
            except CaseEnded as error:
                return CaseResult(case, Verdict.FAIL, f"before the case, another client: {error}")
        mark = self._target.mark()
        started = time.monotonic()
        context = Context(
            self._target.address,
            self._facts,
            # Who waits longer for one answer means it of a whole case, too.
            seconds=max(case.deadline, self._patience),
            patience=self._patience,
            seed=self._seed,
        )
        verdict, came = _judge(case, context)
        result = CaseResult(case, verdict, came, time.monotonic() - started, context.transcript)
        self._look_after(result)
        if result.verdict is Verdict.FAIL:
            result.output = self._target.output(mark)
            if result.ended:
                result.came += last_words(result.output)
        return result

    def reason_to_skip(self, case: Case) -> str:
        """Return why the case can't be run on this server; empty if it can."""
        facts = self._facts
        if case.hostile and not self._hostile:
            return NOT_TO_OTHERS
        known = {*facts.dialect.commands, *split_commands(facts.split)}
        missing = [command.name for command in case.needs if command not in known]
        if missing:
            return f"protocol {facts.dialect.name} has no {missing[0]}"
        if facts.devices < case.devices:
            return f"the server has {facts.devices} device{'s' * (facts.devices != 1)}"
        if case.concurrent and not facts.concurrent:
            return "the server serves one client at a time"
        if case.cache and not facts.cache:
            return "the server has no tensor cache (start it with --cache)"
        if case.split and not facts.split:
            return "the server doesn't have the split extension"
        return ""

    def _look_after(self, result: CaseResult) -> None:
        """Check that the server lives, and another client's data with it; else fail the case."""
        trouble = ""
        if result.case.hostile or result.verdict is Verdict.FAIL:
            trouble = self._sign_of_life()
            result.ended = "no longer answers" if trouble else ""
            if not trouble and self._canary is not None:
                trouble = self._canary.check()
        ended = self._target.ended(_DEATH_SHOWS if trouble else 0.0)
        if ended:
            result.ended = ended
            # What the case saw of it is that the connection was closed.
            result.came = ""
            trouble = f"the server {ended}"
        if trouble:
            result.verdict = Verdict.FAIL
            result.came = f"{trouble}; {result.came}" if result.came else trouble

    def _sign_of_life(self, *, introduce: bool = False) -> str:
        """Return what is wrong with the server for a new client; empty if nothing is.

        ``introduce``: let the server know how the suite numbers ops.
        """
        context = Context(
            self._target.address, self._facts, seconds=self._patience, patience=self._patience
        )
        try:
            peer = context.connect("afterwards")
            if introduce:
                introduce_numbering(peer)
        except Failed as error:
            return f"a new client afterwards: {error}"
        finally:
            context.close()
        return ""

    def _have_server(self, result: CaseResult) -> str:
        """Start the server again if it needs that; why there is none, if that can't be had."""
        if not result.ended:
            return ""
        self._drop_canary()
        self._target.stop()
        try:
            self._target.ensure(self._reconnect)
            trouble = self._sign_of_life(introduce=True)
        except ServerGone as error:
            return f"the server is gone since case {result.case.id}: {error}"
        return f"the server is of no use since case {result.case.id}: {trouble}" if trouble else ""

    def _drop_canary(self) -> None:
        if self._canary is not None:
            self._canary.close()
            self._canary = None


def _judge(case: Case, context: Context) -> tuple[Verdict, str]:
    try:
        case.check(context)
    except (Skipped, NotInRelease) as error:
        return Verdict.SKIPPED, str(error)
    except Differs as error:
        return Verdict.DIFFERS, str(error)
    except Failed as error:
        return Verdict.FAIL, str(error)
    except Exception as error:
        # A mistake in the case, or an answer that it wasn't ready for: the run goes on.
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return Verdict.FAIL, f"the case ended with {type(error).__name__}: {error} ({where})"
    finally:
        context.close()
    return Verdict.PASS, ""
