"""Folders that this user alone writes to, held by a descriptor: what lies there is believed.

A path means something else as soon as somebody moves what it leads through; an open folder stays
the same. Names in it are opened without following links, without waiting for the other end of a
pipe, and only if a regular file is there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Self

# Windows has none of these flags, nor folders that can be opened: there everything goes by paths.
_SAFELY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)
_BY_DESCRIPTOR = sys.platform != "win32"


def make_folders(path: Path) -> None:
    """Make a folder and those above it, each for this user alone, whatever the umask.

    Raises OSError; a folder that exists is left as it is.
    """
    with contextlib.suppress(FileExistsError):
        try:
            path.mkdir(mode=0o700)
        except FileNotFoundError:
            if path.parent == path:
                raise
            make_folders(path.parent)
            path.mkdir(mode=0o700)


def check_private(found: os.stat_result, *, owners: tuple[int, ...] = ()) -> None:
    """Hold a folder or a file against what others could do with it.

    ``owners`` may have it beside this user. Raises PermissionError.
    """
    if sys.platform == "win32":
        return
    if found.st_uid not in (os.geteuid(), *owners):
        raise PermissionError(errno.EPERM, f"it belongs to user {found.st_uid}")
    if found.st_mode & 0o022:
        raise PermissionError(errno.EPERM, "others can write to it (chmod go-w)")


def open_regular(path: str | Path, flags: int = os.O_RDONLY, *, folder: int | None = None) -> int:
    """Open a regular file, that of ``path`` in an open ``folder``; a descriptor.

    Raises OSError for anything else that has this name.
    """
    descriptor = os.open(path, flags | _SAFELY, 0o600, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return descriptor


class PrivateFolder:
    """An open folder. All methods raise OSError; names are those of files right in it.

    Where folders can't be opened (Windows), its path is used instead, and nothing is checked.
    """

    def __init__(self, path: Path, descriptor: int | None) -> None:
        self.path = path
        self._descriptor = descriptor

    @classmethod
    def open(cls, path: Path, *, create: bool = True, owners: tuple[int, ...] = ()) -> Self:
        """Open a folder that no other user can write to; ``owners`` may have it beside this user.

        With ``create`` it is made if there is none, for this user alone. Raises OSError.
        """
        if create:
            make_folders(path)
        return cls._checked(path, path, None, owners)

    def child(self, name: str, *, create: bool = True) -> Self:
        """Open a folder in this one, for this user alone. Raises OSError."""
        if create:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self._at(name), 0o700, dir_fd=self._descriptor)
        return self._checked(self.path / name, self._at(name), self._descriptor, ())

    @classmethod
    def _checked(
        cls, path: Path, name: str | Path, parent: int | None, owners: tuple[int, ...]
    ) -> Self:
        if not _BY_DESCRIPTOR:
            if not path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "Not a directory")
            return cls(path, None)
        # What the user calls it may lead through links; what is in it must not.
        follow = 0 if parent is None else getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(name, _FOLDER | follow, dir_fd=parent)
        try:
            check_private(os.fstat(descriptor), owners=owners)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor)

    def _at(self, name: str) -> str | Path:
        return name if _BY_DESCRIPTOR else self.path / name

    @property
    def _where(self) -> int | Path:
        return self.path if self._descriptor is None else self._descriptor

    def open_file(self, name: str, flags: int = os.O_RDONLY) -> int:
        """Open a regular file; a descriptor."""
        return open_regular(self._at(name), flags, folder=self._descriptor)

    def create(self, name: str) -> int:
        """Open a file that did not exist, to read and write it; a descriptor."""
        return self.open_file(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)

    def read(self, name: str, most: int) -> bytes:
        """Return the first ``most`` bytes of a file."""
        with os.fdopen(self.open_file(name), "rb") as file:
            return file.read(most)

    def write(self, name: str, content: bytes) -> None:
        """Write a file in place: one that is cut short by a crash must not matter."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with os.fdopen(self.open_file(name, flags), "wb") as file:
            file.write(content)

    def lock_file(self, name: str) -> BinaryIO:
        """Open a file that is there to be locked."""
        return os.fdopen(self.open_file(name, os.O_RDWR | os.O_CREAT), "rb+")

    def stat(self, name: str) -> os.stat_result:
        """Return what the system knows of a name; of a link itself."""
        return os.stat(self._at(name), dir_fd=self._descriptor, follow_symlinks=False)

    def touch(self, name: str) -> None:
        """Note that a file is used now."""
        if _BY_DESCRIPTOR:
            os.utime(name, dir_fd=self._descriptor, follow_symlinks=False)
        else:
            os.utime(self.path / name)

    def unlink(self, name: str) -> None:
        os.unlink(self._at(name), dir_fd=self._descriptor)

    def replace(self, name: str, target: str) -> None:
        """Give a file another name, in the place of what had that."""
        os.replace(
            self._at(name),
            self._at(target),
            src_dir_fd=self._descriptor,
            dst_dir_fd=self._descriptor,
        )

    def names(self) -> Iterator[str]:
        """Yield all names."""
        with os.scandir(self._where) as found:
            for entry in found:
                yield entry.name

    def disk(self) -> tuple[int, int]:
        """Return the total and the free bytes of the disk it is on."""
        import shutil

        # A descriptor is as good as a path to what it asks.
        usage = shutil.disk_usage(self._where)
        return usage.total, usage.free

    def close(self) -> None:
        """Let go of it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            self.close()
