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
is the business of quota.py. The folder is one that only this user can write to (folders.py), or,
where it is only read, only this user and root.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from protocol.ggml.hashing import fnv1a_64
from rpc_server.cache.quota import DEFAULT_LIMIT, PARTIAL, NoRoomError, Quota, Usage
from rpc_server.folders import PrivateFolder
from rpc_server.turns import Wanted, always

# As protocol.ggml.hashing.fnv1a_64: bytes, and the hash of those before them.
Hash = Callable[..., int]
Identity = tuple[int, int, int, int]

log = logging.getLogger(__name__)

# Up to protocol 6 a server caches what is larger than this; later the client says what to cache.
HASH_THRESHOLD = 10 << 20

_CHUNK = 8 << 20
# A file changed so short before it was read may be changed again without a new time.
_SETTLED_SECONDS = 2.0
# Files that are known to be sound; of what was forgotten the next use hashes the content again.
_MOST_VERIFIED = 1 << 16
_ROOT = 0


class CacheError(Exception):
    """The cache folder can't be used; the message says why."""


class _UnwantedError(Exception):
    """Nobody is there any more for whom something is kept."""


def default_cache_dir() -> Path:
    """Return upstream's folder.

    It is ``$LLAMA_CACHE/rpc`` or ``llama.cpp/rpc`` in the user's cache folder.
    """
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
    implementation of the hash than protocol's, which loads a compiler. With ``read_only`` what is
    there is served and nothing is ever kept.

    Raises CacheError if the folder can't be made or written to, or if others can write to it.
    """

    def __init__(
        self,
        folder: Path,
        fnv: Hash = fnv1a_64,
        limit: int = DEFAULT_LIMIT,
        *,
        read_only: bool = False,
    ) -> None:
        self.hash = self._fnv = fnv
        self.folder = folder
        self.read_only = read_only
        # What has been verified in this process: a file is hashed once, not per client.
        self._verified: dict[int, Identity] = {}
        self._lock = threading.Lock()
        try:
            if read_only:
                self.files = PrivateFolder.open(folder, create=False, owners=(_ROOT,))
                self._sums = _Sums.find_in(self.files)
                return
            self.files = PrivateFolder.open(folder)
            self._probe()
            sums = self.files.child(_sums_name())
            self._sums = _Sums(sums)
            self._quota = Quota(self.files, sums, limit)
            self._quota.clear_abandoned()
        except OSError as error:
            verb = "read" if read_only else "written"
            raise CacheError(
                f"cache folder {folder} can't be {verb}: {error.strerror or error}"
            ) from None

    def _probe(self) -> None:
        """Raises OSError if nothing can be written to the folder."""
        name = f"{PARTIAL}{secrets.token_hex(8)}"
        os.close(self.files.create(name))
        self.files.unlink(name)

    @property
    def usage(self) -> Usage | None:
        """The content of the folder, as of this server's last look; None if it only reads."""
        return None if self.read_only else self._quota.usage

    @property
    def most_of_one_user(self) -> int:
        """Bytes of files that clients of one address use, of the address that has most."""
        return 0 if self.read_only else self._quota.users.most()

    def size(self, digest: int) -> int | None:
        """Return the size of the content that is there under a hash, in bytes; None if none is."""
        try:
            return self.files.stat(_name(digest)).st_size
        except OSError:
            return None

    def load(self, digest: int, place: memoryview, user: str = "", wanted: Wanted = always) -> bool:
        """Fill ``place`` with the content that has this hash and this length; whether there is one.

        ``user`` is the address of the client that asks for it. Where the content turns out unsound
        on the way, or is not ``wanted`` any more, bytes of ``place`` may have changed.
        """
        name = _name(digest)
        path = self.folder / name
        try:
            with self._open(name) as file:
                before = _identity(file)
                if not place or before[1] != len(place):
                    return False
                filled = _fill(file, place, wanted)
                if not wanted():
                    return False
                if not filled or _identity(file) != before:
                    log.info("cache file %s changes as it is read; not used", path)
                    return False
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                log.warning("cache file %s can't be read: %s", path, error.strerror)
            return False
        if not self._is_verified(digest, before):
            found = hashlib.sha256(place).hexdigest()
            kept = self._sums.find(name)
            if found != kept and (kept is not None or self._fnv(place) != digest):
                self._discard(name, before)
                return False
            if kept is None:
                self._sums.keep(name, found)
            self._set_verified(digest, before)
        self._used(name, len(place), user)
        return True

    def _used(self, name: str, size: int, user: str) -> None:
        self._sums.touch(name)
        if user and not self.read_only:
            self._quota.users.used(name, size, user)

    def store(self, data: memoryview, user: str = "", wanted: Wanted = always) -> Path | None:
        """Keep ``data`` for a client at the address ``user``.

        Return the file's path; None if it is not kept: the log says why, or it is not ``wanted``
        any more.
        """
        if self.read_only or not wanted():
            return None
        digest = self._fnv(data)
        name = _name(digest)
        path = self.folder / name
        found = hashlib.sha256(data).hexdigest()
        try:
            kept = self._existing(digest, found, len(data))
            if kept == found:
                self._used(name, len(data), user)
                return path
            if kept is not None:
                log.warning("another content has the hash %s already; it stays", name)
                return None
            self._write(name, data, user, wanted)
        except _UnwantedError:
            return None
        except NoRoomError as error:
            log.info("%d bytes are not cached: %s", len(data), error)
            return None
        except OSError as error:
            log.warning("could not cache %d bytes as %s: %s", len(data), path, error.strerror)
            return None
        self._sums.keep(name, found)
        self._used(name, len(data), user)
        return path

    def _write(self, name: str, data: memoryview, user: str, wanted: Wanted) -> None:
        """Raises OSError, NoRoomError, _UnwantedError; then nothing is left behind."""
        # No fsync: what a power cut tears does not pass as sound when it is read.
        with self._quota.reserve(len(data), user) as (file, unfinished):
            for at in range(0, len(data), _CHUNK):
                if not wanted():
                    raise _UnwantedError
                file.write(data[at : at + _CHUNK])
            file.flush()
            if sys.platform != "win32":
                # Readable for servers of other users, as upstream's files are.
                os.fchmod(file.fileno(), 0o644)
            self.files.replace(unfinished, name)

    def _existing(self, digest: int, wanted: str, size: int) -> str | None:
        """SHA-256 of a file's sound content; None if there is none, or a damaged one (deleted).

        One that is said to have the sum ``wanted`` and has the ``size`` is not read for it. Raises
        OSError.
        """
        name = _name(digest)
        kept = self._sums.find(name)
        try:
            with self._open(name) as file:
                identity = _identity(file)
                if kept is not None and (
                    (kept == wanted and identity[1] == size) or self._is_verified(digest, identity)
                ):
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
            self._discard(name, identity)
            return None
        if kept is None:
            self._sums.keep(name, found)
        # Somebody who sends another content under its hash again and again has it read once.
        self._set_verified(digest, identity)
        return found

    def _discard(self, name: str, identity: Identity) -> None:
        log.warning("cache file %s is damaged: its content has another hash", self.folder / name)
        if self.read_only:
            return
        self._sums.drop(name)
        with contextlib.suppress(OSError), self._quota.locked():
            # Another server may have put a sound one there meanwhile.
            with self._open(name) as file:
                same = _identity(file) == identity
            if same:
                self.files.unlink(name)

    def _open(self, name: str) -> io.FileIO:
        """A regular file, to be read. Raises OSError."""
        return io.FileIO(self.files.open_file(name))

    def _is_verified(self, digest: int, identity: Identity) -> bool:
        with self._lock:
            return self._verified.get(digest) == identity

    def _set_verified(self, digest: int, identity: Identity) -> None:
        if time.time() - identity[3] / 1e9 > _SETTLED_SECONDS:
            with self._lock:
                if len(self._verified) >= _MOST_VERIFIED:
                    del self._verified[next(iter(self._verified))]
                self._verified[digest] = identity


