"""The conformance suite as it is used: against servers that are right, wrong, dying and gone."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from conformance.__main__ import main
from conformance.properties.__main__ import main as properties
from conformance.suite.probe import probe
from conformance.suite.registry import load, select
from conformance.suite.results import SuiteRun, Verdict
from conformance.suite.runner import SuiteRunner
from conformance.suite.target import Target
from protocol.dialects import DIALECTS, Dialect
from tests.parameters import mostly_slow
from tests.server.process import ServerProcess, running
from tools import upstream
from tools.serving.processes import PATIENCE

# Groups 5, 6, 10 and 11 have tests of their own.
_OLDER = [
    d for d in DIALECTS if d.version in {(6, 0, 0), (5, 1, 0), (4, 0, 0), (3, 5, 0), (1, 0, 0)}
]
# A graph may be the first that needs a kernel, and somebody else may want the processor meanwhile.
PATIENT = ("--timeout", f"{PATIENCE}")
_GROUPS = "handshake,framing,buffers,tensors,devices,clients,hostile"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running("--threads", "1", "-d", "CPU") as started:
        yield started
        assert started.alive, started.log


def _mortal(fault: str) -> str:
    return f"{shlex.quote(sys.executable)} -m tests.conformance.mortal {{port}} {fault}"


def _results(path: Path) -> dict[str, Any]:
    return {case["id"]: case for case in json.loads(path.read_text())["cases"]}


# -- cases -----------------------------------------------------------------------------------------


def test_cases_are_well_declared() -> None:
    cases = load()
    assert len(cases) > 300
    assert len({case.id for case in cases}) == len(cases)
    for case in cases:
        assert re.fullmatch(r"[a-z0-9-]+", case.name), case.name
        for text in (case.sends, case.expects, case.why, case.source):
            assert text.strip(), case


def test_names_of_cases_select_one_each() -> None:
    cases = load()
    for case in cases:
        assert case in select(cases, case.name)
        assert select(cases, case.id) == [case]


@pytest.mark.parametrize("wanted", ["3.999", "no-such-case", "99"])
def test_selecting_what_is_not_there(wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--endpoint", "127.0.0.1:1", "--only", wanted])
    assert ended.value.code == 2
    assert wanted in capsys.readouterr().err


def test_list_and_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--only", "3.4,handshake"]) == 0
    listed = capsys.readouterr().out
    assert "3.4 get-base-of-freed" in listed
    assert "1.5 second-hello" in listed
    assert "3.5" not in listed
    assert main(["--explain", "3.4"]) == 0
    explained = capsys.readouterr().out
    assert "BUFFER_GET_BASE with a handle that was freed" in explained
    assert "rpc_server::buffer_get_base" in explained


# -- this project's server -------------------------------------------------------------------------


def test_our_server_passes(server: ServerProcess, tmp_path: Path) -> None:
    files = [f"--{kind}={tmp_path / kind}" for kind in ("json", "junit", "html")]
    assert (
        main(
            [
                "--endpoint",
                f"127.0.0.1:{server.port}",
                "--hostile",
                "--only",
                _GROUPS,
                *files,
                *PATIENT,
            ]
        )
        == 0
    )
    report = json.loads((tmp_path / "json").read_text())
    assert report["counts"]["fail"] == report["counts"]["not run"] == 0
    assert report["counts"]["differs"] == 0
    assert report["counts"]["pass"] > 250
    assert report["protocol"] == "7.0.0"
    assert report["concurrent"]
    root = ElementTree.parse(tmp_path / "junit").getroot()
    assert root.get("failures") == "0"
    assert len(root.findall("./testsuite/testcase")) == len(report["cases"])
    assert "get-base-of-freed" in (tmp_path / "html").read_text()


@pytest.mark.parametrize("dialect", mostly_slow(_OLDER), ids=lambda d: d.name)
@pytest.mark.slow
def test_our_server_passes_in_every_dialect(dialect: Dialect, tmp_path: Path) -> None:
    """A server that offers the newest version first, and clients that want an older one."""
    groups = "1.1,1.2,1.16,2.80,2.83,2.84,2.86,2.88,2.90,buffers"
    options = [
        "--protocol",
        dialect.name,
        "--hostile",
        "--only",
        groups,
        "--json",
        str(tmp_path / "json"),
        *PATIENT,
    ]
    with running("--threads", "1", "-d", "CPU") as server:
        assert main(["--endpoint", f"127.0.0.1:{server.port}", *options]) == 0
    report = json.loads((tmp_path / "json").read_text())
    assert report["spoken"] == dialect.name
    assert report["counts"]["pass"] > 35


def test_the_version_is_found_out(tmp_path: Path) -> None:
    options = ["--hostile", "--only", "framing,tensors", "--json", str(tmp_path / "json"), *PATIENT]
    with running("--threads", "1", "-d", "CPU", "--protocol", "3.6") as server:
        assert main(["--endpoint", f"127.0.0.1:{server.port}", *options]) == 0
    assert json.loads((tmp_path / "json").read_text())["protocol"] == "3.6.1"


def test_devices_and_cache_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path))
    options = ["--hostile", "--only", "devices,4.110,4.111,4.112,4.113,4.115", *PATIENT]
    path = tmp_path / "json"
    with running("--threads", "1", "-d", "CPU,CPU", "--cache") as server:
        endpoint = f"127.0.0.1:{server.port}"
        assert main(["--endpoint", endpoint, *options, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert (report["devices"], report["cache"]) == (2, True)
    assert {case["verdict"] for case in report["cases"]} == {"pass"}


# -- servers that go wrong -------------------------------------------------------------------------


def test_a_server_that_dies_is_started_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = {kind: tmp_path / kind for kind in ("json", "junit", "html")}
    files = [f"--{kind}={file}" for kind, file in path.items()]
    command = ["--restart-command", _mortal("die"), "--only", "handshake,2.5,2.7"]
    assert main([*command, *files]) == 1
    results = _results(path["json"])
    died = results["1.5"]
    assert died["verdict"] == "fail"
    assert died["server"] == "ended with exit code 3"
    assert "fatal error: HELLO twice" in died["came"]
    assert "fatal error: HELLO twice" in died["output"]
    sent = [
        bytes.fromhex(m["bytes"])
        for m in died["exchange"]
        if m["from"] == "client" and m.get("bytes")
    ]
    assert sent[0] == bytes([14, 24, *[0] * 31])
    # Its end is that of one case only.
    assert {case["verdict"] for id_, case in results.items() if id_ != "1.5"} <= {"pass", "skipped"}
    shown = capsys.readouterr().out
    assert "1.5 second-hello: the server ended with exit code 3" in shown
    failures = ElementTree.parse(path["junit"]).getroot().findall(".//failure")
    assert [f.get("message") for f in failures] == [died["came"]]
    page = path["html"].read_text()
    # The second HELLO, taken apart.
    assert 'title="command = HELLO (14)">0e</b>' in page
    assert 'title="size = 24">18 00 00 00 00 00 00 00</b>' in page
    assert "closed by the server" in page
    assert "http" not in page.split("</style>")[0]


def test_a_server_that_is_gone(tmp_path: Path) -> None:
    """Without a command to start it the rest is not run, and the run fails."""
    with Target(command=_mortal("die")) as started:
        started.ensure(0)
        target = Target(started.address)
        facts = probe(target.address, None, PATIENCE)
        run = SuiteRun("gone", facts)
        cases = select(load(), "1.4,1.5,1.6,1.7")
        runner = SuiteRunner(target, facts, patience=PATIENCE, reconnect=0.2, hostile=True)
        runner.run(cases, run, lambda result: None)
    verdicts = [result.verdict for result in run.results]
    assert verdicts == [Verdict.PASS, Verdict.FAIL, Verdict.NOT_RUN, Verdict.NOT_RUN]
    assert "the server is gone since case 1.5" in run.results[2].came
    assert run.gone


def test_a_server_that_hangs(tmp_path: Path) -> None:
    options = ["--only", "1.5,1.6", "--timeout", "3", "--json", str(tmp_path / "json")]
    assert main(["--restart-command", _mortal("hang"), *options]) == 1
    results = _results(tmp_path / "json")
    assert results["1.5"]["verdict"] == "fail"
    assert "no answer to HELLO within" in results["1.5"]["came"]
    assert results["1.6"]["verdict"] == "pass"


def test_what_differs_is_no_failure(tmp_path: Path) -> None:
    options = ["--only", "1.5", *[f"--{kind}={tmp_path / kind}" for kind in ("json", "junit")]]
    assert main(["--restart-command", _mortal("ignore"), *options]) == 0
    assert _results(tmp_path / "json")["1.5"]["verdict"] == "differs"
    root = ElementTree.parse(tmp_path / "junit").getroot()
    assert root.get("failures") == "0"
    assert root.find(".//system-out") is not None


def test_wrong_content_fails(tmp_path: Path) -> None:
    """The tiny server has one buffer, which it doesn't clear."""
    options = ["--only", "3.10,3.12,3.24,4.1", "--json", str(tmp_path / "json")]
    assert main(["--restart-command", _mortal("ignore"), *options]) == 1
    results = _results(tmp_path / "json")
    verdicts = {id_: case["verdict"] for id_, case in results.items()}
    assert verdicts == {"3.10": "fail", "3.12": "fail", "3.24": "pass", "4.1": "pass"}
    assert results["3.12"]["came"] == (
        "the buffer cleared with 0xff: 1048576 of 1048576 bytes differ, the first at 0: "
        "00 00 00 00 00 00 00 00 instead of ff ff ff ff ff ff ff ff"
    )


