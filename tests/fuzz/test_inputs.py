"""Inputs survive their archive, which is the same whenever and wherever it is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import inputs
from tests.fuzz.minimise import minimise
from tests.fuzz.targets import TARGETS

INPUTS = {"001": b"\1", "000": bytes(range(256)) * 5, "regression-empty": b""}


def test_inputs_come_out_as_they_went_in(tmp_path: Path) -> None:
    archive = tmp_path / "corpora" / f"requests{inputs.SUFFIX}"
    inputs.write(archive, INPUTS)
    assert inputs.read(archive) == INPUTS
    assert list(inputs.read(archive)) == sorted(INPUTS)
    inputs.unpack(archive, tmp_path / "folder")
    assert inputs.read(tmp_path / "folder") == INPUTS
    assert inputs.read(tmp_path / "folder" / "001") == {"001": b"\1"}


def test_the_same_inputs_are_the_same_bytes(tmp_path: Path) -> None:
    one, other = (tmp_path / f"{name}{inputs.SUFFIX}" for name in ("one", "other"))
    inputs.write(one, INPUTS)
    inputs.write(other, dict(reversed(INPUTS.items())))
    assert one.read_bytes() == other.read_bytes()


def test_minimising_keeps_what_covers_something_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.fuzz.targets.CORPUS", tmp_path / "corpora")
    target = TARGETS["requests"]
    kept = inputs.read(Path(__file__).parent / "corpus" / f"requests{inputs.SUFFIX}")
    first = dict(list(kept.items())[:3])
    inputs.write(target.corpus, {**first, "regression-old": b"\0\0"})
    found = tmp_path / "found"
    found.mkdir()
    (found / "again").write_bytes(next(iter(first.values())))
    (found / "crash-1").write_bytes(b"\0\0\xff")
    minimise(target, found)
    left = inputs.read(target.corpus)
    assert left["regression-old"] == b"\0\0"
    assert set(left.values()) <= {*first.values(), b"\0\0"}
    assert len(left) <= 1 + len(first)
