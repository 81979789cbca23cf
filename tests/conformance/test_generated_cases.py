"""The cases of graphs, runs again, the split extension and properties, against this server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.suite.probe import probe
from conformance.suite.registry import load, select
from conformance.suite.results import SuiteRun, Verdict
from conformance.suite.runner import SuiteRunner
from conformance.suite.target import Target
from protocol.dialects import find_dialects
from protocol.ggml.ops import Op
from tests.addresses import coming_from
from tests.cuda import emulation
from tests.parameters import mostly_slow
from tests.server.process import ServerProcess, running
from tools.serving.processes import PATIENCE


def results(port: int, wanted: str, protocol: str = "7") -> SuiteRun:
    target = Target(("127.0.0.1", port))
    facts = probe(target.address, find_dialects(protocol)[0], PATIENCE)
    run = SuiteRun("server", facts)
    runner = SuiteRunner(target, facts, patience=PATIENCE, hostile=True)
    runner.run(select(load(), wanted), run, lambda result: None)
    return run


def wrong(run: SuiteRun) -> dict[str, str]:
    bad = (Verdict.FAIL, Verdict.NOT_RUN, Verdict.DIFFERS)
    return {str(r.case): r.came for r in run.results if r.verdict in bad}


def skipped(run: SuiteRun) -> set[str]:
    return {r.case.id for r in run.results if r.verdict is Verdict.SKIPPED}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    cache = str(tmp_path_factory.mktemp("cache"))
    with running("--threads", "1", "-d", "CPU,CPU", "--cache-dir", cache) as started:
        yield started
        assert started.alive, started.log
        assert "internal error" not in started.log


VERSIONS = ("7.0", "5.1", "3.6", "1.0")


@pytest.mark.parametrize("protocol", mostly_slow(VERSIONS))
def test_graphs_and_runs_again_in_versions_of_every_kind(
    server: ServerProcess, protocol: str
) -> None:
    # A client of another version at the same address would have to wait.
    with coming_from(2 + VERSIONS.index(protocol)):
        run = results(server.port, "graphs,recompute", protocol)
    assert wrong(run) == {}
    expected = {"6.12"} if run.facts.devices == 1 else set()
    if run.facts.dialect.version < (3, 5, 0):
        expected = {r.case.id for r in run.results if r.case.group.number == 6}
    if run.facts.dialect.version < (4, 0, 0):
        expected.add("5.13")
    if Op.SET_ROWS not in run.facts.dialect.ops:
        expected.add("5.23")
    assert skipped(run) == expected


@pytest.mark.slow
def test_split_extension_of_a_worker(server: ServerProcess) -> None:
    run = results(server.port, "split,properties")
    assert wrong(run) == {}
    assert skipped(run) == set()


@pytest.mark.skipif(emulation.compiler() is None, reason=emulation.NO_COMPILER)
def test_split_extension_of_a_worker_with_cards(tmp_path: Path) -> None:
    cards = {"EMULATION": "fast", "EMULATED_CARDS": "2"}
    options = ("--cache-dir", str(tmp_path))
    with ServerProcess(*options, env=cards, module="tests.cuda.serve") as server:
        run = results(server.port, "split")
        assert wrong(run) == {}
        # It is no member of groups, as of one that can't be.
        members = {*range(72, 93)} - {79}
        assert skipped(run) == {r.case.id for r in run.results if r.case.number in members}
        assert server.alive, server.log
        assert "internal error" not in server.log


@pytest.mark.parametrize("mode", mostly_slow(["row", "tensor"]))
def test_split_extension_of_a_coordinator(server: ServerProcess, mode: str) -> None:
    parts = f"127.0.0.1:{server.port},local"
    with running("--threads", "1", "--split", parts, "--split-mode", mode) as coordinator:
        run = results(coordinator.port, "split")
        assert wrong(run) == {}
        # It keeps no programs, and this one no tensors: those cases are for workers. Leases it has.
        workers = {*range(30, 50), 54, 60, 61, *range(72, 93)}
        assert skipped(run) == {r.case.id for r in run.results if r.case.number in workers}


def test_split_cases_where_the_version_has_no_extension(server: ServerProcess) -> None:
    with coming_from(2 + VERSIONS.index("3.6")):
        run = results(server.port, "split", "3.6")
    assert {r.verdict for r in run.results} == {Verdict.SKIPPED}
