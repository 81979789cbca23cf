"""tools.bench.planning: what planning takes on the CPU, and what it keeps from running."""

from __future__ import annotations

import ctypes

import pytest

from tools.bench import planning
from tools.bench.planning import Waits
from tools.gpu_check.llama import SMALL


def test_planning_and_waits_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "LLAMA_8B", SMALL)
    monkeypatch.setattr("sys.setswitchinterval", lambda seconds: None)
    assert planning.main(["--rounds", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 * 2
    assert all(line.endswith(" ms") for line in printed)


def test_who_keeps_pythons_lock_is_noticed() -> None:
    # A PyDLL's functions are called with the lock held.
    hold = ctypes.PyDLL(None).usleep
    with Waits() as waits:
        seconds, longest = waits.during(lambda: hold(50_000))
    assert seconds >= 0.05
    assert longest >= 0.03
