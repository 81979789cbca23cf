"""The operator's models: an index of their tensors by hash, made and kept up to date on a thread.

What is served is what was hashed. A file counts as long as it is the one that was looked at (its
inode, size and times), and it is looked at again before and after each use. One that changes is
hashed anew; until then its tensors are not had here, and clients send them.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from rpc_server.models.files import (
    BeingWrittenError,
    Identity,
    held,
    identity_of,
    open_file,
    read_at,
    sample,
)
from rpc_server.models.hashing import HashLanes, Pace, StoppedError, hash_places
from rpc_server.models.header import HeaderError, read_header
from rpc_server.models.record import FileRecord, IndexedTensor, Records
from rpc_server.observability import progress
from rpc_server.turns import Wanted, always

log = logging.getLogger(__name__)

# How often files are looked at.
_LOOK_SECONDS = 2.0
_SPLIT_NAME = re.compile(r"(.*-)\d{5}(-of-\d{5}\.gguf)", re.IGNORECASE)
# Bytes that are read in one go.
_CHUNK = 8 << 20


class UnusableError(Exception):
    """A file can't be indexed now; the message says why."""


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a tensor's bytes: in the file that was at ``path`` and had ``identity``."""

    path: str
    identity: Identity
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Stripes:
    """Some of a tensor's bytes: ``count`` runs of ``size``, each ``stride`` behind the last."""

    offset: int
    size: int
    stride: int
    count: int

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.size * self.count

    def inside(self, total: int) -> bool:
        """Return whether all of them are among ``total`` bytes."""
        last = self.offset + self.stride * max(self.count - 1, 0) + self.size
        return self.stride >= self.size and last <= total


@dataclass(slots=True)
class Content:
    """A tensor's bytes, in an open file that is the one that was hashed; for any threads."""

    place: Place
    file: BinaryIO
    # A file has one position.
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def read(self, offset: int, into: memoryview, wanted: Wanted = always) -> bool:
        """Fill ``into`` with the bytes from ``offset`` on; return whether they are the tensor's.

        Where they are not, or are not ``wanted`` any more, what is in ``into`` is undefined. Blocks
        on the disk.
        """
        try:
            for at in range(0, len(into), _CHUNK):
                if not wanted():
                    return False
                piece = into[at : at + _CHUNK]
                with self._turn:
                    if not read_at(self.file, self.place.offset + offset + at, piece):
                        return False
            return identity_of(self.file) == self.place.identity
        except OSError as error:
            log.warning("%s can't be read: %s", self.place.path, error.strerror)
            return False

    def part(self, stripes: Stripes) -> Content | None:
        """Return stripes that lie side by side as a content of the same file; None if they don't.

        It has no file of its own to be closed.
        """
        if stripes.count > 1 and stripes.stride != stripes.size:
            return None
        place = replace(self.place, offset=self.place.offset + stripes.offset, size=stripes.nbytes)
        return Content(place, self.file, self._turn)

    def read_slice(
        self, stripes: Stripes, at: int, into: memoryview, wanted: Wanted = always
    ) -> bool:
        """Fill ``into`` with the bytes of stripes from the ``at``-th on; as :meth:`read`."""
        while into:
            number, within = divmod(at, stripes.size)
            size = min(len(into), stripes.size - within)
            if stripes.stride == stripes.size:
                size = len(into)
            offset = stripes.offset + number * stripes.stride + within
            if not self.read(offset, into[:size], wanted):
                return False
            at, into = at + size, into[size:]
        return True


def model_files(paths: Iterable[Path]) -> Iterator[str]:
    """Yield the files that are meant by files and folders, without links, each one once.

    One file of a split model stands for all that are there. In folders that is what is named
    ``*.gguf``, and the ``sha256-*`` of Ollama. What doesn't exist is left out.
    """
    seen = set()
    for path in paths:
        for found in _files_of(path):
            real = os.path.realpath(found)
            if real not in seen:
                seen.add(real)
                yield real


