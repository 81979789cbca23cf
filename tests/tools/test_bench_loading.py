"""tools.bench.loading: its ratios, and a small run of the real thing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools import models, upstream
from tools.bench import loading
from tools.bench.loading import (
    INSTANT,
    LOCAL,
    UPSTREAM,
    WITH,
    WITHOUT,
    ClientStart,
    LoadTimes,
)


def test_ratios_are_taken_round_by_round() -> None:
    measured = LoadTimes("7.0.0", 1_000_000)
    setups = (LOCAL, UPSTREAM, WITH, INSTANT)
    for times in ((1.0, 10.0, 2.0, 1.0), (2.0, 40.0, 4.0, 3.2), (4.0, 20.0, 20.0, 16.0)):
        for setup, seconds in zip(setups, times, strict=True):
            start = ClientStart(seconds, seconds / 2, seconds / 4, 20_000)
            measured.starts.setdefault(setup, []).append(start)
    assert measured.ratio(UPSTREAM, WITH) == 5.0
    assert measured.ratio(WITH, LOCAL) == 2.0
    row = next(line for line in measured.lines() if WITH in line)
    shown = "4.00 s | 2.00 s | 2.00 | 1.25 | 5.00 | 2.00 s | 1.00 s | 0.0 MB | 2.00%"
    assert row == f"| {WITH} | {shown} |"


def test_what_was_not_measured_has_no_ratio() -> None:
    measured = LoadTimes("4.0.0", 1, {WITH: [ClientStart(1.0, 1.0, 1.0, 0)]})
    assert measured.ratio(UPSTREAM, WITH) is None
    assert "| - | - | - |" in measured.lines()[-1]


@pytest.mark.upstream
@pytest.mark.skipif(
    upstream.find_program("llama-completion") is None, reason="run python -m tools.upstream"
)
@pytest.mark.slow
def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = models.write_large_model(tmp_path / "m.gguf", 120 << 20)
    assert loading.main(["--model", str(path), "--rounds", "1", "--rate", "10"]) == 0
    rows = re.findall(r"^\| ([^|]+) \|.*\| ([\d.]+)% \|$", capsys.readouterr().out, re.M)
    share = {name: float(percent) for name, percent in rows}
    assert set(share) == {LOCAL, UPSTREAM, WITHOUT, WITH, INSTANT}
    assert share[LOCAL] == 0
    # All but the table of tokens, and the names in the file.
    assert min(share[UPSTREAM], share[WITHOUT]) > 95
    # Small tensors are sent: two layers' keys and values, and the output's few rows.
    assert share[WITH] < 25
    # The client sends and asks the same of a server that does nothing.
    assert share[INSTANT] == pytest.approx(share[WITH], rel=0.01)
