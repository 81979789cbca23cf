"""tools.bench.launches: what planning a model's launches takes, without a card."""

from __future__ import annotations

import pytest

from tools.bench import launches
from tools.gpu_check.llama import SMALL


def test_all_ways_are_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launches, "LLAMA_8B", SMALL)
    assert launches.main(["--rounds", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 * 4
    assert all(line.endswith(" ms") for line in printed)