def test_what_no_client_sends_is_not_sent_to_others(
    server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that runs already may be one that somebody works with."""
    endpoint = ["--endpoint", f"127.0.0.1:{server.port}", "--only", "1.4,1.5,9"]
    assert main([*endpoint, "--json", str(tmp_path / "json")]) == 0
    cases = json.loads((tmp_path / "json").read_text())["cases"]
    verdicts = {case["id"]: case["verdict"] for case in cases}
    assert verdicts.pop("1.4") == "pass"
    assert set(verdicts.values()) == {"skipped"}
    assert "--hostile" in {case["id"]: case.get("came", "") for case in cases}["1.5"]
    assert properties([*endpoint[:2], "--only", "damage", "--protocol", "7.0"]) == 0
    assert "damage: left out" in capsys.readouterr().out


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    target = Target(command="true")
    assert main(["--endpoint", "{}:{}".format(*target.address)]) == 3
    assert "nobody listens" in capsys.readouterr().err
    assert main(["--restart-command", f"{shlex.quote(sys.executable)} -c 1/0"]) == 3
    assert "ZeroDivisionError" in capsys.readouterr().err


# -- upstream's server -----------------------------------------------------------------------------


@pytest.mark.upstream
@pytest.mark.parametrize("build", [11434, 10531])
@pytest.mark.slow
def test_upstreams_server_is_tested_to_the_end(build: int, tmp_path: Path) -> None:
    program = upstream.find_program("ggml-rpc-server", build)
    if program is None:
        pytest.skip(
            f"no ggml-rpc-server of llama.cpp b{build}: "
            f"run python -m tools.upstream --build {build} --only ggml-rpc-server"
        )
    command = f"{shlex.quote(str(program))} -H 127.0.0.1 -p {{port}} -t 1"
    path = tmp_path / "json"
    groups = f"{_GROUPS},sequences"
    assert main(["--restart-command", command, "--only", groups, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    results = _results(path)
    assert report["counts"]["not run"] == report["counts"]["fail"] == 0
    assert not report["concurrent"]
    # What llama.cpp needs of it, it does.
    for id_ in ("1.1", "2.7", "2.12", "3.1", "3.12", "4.1", "4.81", "4.101"):
        assert results[id_]["verdict"] == "pass", results[id_]
    # Nothing that the suite sends ends it.
    assert not [id_ for id_, case in results.items() if "server" in case]
    assert results["8.1"]["verdict"] == "differs"
