"""The operator's models: what is served, and what is not when files change in whatever way."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from protocol.ggml.hashing import fnv1a_64
from protocol.ggml.types import GgmlType
from rpc_server.models import library as library_module
from rpc_server.models.files import BeingWrittenError
from rpc_server.models.library import Content, Models, Stripes, make_record, model_files
from rpc_server.models.record import Records
from rpc_server.observability.progress import under_way
from tests.client.test_gguf_file import every_type, write
from tests.models.conftest import Indexer, PlainLanes, served, settle, write_model


def look_again(models: Models) -> None:
    models.refresh(PlainLanes())


# -- which files


def test_folders_files_and_parts_of_split_models(tmp_path: Path) -> None:
    parts = [f"big-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for name in ("a.gguf", "deep/er/B.GGUF", "notes.txt", "sha256-0123", *parts):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "folder" / "a.gguf")
    found = [os.path.basename(p) for p in model_files([tmp_path / "folder"])]
    assert sorted(found) == ["B.GGUF", "a.gguf", *parts, "sha256-0123"]
    (tmp_path / "folder" / parts[1]).unlink()
    found = [os.path.basename(p) for p in model_files([tmp_path / "folder" / parts[0]])]
    assert found == [parts[0], parts[2]]
    assert len(list(model_files([tmp_path, tmp_path / "link.gguf"]))) == 5


def test_how_far_the_index_is_can_be_seen(tmp_path: Path) -> None:
    """Of all files that are new: the bytes of both, and the one that is hashed now."""
    sizes = {}
    for name in ("one.gguf", "two.gguf"):
        write_model(tmp_path / name, 3 << 20)
        sizes[name] = settle(tmp_path / name).stat().st_size
    seen: list[tuple[tuple[int, int | None], str]] = []

    def look() -> int:
        seen.extend((t.numbers(), t.detail()) for t in under_way() if t.label == "indexing models")
        return 0

    models = Models([tmp_path], Records(tmp_path / "index"), PlainLanes, look)
    models.refresh(PlainLanes())
    assert len(models.files) == 2
    done = [numbers[0] for numbers, _ in seen]
    assert done == sorted(done)
    assert 6 << 20 <= done[-1] <= sum(sizes.values())
    assert {total for (_, total), _ in seen} == {sum(sizes.values())}
    assert {detail for _, detail in seen} == set(sizes)
    assert "indexing models" not in [t.label for t in under_way()]


# -- what is served


def test_every_tensor_of_every_type_is_served(tmp_path: Path, indexer: Indexer) -> None:
    new = (998, (32, 64), bytes(range(250)) * 5 + b"end." * 7 + b"..")
    written = {**every_type(), "of a type that nobody knows yet": new}
    path = settle(write(tmp_path / "every.gguf", written))
    models = indexer(path)
    (record,) = models.files
    assert {t.name for t in record.tensors} == set(written)
    for _, _, data in written.values():
        assert served(models, data) == data
    assert served(models, b"what nobody has here") is None


def test_a_hash_is_good_for_its_length_alone(tmp_path: Path, indexer: Indexer) -> None:
    data = write_model(tmp_path / "m.gguf", 1000)["t0"]
    models = indexer(tmp_path)
    for size in (999, 1001):
        with models.open(fnv1a_64(data), size) as content:
            assert content is None


def test_of_a_client_that_is_gone_nothing_more_is_read(
    tmp_path: Path, indexer: Indexer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_module, "_CHUNK", 1000)
    data = write_model(tmp_path / "m.gguf", 4000)["t0"]
    models = indexer(tmp_path)
    left = iter(range(2))
    with models.open(fnv1a_64(data), len(data)) as content:
        assert content is not None
        place = bytearray(len(data))
        assert not content.read(0, memoryview(place), lambda: next(left, None) is not None)
        assert bytes(place) == data[:2000] + bytes(len(data) - 2000)
        assert content.read(0, memoryview(place))
        assert bytes(place) == data


def test_rows_are_taken_out_of_a_tensor(tmp_path: Path, indexer: Indexer) -> None:
    data = write_model(tmp_path / "m.gguf", 6000)["t0"]
    table = np.frombuffer(data, np.uint8).reshape(6, 1000)
    models = indexer(tmp_path)
    with models.open(fnv1a_64(data), len(data)) as content:
        assert content is not None
        place = memoryview(bytearray(2000))
        assert content.read_slice(Stripes(2000, 2000, 2000, 1), 0, place)
        assert bytes(place) == table[2:4].tobytes()
        place = memoryview(bytearray(6 * 250))
        assert content.read_slice(Stripes(500, 250, 1000, 6), 0, place)
        assert bytes(place) == table[:, 500:750].tobytes()
    assert Stripes(5000, 1000, 1000, 1).inside(6000)
    assert not Stripes(5000, 1001, 1001, 1).inside(6000)
    assert not Stripes(500, 250, 1000, 7).inside(6000)
    assert not Stripes(0, 1000, 999, 2).inside(6000), "rows would overlap"


def test_several_threads_read_one_content(tmp_path: Path, indexer: Indexer) -> None:
    """As where parts of a split are given their slices side by side."""
    data = write_model(tmp_path / "m.gguf", 4 << 20)["t0"]
    models = indexer(tmp_path)
    with models.open(fnv1a_64(data), len(data)) as content, ThreadPoolExecutor(4) as threads:
        assert content is not None

        def read(at: int) -> bool:
            place = bytearray(4096)
            return content.read(at, memoryview(place)) and place == data[at : at + 4096]

        assert all(threads.map(read, range(0, 4 << 20, 4096)))


def test_one_of_two_files_is_enough(tmp_path: Path, indexer: Indexer) -> None:
    data = write_model(tmp_path / "one.gguf", 5000)["t0"]
    shutil.copy(tmp_path / "one.gguf", settle(tmp_path / "one.gguf").with_name("two.gguf"))
    models = indexer(tmp_path)
    (tmp_path / "one.gguf").unlink()
    assert served(models, data) == data
    look_again(models)
    assert served(models, data) == data
    assert len(models.files) == 1


# -- the index between starts


def test_an_index_is_made_once(
    tmp_path: Path, indexer: Indexer, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_model(tmp_path / "m.gguf", 5000)["t0"]
    indexer(tmp_path)

    def no_more(*args: object) -> None:
        raise AssertionError("hashed a second time")

    monkeypatch.setattr(library_module, "make_record", no_more)
    assert served(indexer(tmp_path), data) == data


def test_another_content_with_the_same_times_is_hashed_anew(
    tmp_path: Path, indexer: Indexer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all that the system tells of a file is as before, its sample tells."""
    old = write_model(tmp_path / "m.gguf", 5000)["t0"]
    indexer(tmp_path)
    new = write_model(tmp_path / "m.gguf", 5000, seed=2)["t0"]
    (record,) = Records(tmp_path / "index" / "models").all()
    with monkeypatch.context() as patched:
        patched.setattr(library_module, "identity_of", lambda file: record.identity)
        models = indexer(tmp_path)
    assert old != new
    assert {t.hash for f in models.files for t in f.tensors} == {fnv1a_64(new)}


