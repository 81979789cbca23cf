"""``python -m tools.models list|index|verify``."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from rpc_server.models.record import Records, default_folder
from tests.client.test_gguf_file import write
from tests.models.conftest import settle, write_model
from tools.models import main


@pytest.fixture(autouse=True)
def own_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "index" / "models"
    monkeypatch.setattr("tools.on_disk.default_folder", lambda: folder)
    monkeypatch.setattr("rpc_server.models.files.SETTLED_SECONDS", -1.0)


def test_what_there_is_and_whether_it_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.gguf"
    write_model(path, 11 << 20, 1 << 20)
    assert main(["list", str(tmp_path)]) == 1
    assert "not indexed" in capsys.readouterr().out
    assert main(["index", str(tmp_path)]) == 0
    said = "2 tensors, 12.0 MiB (I8); 1 over 10 MiB, 91.7% of the bytes"
    assert said in capsys.readouterr().out
    assert main(["index", str(path)]) == 0
    assert "indexed before" in capsys.readouterr().out
    assert main(["list"]) == 0
    assert said in capsys.readouterr().out
    assert main(["verify"]) == 0
    assert f"{path}: as indexed" in capsys.readouterr().out

    times = os.stat(path)
    with path.open("r+b") as file:
        file.seek(5 << 20)
        file.write(b"changed")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert main(["list"]) == 1
    assert "changed since it was indexed" in capsys.readouterr().out
    assert main(["verify"]) == 1
    assert "'t0' not as indexed" in capsys.readouterr().out
    path.unlink()
    assert main(["verify"]) == 1
    assert "No such file" in capsys.readouterr().out


def test_a_type_that_has_got_its_name_since_is_no_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = settle(write(tmp_path / "new.gguf", {"w": (998, (32, 64), bytes(64 * 19))}))
    assert main(["index", str(path)]) == 0
    assert "1 tensors, 0.0 MiB (type 998)" in capsys.readouterr().out
    records = Records(tmp_path / "index" / "models")
    (record,) = records.all()
    records.keep(replace(record, tensors=(replace(record.tensors[0], type="Q3_9"),)))
    assert main(["verify"]) == 0
    assert f"{path}: as indexed" in capsys.readouterr().out


def test_files_that_are_no_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"no model")
    assert main(["index", str(path)]) == 1
    assert "does not begin as a GGUF file" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["index", str(tmp_path / "missing")])
    assert ended.value.code == 2
    with pytest.raises(SystemExit) as ended:
        main(["index"])
    assert ended.value.code == 2


def test_the_index_is_beside_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_folder() == Path("/caches/ggml-rpc-server/models")
