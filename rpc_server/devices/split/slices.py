"""Split weights that load from the parts' disks: which content each part had of which tensor.

A client offers a large tensor by the hash of all of it, and no part has all of it. So where a
tensor arrives with the wish to be kept, it goes to each part in pieces that the part is asked to
keep in a cache of its own (its ``--cache``), and the hashes of these pieces are noted here, under
the hash of the whole and the way it was cut. When the tensor is offered again, and cut the same
way, each part is offered its pieces by their hashes. If all parts have all of theirs the tensor
counts as loaded; otherwise the client sends it, and only the parts that lack something are sent
theirs. Parts that keep nothing are among these.

A note is a small file beside the cached tensors, in a folder that only this user can write to. Each
ends with the SHA-256 of itself; one that is damaged, or for another cut, is not used.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from protocol.ggml.hashing import FNV_OFFSET
from rpc_server.cache.store import TensorCache
from rpc_server.devices.split.sharded import Bytes, Part, ShardedWeight
from rpc_server.folders import PrivateFolder

log = logging.getLogger(__name__)


# What a part is sent, and asked to keep, at once: a file there. More for fewer files, less for
# the memory that this server needs while a model is uploaded.
PIECE = 16 << 20
_MOST_CHUNK = 128 << 20
# Notes that are kept at most, of some kilobytes each; when there are more the oldest tenth goes.
MOST_NOTES = 20_000
_MOST_BYTES = 4 << 20
_VERSION = "slices of a split tensor, 1"


class Piece(NamedTuple):
    """Bytes ``at`` to ``at + size`` of what a part has, which came in one chunk of the tensor."""

    part: int
    at: int
    size: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes of a tensor from ``offset`` on that go to the parts together."""

    offset: int
    size: int