def test_a_damaged_record_is_made_anew(tmp_path: Path, indexer: Indexer) -> None:
    data = write_model(tmp_path / "m.gguf", 5000)["t0"]
    indexer(tmp_path)
    (path,) = (tmp_path / "index" / "models").iterdir()
    path.write_bytes(path.read_bytes()[:-10])
    assert served(indexer(tmp_path), data) == data


def test_the_index_is_made_in_the_background(tmp_path: Path, indexer: Indexer) -> None:
    data = write_model(tmp_path / "m.gguf", 5000)["t0"]
    models = indexer(tmp_path, look=False)
    assert served(models, data) is None
    models.start()
    try:
        assert models.wait(60)
        assert served(models, data) == data
    finally:
        models.close()
    assert not [t for t in threading.enumerate() if t.name == "models"]


# -- files that change


def test_a_replaced_file_is_indexed_again(tmp_path: Path, indexer: Indexer) -> None:
    path = tmp_path / "m.gguf"
    old = write_model(path, 5000)["t0"]
    models = indexer(path)
    new = write_model(tmp_path / "new", 5000, seed=2)["t0"]
    os.replace(tmp_path / "new", path)
    assert served(models, old) is None, "before the index knows of it"
    look_again(models)
    assert served(models, old) is None
    assert served(models, new) == new


@contextlib.contextmanager
def being_read(path: Path, indexer: Indexer, size: int) -> Iterator[tuple[Models, bytes, Content]]:
    """The index of a new file with one tensor, what that is, and what a client reads of it."""
    data = write_model(path, size)["t0"]
    models = indexer(path)
    with models.open(fnv1a_64(data), size) as content:
        assert content is not None
        yield models, data, content


