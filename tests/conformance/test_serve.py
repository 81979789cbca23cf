"""The scripted server: it finds what clients do wrong, and leaves alone what they do right."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from client.errors import ConnectionLost, VersionMismatch
from conformance.__main__ import main
from conformance.serve.campaign import (
    Client,
    ClientCampaign,
    ClientVersion,
    NoClient,
    planned,
)
from conformance.serve.faults import Fault, Mishap
from conformance.serve.graphs import check_graph
from conformance.serve.judge import judge
from conformance.serve.memory import Addresses, HashStore
from conformance.serve.program import Ended, run_client
from conformance.serve.rules import RULES, Notes
from conformance.serve.scenarios import (
    Conduct,
    Scenario,
    Topic,
    plain,
    scenarios,
    select,
)
from conformance.serve.server import ConnectionRecord, Script, ScriptedServer, Visit
from conformance.serve.state import Properties, RequestRefused, ServedSession
from conformance.serve.tensors import TensorView, view_of
from conformance.suite.results import Verdict
from conformance.suite.tensors import Fields, sources, tensor, tensor_array
from protocol.commands import Command
from protocol.dialects import DIALECTS, Dialect
from protocol.errors import ProtocolError
from protocol.graph_payload import GraphPayload
from tests.conformance.clients.__main__ import work
from tests.conformance.clients.breakers import BREAKERS, Breaker, not_hello
from tools.serving.processes import PATIENCE

NEWEST = DIALECTS[0]
LIMITED = Properties(max_size=1 << 40, pad=4096, caches=True)
GOOD = (
    f"{shlex.quote(sys.executable)} -m tests.conformance.clients --port {{port}} "
    f"--timeout {PATIENCE}"
)


def script(dialect: Dialect = NEWEST, **properties: Any) -> Script:
    return replace(plain(dialect).script(dialect), properties=Properties(**properties))


def scenario(name: str, dialect: Dialect = NEWEST) -> Scenario:
    (found,) = select(scenarios(dialect), name)
    return found


def served(
    made: Script, dialect: Dialect = NEWEST, store: HashStore | None = None
) -> tuple[Visit, str]:
    """What is seen of the good client in this process, and the error that it ended with."""
    error = ""
    with ScriptedServer(made, store=store) as server:
        try:
            asyncio.run(work(server.port, dialect, PATIENCE))
        except (ConnectionLost, ProtocolError, VersionMismatch) as raised:
            error = type(raised).__name__
        assert server.settle(PATIENCE)
    return server.visit, error


# -- rules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_a_good_client_keeps_every_rule(dialect: Dialect) -> None:
    visit, error = served(script(dialect, caches=True, pad=512), dialect)
    assert error == ""
    assert visit.notes.examples == {}
    assert judge(plain(dialect), visit, Ended(0, 1.0, "")) == (Verdict.PASS, "")
    untested = set(RULES) - set(visit.notes.tested)
    # What there is to see depends on the version.
    missing = {"memset/range": Command.MEMSET_TENSOR, "graph/recompute": Command.GRAPH_RECOMPUTE}
    expected = {rule for rule, command in missing.items() if command not in dialect.commands}
    assert untested - {"hash/hit"} == expected


@pytest.mark.parametrize("rule", BREAKERS)
def test_a_broken_rule_is_seen(rule: str) -> None:
    made = replace(script(), properties=LIMITED)
    with ScriptedServer(made) as server:
        breaker = Breaker(server.port)
        BREAKERS[rule](breaker)
        breaker.wire.socket.close()
        assert server.settle(PATIENCE)
    notes = server.visit.notes
    assert notes.verdict(rule)[0] is RULES[rule].broken
    # The buffer that every one of them leaves is all else that may be found.
    assert set(notes.broken) <= {rule, "buffer/all-freed"}


def _view(fields: Fields) -> TensorView:
    found = view_of(SimpleNamespace(**fields))
    assert found is not None
    return found


def _alone() -> tuple[ServedSession, Fields]:
    """A session without a connection, and a tensor at the end of its one buffer."""
    session = ServedSession(NEWEST, LIMITED, Addresses(64), HashStore(), Notes(), {})
    block = session.memory.allocate(4096, 0)
    assert block is not None
    return session, tensor(1, (16,), buffer=block.handle, data=block.base + 4096 - 64)


def test_a_tensor_over_its_buffers_edge_is_seen() -> None:
    session, fields = _alone()
    fields["data"] += 32
    with pytest.raises(RequestRefused, match="64 bytes at"):
        session.check_place("t", _view(fields), session.memory.live[0])
    assert session.notes.verdict("tensor/inside")[0] is Verdict.FAIL


def test_an_op_that_is_none_is_seen() -> None:
    session, fields = _alone()
    node = {**fields, "op": len(NEWEST.ops), "id": 2, "src": sources(1)}
    graph = GraphPayload(0, np.array([2], np.uint64), tensor_array([fields, node]))
    with pytest.raises(RequestRefused, match="has op number"):
        check_graph(session, graph)
    assert session.notes.verdict("graph/op")[0] is Verdict.FAIL


def test_every_rule_has_somebody_who_breaks_it() -> None:
    assert set(BREAKERS) | {"hello/first", "tensor/inside", "graph/op"} == set(RULES)
    with ScriptedServer(script()) as server:
        not_hello(server.port)
        assert server.settle(PATIENCE)
    assert server.visit.notes.verdict("hello/first")[0] is Verdict.FAIL


def test_notes_count_and_keep_a_few_examples() -> None:
    notes, more = Notes(), Notes()
    for i in range(20):
        more.check("get/range", i % 2 == 0, f"number {i}")
    notes.add(more)
    assert notes.verdict("get/range") == (Verdict.FAIL, "number 1 (and 9 times more)")
    assert notes.verdict("set/range")[0] is Verdict.SKIPPED
    assert len(notes.examples["get/range"]) < 10


# -- scenarios -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["newer-major", "older-major", "newer-minor"])
def test_a_version_that_is_not_the_clients_is_refused(name: str) -> None:
    chosen = scenario(name)
    visit, error = served(chosen.script(NEWEST))
    assert error == "VersionMismatch"
    assert judge(chosen, visit, Ended(1, 0.1, ""))[0] is Verdict.PASS
    # The same client, if it had gone on.
    visit.connections[0].went_on = True
    assert judge(chosen, visit, None)[0] is Verdict.FAIL


@pytest.mark.parametrize("how", [how for how in Mishap if how.fatal and how is not Mishap.SILENT])
def test_an_answer_that_is_none_ends_the_connection(how: Mishap) -> None:
    chosen = Scenario(
        Topic.WRONG, "x", "", Conduct.NOTICES, "", fault=Fault(how, Command.BUFFER_GET_BASE)
    )
    visit, error = served(chosen.script(NEWEST))
    assert error in ("ConnectionLost", "ProtocolError")
    assert visit.fault_happened
    assert judge(chosen, visit, Ended(1, 0.1, ""))[0] is Verdict.PASS


def test_pieces_and_delays_are_borne() -> None:
    for fault in (Fault(Mishap.DRIBBLE), Fault(Mishap.DELAY, Command.GET_TENSOR, seconds=0.2)):
        visit, error = served(replace(script(), fault=fault))
        assert error == ""
        assert visit.fault_happened


def test_data_known_from_an_earlier_run_are_not_sent_again() -> None:
    store = HashStore()
    chosen = scenario("hash-hit")
    sent = []
    for _ in range(2):
        visit, error = served(chosen.script(NEWEST), store=store)
        assert error == ""
        sent.append(visit.requests[Command.SET_TENSOR])
    assert sent[1] == sent[0] - 1
    assert visit.notes.verdict("hash/hit")[0] is Verdict.PASS


def test_the_server_can_leave_within_an_upload() -> None:
    fault = Fault(Mishap.CLOSE, Command.SET_TENSOR, number=4, within=True)
    visit, error = served(replace(script(), fault=fault))
    assert error == "ConnectionLost"
    assert visit.fault_happened
    assert not visit.notes.broken


def test_a_client_that_stays_on_a_dead_connection_fails() -> None:
    fault = Fault(Mishap.LONG, Command.GET_ALIGNMENT)
    chosen = Scenario(Topic.WRONG, "x", "", Conduct.REFUSES, "", fault=fault)
    with ScriptedServer(chosen.script(NEWEST), patience=1.0) as server:
        breaker = Breaker(server.port)
        breaker.wire.send(Command.GET_ALIGNMENT, bytes(4))
        breaker.wire.read(17)
        assert server.settle(PATIENCE)
        breaker.wire.socket.close()
    verdict, came = judge(chosen, server.visit, None)
    assert verdict is Verdict.FAIL
    assert "still open" in came


# -- verdicts --------------------------------------------------------------------------------------


def seen(**fields: Any) -> Visit:
    record = ConnectionRecord(1, hello_size=24, went_on=True, ended_by="client", **fields)
    return Visit(connections=[record], fault_happened=True)


@pytest.mark.parametrize(
    ("status", "verdict"),
    [
        (1, Verdict.PASS),
        (0, Verdict.DIFFERS),
        (-6, Verdict.DIFFERS),
        (-13, Verdict.DIFFERS),
        (-11, Verdict.FAIL),
        (None, Verdict.FAIL),
    ],
)
def test_how_a_program_ends_counts(status: int | None, verdict: Verdict) -> None:
    visit = seen(faulted=True)
    visit.requests[Command.GET_TENSOR] = 1
    chosen = scenario("cut-get-tensor")
    assert judge(chosen, visit, Ended(status, 1.0, ""))[0] is verdict


def test_what_did_not_happen_is_not_judged() -> None:
    visit = seen()
    visit.fault_happened = False
    assert judge(scenario("closed-copy-tensor"), visit, Ended(0, 1.0, ""))[0] is Verdict.SKIPPED
    assert judge(scenario("newer-major"), Visit(), None)[0] is Verdict.SKIPPED


def test_a_plain_server_must_be_used() -> None:
    visit = seen()
    visit.connections[0].went_on = False
    verdict, came = judge(plain(NEWEST), visit, Ended(0, 1.0, ""))
    assert verdict is Verdict.FAIL
    assert "did not go on after HELLO" in came
    assert judge(plain(NEWEST), seen(), Ended(3, 1.0, ""))[0] is Verdict.FAIL


def test_programs_are_watched_and_ended() -> None:
    code = "import os,sys; print(sys.argv[1]); os.kill(os.getpid(), int(sys.argv[2]))"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {{port}} 6"
    ended = run_client(command, 7777, PATIENCE)
    assert (ended.signal, ended.output) == ("SIGABRT", "7777\n")
    sleeps = f"{shlex.quote(sys.executable)} -c 'import time; time.sleep(60)'"
    assert run_client(sleeps, 1, 0.5).status is None


# -- a whole run -----------------------------------------------------------------------------------


def test_the_clients_version_is_found() -> None:
    old = f"{GOOD} --protocol 6.0"
    found = ClientCampaign(Client(old, PATIENCE)).find_version()
    assert found.version == (6, 0, 0)
    assert found.dialect.version == (6, 0, 0)
    with pytest.raises(NoClient, match="no HELLO"):
        ClientCampaign(Client(f"{shlex.quote(sys.executable)} -c 'pass'", PATIENCE)).find_version()


def test_clients_that_come_by_themselves_are_waited_for() -> None:
    threads: list[threading.Thread] = []

    def announce(text: str, port: int) -> None:
        def come() -> None:
            with pytest.raises(VersionMismatch):
                asyncio.run(work(port, NEWEST, PATIENCE))

        if port:
            threads.append(threading.Thread(target=come))
            threads[-1].start()

    campaign = ClientCampaign(Client(), announce)
    result = campaign.run(scenario("newer-major"), ClientVersion(NEWEST.version, NEWEST))
    for thread in threads:
        thread.join()
    assert len(threads) == 1
    assert (result.verdict, result.came) == (Verdict.PASS, "")


def test_every_dialect_is_planned() -> None:
    names = {s.name for s in planned(ClientVersion((7, 0, 0), NEWEST), every_dialect=True)}
    assert {f"plain-{d.name}" for d in DIALECTS} <= names
    for dialect in DIALECTS:
        made = scenarios(dialect)
        assert len({s.name for s in made}) == len(made)
        assert all(s.needs is None or s.needs in dialect.commands for s in made)


def test_command_line_with_a_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, junit, page = tmp_path / "r.json", tmp_path / "r.xml", tmp_path / "r.html"
    status = main(
        [
            *("--serve", "--client-command", GOOD, "--protocol", "7.0", "--timeout", f"{PATIENCE}"),
            *("--scenario", "newer-major,no-memory", "--verbose"),
            *("--json", str(report), "--junit", str(junit), "--html", str(page)),
        ]
    )
    out = capsys.readouterr().out
    assert status == 0, out
    by_name = {case["name"]: case["verdict"] for case in json.loads(report.read_text())["cases"]}
    assert by_name["newer-major"] == by_name["no-memory"] == by_name["hello/first"] == "pass"
    assert by_name["hash/fnv"] == "skipped"
    assert "newer-major" in junit.read_text()
    assert "newer-major" in page.read_text()


def test_findings_are_reported_with_what_was_seen(tmp_path: Path) -> None:
    code = "import os,sys; from tools.wire import Wire; Wire(int(sys.argv[1])); os.abort()"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {{port}}"
    report, page = tmp_path / "r.json", tmp_path / "r.html"
    options = ["--serve", "--client-command", command, "--protocol", "7.0"]
    chosen = ["--scenario", "newer-major", "--json", str(report), "--html", str(page)]
    assert main([*options, *chosen]) == 0
    found = next(c for c in json.loads(report.read_text())["cases"] if c["name"] == "newer-major")
    assert found["verdict"] == "differs"
    told, asked, answered, ended = found["exchange"]
    assert told["note"] == "the client sent HELLO of 24 bytes"
    assert (asked["from"], asked["command"], asked["size"]) == ("client", "HELLO", 33)
    assert answered["bytes"] == "1c00000000000000" + "080000" + "00" * 25
    assert ended["note"] == "it was ended by SIGABRT"
    assert "8.0.0" in page.read_text()


def test_command_line_refuses_what_makes_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--scenario", "nothing", "--list"], ["--client-command", "true"]):
        with pytest.raises(SystemExit) as ended:
            main(["--serve", *wrong])
        assert ended.value.code == 2
    assert main(["--serve", "--list", "--scenario", "slow"]) == 0
    assert "dribble" in capsys.readouterr().out
