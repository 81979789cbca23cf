"""What tells that a file has changed, and a hold on it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rpc_server.models.files import (
    BeingWrittenError,
    Hold,
    held,
    identity_of,
    open_file,
    read_at,
    sample,
)

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="files can be held on Linux only")


def holdable(path: Path) -> bool:
    """Whether files of this folder's file system can be held."""
    path.write_bytes(b"x")
    with open_file(path) as file, held(file) as hold:
        return hold is not None


def test_a_change_shows(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"one")
    with open_file(path) as file:
        before = identity_of(file)
        assert identity_of(path) == before
        os.utime(path, ns=(before.mtime, before.mtime))
        assert identity_of(file) != before, "its time of change can't be set"
    other = tmp_path / "g"
    other.write_bytes(b"one")
    before = identity_of(path)
    os.replace(other, path)
    assert identity_of(path) != before


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="not a regular file"):
        open_file(os.devnull)
    with pytest.raises(OSError, match=r"\w"):
        open_file(tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        open_file(tmp_path / "pipe")


def test_reading_ends_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(range(100)))
    with open_file(path) as file:
        place = memoryview(bytearray(40))
        assert read_at(file, 60, place)
        assert bytes(place) == bytes(range(60, 100))
        assert not read_at(file, 61, place)


def test_a_sample_tells_heads_ends_and_middles_apart() -> None:
    size = 8 << 20
    content = bytearray(os.urandom(size))

    def sum_of(data: bytes) -> str:
        return sample(io.BytesIO(data), size, 1000)

    whole = sum_of(bytes(content))
    assert sum_of(bytes(content)) == whole
    for at in (0, 999, 1000, size // 2 + 1000, size - 1):
        damaged = bytearray(content)
        damaged[at] ^= 1
        assert sum_of(bytes(damaged)) != whole, at


@on_linux
def test_a_held_file_tells_of_a_writer_and_lets_it_wait(tmp_path: Path) -> None:
    path = tmp_path / "f"
    if not holdable(path):
        pytest.skip("files of this file system can't be held")
    with open_file(path) as file, held(file) as hold:
        assert hold is not None
        assert not hold.wanted
        with open_file(path) as other:
            assert other.read() == b"x", "readers are let in"
        with pytest.raises(BlockingIOError):
            os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        assert hold.wanted
        # One that waits: it goes on when the file is let go.
        writer = subprocess.Popen([sys.executable, "-c", f"open({str(path)!r}, 'w').write('new')"])
        hold.let_go()
        assert writer.wait(60) == 0
    assert path.read_bytes() == b"new"


@on_linux
def test_a_file_that_somebody_writes_to_is_not_held(tmp_path: Path) -> None:
    path = tmp_path / "f"
    if not holdable(path):
        pytest.skip("files of this file system can't be held")
    with path.open("ab"), open_file(path) as file, pytest.raises(BeingWrittenError):
        Hold(file.fileno())
    with open_file(path) as file:
        Hold(file.fileno()).let_go()
