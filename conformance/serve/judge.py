"""The verdict on a visit: what was seen of a client, against what the scenario expects."""

from __future__ import annotations

from conformance.serve.program import Ended
from conformance.serve.rules import RULES
from conformance.serve.scenarios import Conduct, Scenario, Topic
from conformance.serve.server import ConnectionRecord, Visit
from conformance.suite.results import Verdict

Judgement = tuple[Verdict, str]

_PASS: Judgement = (Verdict.PASS, "")
_ABOUT_RULES = (Topic.DIALECTS, Topic.LIMITS)
_ORDER = (Verdict.FAIL, Verdict.DIFFERS, Verdict.SKIPPED, Verdict.PASS)


def judge(scenario: Scenario, visit: Visit, ended: Ended | None) -> Judgement:
    """Return the verdict on a visit, and why.

    ``ended`` is None where the client isn't ours to watch.
    """
    if not visit.connections:
        if ended is not None and ended.status is None:
            return Verdict.FAIL, f"the client never connected; {ended.words}"
        return Verdict.SKIPPED, "not seen: the client never connected"
    found = [
        _hang(visit, ended),
        _rules(scenario, visit),
        _wire(scenario, visit),
        _process(scenario, visit, ended),
    ]
    happened = _happened(scenario, visit)
    if happened is not None and all(verdict is Verdict.PASS for verdict, _ in found[:2]):
        return Verdict.SKIPPED, f"not seen: {happened}"
    for verdict in _ORDER:
        reasons = [reason for kind, reason in found if kind is verdict and reason]
        if reasons:
            return verdict, "; ".join(reasons)
    return _PASS


def _happened(scenario: Scenario, visit: Visit) -> str | None:
    """None, or why there was nothing to see."""
    if scenario.fault is not None and not visit.fault_happened:
        command = scenario.fault.command
        return f"the client sent no {command.name}" if command else "nothing was answered"
    if scenario.needs is not None and not visit.requests[scenario.needs]:
        return f"the client sent no {scenario.needs.name}"
    return None


def _hang(visit: Visit, ended: Ended | None) -> Judgement:
    if ended is not None and ended.status is None:
        last = visit.connections[-1]
        return Verdict.FAIL, f"{ended.words} ({_last(last)})"
    return _PASS


def _rules(scenario: Scenario, visit: Visit) -> Judgement:
    """Rules broken in this visit. Those that only differ are told where they are the subject."""
    notes = visit.notes
    told = (Verdict.FAIL, *((Verdict.DIFFERS,) if scenario.subject in _ABOUT_RULES else ()))
    for verdict in told:
        broken = [rule for rule in notes.broken if RULES[rule].broken is verdict]
        if broken:
            return verdict, "; ".join(f"{rule}: {notes.examples[rule][0]}" for rule in broken)
    return _PASS


def _wire(scenario: Scenario, visit: Visit) -> Judgement:
    """Return what the connections themselves show."""
    connections = visit.connections
    if scenario.expected is Conduct.SUCCEEDS:
        if any(record.hello_size is not None and not record.went_on for record in connections):
            first = next(r for r in connections if r.hello_size is not None and not r.went_on)
            if not visit.went_on:
                return Verdict.FAIL, f"the client did not go on after HELLO ({first.story})"
        return _PASS
    if scenario.shift[0] or scenario.shift[1] or scenario.fault is None:
        return _refused_hello(scenario, connections)
    for record in connections:
        if not record.faulted:
            continue
        if record.bytes_after_fault:
            return (
                Verdict.FAIL,
                f"{record.bytes_after_fault} more bytes were sent after what was no answer",
            )
        if record.ended_by == "watch":
            waited = f"{record.seconds_to_end:.0f} s"
            if scenario.subject is Topic.SILENT:
                return Verdict.DIFFERS, f"the client was still waiting after {waited}"
            return Verdict.FAIL, f"the connection was still open {waited} later"
    return _PASS


def _refused_hello(scenario: Scenario, connections: list[ConnectionRecord]) -> Judgement:
    if scenario.expected is not Conduct.REFUSES:
        return _PASS
    for record in connections:
        if record.went_on:
            version = ".".join(map(str, record.offered or ()))
            return Verdict.FAIL, f"the client went on with {version}: {record.story}"
    return _PASS


def _process(scenario: Scenario, visit: Visit, ended: Ended | None) -> Judgement:
    if ended is None or ended.status is None or scenario.subject is Topic.SILENT:
        return _PASS
    if scenario.expected is Conduct.SUCCEEDS:
        if ended.status:
            return Verdict.FAIL, f"{ended.words} ({_last(visit.connections[-1])})"
        return _PASS
    if ended.signal in ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL"):
        return Verdict.FAIL, f"a crash: {ended.words}"
    if ended.signal == "SIGPIPE":
        return Verdict.DIFFERS, f"{ended.words}, without a word"
    if ended.signal:
        return Verdict.DIFFERS, f"{ended.words}, not with a status"
    if ended.status == 0 and scenario.expected is not Conduct.COPES:
        return Verdict.DIFFERS, "it went on without the server, and ended with status 0"
    return _PASS


def _last(record: ConnectionRecord) -> str:
    last = record.commands[-1][0] if record.commands else "nothing"
    return f"its last request was {last}"
