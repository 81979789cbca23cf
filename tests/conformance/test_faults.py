"""The suite finds every fault that is planted in a server, by a case that names its cause."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence

import pytest

from conformance.suite.errors import Failed
from conformance.suite.probe import NotUnderstood, probe
from conformance.suite.registry import Case, load, select
from conformance.suite.results import CaseResult, SuiteRun, Verdict
from conformance.suite.runner import SuiteRunner
from conformance.suite.target import Target
from tests.conformance.faulty.planted import FAULTS, Fault
from tests.parameters import mostly_slow
from tests.server.process import running
from tools.serving.processes import PATIENCE

# Seconds for one answer: faults that make a server silent are found by waiting so long. A server
# without faults may have kernels to compile.
FAULTY_PATIENCE = 1.0


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where servers that cache put their files."""
    patch = pytest.MonkeyPatch()
    patch.setenv("LLAMA_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def worker() -> Iterator[str]:
    """A server without faults, for those that split over it."""
    with running("--threads", "1") as server:
        yield f"127.0.0.1:{server.port}"


def results(
    fault: str, options: Sequence[str], cases: Sequence[Case], patience: float = FAULTY_PATIENCE
) -> list[CaseResult]:
    """What becomes of the cases on a server with this fault."""
    words = [sys.executable, "-m", "tests.conformance.faulty", "--fault", fault, *options]
    target = Target(command=shlex.join([*words, "-t", "1", "--log-level", "error"]) + " -p {port}")
    try:
        target.ensure(0)
        # What a server does while it is looked at is asked of a right one, too.
        facts = probe(target.address, None, PATIENCE)
        run = SuiteRun(fault, facts)
        SuiteRunner(target, facts, patience=patience).run(cases, run, lambda result: None)
        return run.results
    finally:
        target.close()


def named(*names: str) -> list[Case]:
    return select(load(), ",".join(names))


BY_OPTIONS: dict[tuple[str, ...], list[Fault]] = {}
for _fault in FAULTS.values():
    BY_OPTIONS.setdefault(_fault.options, []).append(_fault)


@pytest.mark.parametrize("options", BY_OPTIONS, ids=lambda options: " ".join(options) or "none")
def test_without_a_fault_the_same_cases_pass(options: tuple[str, ...], worker: str) -> None:
    names = {case for fault in BY_OPTIONS[options] for case in fault.cases}
    placed = [word.replace("{worker}", worker) for word in options]
    found = results("none", placed, named(*sorted(names)), PATIENCE)
    assert {r.case.name: r.came for r in found if r.verdict is not Verdict.PASS} == {}


@pytest.mark.parametrize(
    "fault", mostly_slow(FAULTS.values(), quick=6), ids=lambda fault: fault.name
)
def test_fault_is_found(fault: Fault, worker: str) -> None:
    options = ["--worker", worker]
    if fault.probe:
        with pytest.raises((Failed, NotUnderstood), match=fault.probe):
            results(fault.name, options, [])
        return
    found = results(fault.name, options, named(*fault.cases))
    verdicts = {result.case.name: result.verdict for result in found}
    assert set(verdicts) == set(fault.cases)
    missed = [name for name, v in verdicts.items() if v not in (Verdict.FAIL, Verdict.DIFFERS)]
    assert not missed, f"{fault.wrong}: not found by {missed}"
