"""The cache of large tensors on disk, in upstream's folder and under upstream's names.

A file is named by the 16 hex digits of the FNV-1a 64 of its content; llama.cpp offers tensors over
10 MiB by that hash and sends only what the server doesn't have. Beside it, in a folder of this
user's that upstream takes no notice of, is the SHA-256 of the content.

What is served has the length of the tensor it is for and the SHA-256 it was stored with; a file
that has none yet, one of upstream's, must have the hash in its name and gets one. So a file cut
short, damaged or changed by somebody else is never used, however well its FNV was made to fit. What
can't be known is whether the client that offers a hash means the content that another one stored
under it: the protocol has no more than the FNV. The first content under a name is therefore kept,
and a second one refused.

Files appear and vanish in one step, and nothing needs to be repaired after a crash. Room for them
is the business of cache_room.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import re
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from protocol.ggml.hashing import fnv1a_64
from rpc_server.cache.quota import DEFAULT_LIMIT, NoRoomError, Quota

# As protocol.ggml.hashing.fnv1a_64: bytes, and the hash of those before them.
Hash = Callable[..., int]
Identity = tuple[int, int, int, int]

log = logging.getLogger(__name__)

# Up to protocol 6 a server caches what is larger than this; later the client says what to cache.
HASH_THRESHOLD = 10 << 20

_CHUNK = 8 << 20
# A file changed so short before it was read may be changed again without a new time.
_SETTLED_SECONDS = 2.0
# No waiting for the other end of a pipe, no link to elsewhere; Windows has neither flag.
_OPEN = (
    os.O_RDONLY
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_BINARY", 0)
)


class CacheError(Exception):
    """The cache folder can't be used; the message says why."""


def default_cache_dir() -> Path:
    """Upstream's folder: ``$LLAMA_CACHE/rpc``, or ``llama.cpp/rpc`` in the user's cache folder."""
    if chosen := os.environ.get("LLAMA_CACHE"):
        return Path(chosen) / "rpc"
    if sys.platform == "win32":
        base = Path(os.environ["LOCALAPPDATA"])
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "llama.cpp" / "rpc"


class TensorCache:
    """Files in ``folder``, of ``limit`` bytes together; several servers may use one folder.

    Methods block on the disk: call them off the event loop, from any thread. ``fnv`` is another
    implementation of the hash than protocol's, which loads a compiler.

    Raises CacheError if the folder can't be made or written to.
    """

    def __init__(self, folder: Path, fnv: Hash = fnv1a_64, limit: int = DEFAULT_LIMIT) -> None:
        self.folder = folder
        self.hash = self._fnv = fnv
        # What has been verified in this process: a file is hashed once, not per client.
        self._verified: dict[int, Identity] = {}
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            self._sums = _Sums.open(folder)
            self._room = Quota(folder, self._sums.folder, limit)
            self._room.clear_abandoned()
        except OSError as error:
            raise CacheError(f"cache folder {folder} can't be written: {error.strerror}") from None

    def _path(self, digest: int) -> Path:
        return self.folder / f"{digest:016x}"

    def load(self, digest: int, place: memoryview) -> bool:
        """Fill ``place`` with the content that has this hash and this length; whether there is one.

        Where it turns out unsound on the way, bytes of ``place`` may have changed.
        """
        path = self._path(digest)
        try:
            with _open(path) as file:
                before = _identity(file)
                if not place or before[1] != len(place):
                    return False
                if not _fill(file, place) or _identity(file) != before:
                    log.info("cache file %s changes as it is read; not used", path)
                    return False
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                log.warning("cache file %s can't be read: %s", path, error.strerror)
            return False
        if not self._is_verified(digest, before):
            found = hashlib.sha256(place).hexdigest()
            kept = self._sums.find(path.name)
            if found != kept and (kept is not None or self._fnv(place) != digest):
                self._discard(path, before)
                return False
            if kept is None:
                self._sums.keep(path.name, found)
            self._set_verified(digest, before)
        self._sums.touch(path.name)
        return True

    def store(self, data: memoryview) -> Path | None:
        """Keep ``data``; the file's path, None if it is not kept (the log says why)."""
        digest = self._fnv(data)
        path = self._path(digest)
        found = hashlib.sha256(data).hexdigest()
        try:
            kept = self._existing(path, digest, found, len(data))
            if kept == found:
                self._sums.touch(path.name)
                return path
            if kept is not None:
                log.warning("another content has the hash %s already; it stays", path.name)
                return None
            self._write(path, data)
        except NoRoomError as error:
            log.info("%d bytes are not cached: %s", len(data), error)
            return None
        except OSError as error:
            log.warning("could not cache %d bytes as %s: %s", len(data), path, error.strerror)
            return None
        self._sums.keep(path.name, found)
        return path

    def _write(self, path: Path, data: memoryview) -> None:
        """Raises OSError, NoRoomError; then nothing is left behind."""
        # No fsync: what a power cut tears does not pass as sound when it is read.
        with self._room.reserve(len(data)) as (file, temporary):
            for at in range(0, len(data), _CHUNK):
                file.write(data[at : at + _CHUNK])
            file.flush()
            # Readable for servers of other users, as upstream's files are.
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)

    def _existing(self, path: Path, digest: int, wanted: str, size: int) -> str | None:
        """SHA-256 of a file's sound content; None if there is none, or a damaged one (deleted).

        One that is said to have the sum ``wanted`` and has the ``size`` is not read for it. Raises
        OSError.
        """
        kept = self._sums.find(path.name)
        try:
            with _open(path) as file:
                identity = _identity(file)
                if kept == wanted and identity[1] == size:
                    return kept
                if kept is not None:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                    sound = found == kept
                else:
                    content = memoryview(file.read())
                    found = hashlib.sha256(content).hexdigest()
                    sound = self._fnv(content) == digest
        except FileNotFoundError:
            return None
        if not sound:
            self._discard(path, identity)
            return None
        if kept is None:
            self._sums.keep(path.name, found)
        return found

    def _discard(self, path: Path, identity: Identity) -> None:
        log.warning("cache file %s is damaged: its content has another hash", path)
        self._sums.drop(path.name)
        with contextlib.suppress(OSError), self._room.locked():
            # Another server may have put a sound one there meanwhile.
            with _open(path) as file:
                same = _identity(file) == identity
            if same:
                path.unlink()

    def _is_verified(self, digest: int, identity: Identity) -> bool:
        with self._lock:
            return self._verified.get(digest) == identity

    def _set_verified(self, digest: int, identity: Identity) -> None:
        if time.time() - identity[3] / 1e9 > _SETTLED_SECONDS:
            with self._lock:
                self._verified[digest] = identity


