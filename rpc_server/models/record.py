"""What the index knows of one file, and how that is kept on disk between starts.

A record is a small file in a folder that only this user writes to, beside the folders of compiled
kernels. It ends with the SHA-256 of itself; one that is damaged is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rpc_server.folders import PrivateFolder
from rpc_server.models.files import Identity
from rpc_server.native.folder import cache_base

log = logging.getLogger(__name__)

_VERSION = 2
_SUFFIX = ".json"
# A record of 100,000 tensors has some 10 MB.
_MOST_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class IndexedTensor:
    """One tensor: ``size`` bytes at ``offset``, whose FNV-1a 64 is ``hash``."""

    name: str
    type: str
    offset: int
    size: int
    hash: int


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file at ``path`` (without links): what it was when it was hashed, and its tensors.

    ``sample`` is a sum of its head, whose length is ``head``, and of pieces of the rest.
    """

    path: str
    identity: Identity
    head: int
    sample: str
    tensors: tuple[IndexedTensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.size for t in self.tensors)


def default_folder() -> Path:
    """Return where records lie: beside the folders of compiled kernels."""
    return cache_base() / "models"


class Records:
    """The records in a folder; without one that is this user's alone nothing is kept."""

    def __init__(self, path: Path) -> None:
        self._folder: PrivateFolder | None = None
        try:
            self._folder = PrivateFolder.open(path)
        except OSError as error:
            log.warning(
                "the index of models is not kept in %s: %s", path, error.strerror or str(error)
            )

    def find(self, path: str) -> FileRecord | None:
        """Return the record of the file at ``path``, None if there is none that is sound."""
        record = None if self._folder is None else _read(self._folder, _name(path))
        return record if record is not None and record.path == path else None

    def keep(self, record: FileRecord) -> None:
        """Write a record; a full disk is no error here."""
        folder = self._folder
        if folder is None:
            return
        text = json.dumps({"version": _VERSION, **asdict(record)}).encode() + b"\n"
        text += hashlib.sha256(text).hexdigest().encode() + b"\n"
        temporary = f".partial-{secrets.token_hex(8)}"
        try:
            with os.fdopen(folder.create(temporary), "wb") as file:
                file.write(text)
            folder.replace(temporary, _name(record.path))
        except OSError as error:
            with contextlib.suppress(OSError):
                folder.unlink(temporary)
            log.warning(
                "the index of %s is not kept, and made again at the next start: %s",
                record.path,
                error.strerror,
            )

    def all(self) -> Iterator[FileRecord]:
        """Yield all sound records, in the order of their files' paths."""
        if self._folder is None:
            return
        names = [name for name in self._folder.names() if name.endswith(_SUFFIX)]
        found = [record for name in names if (record := _read(self._folder, name)) is not None]
        yield from sorted(found, key=lambda record: record.path)


def _name(path: str) -> str:
    return hashlib.sha256(path.encode()).hexdigest()[:32] + _SUFFIX


def _read(folder: PrivateFolder, name: str) -> FileRecord | None:
    try:
        data = folder.read(name, _MOST_BYTES)
    except OSError:
        return None
    text, end = data[:-65], data[-65:]
    if end != hashlib.sha256(text).hexdigest().encode() + b"\n":
        log.warning("%s is damaged; its file is indexed anew", folder.path / name)
        return None
    fields = json.loads(text)
    if fields.pop("version", None) != _VERSION:
        return None
    return FileRecord(
        path=fields["path"],
        identity=Identity(*fields["identity"]),
        head=fields["head"],
        sample=fields["sample"],
        tensors=tuple(IndexedTensor(**tensor) for tensor in fields["tensors"]),
    )