def chunks(weight: ShardedWeight) -> Iterator[Chunk]:
    """Yield a tensor's bytes as they are sent: whole rows, so many that pieces have their size."""
    row, total = weight.tensor.row_size, weight.tensor.nbytes
    wanted = min(PIECE * sum(bool(len(cut)) for cut in weight.cuts), _MOST_CHUNK)
    step = max(wanted // row, 1) * row
    for offset in range(0, total, step):
        yield Chunk(offset, min(step, total - offset))


def pieces(weight: ShardedWeight, chunk: Chunk) -> list[Piece]:
    """Return what each part gets of a chunk; nothing for those that get nothing."""
    first: dict[int, int] = {}
    size: dict[int, int] = {}
    for run in weight.runs(chunk.offset, chunk.size):
        first.setdefault(run.part, run.at)
        size[run.part] = size.get(run.part, 0) + run.count * run.size
    return [Piece(part, first[part], size[part]) for part in first]


def layout(weight: ShardedWeight) -> str:
    """Return in words how a tensor is cut: what has to be the same for a note to hold."""
    t = weight.tensor
    cuts = " ".join(f"{c.first}-{c.last}" for c in weight.cuts)
    local = "none" if weight.local is None else weight.local
    return f"{t.type.name} {t.ne} axis {weight.axis} cuts {cuts} local {local} pieces {PIECE}"


class SliceNotes:
    """The notes in a folder within ``cache``. Methods block on the disk."""

    def __init__(
        self, cache: PrivateFolder, most: int = MOST_NOTES, *, read_only: bool = False
    ) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._read_only = read_only
        self._folder: PrivateFolder | None = None
        self._count = 0
        name = f".slices-{os.geteuid() if hasattr(os, 'geteuid') else 0}"
        try:
            self._folder = cache.child(name, create=not read_only)
            self._count = sum(1 for _ in self._folder.names())
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("%s is not used: %s", cache.path / name, error.strerror)

    def find(self, digest: int, weight: ShardedWeight) -> list[int] | None:
        """Return the hashes of all pieces of the tensor with this hash, in order, or None."""
        folder = self._folder
        if folder is None:
            return None
        name, wanted = _name(digest, weight), _count(weight)
        try:
            text = folder.read(name, _MOST_BYTES)
            if not self._read_only:
                folder.touch(name)
        except OSError:
            return None
        found = _decode(text, digest, weight)
        if found is None or len(found) != wanted:
            log.warning("%s is damaged, or for something else; not used", folder.path / name)
            return None
        return found

    def keep(self, digest: int, weight: ShardedWeight, hashes: Sequence[int]) -> None:
        """Note the hashes of all pieces; a full disk is no error here."""
        folder = self._folder
        text = _encode(digest, weight, hashes)
        if folder is None or self._read_only or len(text) > _MOST_BYTES:
            return
        try:
            with self._lock:
                if self._count >= self._most:
                    self._make_room(folder)
                unfinished = f".partial-{secrets.token_hex(8)}"
                try:
                    folder.write(unfinished, text)
                    folder.replace(unfinished, _name(digest, weight))
                except BaseException:
                    with contextlib.suppress(OSError):
                        folder.unlink(unfinished)
                    raise
                self._count += 1
        except OSError as error:
            log.warning("could not note the slices of %016x: %s", digest, error.strerror)

    def _make_room(self, folder: PrivateFolder) -> None:
        """Delete what was used longest ago. Raises OSError."""
        found = []
        for name in folder.names():
            with contextlib.suppress(OSError):
                found.append((folder.stat(name).st_mtime, name))
        found.sort()
        for _, name in found[: max(len(found) - self._most * 9 // 10, 0)]:
            with contextlib.suppress(OSError):
                folder.unlink(name)
        self._count = sum(1 for _ in folder.names())


def _name(digest: int, weight: ShardedWeight) -> str:
    cut = hashlib.sha256(layout(weight).encode()).hexdigest()[:16]
    return f"{digest:016x}-{cut}"


def _count(weight: ShardedWeight) -> int:
    return sum(len(pieces(weight, chunk)) for chunk in chunks(weight))


def _encode(digest: int, weight: ShardedWeight, hashes: Sequence[int]) -> bytes:
    lines = [_VERSION, f"{digest:016x}", layout(weight), *(f"{h:016x}" for h in hashes)]
    text = "".join(f"{line}\n" for line in lines).encode()
    return text + f"{hashlib.sha256(text).hexdigest()}\n".encode()


def _decode(data: bytes, digest: int, weight: ShardedWeight) -> list[int] | None:
    """Return the hashes of a note; None if it is damaged, or of something else."""
    text, end = data[:-65], data[-65:]
    if end != f"{hashlib.sha256(text).hexdigest()}\n".encode():
        return None
    version, whole, cut, *hashes = text.decode().splitlines() or [""] * 3
    if (version, whole, cut) != (_VERSION, f"{digest:016x}", layout(weight)):
        return None
    return [int(line, 16) for line in hashes]


@dataclass(slots=True)
class Slices:
    """The slices of one coordinator's weights, kept and loaded: ``cache`` has its own share."""

    cache: TensorCache
    notes: SliceNotes

    @classmethod
    def of(cls, cache: TensorCache) -> Slices:
        """Return those whose notes lie beside the tensors of ``cache``."""
        return cls(cache, SliceNotes(cache.files, read_only=cache.read_only))

    def keeping(self, weight: ShardedWeight) -> Keeping | None:
        """Return what watches an upload of all of ``weight``; None if no part keeps its slice."""
        if self.cache.read_only or weight.gathered:
            return None
        here = weight.local is not None and len(weight.cuts[weight.local]) > 0
        if not here and not any(p is not None and p.worker.keeps for p in weight.parts):
            return None
        return Keeping(self, weight)

    async def load(
        self,
        digest: int,
        weight: ShardedWeight,
        hashes: Sequence[int],
        view: Callable[[], Bytes],
        loaded: frozenset[int],
    ) -> frozenset[int]:
        """Fill a weight from the disks of the parts that aren't ``loaded``; return all that are.

        ``view`` is the weight's memory here, for this server's share. Raises WorkerLost.
        """
        by_part: dict[int, list[tuple[Chunk, Piece, int]]] = {}
        following = iter(hashes)
        for chunk in chunks(weight):
            for piece in pieces(weight, chunk):
                by_part.setdefault(piece.part, []).append((chunk, piece, next(following)))
        found_all = {i for i in range(len(weight.cuts)) if i in loaded or i not in by_part}

        async def load_part(i: int, wanted: list[tuple[Chunk, Piece, int]]) -> None:
            part = weight.parts[i]
            if part is not None and not part.worker.keeps:
                return
            for chunk, piece, hash in wanted:
                if part is not None:
                    found = await part.worker.recall(part.tensor, piece.at, piece.size, hash)
                else:
                    found = await asyncio.to_thread(
                        self._load_here, weight, chunk, piece, hash, view
                    )
                if not found:
                    log.debug("part %d does not have a piece of %016x", i, digest)
                    return
            found_all.add(i)

        missing = (i for i in by_part if i not in found_all)
        await asyncio.gather(*(load_part(i, by_part[i]) for i in missing))
        return frozenset(found_all)

    def _load_here(
        self,
        weight: ShardedWeight,
        chunk: Chunk,
        piece: Piece,
        hash: int,
        view: Callable[[], Bytes],
    ) -> bool:
        content = np.empty(piece.size, np.uint8)
        if not self.cache.load(hash, content.data):
            return False
        memory = view()
        at = 0
        for run in weight.runs(chunk.offset, chunk.size):
            if run.part == piece.part:
                n = run.count * run.size
                weight.here(run, memory, chunk.offset)[...] = content[at : at + n].reshape(
                    run.count, run.size
                )
                at += n
        return True


@dataclass(slots=True)
class Keeping:
    """One upload of a whole tensor that is to be kept: its hash so far, and those of its pieces.

    Parts that are ``loaded`` have their slices, and are not sent them.
    """

    slices: Slices
    weight: ShardedWeight
    loaded: frozenset[int] = frozenset()
    digest: int = FNV_OFFSET
    _hashes: list[int] = field(default_factory=list)

    def step(self, offset: int) -> int:
        """Return how many bytes go on together from ``offset`` on."""
        return next(c.size for c in chunks(self.weight) if c.offset == offset)

    async def forward(self, data: Bytes, offset: int) -> None:
        """Send a chunk to the parts, to be kept. Raises WorkerLost."""
        chunk = Chunk(offset, len(data))
        sent = [self._send(p, self._content(p, chunk, data)) for p in pieces(self.weight, chunk)]
        whole = asyncio.to_thread(self.slices.cache.hash, data.data, self.digest)
        self.digest, *hashes = await asyncio.gather(whole, *sent)
        self._hashes += hashes

    def _content(self, piece: Piece, chunk: Chunk, data: Bytes) -> Bytes:
        runs = [r for r in self.weight.runs(chunk.offset, chunk.size) if r.part == piece.part]
        return np.concatenate([run.of(data).reshape(-1) for run in runs])

    async def _send(self, piece: Piece, content: Bytes) -> int:
        """Send a piece to its part, or keep it here; return its hash. Raises WorkerLost."""
        part: Part | None = self.weight.parts[piece.part]
        if piece.part not in self.loaded:
            if part is None:
                await asyncio.to_thread(self.slices.cache.store, content.data)
            elif part.worker.keeps:
                await part.worker.write_kept(part.tensor, content.data, piece.at)
            else:
                await part.worker.write(part.tensor, content.data, piece.at)
        digest: int = await asyncio.to_thread(self.slices.cache.hash, content.data)
        return digest

    async def finish(self) -> None:
        """Note what was sent: all of it."""
        await asyncio.to_thread(self.slices.notes.keep, self.digest, self.weight, self._hashes)
