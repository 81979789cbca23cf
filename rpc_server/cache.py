"""The cache of large tensors on disk, in upstream's folder and under upstream's names.

A file is named by the 16 hex digits of the FNV-1a 64 of its content; llama.cpp offers tensors over
10 MiB by that hash and sends only what the server doesn't have. A file is written beside its name
and moved there in one step, and it is served only after its content has been found to have the hash
in its name, so a file cut short, damaged or put there by somebody else is never used.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from protocol.hashing import fnv1a_64

Hash = Callable[[memoryview], int]

log = logging.getLogger(__name__)

# Up to protocol 6 a server caches what is larger than this; later the client says what to cache.
HASH_THRESHOLD = 10 << 20


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
    """Files in ``folder``. Methods block on the disk: call them off the event loop.

    ``fnv`` is another implementation of the hash than protocol's, which loads a compiler.

    Raises CacheError if the folder can't be made or written to.
    """

    def __init__(self, folder: Path, fnv: Hash = fnv1a_64) -> None:
        self.folder = folder
        self._hash = fnv
        # What has been verified in this process, by name: a file is hashed once, not per client.
        self._verified: dict[int, tuple[int, int, int]] = {}
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise CacheError(f"cache folder {folder} can't be written: {error.strerror}") from None

    def _path(self, digest: int) -> Path:
        return self.folder / f"{digest:016x}"

    def load(self, digest: int, capacity: int) -> mmap.mmap | None:
        """The content with this hash, mapped read-only; None if there is none that is sound.

        A content of more than ``capacity`` bytes, or of none, isn't served.
        """
        path = self._path(digest)
        try:
            with path.open("rb") as file:
                stat = os.fstat(file.fileno())
                if not 0 < stat.st_size <= capacity:
                    return None
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError:
            return None
        identity = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        with self._lock:
            known = self._verified.get(digest) == identity
        if not known:
            if self._hash(memoryview(content)) != digest:
                log.warning("cache file %s is damaged: its content has another hash", path)
                content.close()
                return None
            with self._lock:
                self._verified[digest] = identity
        return content

    def store(self, data: memoryview) -> Path | None:
        """Keep ``data``; the file's path, None if it could not be written (logged)."""
        path = self._path(self._hash(data))
        temporary: str | None = None
        try:
            descriptor, temporary = tempfile.mkstemp(prefix=".partial-", dir=self.folder)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            # Readable for servers of other users, as upstream's files are.
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except OSError as error:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
            log.warning("could not cache %d bytes as %s: %s", len(data), path, error.strerror)
            return None
        return path
