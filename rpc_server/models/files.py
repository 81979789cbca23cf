"""Files as they were when they were looked at: what tells that one has changed, and a hold on it.

On Linux a file can be *held*: the system then tells before anybody opens it for writing or cuts it
short, and lets them wait until we let go (a read lease; it is got for files of this process's user,
or by root, on file systems of this machine, and not while somebody has the file open for writing).
Elsewhere a file is looked at before and after it is read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from rpc_server.folders import open_regular

if sys.platform == "linux":
    import fcntl

# A file changed so short before it was read may be changed again without a new time.
SETTLED_SECONDS = 2.0

# What a sample of a file takes: its beginning, its end, and pieces between them.
_SAMPLES = 64
_SAMPLE = 64 << 10


class Identity(NamedTuple):
    """The properties that replacing or writing to a file changes; times in ns."""

    device: int
    inode: int
    size: int
    mtime: int
    ctime: int

    @property
    def settled(self) -> bool:
        """True if it was changed so long ago that another change would show."""
        return time.time() - max(self.mtime, self.ctime) / 1e9 > SETTLED_SECONDS


class BeingWrittenError(OSError):
    """Somebody has the file open for writing."""


def open_file(path: str | Path) -> BinaryIO:
    """Open a regular file, no link to one, for reading. Raises OSError."""
    return os.fdopen(open_regular(path), "rb", buffering=1 << 16)


def identity_of(file: BinaryIO | str | Path) -> Identity:
    """Return what a file is now; by name it is the one there now. Raises OSError."""
    found = os.stat(file) if isinstance(file, str | Path) else os.fstat(file.fileno())
    return Identity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def read_at(file: BinaryIO, offset: int, into: memoryview) -> bool:
    """Fill ``into`` with the bytes from ``offset`` on; return whether there were as many.

    Raises OSError.
    """
    # Read, not mapped: a mapped file that another process cuts short takes this one with it.
    file.seek(offset)
    at = 0
    while at < len(into):
        # Readers of the standard library take what is large past their own buffer.
        n = file.readinto(into[at:])  # type: ignore[attr-defined]
        if not n:
            return False
        at += n
    return True


def sample(file: BinaryIO, size: int, head: int) -> str:
    """Return the SHA-256 of a file's first ``head`` bytes and of pieces of the rest.

    It is read within milliseconds, and tells another model from this one even where all times and
    the size are the same. Raises OSError.
    """
    sum_ = hashlib.sha256()
    file.seek(0)
    left = head
    while left > 0 and (data := file.read(min(left, 1 << 20))):
        sum_.update(data)
        left -= len(data)
    rest = max(size - head - _SAMPLE, 0)
    for number in range(_SAMPLES + 1):
        file.seek(head + rest * number // _SAMPLES)
        sum_.update(file.read(_SAMPLE))
    return sum_.hexdigest()


class Hold:
    """A hold on an open file, by its descriptor; see the module."""

    def __init__(self, descriptor: int) -> None:
        """Take it. Raises BeingWrittenError; OSError where files can't be held."""
        self._descriptor = descriptor
        if sys.platform != "linux":
            raise OSError(errno.ENOTSUP, "this system can't hold files")
        # By default the system's word would end the process; this signal does nothing.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                raise BeingWrittenError(error.errno, "it is open for writing") from None
            raise

    @property
    def wanted(self) -> bool:
        """True if somebody waits to write to the file, or the hold is gone already."""
        if sys.platform != "linux":
            return True
        return bool(fcntl.fcntl(self._descriptor, fcntl.F_GETLEASE) != fcntl.F_RDLCK)

    def let_go(self) -> None:
        """Let others write to the file."""
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                fcntl.fcntl(self._descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)


@contextlib.contextmanager
def held(file: BinaryIO) -> Iterator[Hold | None]:
    """Hold a file where that can be done; raises BeingWrittenError if somebody writes to it."""
    try:
        hold = Hold(file.fileno())
    except BeingWrittenError:
        raise
    except OSError:
        yield None
        return
    try:
        yield hold
    finally:
        hold.let_go()
