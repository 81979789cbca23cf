"""Whose clients the files of the tensor cache are for: who had one kept, or was served it, last.

Nothing in the folder says so, and nothing could: a content is its hash, whoever sent it. So this is
what one server has seen since it began; a file that it knows nothing of is nobody's.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Collection

# Contents below this size are no weights to speak of: they are counted by their number.
SMALL = 1 << 20
# Files that are remembered, of those that were used last.
_MOST_FILES = 1 << 17


class CacheUsers:
    """By address of a client, the bytes of files that its clients used last. From any thread."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, tuple[str, int]] = OrderedDict()
        self._bytes: Counter[str] = Counter()
        self._small: Counter[str] = Counter()
        self._lock = threading.Lock()

    def used(self, name: str, size: int, user: str) -> None:
        """Note that the file of ``size`` bytes was kept for ``user``, or served to it."""
        with self._lock:
            self._forget(name)
            self._files[name] = (user, size)
            self._bytes[user] += size
            self._small[user] += size < SMALL
            if len(self._files) > _MOST_FILES:
                self._forget(next(iter(self._files)))

    def forget(self, name: str) -> None:
        """Note that a file is gone."""
        with self._lock:
            self._forget(name)

    def keep_only(self, names: Collection[str]) -> None:
        """Forget files that are not among ``names``: others may have deleted them."""
        with self._lock:
            for name in [name for name in self._files if name not in names]:
                self._forget(name)

    def of(self, name: str) -> str | None:
        """Return whose a file is; None if nobody of this server has used it."""
        entry = self._files.get(name)
        return entry[0] if entry is not None else None

    def nbytes(self, user: str) -> int:
        """Return how many bytes there are in files of ``user``."""
        return self._bytes[user]

    def small(self, user: str) -> int:
        """Return how many small files are of ``user``."""
        return self._small[user]

    def most(self) -> int:
        """Return how many bytes there are in files of the address that has most."""
        with self._lock:
            return max(self._bytes.values(), default=0)

    def _forget(self, name: str) -> None:
        user, size = self._files.pop(name, ("", 0))
        self._bytes[user] -= size
        self._small[user] -= 0 < size < SMALL
        for counter in (self._bytes, self._small):
            if not counter[user]:
                del counter[user]
