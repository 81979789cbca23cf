"""tools.neighbour: its catalogue, a short run, and that it notices what is wrong."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.server.process import ServerProcess, running
from tools.neighbour import __main__ as program
from tools.neighbour import catalogue, harness
from tools.neighbour.attack import CATALOGUE, Attack, Attacker, Where, attack
from tools.neighbour.report import as_json, cells, markdown, summary
from tools.neighbour.site import Footprint
from tools.neighbour.victim import Noticed, Victim

assert catalogue

# Of each server and part one or two, and none that takes long.
SHORT = (
    "graph-of-nothing-but-leaves",
    "half-a-hello",
    "graphs-of-many-clients",
    "hangs-up-within-a-program",
    "program-whose-ids-repeat",
    "messages-almost-whole",
    "a-link-for-a-content",
    "names-with-line-breaks",
    "headers-that-never-end",
    "tls-without-a-token",
    "uploads-where-nothing-is-kept",
    "weights-announced-and-not-sent",
)


def test_the_catalogue() -> None:
    assert len(CATALOGUE) >= 60
    kinds = Counter(attack.kind for attack in CATALOGUE.values())
    assert min(kinds.values()) >= 3, kinds
    assert {attack.server for attack in CATALOGUE.values()} == {
        "worker", "read-only", "coordinator",
    }  # fmt: skip
    assert all(not a.does.endswith(".") and "  " not in a.does for a in CATALOGUE.values())


def test_one_name_is_one_attack() -> None:
    with pytest.raises(RuntimeError, match="two attacks are called half-a-hello"):

        @attack("kind")
        def half_a_hello(a: Attacker) -> None:
            """Says it twice"""

    with pytest.raises(RuntimeError, match="doesn't say what it does"):

        @attack("kind")
        def nothing_said(a: Attacker) -> None:
            pass


@pytest.mark.slow
def test_a_short_run() -> None:
    """Nothing is changed, nothing is kept, and others are answered; how fast isn't looked at."""
    results = list(harness.run([CATALOGUE[name] for name in SHORT], 0.3))
    assert sorted(result.attack.name for result in results) == sorted(SHORT)
    for result in results:
        if result.skipped:
            continue
        assert not result.faults, (result.attack.name, result.faults)
        assert result.noticed.rounds > 0
        assert result.attempts > 0


@pytest.mark.nightly
def test_all_of_it() -> None:
    for result in harness.run(list(CATALOGUE.values()), 1.0):
        assert not result.faults, (result.attack.name, result.faults)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running("--threads", "1") as started:
        yield started


def test_a_victim_notices(server: ServerProcess) -> None:
    """A changed byte, a result that is wrong, a connection that ends."""
    victim = Victim(server.port)
    assert victim.watch(lambda: False, 0.05).changed == ""
    wire = victim._wire
    wire.set_tensor(victim._bytes, b"\xff", 77)
    assert victim.watch(lambda: False, 0.05).changed == "bytes have changed"
    wire.set_tensor(victim._leaf, bytes(4))
    assert victim.watch(lambda: False, 0.05).changed == "a result is wrong"
    victim.close()
    assert victim.watch(lambda: False, 0.05).changed.startswith("its connection ended")


def test_what_is_kept() -> None:
    before = Footprint(100 << 20, 500, 20, 8, 0)
    assert Footprint(190 << 20, 520, 20, 9, 0).kept(before) == ""
    assert Footprint(90 << 20, 400, 10, 7, 0).kept(before) == ""
    after = Footprint(200 << 20, 600, 21, 30, 1)
    assert after.kept(before) == (
        "100 MiB of memory, 100 mappings, 1 descriptors, 22 threads, 1 files"
    )


def _result(**changed: object) -> harness.AttackResult:
    made = Attack("one", "a kind", "Does something", lambda a: None, "worker", False)
    result = harness.AttackResult(made, Noticed(hello=0.01, graph=0.02, rounds=5))
    for name, value in changed.items():
        setattr(result, name, value)
    return result


def test_the_report() -> None:
    good = _result()
    assert good.passed
    assert cells(good) == ("Does something", "10", "20", "same", "nothing", "1.00")
    slow = _result(noticed=Noticed(hello=0.2, graph=0.3, rounds=1))
    assert slow.delays == ["HELLO 200 ms", "one node 300 ms"]
    bad = _result(kept="9 descriptors", findings=["the server ended"])
    assert bad.faults == ["the server ended", "kept: 9 descriptors"]
    late = _result(speed=0.5)
    text = summary([good, slow, bad, late, _result(skipped="needs something")])
    assert text.splitlines()[0] == "1 of 4 attacks went unnoticed"
    assert "kernels at 0.50 of their speed" in text
    table = markdown([good, slow], Noticed(hello=0.001, graph=0.002))
    assert "| **a kind** | | | | | |\n| Does something | 10 | 20 | same | nothing | 1.00 |" in table
    assert json.loads(as_json([bad], Noticed()))["attacks"][0]["faults"] == bad.faults


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--list", "--only", "half-a-hello"]) == 0
    assert "60 connections that stop within HELLO" in capsys.readouterr().out
    for wrong in (["--only", "no such thing"], ["--seconds", "0"], ["--port", "50052"]):
        with pytest.raises(SystemExit) as ended:
            program.main(wrong)
        assert ended.value.code == 2
    where = Where(1, 2, 3, "folder", "log")
    assert Where.decode(where.encode()) == where


@pytest.mark.slow
def test_an_attack_that_fails_is_reported() -> None:
    """One that isn't in the catalogue ends its process with an error."""
    made = Attack("not-there", "a kind", "Is not there", lambda a: None, "worker", False)
    (result,) = harness.run([made], 0.1)
    assert result.faults[0].startswith("the attack itself failed: KeyError")
