"""Real clients of releases from 2.0 on: ggml as packages carried it, in auto mode and pinned.

Each computes graphs of known values on its own CPU backend and on the server; ``ggml_client`` has
the graphs, and is run in a process of its own, as often as a user would have to start it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from protocol.dialects import find_dialects
from protocol.ggml.ops import GluOp, Op, UnaryOp
from tests.e2e.conftest import Serve, needs_own_server
from tests.e2e.ggml_client import CASES
from tests.e2e.llama import RpcServer
from tools import upstream
from tools.upstream import ClientLibrary

pytestmark = [pytest.mark.upstream, needs_own_server]
# All that is needed is the library of the release.
NEEDS_PROGRAMS = False

# A version is found within so many starts: one for each that has the same HELLO, and one more
# where something was believed of the address.
MOST_STARTS = 6
PROJECT = Path(__file__).parents[2]

# By client and how the server was started: what the table at the end shows.
_starts: dict[tuple[str, str], tuple[int, int]] = {}


# Those that CI builds, and whatever else has been built.
CLIENTS = [c for c in upstream.CLIENT_LIBRARIES if c.in_ci or upstream.has_library(c)]


@pytest.fixture(params=CLIENTS, ids=lambda c: f"{c.dialect}-{c.name}")
def client(request: pytest.FixtureRequest) -> ClientLibrary:
    """A release whose library has been built."""
    found: ClientLibrary = request.param
    if not upstream.has_library(found):
        pytest.skip(f"no library of {found.name}; python -m tools.upstream --clients")
    return found


def run(client: ClientLibrary, server: RpcServer, *cases: str) -> dict[str, float] | None:
    """The error of each case; None where the client was turned away before the first."""
    only = [word for name in cases for word in ("--only", name)]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.e2e.ggml_client"),
            *(str(upstream.library_dir(client)), server.address, *only),
        ],
        cwd=PROJECT,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert server.alive, server.log[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    errors = {line["case"]: line["nmse"] for line in lines}
    if not errors:
        return None
    assert done.returncode == 0, f"after {list(errors)[-1]}: {done.stderr}\n{server.log[-2000:]}"
    return errors


def served(client: ClientLibrary, server: RpcServer, *cases: str) -> tuple[int, dict[str, float]]:
    """Start the client until it is served: how many starts that took, and its errors."""
    for start in range(1, MOST_STARTS + 1):
        errors = run(client, server, *cases)
        if errors is not None:
            return start, errors
    raise AssertionError(f"not served in {MOST_STARTS} starts:\n{server.log[-3000:]}")


def check(errors: dict[str, float]) -> None:
    wrong = {name: error for name, error in errors.items() if not error <= CASES[name].bound}
    assert not wrong


@pytest.mark.parametrize("mode", ["auto", "pinned"])
def test_results_are_those_of_its_own_cpu(client: ClientLibrary, mode: str, serve: Serve) -> None:
    server = serve("--protocol", "auto" if mode == "auto" else client.dialect)
    starts, errors = served(client, server)
    check(errors)
    # What each has: blocks of models, and the ops that all releases know.
    assert {"block", "convolution block", "pad", "pool_2d", "flash_attn_ext"} <= set(errors)
    assert len(errors) >= 60
    assert mode == "auto" or starts == 1
    assert ("names of 128 bytes" in server.log) == (client.name_size == 128)
    _starts[client.name, mode] = starts, len(errors)


def test_a_small_graph_comes_first(client: ClientLibrary, serve: Serve) -> None:
    """It is computed right or refused with the words that help, and right once more is known."""
    server = serve("--protocol", "auto")
    served_or_not = None
    for _ in range(MOST_STARTS):
        served_or_not = run(client, server, "pad")
        if served_or_not is not None or "several releases" in server.log:
            break
    if served_or_not is None:
        assert f"--protocol {client.dialect}" in server.log
    else:
        check(served_or_not)
    check(served(client, server, "block", "pad", "pool_2d")[1])


def test_the_tables_are_those_of_its_headers(client: ClientLibrary) -> None:
    folder = upstream.library_dir(client)
    header, rpc = ((folder / name).read_text() for name in ("ggml.h", "ggml-rpc.h"))
    (dialect,) = find_dialects(client.dialect)
    numbers = re.findall(r"define RPC_PROTO_(?:MAJOR|MINOR|PATCH)_VERSION\s+(\d+)", rpc)
    assert tuple(map(int, numbers)) == dialect.version
    assert [op.value for op in dialect.ops] == _enum(header, "op")
    for op, kind, functions in ((Op.UNARY, "unary_op", UnaryOp), (Op.GLU, "glu_op", GluOp)):
        theirs = _enum(header, kind)
        ours = [functions(n).name for n in dialect.numbering.functions[op]]
        # Functions that came later at the end have numbers that the release doesn't send.
        assert ours[: len(theirs)] == theirs


def _enum(header: str, name: str) -> list[str]:
    """The names of an enum of ggml.h, without its prefix."""
    found = re.search(rf"enum ggml_{name} \{{(.*?)\}}", header, re.DOTALL)
    if found is None:
        return []
    body = re.sub(r"//.*|/\*.*?\*/", "", found[1])
    prefix = f"GGML_{name.upper()}_"
    names = [word.split("=")[0].strip().removeprefix(prefix) for word in body.split(",")]
    return [word for word in names if word and word != "COUNT"]


def test_starts_that_each_client_needed(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints the table; what may be in it, the tests above have checked."""
    if not _starts:
        pytest.skip("no library of an old release; python -m tools.upstream --all-clients")
    dialects = {c.name: c.dialect for c in upstream.CLIENT_LIBRARIES}
    with capsys.disabled():
        print("\n\n| client | dialect | server | starts | graphs compared |\n|---|---|---|---|---|")
        for (name, mode), (starts, compared) in _starts.items():
            print(f"| {name} | {dialects[name]} | {mode} | {starts} | {compared} |")