def _files_of(path: Path) -> Iterator[str]:
    if path.is_dir():
        for folder, _, names in os.walk(path):
            for name in sorted(names):
                if name.lower().endswith(".gguf") or name.startswith("sha256-"):
                    yield os.path.join(folder, name)
        return
    if match := _SPLIT_NAME.fullmatch(path.name):
        same = re.compile(re.escape(match[1]) + r"\d{5}" + re.escape(match[2]), re.IGNORECASE)
        if path.parent.is_dir():
            yield from (str(p) for p in sorted(path.parent.iterdir()) if same.fullmatch(p.name))
        return
    if path.exists():
        yield str(path)


def make_record(path: str, lanes: HashLanes, between: Callable[[int], None]) -> FileRecord:
    """Hash all tensors of a file. ``between`` as of hash_places. Raises UnusableError, OSError."""
    with open_file(path) as file, held(file):
        identity = identity_of(file)
        if not identity.settled:
            raise BeingWrittenError(0, "it was changed a moment ago")
        try:
            header = read_header(file, identity.size)
            places = header.tensors
            hashes = hash_places(file, places, lanes, between)
        except HeaderError as error:
            raise UnusableError(str(error)) from None
        except EOFError:
            raise UnusableError("it was cut short while it was read") from None
        if header.unknown:
            log.info(
                "%s: %d tensors of types unknown here are left out: their sizes aren't certain",
                path,
                len(header.unknown),
            )
        record = FileRecord(
            path=path,
            identity=identity,
            head=header.nbytes,
            sample=sample(file, identity.size, header.nbytes),
            tensors=tuple(
                IndexedTensor(p.name, p.type, p.offset, p.size, hash_)
                for p, hash_ in zip(places, hashes, strict=True)
            ),
        )
        if identity_of(file) != identity:
            raise BeingWrittenError(0, "it changed while it was read")
        return record


def checked_record(record: FileRecord) -> FileRecord | None:
    """Return the record if its file is still the one it is of, None if not. Raises OSError."""
    with open_file(record.path) as file, held(file):
        now = identity_of(file)
        # A disk may have another number after the machine has started again.
        same = now._replace(device=record.identity.device) == record.identity
        if not same or sample(file, now.size, record.head) != record.sample:
            return None
    return replace(record, identity=now)


