"""Room in the folder of the tensor cache: how much may be there, and what goes to make room.

The folder is shared by this user's servers, upstream's among them, that come, go and crash. Who
needs room holds the folder's lock for as long as it takes to find it and to lay down an unfinished
file of the size to come; the content is written without the lock. An unfinished file is locked by
who writes it, so one that nobody has locked is a dead process's.

What is there is summed up in a small file, which every server of ours brings up to date under the
lock: to keep a tensor takes as long with a hundred thousand files as with none. As upstream's
servers tell nobody what they write, the folder is looked through again every ten minutes, and when
something has to go and it isn't known any more what was used longest ago.

Clients of one address can't push out what others use: once theirs takes half of the room, what they
keep takes the place of their own, or of what nobody has used since this server began.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import logging
import os
import re
import secrets
import stat
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

from rpc_server.cache.users import SMALL, CacheUsers
from rpc_server.folders import PrivateFolder

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)

DEFAULT_LIMIT = 100 << 30
PARTIAL = ".partial-"
# There are so many small ones at most, lest somebody fills the folder with files of a few bytes;
# larger ones are few because of their bytes.
MOST_SMALL = 8192
_NAME = re.compile(r"[0-9a-f]{16}")
_LEDGER = "usage"
_LOCK = "lock"
# Where files can't be locked, an unfinished one that is so old is nobody's.
_ABANDONED_SECONDS = 86400.0
# How long the sums are believed, seconds.
_BELIEVED_SECONDS = 600.0
# How many files are remembered, of those that go first: more than are looked at for one.
_REMEMBERED = 1024
# And of how many kinds.
_MOST_KINDS = 16


class NoRoomError(Exception):
    """A content is too large for the cache or its disk; the message says which."""


@dataclass(frozen=True, slots=True, order=True)
class _Entry:
    last_use: float
    name: str
    size: int


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The files that are looked for to be deleted.

    They are all files or ``small`` ones, of all users or of one.
    """

    small: bool
    user: str | None

    def has(self, entry: _Entry, users: CacheUsers) -> bool:
        """Return whether an entry is of this kind."""
        if self.small and entry.size >= SMALL:
            return False
        return self.user is None or users.of(entry.name) in (None, self.user)


@dataclass(frozen=True, slots=True)
class Usage:
    """The content of a folder: bytes of finished and unfinished files, and how many are small.

    ``looked`` is when all files were looked at, in seconds since 1970.
    """

    nbytes: int = 0
    unfinished: int = 0
    small: int = 0
    looked: float = 0.0

    def encode(self) -> bytes:
        """Return it as the line of a file."""
        return f"{self.nbytes} {self.unfinished} {self.small} {self.looked:.3f}\n".encode()

    @classmethod
    def decode(cls, line: bytes) -> Usage | None:
        """Return what a line says; None if it says nothing."""
        match = re.fullmatch(rb"(\d{1,19}) (\d{1,19}) (\d{1,19}) (\d{1,15}\.\d{3})\n", line)
        if match is None:
            return None
        return cls(int(match[1]), int(match[2]), int(match[3]), float(match[4]))


