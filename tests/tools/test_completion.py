"""Completions of shells: of every command, and bash really completes with them."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tools import completion

ROOT = Path(__file__).parents[2]
needs_shtab = pytest.mark.skipif(
    importlib.util.find_spec("shtab") is None, reason="no shtab: pip install '.[completion]'"
)


def test_every_command_that_is_installed_is_completed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(completion.COMMANDS) == set(project["scripts"])


@needs_shtab
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_options_values_and_files(tmp_path: Path) -> None:
    assert completion.main(["bash", "-o", str(tmp_path)]) == 0
    assert {file.name for file in tmp_path.iterdir()} == set(completion.COMMANDS)
    (tmp_path / "model.pcapng").touch()

    def completed(*words: str) -> list[str]:
        """What Tab offers after these words."""
        typed = " ".join(f"'{word}'" for word in words)
        asked = (
            f"source ./{words[0]}; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; "
            'COMP_LINE="${COMP_WORDS[*]}"; COMP_POINT=${#COMP_LINE}; '
            f"$(complete -p {words[0]} | sed 's/.*-F \\([^ ]*\\) .*/\\1/') {words[0]} "
            f"'{words[-1]}' '{words[-2]}'; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        )
        done = subprocess.run(
            ["bash", "-c", asked], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    offered = completed("ggml-rpc-server-py", "--split-")
    assert "--split-mode" in offered
    assert all(option.startswith("--split-") for option in offered)
    assert completed("ggml-rpc-server-py", "--split-mode", "t") == ["tensor"]
    assert "model.pcapng" in completed("ggml-rpc-replay", "model")


@needs_shtab
def test_zsh_files_have_its_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert completion.main(["zsh", "-o", str(tmp_path)]) == 0
    text = (tmp_path / "_ggml-rpc-dump").read_text()
    assert text.startswith("#compdef ggml-rpc-dump")
    assert "--tensor" in text
    assert f"fpath+=({tmp_path})" in capsys.readouterr().out


def test_a_missing_shtab_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert completion.main(["bash", "-o", str(tmp_path / "new")]) == 1
    assert "ggml-rpc-server[completion]" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