def _open(path: Path) -> io.FileIO:
    """A regular file, to be read. Raises OSError."""
    file = io.FileIO(os.open(path, _OPEN))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(0, "not a regular file")
    return file


def _identity(file: io.FileIO) -> Identity:
    """What a file doesn't keep when it is replaced or written to: inode, size, times in ns."""
    found = os.fstat(file.fileno())
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _fill(file: io.FileIO, place: memoryview) -> bool:
    """Read the file's beginning; whether there was as much."""
    at = 0
    while at < len(place):
        # Not mapped: a mapped file that another process cuts short takes this one with it.
        n = file.readinto(place[at : at + _CHUNK])
        if not n:
            return False
        at += n
    return True


class _Sums:
    """The SHA-256 of cached files, as lines for sha256sum(1); a file's time is its last use.

    They are in a folder that only this user writes to, so that they hold for contents which others
    may change. Without such a folder (None) nothing is kept.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    @classmethod
    def open(cls, cache: Path) -> _Sums:
        """Raises OSError if it can't be made."""
        user = os.geteuid() if hasattr(os, "geteuid") else 0
        folder = cache / f".sums-{user}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if sys.platform != "win32" and (
            not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o022
        ):
            log.warning("%s is not a folder of this user alone; its sums are not used", folder)
            return cls(None)
        return cls(folder)

    def find(self, name: str) -> str | None:
        """The sum of a file's content; None if none is kept, or what is kept is no sum."""
        if self.folder is None:
            return None
        try:
            with _open(self.folder / name) as file:
                line = file.read(256)
        except OSError:
            return None
        match = re.fullmatch(rb"([0-9a-f]{64})  \.\./([0-9a-f]{16})\n", line)
        return match[1].decode() if match and match[2].decode() == name else None

    def keep(self, name: str, value: str) -> None:
        """Without it the next reader goes by FNV again: a full disk is no error here."""
        if self.folder is None:
            return
        # A line that was cut short is no sum, so it needs no more care than this.
        with contextlib.suppress(OSError):
            (self.folder / name).write_text(f"{value}  ../{name}\n")

    def touch(self, name: str) -> None:
        if self.folder is not None:
            with contextlib.suppress(OSError):
                os.utime(self.folder / name)

    def drop(self, name: str) -> None:
        if self.folder is not None:
            with contextlib.suppress(OSError):
                (self.folder / name).unlink()
