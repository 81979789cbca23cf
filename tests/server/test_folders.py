"""Folders of one user: what is not theirs alone is refused, links and pipes in them too."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rpc_server.folders import PrivateFolder, check_private, make_folders, open_regular

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="goes by paths there")


def test_folders_are_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_folders(tmp_path / "a" / "b" / "c")
        make_folders(tmp_path / "a" / "b" / "c")
    finally:
        os.umask(before)
    for name in ("a", "a/b", "a/b/c"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        make_folders(tmp_path / "file" / "below")


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o1777])
def test_what_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(PermissionError, match="others can write to it"):
        PrivateFolder.open(tmp_path)
    tmp_path.chmod(0o755)
    PrivateFolder.open(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder away")
def test_what_is_somebody_elses_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, 65534, -1)
    with pytest.raises(PermissionError, match="belongs to user 65534"):
        PrivateFolder.open(tmp_path)
    PrivateFolder.open(tmp_path, owners=(65534,))
    with pytest.raises(PermissionError):
        check_private(tmp_path.stat(), owners=(1,))


def test_a_child_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder = tmp_path / "folder"
    opened = PrivateFolder.open(folder)
    (folder / "child").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
        opened.child("child")
    # What the user calls the folder itself may lead through one.
    (tmp_path / "link").symlink_to(folder)
    assert list(PrivateFolder.open(tmp_path / "link").names()) == ["child"]


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    folder = PrivateFolder.open(tmp_path)
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    place = tmp_path / "place"
    makers: tuple[Callable[[], None], ...] = (
        place.mkdir,
        lambda: os.mkfifo(place),
        lambda: place.symlink_to(secret),
    )
    for make in makers:
        make()
        with pytest.raises(OSError, match=r"regular|directory|symbolic links"):
            folder.read("place", 10)
        with pytest.raises(OSError, match=r"regular|directory|symbolic links|No such device"):
            folder.write("place", b"x")
        with pytest.raises(OSError, match=r"regular|directory|symbolic links|exists"):
            folder.create("place")
        with pytest.raises(OSError, match=r"regular|directory|symbolic links"):
            open_regular(place)
        _remove(place)
    assert secret.read_bytes() == b"secret"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink()


def test_it_stays_the_same_folder(tmp_path: Path) -> None:
    folder = PrivateFolder.open(tmp_path / "folder")
    folder.write("one", b"1")
    (tmp_path / "folder").rename(tmp_path / "moved")
    (tmp_path / "folder").mkdir()
    folder.write("two", b"2")
    folder.replace("two", "three")
    assert sorted(folder.names()) == ["one", "three"]
    assert folder.read("three", 10) == b"2"
    assert folder.stat("three").st_size == 1
    folder.unlink("one")
    assert sorted(os.listdir(tmp_path / "moved")) == ["three"]
    assert os.listdir(tmp_path / "folder") == []