def test_a_file_replaced_while_it_is_read_is_read_to_its_end(
    tmp_path: Path, indexer: Indexer
) -> None:
    path, place = tmp_path / "m.gguf", memoryview(bytearray(2500))
    with being_read(path, indexer, 5000) as (_, old, content):
        assert content.read(0, place)
        write_model(tmp_path / "new", 5000, seed=2)
        os.replace(tmp_path / "new", path)
        # Losing its name changes a file's time of change: better sent once more than wrong.
        if content.read(2500, place):
            assert bytes(place) == old[2500:]


@pytest.mark.parametrize("change", ["write", "truncate"])
def test_a_file_changed_in_its_place_is_not_served(
    change: str, tmp_path: Path, indexer: Indexer
) -> None:
    path, place = tmp_path / "m.gguf", memoryview(bytearray(50_000))
    with being_read(path, indexer, 50_000) as (models, old, content):
        with path.open("r+b") as file:
            if change == "write":
                file.seek(-25_000, 2)
                file.write(b"something else")
            else:
                file.truncate(25_000)
        settle(path)
        assert not content.read(0, place), "changed while it was open"
    assert served(models, old) is None
    look_again(models)
    assert served(models, old) is None
    assert len(models.files) == (change == "write")


def test_a_half_downloaded_file_is_served_when_it_is_whole(
    tmp_path: Path, indexer: Indexer, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "m.gguf"
    data = write_model(path, 50_000)["t0"]
    whole = path.read_bytes()
    path.write_bytes(whole[:30_000])
    models = indexer(path)
    assert not models.files
    assert "missing: it is cut short" in caplog.text
    caplog.clear()
    look_again(models)
    assert not caplog.text, "it is said once"
    path.write_bytes(whole)
    look_again(models)
    assert served(models, data) == data


def test_a_file_that_is_being_written_is_left_for_later(
    tmp_path: Path, indexer: Indexer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.gguf"
    data = write_model(path, 5000)["t0"]
    monkeypatch.setattr("rpc_server.models.files.SETTLED_SECONDS", 1000.0)
    models = indexer(path)
    assert served(models, data) is None
    monkeypatch.setattr("rpc_server.models.files.SETTLED_SECONDS", -1.0)
    look_again(models)
    assert served(models, data) == data


def test_a_file_that_changes_while_it_is_hashed_gets_no_record(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_model(path, 5000, 5000)

    def meddle(n: int) -> None:
        os.chmod(path, 0o600)

    with pytest.raises(BeingWrittenError):
        make_record(str(path), PlainLanes(), meddle)


def test_a_deleted_file_is_no_longer_served(tmp_path: Path, indexer: Indexer) -> None:
    path = tmp_path / "m.gguf"
    data = write_model(path, 5000)["t0"]
    models = indexer(path)
    path.unlink()
    assert served(models, data) is None
    look_again(models)
    assert not models.files


def test_what_is_no_model_hurts_nothing_else(
    tmp_path: Path, indexer: Indexer, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "text.gguf").write_bytes(b"not a model at all, but named as one")
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "nowhere.gguf").symlink_to(tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe.gguf")
    data = write_model(tmp_path / "m.gguf", 5000)["t0"]
    with caplog.at_level(logging.WARNING):
        models = indexer(tmp_path)
    assert served(models, data) == data
    assert "does not begin as a GGUF file" in caplog.text
    assert "not a regular file" in caplog.text
    assert "No such file" in caplog.text


def test_a_file_that_can_not_be_read_is_told_once(
    tmp_path: Path,
    indexer: Indexer,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "m.gguf"
    data = write_model(path, 5000)["t0"]

    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied")

    # Root may read everything: the system's answer is played.
    with monkeypatch.context() as patched:
        patched.setattr(library_module, "open_file", refuse)
        models = indexer(path)
        look_again(models)
        assert caplog.text.count("Permission denied") == 1
    look_again(models)
    assert served(models, data) == data


def test_a_new_file_is_found(tmp_path: Path, indexer: Indexer) -> None:
    models = indexer(tmp_path)
    data = write_model(tmp_path / "m.gguf", 5000)["t0"]
    look_again(models)
    assert served(models, data) == data


def test_tensors_of_no_known_type_are_left_out(
    tmp_path: Path, indexer: Indexer, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {"new": (998, (32,), b"n" * 70), "known": (GgmlType.F32, (4,), b"k" * 16)}
    settle(write(tmp_path / "m.gguf", tensors))
    with caplog.at_level(logging.INFO):
        models = indexer(tmp_path)
    assert served(models, b"k" * 16) == b"k" * 16
    assert "1 tensors of types unknown here are left out" in caplog.text