def _name(digest: int) -> str:
    return f"{digest:016x}"


def _identity(file: io.FileIO) -> Identity:
    """Return what replacing or writing to a file changes: inode, size, times in ns."""
    found = os.fstat(file.fileno())
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _fill(file: io.FileIO, place: memoryview, wanted: Wanted) -> bool:
    """Read the file's beginning; return whether there was as much, and it is ``wanted``."""
    at = 0
    while at < len(place):
        if not wanted():
            return False
        # Not mapped: a mapped file that another process cuts short takes this one with it.
        n = file.readinto(place[at : at + _CHUNK])
        if not n:
            return False
        at += n
    return True


def _sums_name() -> str:
    return f".sums-{os.geteuid() if hasattr(os, 'geteuid') else 0}"


class _Sums:
    """The SHA-256 of cached files, as lines for sha256sum(1); a file's time is its last use.

    They are in a folder that only this user writes to, which upstream takes no notice of. Without
    one (None) nothing is kept.
    """

    def __init__(self, folder: PrivateFolder | None, *, read_only: bool = False) -> None:
        self._folder = folder
        self._written = None if read_only else folder

    @classmethod
    def find_in(cls, cache: PrivateFolder) -> _Sums:
        """Return those that are there, to be read only."""
        try:
            return cls(cache.child(_sums_name(), create=False), read_only=True)
        except OSError:
            return cls(None)

    def find(self, name: str) -> str | None:
        """The sum of a file's content; None if none is kept, or what is kept is no sum."""
        if self._folder is None:
            return None
        try:
            line = self._folder.read(name, 256)
        except OSError:
            return None
        match = re.fullmatch(rb"([0-9a-f]{64})  \.\./([0-9a-f]{16})\n", line)
        return match[1].decode() if match and match[2].decode() == name else None

    def keep(self, name: str, value: str) -> None:
        """Without it the next reader goes by FNV again: a full disk is no error here."""
        # A line that was cut short is no sum, so it needs no more care than this.
        with contextlib.suppress(OSError):
            if self._written is not None:
                self._written.write(name, f"{value}  ../{name}\n".encode())

    def touch(self, name: str) -> None:
        with contextlib.suppress(OSError):
            if self._written is not None:
                self._written.touch(name)

    def drop(self, name: str) -> None:
        with contextlib.suppress(OSError):
            if self._written is not None:
                self._written.unlink(name)
