"""A dozen of the combinations of tests/e2e/matrix, with each arrangement and each program."""

from __future__ import annotations

import itertools
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import llama
from tests.e2e.conftest import needs_own_server
from tests.e2e.matrix.arrangements import ARRANGEMENTS
from tests.e2e.matrix.combinations import (
    COMPLETION,
    EMBEDDING,
    FACTORS,
    IMATRIX,
    PERPLEXITY,
    SERVER,
    Combination,
    pairwise,
    possible,
    representative,
)
from tests.e2e.matrix.run import Bench


def _pairs(combination: Combination) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    return set(itertools.combinations(combination._asdict().items(), 2))


def test_every_pair_that_is_possible_is_chosen() -> None:
    wanted = set().union(*map(_pairs, possible()))
    assert wanted <= set().union(*map(_pairs, pairwise()))
    assert len(pairwise()) >= 80


def test_the_few_have_every_value() -> None:
    """Each server arrangement and program above all."""
    few = representative()
    assert len(few) <= 14
    assert {c.servers for c in few} == set(ARRANGEMENTS)
    for factor, values in FACTORS.items():
        assert {getattr(c, factor) for c in few} == set(values), factor


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with Bench(tmp_path_factory.mktemp("matrix")) as started:
        yield started


@needs_own_server
@pytest.mark.parametrize(
    ("fault", "program"),
    [
        ("recompute-does-nothing", COMPLETION),
        ("recompute-does-nothing", SERVER),
        ("last-node-left-out", EMBEDDING),
        ("last-node-left-out", PERPLEXITY),
        ("last-node-left-out", IMATRIX),
    ],
)
def test_a_fault_is_noticed(
    fault: str, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that computes something else by a planted fault."""
    command = f"{shlex.quote(sys.executable)} -m tests.conformance.faulty --fault {fault}"
    monkeypatch.setattr(llama, "SERVER_COMMAND", command + " --port {port}")
    combination = Combination("one", program, "1", "-ngl 99", "f16, fa on", "nothing", "qwen2")
    with Bench(tmp_path) as started:
        outcome = started.run(combination)
    assert not outcome.ok, outcome.words


@needs_own_server
@pytest.mark.parametrize("combination", representative(), ids=str)
def test_the_answer_is_the_local_one(combination: Combination, bench: Bench) -> None:
    outcome = bench.run(combination)
    assert outcome.ok, outcome.fault
