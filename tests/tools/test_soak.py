"""The long run, cut short; and that it would notice what it is there to notice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tools import smollm2, soak, upstream


@pytest.mark.upstream
@pytest.mark.slow
def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if upstream.find_program("llama-server") is None:
        pytest.skip("no llama-server: run python -m tools.upstream")
    smollm2.fetch()
    options = ["--minutes", "0.08", "--every", "2", "--tokens", "4", "--logs", str(tmp_path)]
    assert soak.main(options) == 0
    told = capsys.readouterr().out
    assert "answers that are wrong              0\n" in told
    assert told.endswith("passed\n")
    assert (tmp_path / "coordinator.log").is_file()


def finished(**what: object) -> soak.Soak:
    """A run that went well but for what is said."""
    run = soak.Soak.__new__(soak.Soak)
    run.tally = soak.SoakTally(correct=10, starts=2)
    run.tally.disturbances["killed"] = 2
    run.memory = [1 << 20, 2 << 20]
    for name, value in what.items():
        setattr(run.tally, name, value)
    return run


def test_what_counts_as_passed() -> None:
    assert finished().passed
    assert finished(errors={"URLError": 3}).passed
    assert not finished(wrong=["'a' instead of 'b'"]).passed
    assert not finished(faults=["coordinator.log: internal error"]).passed
    # A run in which nothing happened says nothing.
    assert not finished(correct=0).passed
    assert not finished(disturbances=Counter()).passed


def test_summary() -> None:
    run = finished(recoveries=[1.0, 5.0, 2.0])
    run.tally.errors.update({"URLError": 3, "HTTP 500": 1})
    told = run.summary(90)
    assert "time                                1.5 minutes" in told
    assert "4 (3 URLError, 1 HTTP 500)" in told
    assert "2.0 s (median), 5.0 s (most)" in told
    assert "1 MiB at the start, 2 MiB at the end" in told


def test_faults_in_the_logs_of_servers_are_found(tmp_path: Path) -> None:
    log = tmp_path / "worker-1-1.log"
    log.write_text("10:00:00 INFO fine\n10:00:01 ERROR client 1: internal error; closing\n")
    found = [line for line in soak.lines_of(log) if soak.FAULTS.search(line)]
    assert len(found) == 1


def test_a_model_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline() -> Path:
        raise smollm2.ModelUnavailableError("no SmolLM2")

    monkeypatch.setattr(smollm2, "fetch", offline)
    with pytest.raises(SystemExit) as caught:
        soak.main([])
    assert caught.value.code == 2
    assert "name a --model" in capsys.readouterr().err
