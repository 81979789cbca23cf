"""Room in the folder of the tensor cache: how much may be there, and what goes to make room.

The folder is shared by servers of any number, upstream's among them, that come, go and crash. Who
needs room holds the folder's lock for as long as it takes to look around, delete what was used
longest ago and lay down an unfinished file of the size to come; the content is written without it.
An unfinished file is locked by who writes it, so one that nobody has locked is a dead process's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)

DEFAULT_LIMIT = 100 << 30
PARTIAL = ".partial-"
_NAME = re.compile(r"[0-9a-f]{16}")
# Where files can't be locked, an unfinished one that is so old is nobody's.
_ABANDONED_SECONDS = 86400.0


class NoRoomError(Exception):
    """A content is too large for the cache or its disk; the message says which."""


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    size: int
    last_use: float


class Quota:
    """Space of ``folder``: at most ``limit`` bytes in its files, and never the end of its disk.

    ``sums`` is a folder whose files, named alike, tell by their times when one was used last.
    """

    def __init__(self, folder: Path, sums: Path | None, limit: int) -> None:
        self._folder = folder
        self._sums = sums
        self._limit = limit

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among this user's servers (where files can be locked). Raises OSError."""
        if sys.platform == "win32" or self._sums is None:
            yield
            return
        with (self._sums / "lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def reserve(self, size: int) -> Iterator[tuple[BinaryIO, Path]]:
        """An unfinished file to write ``size`` bytes to and then to move to its name.

        Deleted at the end, if it is still there. Raises NoRoomError, OSError.
        """
        with self.locked():
            self._make_room(size)
            descriptor, name = tempfile.mkstemp(prefix=PARTIAL, dir=self._folder)
            if sys.platform != "win32":
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                # Others count it at its full size from now on.
                os.truncate(file.fileno(), size)
                yield file, temporary
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def clear_abandoned(self) -> None:
        """Delete unfinished files of dead processes. Raises OSError."""
        with self.locked():
            self._clear_abandoned()

    def _clear_abandoned(self) -> None:
        for path in self._folder.glob(f"{PARTIAL}*"):
            if _is_abandoned(path):
                log.debug("deleting %s, which a process that is gone had not finished", path)
                with contextlib.suppress(OSError):
                    path.unlink()

    def _make_room(self, size: int) -> None:
        if size > self._limit:
            raise NoRoomError(f"that is more than the cache may hold ({self._limit} bytes)")
        self._clear_abandoned()
        entries, unfinished = self._look()
        used = sum(entry.size for entry in entries) + unfinished
        disk = shutil.disk_usage(self._folder)
        # Servers that fill the disk hurt more than a tensor sent again.
        floor = min(disk.total // 20, 4 << 30)
        needed = max(used + size - self._limit, size + floor - disk.free)
        if needed > used - unfinished:
            raise NoRoomError(f"{disk.free} bytes are left on the disk of {self._folder}")
        for entry in sorted(entries, key=lambda entry: entry.last_use):
            if needed <= 0:
                break
            try:
                entry.path.unlink()
            except OSError:
                continue
            needed -= entry.size
            log.info("deleted %s of %d bytes from the cache, to make room", entry.path, entry.size)
            if self._sums is not None:
                with contextlib.suppress(OSError):
                    (self._sums / entry.path.name).unlink()
        if needed > 0:
            raise NoRoomError(f"files in {self._folder} can't be deleted")

    def _look(self) -> tuple[list[_Entry], int]:
        """Files that can go, and the bytes of those that are being written."""
        entries: list[_Entry] = []
        unfinished = 0
        with os.scandir(self._folder) as found:
            for item in found:
                try:
                    info = item.stat(follow_symlinks=False)
                except OSError:
                    continue
                if not stat.S_ISREG(info.st_mode):
                    continue
                if item.name.startswith(PARTIAL):
                    unfinished += info.st_size
                elif _NAME.fullmatch(item.name):
                    last_use = max(info.st_mtime, info.st_atime, self._last_use(item.name))
                    entries.append(_Entry(Path(item.path), info.st_size, last_use))
        return entries, unfinished

    def _last_use(self, name: str) -> float:
        if self._sums is not None:
            with contextlib.suppress(OSError):
                return (self._sums / name).stat().st_mtime
        return 0.0


def _is_abandoned(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            # Those of other users have another lock: between making and locking one it looks dead.
            if sys.platform == "win32" or info.st_uid != os.geteuid():
                return time.time() - info.st_mtime > _ABANDONED_SECONDS
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
