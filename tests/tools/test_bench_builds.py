"""tools.bench.builds: what a build is, how rounds are put together, and a small real run."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import pytest

from tools import models, upstream
from tools.bench import builds
from tools.bench.builds import Build, BuildTable, weight_bytes
from tools.bench.cores import processor_seconds
from tools.bench.results import Sample
from tools.serving.processes import PROJECT


def test_a_build_is_a_folder_with_variables() -> None:
    made = Build.parse(f"small={PROJECT},A=1,B=x=y")
    assert (made.name, made.folder, made.env) == ("small", PROJECT, {"A": "1", "B": "x=y"})
    assert Build.parse("upstream") == Build("upstream", None)


@pytest.mark.parametrize("text", ["", "name", "name=", "=.", f"a={PROJECT},B", "a=/nowhere"])
def test_what_is_no_build(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(argparse.ArgumentTypeError):
        Build.parse(text)


def speed(value: float) -> list[Sample]:
    return [Sample("tg32", "tokens/s", True, value)]


def test_ratios_are_to_the_first_build_round_by_round() -> None:
    result = BuildTable(["old", "new"])
    for old, new in ((10.0, 20.0), (1.0, 3.0), (100.0, 400.0)):
        result.add("old", speed(old))
        result.add("new", speed(new))
    result.add("new", [Sample("pages", "MiB", True, 5.0)])
    header, tokens, pages = result.rows()
    assert header == ("figure", "old", "new", "new / old")
    assert tokens == ("tg32, tokens/s", "10.0", "20.0", "3.00 (2.00..4.00)")
    assert pages == ("pages, MiB", "-", "5.00", "-")
    assert len({len(line) for line in result.text().splitlines()}) == 1


def test_a_figure_that_is_nothing_has_no_ratio() -> None:
    result = BuildTable(["old", "new"])
    result.add("old", speed(0.0))
    result.add("new", speed(1.0))
    assert result.rows()[1][-1] == "-"


@pytest.mark.slow
def test_a_token_reads_all_matrices_but_the_table_of_tokens(tmp_path: Path) -> None:
    path = models.write_large_model(tmp_path / "m.gguf", 80 << 20)
    size = weight_bytes(path)
    assert 0.97 * path.stat().st_size < size + 512 * 2048 * 34 // 32 < path.stat().st_size


def test_processor_time_is_that_of_the_process() -> None:
    before = processor_seconds(os.getpid())
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    assert processor_seconds(os.getpid()) >= before + 0.02


@pytest.mark.upstream
@pytest.mark.skipif(
    upstream.find_program("llama-bench") is None,
    reason="no llama-bench: run python -m tools.upstream",
)
@pytest.mark.slow
def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = models.write_model(tmp_path, "llama-gqa", "Q8_0")
    arguments = ["--build", f"own={PROJECT},GGML_RPC_LARGE_PAGES=off", "--build", "upstream"]
    arguments += ["--model", str(model), "-p", "0", "-n", "4", "-r", "1", "--rounds", "1"]
    assert builds.main([*arguments, "-t", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == model.stem
    assert lines[1].split() == ["figure", "own", "upstream", "upstream", "/", "own"]
    (tokens,) = (line for line in lines if line.startswith("tg4, tokens/s"))
    assert all(float(word) > 0 for word in tokens.split()[2:4])


def test_nothing_to_measure(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        builds.main([])
    assert "no --build" in capsys.readouterr().err
