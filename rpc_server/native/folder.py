"""Folders of compiled code: what one is named by, and when it is deleted.

Code is good for the sources it was made from, the compiler that made it and the processor it was
made for. A folder is named by all of these, so a change of any starts a fresh one; old ones are
deleted by the next server that compiles, but for the last few and those that are in use.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from rpc_server.folders import check_private, make_folders, open_regular

if TYPE_CHECKING:
    import tempfile

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)

_PREFIX = "kernels-"
_LOCK = "in-use"
# Enough for a few versions side by side; a folder with the code of all kernels has some 20 MiB.
KEPT = 4


# Packages that code depends on, and the files that tell their versions apart. Of gguf it is what
# kernels are compiled with: the grids and the sizes of its formats.
_PACKAGES = {
    "numba": ("_version.py",),
    "llvmlite": ("_version.py",),
    "gguf": ("constants.py", "quants.py"),
}


def _packages() -> Iterator[bytes]:
    """Yield what tells versions of the compiler and of gguf apart, without importing them."""
    for package, names in _PACKAGES.items():
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            for path in (Path(place) / name for name in names):
                if path.exists():
                    yield from (path.name.encode(), path.read_bytes())


def _processor() -> list[str]:
    """Return what tells processors apart, as far as code for one may not run on another."""
    told = [platform.system(), platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return told
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part", "isa")
    seen = set()
    for line in lines:
        key = line.partition(":")[0].strip()
        if key in wanted and key not in seen:
            seen.add(key)
            told.append(line)
    return told


def _sources(folders: Iterable[Path]) -> Iterator[bytes]:
    """Yield names and contents of all modules in folders and their subfolders."""
    for folder in sorted(folders):
        for source in sorted(folder.rglob("*.py")):
            yield source.relative_to(folder).as_posix().encode()
            yield source.read_bytes()


def fingerprint(folders: Iterable[Path]) -> str:
    """Return 16 hex digits for all that compiled code depends on; ``folders`` hold its sources."""
    digest = hashlib.blake2b(digest_size=8)
    for part in (
        *_sources(folders),
        *_packages(),
        *(text.encode() for text in _processor()),
        sys.version.encode(),
        # numba's own settings of the processor to compile for, and the like.
        *(f"{k}={v}".encode() for k, v in sorted(os.environ.items()) if k.startswith("NUMBA_")),
    ):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def cache_base() -> Path:
    """Return where folders of compiled code are, for this user."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home())
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "ggml-rpc-server"


class Folder:
    """One folder, marked as in use as long as this process runs.

    What lies in it is run, so it is this user's alone. Where nothing can be written, or somebody
    else could, it is a folder of this process, deleted at its end.
    """

    def __init__(self, base: Path, digest: str) -> None:
        self.path = base / f"{_PREFIX}{digest}"
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        # Why it is one of this process alone, if it is.
        self.unkept = ""
        try:
            if _is_open_to_others(base) | _is_open_to_others(self.path):
                import shutil

                log.warning("%s could be written to by others: its code is not used", self.path)
                shutil.rmtree(self.path)
            make_folders(base)
            for path in (base, self.path):
                _make_private(path)
            self._lock = _lock_in_use(self.path)
        except OSError as error:
            import tempfile

            log.warning("compiled kernels will not be kept: %s", error)
            self.unkept = str(error)
            self._temporary = tempfile.TemporaryDirectory(prefix="ggml-rpc-server-")
            self.path = Path(self._temporary.name) / self.path.name
            self._lock = _lock_in_use(self.path)

    def read(self, name: str) -> bytes:
        """Return what is in a file that nobody else could have written. Raises OSError."""
        with os.fdopen(open_regular(self.path / name), "rb") as file:
            check_private(os.fstat(file.fileno()))
            return file.read()

    def prune(self, keep: int = KEPT) -> list[Path]:
        """Delete folders beside this one that nobody uses, but for the ``keep`` used last."""
        others = [p for p in self.path.parent.glob(f"{_PREFIX}*") if p != self.path]
        others.sort(key=_last_use, reverse=True)
        return [path for path in others[keep:] if _delete_unused(path)]

    def close(self) -> None:
        self._lock.close()
        if self._temporary is not None:
            self._temporary.cleanup()


def _is_open_to_others(path: Path) -> bool:
    """Return whether other users may write to an existing folder of this user's."""
    if sys.platform == "win32":
        return False
    try:
        return bool(path.stat().st_mode & 0o022)
    except FileNotFoundError:
        return False


def _make_private(path: Path) -> None:
    """Make a folder that is nobody else's to write to, or one that exists so.

    Raises OSError if it is somebody else's, or no folder.
    """
    path.mkdir(mode=0o700, exist_ok=True)
    if sys.platform == "win32":
        return
    # By descriptor: what is looked at is what is changed.
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        owner = os.fstat(folder).st_uid
        if owner != os.geteuid():
            raise PermissionError(f"{path} belongs to user {owner}")
        os.fchmod(folder, 0o700)
    finally:
        os.close(folder)


def _last_use(path: Path) -> float:
    for file in (path / _LOCK, path):
        try:
            return file.stat().st_mtime
        except OSError:
            continue
    return 0.0


def _lock_in_use(path: Path) -> IO[bytes]:
    """An open file that shows to others that the folder is in use. Raises OSError."""
    while True:
        make_folders(path)
        name = path / _LOCK
        file = _open_lock(name)
        os.utime(name)
        if sys.platform == "win32":
            # An open file can't be deleted there.
            return file
        fcntl.flock(file, fcntl.LOCK_SH)
        # Whoever deleted the folder meanwhile had the lock; then this is not the file there any
        # more.
        try:
            if os.stat(name).st_ino == os.fstat(file.fileno()).st_ino:
                return file
        except FileNotFoundError:
            pass
        file.close()


def _open_lock(path: Path) -> IO[bytes]:
    return os.fdopen(open_regular(path, os.O_RDWR | os.O_CREAT), "rb+")


def _delete_unused(path: Path) -> bool:
    """Delete a folder unless a process uses it; whether it was."""
    import shutil

    try:
        with _open_lock(path / _LOCK) as file:
            if sys.platform != "win32":
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)
    except OSError:
        return False
    return True
