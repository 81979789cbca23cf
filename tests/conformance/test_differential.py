"""This server held against upstream's own, op by op: a short run of the differential tester."""

from __future__ import annotations

import os
import sys

import pytest

from conformance.differential.campaign import DifferentialCampaign, Servers, select
from conformance.differential.report import Report
from tests.cuda import emulation
from tools.upstream import find_program

pytestmark = [pytest.mark.upstream, pytest.mark.slow, pytest.mark.timeout(900)]

_JOBS = 2
COMMANDS = {
    "cpu": "-m rpc_server --port {port} -t 2 --log-level error",
    # Each access is checked; what has no kernel is refused.
    "cuda": "-m tests.cuda.serve --port {port} --log-level error",
}


@pytest.mark.parametrize("device", COMMANDS)
def test_every_op_agrees_with_upstream(device: str) -> None:
    program = find_program("ggml-rpc-server")
    if program is None:
        pytest.skip("no ggml-rpc-server of llama.cpp: run python -m tools.upstream")
    if device == "cuda" and emulation.compiler() is None:
        pytest.skip(emulation.NO_COMPILER)
    own = f"{sys.executable} {COMMANDS[device]}"
    servers = Servers(None, own, None, f"{program} -p {{port}} -t 2")
    seed = int(os.environ.get("DIFFERENTIAL_SEED", "0"))
    chosen = select()
    report = Report(list(chosen))
    for name, tally in DifferentialCampaign(servers, "short", seed, chosen).run(_JOBS):
        report.add(name, tally)
    print(f"seed {seed}\n{report.table()}")
    assert not report.failed, f"seed {seed}: see the findings above"
