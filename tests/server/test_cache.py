"""The tensor cache: upstream's names, never a wrong byte."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from protocol.commands import Command
from protocol.dialects import DIALECTS
from protocol.hashing import fnv1a_64
from rpc_server.cache import HASH_THRESHOLD, CacheError, TensorCache, default_cache_dir
from tests.server.process import Wire, running, tensor


@pytest.fixture
def content() -> bytes:
    return np.random.default_rng(3).bytes(HASH_THRESHOLD + 4096)


def test_folder_is_upstreams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CACHE", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/rpc")
    monkeypatch.delenv("LLAMA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_cache_dir() == Path("/caches/llama.cpp/rpc")


def test_stores_under_the_hash_and_loads(tmp_path: Path, content: bytes) -> None:
    cache = TensorCache(tmp_path)
    digest = fnv1a_64(content)
    assert cache.load(digest, len(content)) is None
    path = cache.store(memoryview(content))
    assert path == tmp_path / f"{digest:016x}"
    loaded = cache.load(digest, len(content))
    assert loaded is not None
    assert loaded[:] == content
    assert [p.name for p in tmp_path.iterdir()] == [f"{digest:016x}"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_damaged_files_are_not_served(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    cache = TensorCache(tmp_path)
    path = cache.store(memoryview(content))
    assert path is not None
    digest = fnv1a_64(content)
    # Verified once in this process, then changed behind its back.
    assert cache.load(digest, len(content)) is not None
    damaged = bytearray(content)
    damaged[1000] ^= 1
    for wrong in (bytes(damaged), content[:-1], b"", content + b"x"):
        path.write_bytes(wrong)
        os.utime(path, ns=(1, len(wrong) + wrong[:1001].count(b"x")))
        assert cache.load(digest, 1 << 40) is None
    assert "is damaged" in caplog.text


def test_content_larger_than_its_place_is_not_served(tmp_path: Path, content: bytes) -> None:
    cache = TensorCache(tmp_path)
    cache.store(memoryview(content))
    assert cache.load(fnv1a_64(content), len(content) - 1) is None


def test_a_full_disk_costs_only_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = TensorCache(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert cache.store(memoryview(b"x" * 100)) is None
    assert "No space left on device" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="can't be written"):
        TensorCache(tmp_path / "file")


@pytest.mark.parametrize("version", [(7, 0, 0), (6, 0, 0)])
def test_second_upload_comes_from_the_cache(
    tmp_path: Path, content: bytes, version: tuple[int, int, int]
) -> None:
    dialect = next(d for d in DIALECTS if d.version == version)
    env = {**os.environ, "LLAMA_CACHE": str(tmp_path)}
    protocol = f"{version[0]}.{version[1]}"
    digest = fnv1a_64(content)
    with running("--cache", "--protocol", protocol, env=env) as server:
        for expected in (0, 1):
            with Wire(server.port, dialect) as wire:
                handle, base = wire.alloc(len(content))
                whole = tensor(1, (len(content) // 4,), handle, base)
                offer = {"tensor": whole, "offset": 0, "hash": digest}
                assert wire.call(Command.SET_TENSOR_HASH, offer).result == expected
                if not expected:
                    fields = {"tensor": whole, "offset": 0, "cache_flag": 1}
                    wire.call(Command.SET_TENSOR, fields, content)
                assert wire.get_tensor(whole, len(content)) == content
    assert [p.name for p in (tmp_path / "rpc").iterdir()] == [f"{digest:016x}"]


def test_newer_clients_say_what_is_kept(tmp_path: Path, content: bytes) -> None:
    env = {**os.environ, "LLAMA_CACHE": str(tmp_path)}
    with running("--cache", env=env) as server, Wire(server.port) as wire:
        handle, base = wire.alloc(len(content))
        whole = tensor(1, (len(content) // 4,), handle, base)
        wire.set_tensor(whole, content)
        assert wire.get_tensor(whole, 16) == content[:16]
    assert list((tmp_path / "rpc").iterdir()) == []
