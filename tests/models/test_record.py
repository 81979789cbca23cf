"""Records of the index on disk: read back as they were, or not at all."""

from __future__ import annotations

import logging
import os
import stat
import sys
from pathlib import Path

import pytest

from rpc_server.folders import PrivateFolder
from rpc_server.models.files import Identity
from rpc_server.models.record import FileRecord, IndexedTensor, Records

RECORD = FileRecord(
    path="/models/größe.gguf",
    identity=Identity(1, 2, 3, 4, 5),
    head=77,
    sample="ab" * 32,
    tensors=(IndexedTensor("w", "Q2_0", 96, 1 << 40, (1 << 64) - 1),),
)


def test_a_record_is_read_as_it_was_kept(tmp_path: Path) -> None:
    Records(tmp_path / "models").keep(RECORD)
    records = Records(tmp_path / "models")
    assert records.find(RECORD.path) == RECORD
    assert records.find("/models/other.gguf") is None
    assert list(records.all()) == [RECORD]
    if sys.platform != "win32":
        assert stat.S_IMODE((tmp_path / "models").stat().st_mode) == 0o700


@pytest.mark.slow
def test_a_record_cut_or_damaged_anywhere_is_none(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.keep(RECORD)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at])
        assert records.find(RECORD.path) is None
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert records.find(RECORD.path) is None
    path.write_bytes(whole)
    assert records.find(RECORD.path) == RECORD


def test_a_full_disk_is_told_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(folder: PrivateFolder, source: str, target: str) -> None:
        raise OSError(28, os.strerror(28))

    records = Records(tmp_path)
    monkeypatch.setattr(PrivateFolder, "replace", full)
    with caplog.at_level(logging.WARNING):
        records.keep(RECORD)
    assert "No space left" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="needs to give a folder")
def test_a_folder_of_somebody_else_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Records(tmp_path / "models").keep(RECORD)
    os.chown(tmp_path / "models", 12345, -1)
    records = Records(tmp_path / "models")
    assert "belongs to user 12345" in caplog.text
    assert records.find(RECORD.path) is None
    records.keep(RECORD)
    assert list(records.all()) == []