class Models:
    """An index of the files at ``paths``, kept up to date from :meth:`start` to :meth:`close`.

    ``work`` counts what clients have had done (see Pace). Methods are called from any thread.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        records: Records,
        lanes: Callable[[], HashLanes],
        work: Callable[[], int] = lambda: 0,
    ) -> None:
        self.paths = tuple(paths)
        self._records = records
        self._make_lanes = lanes
        self._work = work
        self._lock = threading.Lock()
        # Of each file what it is indexed as, and where a tensor is by its hash and size.
        self._files: dict[str, FileRecord] = {}
        self._places: dict[tuple[int, int], list[Place]] = {}
        # What was said of a file that can't be used, so that it is said once.
        self._said: dict[str, tuple[Identity | None, str]] = {}
        self._stopped = threading.Event()
        # Whether all files have been looked at since the start.
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="models", daemon=True)

    def start(self) -> None:
        """Begin to index, in the background."""
        self._thread.start()

    def close(self) -> None:
        """End the work in the background, and wait until it has ended."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def wait(self, seconds: float) -> bool:
        """Wait until all files have been looked at; return whether they have."""
        return self._ready.wait(seconds)

    @property
    def files(self) -> list[FileRecord]:
        """The files that are indexed now."""
        with self._lock:
            return list(self._files.values())

    def describe(self) -> str:
        """Return in words, for the start, which files are meant."""
        return ", ".join(map(str, self.paths))

    @contextmanager
    def open(self, digest: int, size: int) -> Iterator[Content | None]:
        """Give the tensor of ``size`` bytes that has this hash, None if it is not had here."""
        with self._lock:
            places = list(self._places.get((digest, size), ()))
        for place in places:
            content = self._open(place)
            if content is not None:
                with content.file:
                    yield content
                return
        yield None

    @staticmethod
    def _open(place: Place) -> Content | None:
        try:
            file = open_file(place.path)
            if identity_of(file) == place.identity:
                return Content(place, file)
            file.close()
            log.info("%s has changed; it is not used until it is indexed again", place.path)
        except OSError as error:
            log.info("%s can't be read any more: %s", place.path, error.strerror)
        return None

    # -- in the background

    def _run(self) -> None:
        if sys.platform == "linux":
            # The thread's own on Linux: what else wants the processor gets most of it.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        try:
            lanes = self._make_lanes()
            while not self._stopped.is_set():
                self.refresh(lanes)
                self._ready.set()
                self._stopped.wait(_LOOK_SECONDS)
        except StoppedError:
            pass

    def refresh(self, lanes: HashLanes) -> None:
        """Look at all files once, and index those that are new or have changed."""
        found = list(model_files(self.paths))
        for path in set(self._files) - set(found):
            log.info("%s is gone", path)
            self._forget(path)
        changed = [path for path in found if self._has_changed(path)]
        fresh = [path for path in changed if not self._recall(path)]
        if fresh:
            self._index(fresh, lanes)

    def _has_changed(self, path: str) -> bool:
        """Return whether a file is not the one that is indexed, or was found to be unusable."""
        try:
            identity = identity_of(path)
        except OSError as error:
            self._refuse(path, None, error.strerror or str(error))
            return False
        known = self._files.get(path)
        if known is not None and known.identity == identity:
            return False
        self._forget(path)
        said = self._said.get(path)
        return said is None or said[0] is None or said[0] != identity

    def _recall(self, path: str) -> bool:
        """Take a file's record from an earlier start; return whether there is one that holds."""
        record = self._records.find(path)
        try:
            record = record and checked_record(record)
        except OSError:
            return False
        if record is None:
            return False
        self._add(record)
        log.info("%s: %d tensors, indexed before", path, len(record.tensors))
        return True

    def _index(self, paths: Sequence[str], lanes: HashLanes) -> None:
        pace = Pace(self._work, self._stopped.wait)
        with indexing(paths) as task:
            for path in paths:
                self._index_one(path, lanes, task, pace)

    def _index_one(self, path: str, lanes: HashLanes, task: progress.Task, pace: Pace) -> None:
        identity, started = None, time.monotonic()

        def between(n: int) -> None:
            task.advance(n, os.path.basename(path))
            pace.rest()

        try:
            identity = identity_of(path)
            record = make_record(path, lanes, between)
        except BeingWrittenError as error:
            # It is looked at again.
            self._refuse(path, None, error.strerror or str(error))
        except UnusableError as error:
            self._refuse(path, identity, str(error))
        except OSError as error:
            self._refuse(path, None, error.strerror or str(error))
        else:
            self._add(record)
            self._records.keep(record)
            seconds = max(time.monotonic() - started, 1e-6)
            log.info(
                "%s: %d tensors, %.1f MiB, indexed in %.1f s (%.0f MiB/s)",
                path,
                len(record.tensors),
                record.nbytes / (1 << 20),
                seconds,
                record.nbytes / (1 << 20) / seconds,
            )

    def _refuse(self, path: str, identity: Identity | None, reason: str) -> None:
        """Note why a file is not served: with an ``identity``, until it has another one."""
        self._forget(path)
        if self._said.get(path, (None, ""))[1] != reason:
            log.warning("%s is not served: %s", path, reason)
        self._said[path] = identity, reason

    def _add(self, record: FileRecord) -> None:
        with self._lock:
            self._said.pop(record.path, None)
            self._files[record.path] = record
            for t in record.tensors:
                place = Place(record.path, record.identity, t.offset, t.size)
                self._places.setdefault((t.hash, t.size), []).append(place)

    def _forget(self, path: str) -> None:
        with self._lock:
            record = self._files.pop(path, None)
            for t in record.tensors if record is not None else ():
                key = t.hash, t.size
                left = [p for p in self._places.get(key, ()) if p.path != path]
                if left:
                    self._places[key] = left
                else:
                    self._places.pop(key, None)


def indexing(paths: Iterable[str]) -> progress.Task:
    """Return a task that shows how much of these files is hashed."""
    return progress.begin("indexing models", sum(map(_size, paths)), progress.BYTES)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