class Quota:
    """Space of ``folder``: at most ``limit`` bytes in its files, and never the end of its disk.

    ``sums`` is a folder whose files, named alike, tell by their times when one was used last.
    """

    def __init__(
        self,
        folder: PrivateFolder,
        sums: PrivateFolder,
        limit: int,
        most_small: int = MOST_SMALL,
    ) -> None:
        self._folder = folder
        self._sums = sums
        self._limit = limit
        self._most_small = most_small
        # As of when this server last changed or counted it.
        self.usage = Usage()
        self.users = CacheUsers()
        # What goes first, as of when the folder was last looked through for it.
        self._oldest: dict[_Wanted, deque[_Entry]] = {}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Be alone among this user's servers (where files can be locked). Raises OSError."""
        if sys.platform == "win32":
            yield
            return
        with self._sums.lock_file(_LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def reserve(self, size: int, user: str = "") -> Iterator[tuple[BinaryIO, str]]:
        """Yield an unfinished file to write ``size`` bytes to and then to give its name to.

        ``user`` is the address of the client it is for. Deleted at the end, if it is still there.
        Raises NoRoomError, OSError.
        """
        small = int(size < SMALL)
        with self.locked():
            usage = self._make_room(size, user)
            name = f"{PARTIAL}{secrets.token_hex(8)}"
            # First the sums: what a crash leaves in them that isn't there is found out later.
            self._note(
                replace(usage, unfinished=usage.unfinished + size, small=usage.small + small)
            )
            file = os.fdopen(self._folder.create(name), "wb")
            try:
                if sys.platform != "win32":
                    fcntl.flock(file, fcntl.LOCK_EX)
                # Before anybody else can look, who would count it by its size.
                os.truncate(file.fileno(), size)
            except OSError:
                file.close()
                self._folder.unlink(name)
                self._note(usage)
                raise
        finished = False
        try:
            with file:
                yield file, name
            finished = True
        finally:
            with contextlib.suppress(OSError):
                self._folder.unlink(name)
                finished = False
            with contextlib.suppress(OSError), self.locked():
                self._finished(size, small, kept=finished)

    def _finished(self, size: int, small: int, *, kept: bool) -> None:
        usage = self._usage()
        unfinished = max(0, usage.unfinished - size)
        if kept:
            self._note(replace(usage, unfinished=unfinished, nbytes=usage.nbytes + size))
        else:
            self._note(replace(usage, unfinished=unfinished, small=max(0, usage.small - small)))

    def clear_abandoned(self) -> None:
        """Delete unfinished files of dead processes, and count what is there. Raises OSError."""
        with self.locked():
            self._look()

    def _usage(self) -> Usage:
        """Return what is there; looks at all files if it was not for long."""
        try:
            usage = Usage.decode(self._sums.read(_LEDGER, 128))
        except OSError:
            usage = None
        if usage is None or not 0 <= time.time() - usage.looked < _BELIEVED_SECONDS:
            return self._look()
        return usage

    def _note(self, usage: Usage) -> None:
        self.usage = usage
        # On a full disk what is left says nothing, and the next one looks at all files.
        with contextlib.suppress(OSError):
            self._sums.write(_LEDGER, usage.encode())

    def _make_room(self, size: int, user: str) -> Usage:
        """Delete what was used longest ago until ``size`` bytes fit; what is there then."""
        if size > self._limit:
            raise NoRoomError(f"that is more than the cache may hold ({self._limit} bytes)")
        usage = self._usage()
        looked: _Wanted | None = None
        failed = False
        total, free = self._folder.disk()
        # Servers that fill the disk hurt more than a tensor sent again.
        floor = min(total // 20, 4 << 30)
        while True:
            needed = max(usage.nbytes + usage.unfinished + size - self._limit, size + floor - free)
            crowded = size < SMALL and usage.small >= self._most_small
            if needed <= 0 and not crowded:
                return usage
            if needed > usage.nbytes:
                raise NoRoomError(f"{free} bytes are left on the disk of {self._folder.path}")
            kind = _Wanted(
                small=needed <= 0, user=user if self._has_its_share(user, size) else None
            )
            oldest = self._oldest.get(kind)
            if not oldest and looked != kind:
                usage, looked = self._look(kind), kind
                continue
            if not oldest:
                if failed:
                    raise NoRoomError(f"files in {self._folder.path} can't be deleted")
                if kind.user is not None:
                    raise NoRoomError("what is there is for clients of other addresses")
                raise NoRoomError("what is there is being written or was used just now")
            entry = oldest.popleft()
            if self._last_use(entry.name) != entry.last_use:
                # Used meanwhile, or gone.
                continue
            if not self._delete(entry):
                failed = True
                continue
            # File systems may take their time until they say so.
            free += entry.size
            small = usage.small - (entry.size < SMALL)
            usage = replace(usage, nbytes=max(0, usage.nbytes - entry.size), small=max(0, small))
            self._note(usage)
            # One that was used a moment ago may be found again when all are looked at.
            looked = looked if oldest else None

    def _has_its_share(self, user: str, size: int) -> bool:
        """Return whether ``size`` bytes more give a user half of the room, or of small files."""
        small = size < SMALL and self.users.small(user) >= self._most_small // 2
        return bool(user) and (small or self.users.nbytes(user) + size > self._limit // 2)

    def _delete(self, entry: _Entry) -> bool:
        try:
            self._folder.unlink(entry.name)
        except OSError as error:
            # Without it there is as much room as if it had just been deleted.
            return error.errno == errno.ENOENT
        log.info(
            "deleted %s of %d bytes from the cache, to make room",
            self._folder.path / entry.name,
            entry.size,
        )
        self.users.forget(entry.name)
        with contextlib.suppress(OSError):
            self._sums.unlink(entry.name)
        return True

    def _look(self, wanted: _Wanted | None = None) -> Usage:
        """Look at all files: note what they are together, and which of ``wanted`` go first."""
        nbytes = unfinished = small = 0
        entries: list[_Entry] = []
        for name in self._folder.names():
            partial = name.startswith(PARTIAL)
            if not partial and not _NAME.fullmatch(name):
                continue
            if partial and self._is_abandoned(name):
                log.debug("deleting %s, which a process that is gone had not finished", name)
                with contextlib.suppress(OSError):
                    self._folder.unlink(name)
                    continue
            try:
                info = self._folder.stat(name)
            except OSError:
                continue
            if not stat.S_ISREG(info.st_mode):
                continue
            small += info.st_size < SMALL
            if partial:
                unfinished += info.st_size
            else:
                nbytes += info.st_size
                entries.append(_Entry(self._last_use(name, info), name, info.st_size))
        self.users.keep_only({e.name for e in entries})
        if wanted is not None:
            if len(self._oldest) >= _MOST_KINDS:
                self._oldest.clear()
            found = (e for e in entries if wanted.has(e, self.users))
            self._oldest[wanted] = deque(heapq.nsmallest(_REMEMBERED, found))
        usage = Usage(nbytes, unfinished, small, time.time())
        self._note(usage)
        return usage

    def _last_use(self, name: str, info: os.stat_result | None = None) -> float:
        """Return when a file was used last; 0 if it is gone."""
        try:
            info = info or self._folder.stat(name)
        except OSError:
            return 0.0
        noted = 0.0
        with contextlib.suppress(OSError):
            noted = self._sums.stat(name).st_mtime
        return max(info.st_mtime, info.st_atime, noted)

    def _is_abandoned(self, name: str) -> bool:
        try:
            with os.fdopen(self._folder.open_file(name), "rb") as file:
                info = os.fstat(file.fileno())
                if sys.platform == "win32":
                    return time.time() - info.st_mtime > _ABANDONED_SECONDS
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True
