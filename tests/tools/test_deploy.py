"""The unit for systemd and its drop-in are read by systemd itself without a complaint."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.serving.processes import PROJECT

DEPLOY = PROJECT / "tools" / "deploy"
UNIT = "ggml-rpc-server.service"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
@pytest.mark.parametrize("gpu", [False, True])
def test_systemd_understands_the_unit(gpu: bool, tmp_path: Path) -> None:
    """Programs are this environment's: nothing is installed in /opt here."""
    unit = tmp_path / UNIT
    told = (DEPLOY / UNIT).read_text()
    unit.write_text(told.replace("/opt/ggml-rpc-server/bin/python", sys.executable))
    if gpu:
        shutil.copytree(DEPLOY / f"{UNIT}.d", tmp_path / f"{UNIT}.d")
    command = ["systemd-analyze", "verify", "--man=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # What else is installed on this machine is read as well, and complained of.
    complaints = [x for x in (done.stdout + done.stderr).splitlines() if "ggml-rpc-server" in x]
    assert not complaints


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_a_wrong_line_is_noticed(tmp_path: Path) -> None:
    unit = tmp_path / UNIT
    unit.write_text((DEPLOY / UNIT).read_text().replace("ProtectHome=yes", "ProtectHome=maybe"))
    command = ["systemd-analyze", "verify", "--man=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "ggml-rpc-server.service" in done.stdout + done.stderr
