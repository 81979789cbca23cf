"""A run as JSON: for programs, and to compare runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conformance.suite.results import CaseResult, SuiteRun, Verdict
from conformance.suite.transcript import TranscriptMessage


def to_json(run: SuiteRun) -> dict[str, Any]:
    """Return the run as what json.dumps takes; exchanges only of cases that failed or differ."""
    facts = run.facts
    return {
        "server": run.server,
        "protocol": ".".join(map(str, facts.version)),
        "spoken": facts.dialect.name,
        "devices": facts.devices,
        "concurrent": facts.concurrent,
        "cache": facts.cache,
        "split": facts.split,
        "seconds": round(run.seconds, 3),
        "counts": {verdict.value: n for verdict, n in run.counts.items()},
        "cases": [_case(result) for result in run.results],
    }


def _case(result: CaseResult) -> dict[str, Any]:
    case = result.case
    made: dict[str, Any] = {
        "id": case.id,
        "name": case.name,
        "group": case.group.name,
        "verdict": result.verdict.value,
        "seconds": round(result.seconds, 4),
    }
    if result.came:
        made["came"] = result.came
    if result.verdict in (Verdict.FAIL, Verdict.DIFFERS):
        made |= {"sends": case.sends, "expects": case.expects, "why": case.why}
        made |= {"source": case.source}
        made["exchange"] = [_message(message) for message in result.transcript.messages]
    if result.ended:
        made["server"] = result.ended
    if result.output:
        made["output"] = result.output
    return made


def _message(message: TranscriptMessage) -> dict[str, Any]:
    made: dict[str, Any] = {
        "connection": message.peer,
        "from": "client" if message.sent else "server",
        "seconds": round(message.seconds, 4),
    }
    if message.command:
        made["command"] = message.command
    if message.note:
        made["note"] = message.note
    if message.size:
        made |= {"size": message.size, "bytes": message.data.hex()}
    return made


def write_json(run: SuiteRun, path: Path) -> None:
    path.write_text(json.dumps(to_json(run), indent=1) + "\n")
