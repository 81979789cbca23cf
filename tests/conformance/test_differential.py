"""This server held against upstream's own, op by op: a short run of the differential tester."""

from __future__ import annotations

import os
import sys

import pytest

from conformance.differential.campaign import Campaign, Servers, select
from conformance.differential.report import Report
from tools.upstream import find_program

pytestmark = [pytest.mark.upstream, pytest.mark.timeout(600)]

_JOBS = 2


@pytest.fixture(scope="module")
def servers() -> Servers:
    program = find_program("ggml-rpc-server")
    if program is None:
        pytest.skip("no ggml-rpc-server of llama.cpp: run python -m tools.upstream")
    own = f"{sys.executable} -m rpc_server --port {{port}} -t 2 --log-level error"
    return Servers(None, own, None, f"{program} -p {{port}} -t 2")


def test_every_op_agrees_with_upstream(servers: Servers) -> None:
    seed = int(os.environ.get("DIFFERENTIAL_SEED", "0"))
    chosen = select()
    report = Report(list(chosen))
    for name, tally in Campaign(servers, "short", seed, chosen).run(_JOBS):
        report.add(name, tally)
    print(f"seed {seed}\n{report.table()}")
    assert not report.failed, f"seed {seed}: see the findings above"
