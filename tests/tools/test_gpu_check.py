"""The check of a card: what it finds right on an emulated one, and that it finds what is wrong."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from protocol.ggml.types import GgmlType
from tests.cuda import emulation
from tools import upstream
from tools.gpu_check import __main__ as program
from tools.gpu_check import kernels, servers, speed, summary
from tools.gpu_check.llama import LLAMA_8B, SMALL, spread
from tools.gpu_check.servers import ServersToCheck, devices

needs_compiler = pytest.mark.skipif(emulation.compiler() is None, reason=emulation.NO_COMPILER)

TINY = replace(SMALL, layers=1, vocabulary=256)
QUICK = speed.TimingPlan(prompt=5, before=5, prompts=1, steps=2)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that check each access: other tests have had them compiled."""
    monkeypatch.setitem(servers.EMULATED_FAST, "EMULATION", "checked")
    extent = program.CheckExtent("smoke", TINY, ("Q4_K",), (1, 5), QUICK)
    monkeypatch.setattr(program, "_EMULATED", extent)


def check(folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit status and result of a check of an emulated card."""
    status = program.main(["--emulated", "--jobs", "1", "-o", str(folder), *options])
    return status, json.loads((folder / "result.json").read_text())


@needs_compiler
@pytest.mark.slow
def test_all_parts_of_a_card_that_is_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, result = check(tmp_path, "--only", "DIAG")
    assert status == 0
    assert result["right"]
    assert not result["errors"]
    assert result["card"]["description"] == "emulated GPU (compute capability 6.1)"
    assert result["ops"]["cases"] > 0
    rows = [(row["tokens"], row["before"]) for row in result["layers"]]
    assert rows == [(1, 0), (5, 0), *((1, n) for n in kernels.GROWING)]
    assert result["graphs"] == {"growing": 2, "changed": 2}
    assert all(row["error"] < kernels.LARGEST_ERROR for row in result["layers"])
    assert {"fill.diag", "norm.normalize"}.isdisjoint(result["coverage"]["not_run"])
    ours = result["speed"]["ours"]
    assert ours["decode_tokens_per_second"] > 0
    assert ours["prompt_tokens_per_second"] > 0
    told = capsys.readouterr().out
    assert "EMULATED" in told
    assert "graphs    2 of 2 went on" in told
    assert "all is well" in told
    assert (tmp_path / "summary.txt").read_text() in told
    assert program.main(["--show", str(tmp_path / "result.json")]) == 0
    assert "all is well" in capsys.readouterr().out


# A server whose SILU takes its argument's sign for the other one.
_WRONG = """
import sys
from rpc_server.devices.cuda import compile, kernels
from tests.cuda import standin
right = compile.source_text
def wrong(name):
    text = right(name)
    return text.replace("return x / (1 + expf(-x));", "return x / (1 + expf(x));")
kernels.source_text = wrong
standin.install()
from rpc_server.__main__ import main
sys.exit(main())
"""


@needs_compiler
@pytest.mark.slow
def test_a_kernel_that_is_wrong_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def card(self: ServersToCheck, *options: str) -> list[str]:
        return [sys.executable, "-c", _WRONG, "--port", "{port}", "-d", "CUDA0", *options]

    monkeypatch.setattr(ServersToCheck, "card", card)
    status, result = check(tmp_path, "--only", "SILU_BACK", "--parts", "layers")
    assert status == 1
    assert not result["right"]
    assert not any(row["right"] for row in result["layers"])
    assert "5 WRONG" in capsys.readouterr().out


@needs_compiler
@pytest.mark.slow
def test_a_card_that_is_lost_ends_a_part_and_not_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EMULATED_FAILURE", "3")
    status, result = check(tmp_path, "--parts", "layers,speed")
    assert status == 2
    assert set(result["errors"]) == {"layers", "speed"}
    assert "ERROR     speed:" in capsys.readouterr().out


@needs_compiler
@pytest.mark.upstream
@pytest.mark.skipif(
    upstream.find_program("ggml-rpc-server") is None,
    reason="llama.cpp is not built: python -m tools.upstream",
)
@pytest.mark.slow
def test_upstream_is_the_reference_and_measured_beside(tmp_path: Path) -> None:
    folder = str(upstream.bin_dir())
    options = ["--only", "DIAG", "--parts", "ops,speed", "--upstream", folder]
    status, result = check(tmp_path, *options)
    assert (status, result["errors"]) == (0, {})
    assert "llama.cpp" in result["ops"]["reference"]
    assert result["speed"]["upstream"]["decode_tokens_per_second"] > 0


@pytest.mark.parametrize("options", [["--parts", "all"], ["--only", "NO_SUCH_OP"], ["--jobs", "0"]])
def test_options_that_are_refused(options: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        program.main(options)
    assert error.value.code == 2


def test_a_folder_without_a_server_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(["--upstream", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    assert "no ggml-rpc-server" in capsys.readouterr().err


# -- its arithmetic --------------------------------------------------------------------------------


def test_weights_of_eight_billion() -> None:
    """Llama 3 8B in Q4_K_M is 4.58 GiB, of which 0.27 GiB are embeddings, which stay at home."""
    assert LLAMA_8B.weight_bytes / 2**30 == pytest.approx(4.58 - 0.27, abs=0.02)
    better = [i for i in range(32) if LLAMA_8B.is_better(i)]
    assert len(better) == 16


def test_a_small_card_gets_fewer_layers() -> None:
    assert speed.fitting(LLAMA_8B, 8 << 30) is not LLAMA_8B
    assert speed.fitting(LLAMA_8B, 8 << 30).layers == 32
    assert 10 < speed.fitting(LLAMA_8B, 4 << 30).layers < 32
    with pytest.raises(MemoryError):
        speed.fitting(LLAMA_8B, 1 << 30)


@pytest.mark.parametrize("type_", [GgmlType.Q4_K, GgmlType.Q6_K, GgmlType.IQ4_XS])
def test_how_far_random_weights_spread(type_: GgmlType) -> None:
    assert 0.1 < spread(type_) < 100


def test_kernels_that_have_run() -> None:
    log = "kernel matvec-Q4_K.multiply_1 is ready\nkernel fill.fill is ready\n"
    found = kernels.coverage(kernels.ran(log))
    assert (found["kernels_run"], found["compiled"]) == (2, 2)
    assert not {"matvec.multiply_1", "fill.fill"} & set(found["not_run"])
    assert "matvec.multiply_joint" in found["not_run"]
    assert found["kernels"] == len(found["not_run"]) + 2


def test_devices_of_a_banner() -> None:
    (found,) = devices(
        "Devices:\n  CUDA0: Tesla P100 (compute capability 6.0) (16276 MiB, 15 MiB free)\n"
    )
    assert (found.name, found.total, found.free) == ("CUDA0", 16276, 15)
    assert found.description == "Tesla P100 (compute capability 6.0)"


def test_what_is_told_of_differences() -> None:
    figures = {
        "decode_tokens_per_second": 50.0,
        "decode_bytes_per_second": 2e11,
        "prompt_tokens_per_second": 400.0,
        "new_graph_seconds": 0.03,
    }
    theirs = {**figures, "decode_tokens_per_second": 40.0, "prompt_tokens_per_second": 800.0}
    result = {
        "emulated": False,
        "machine": {"processor": "a processor", "cores": 8, "system": "Linux x86_64"},
        "driver": "Tesla P100, 580.1",
        "errors": {"upstream": "hung up"},
        "right": False,
        "ops": {
            "cases": 9,
            "reference": "this server on the processor",
            "seconds": 3.0,
            "failed": {"ADD": ["f32: wrote outside its tensors"]},
        },
        "layers": [{"weights": "Q4_K", "tokens": 512, "error": 0.25, "right": False}],
        "graphs": {"growing": 2, "changed": 0},
        "coverage": {"kernels": 3, "kernels_run": 2, "compiled": 5, "not_run": ["fill.fill"]},
        "speed": {
            "model": {"name": "8B", "layers": 8, "layers_of_model": 32, "bytes": 1 << 30},
            "ours": figures,
            "upstream": theirs,
        },
    }
    told = summary.text(result)
    for words in (
        "1 DIFFER", "ADD f32: wrote outside", "1 WRONG", "Q4_K, 512 tokens: 2.50e-01",
        "THE DRIVER DOES NOT CHANGE THEM",
        "not: fill.fill", "8 layers of 32", "ERROR     upstream: hung up", "SOMETHING IS WRONG",
        "driver    Tesla P100, 580.1",
    ):  # fmt: skip
        assert words in told
    assert re.search(r"ratio +1\.25 +0\.50", told)
    assert "EMULATED" not in told


def test_only_known_parts() -> None:
    assert program._parts("ops,speed") == ("ops", "speed")
    with pytest.raises(argparse.ArgumentTypeError):
        program._parts("ops,,speed")
