"""Where the tensors of a GGUF file lie: the file's head, read without mapping the file.

What clients offer by hash are tensors, so of all that a head says only their names, types and
places are taken; metadata is stepped over. A type that this project doesn't know has no size here.
It follows from where the next tensor begins: that is less than the file's alignment behind the last
one's end, a tensor's rows are all of one length, and elements of a type take the same room in all
tensors. Where more than one size would do, or none, tensors of that type are left out, and the rest
of the file is as good as ever. (A wrong size would never serve wrong bytes: its hash is of other
bytes than a client's.) Nothing of a file is trusted before it is checked against the file's length.
"""

from __future__ import annotations

import bisect
import math
import struct
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import BinaryIO, NamedTuple

from protocol.ggml.types import TYPE_INFO, GgmlType, row_size

_MAGIC = b"GGUF"
# Version 1 has counts of 32 bits and is not written any more.
_VERSIONS = (2, 3)
_MAX_DIMS = 4
# Most bytes of a head: the largest known, with vocabulary and templates, have some 20 MiB.
_MOST_HEAD = 1 << 30
_MOST_NAME = 1 << 16
_ALIGNMENT_KEY = b"general.alignment"
_DEFAULT_ALIGNMENT = 32
_MOST_ALIGNMENT = 1 << 30
# Most sizes of a tensor that are tried, of a type that is not known.
_MOST_SIZES = 64

_UINT32, _STRING, _ARRAY = 4, 8, 9
# Bytes of a metadata value by its type: numbers, then what has a length of its own.
_VALUE_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


class HeaderError(ValueError):
    """A file is no sound GGUF file; the message says why."""


@dataclass(frozen=True, slots=True)
class FilePlace:
    """One tensor of a file: ``size`` bytes from byte ``offset`` on; ``type`` is its type's name."""

    name: str
    type: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Header:
    """The content of a file's head: its tensors, and its own length in bytes.

    ``unknown`` are the names of tensors left out: no size of theirs is certain.
    """

    tensors: tuple[FilePlace, ...]
    nbytes: int
    unknown: tuple[str, ...]


class _Cursor:
    """Takes numbers and strings off a file, and no more than a head may have."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self._file = file
        self._left = min(length, _MOST_HEAD)

    def take(self, size: int) -> bytes:
        data = self._file.read(size) if size <= self._left else b""
        if len(data) != size:
            raise HeaderError("it ends within its head")
        self._left -= size
        return data

    def skip(self, size: int) -> None:
        if size > self._left:
            raise HeaderError("it ends within its head")
        self._file.seek(size, 1)
        self._left -= size

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def string(self) -> bytes:
        size = self.u64()
        if size > _MOST_NAME:
            raise HeaderError(f"a name of {size} bytes")
        return self.take(size)


def read_header(file: BinaryIO, length: int) -> Header:
    """Read the head of a GGUF file of ``length`` bytes, from its beginning.

    Raises HeaderError, also for a file that ends before its tensors do; OSError.
    """
    at = _Cursor(file, length)
    magic, version = at.take(4), at.u32()
    if magic != _MAGIC:
        raise HeaderError("it does not begin as a GGUF file")
    if version not in _VERSIONS:
        raise HeaderError(f"it has version {version} of the format, known are 2 and 3")
    n_tensors, n_values = at.u64(), at.u64()
    alignment = _DEFAULT_ALIGNMENT
    for _ in range(n_values):
        key, kind = at.string(), at.u32()
        if key == _ALIGNMENT_KEY and kind == _UINT32:
            alignment = at.u32()
        else:
            _skip_value(at, kind)
    if alignment.bit_count() != 1 or alignment > _MOST_ALIGNMENT:
        raise HeaderError(f"an alignment of {alignment}")
    described = [_description(at) for _ in range(n_tensors)]
    nbytes = file.tell()
    data = -(-nbytes // alignment) * alignment
    return _placed(described, data, length, nbytes, alignment)


def _skip_value(at: _Cursor, kind: int) -> None:
    if kind == _STRING:
        at.skip(at.u64())
        return
    if kind != _ARRAY:
        at.skip(_value_size(kind))
        return
    inner, count = at.u32(), at.u64()
    if inner == _STRING:
        for _ in range(count):
            at.skip(at.u64())
    else:
        at.skip(count * _value_size(inner))


def _value_size(kind: int) -> int:
    size = _VALUE_SIZES.get(kind)
    if size is None:
        raise HeaderError(f"a value of type {kind}")
    return size


class _Described(NamedTuple):
    """A tensor as the head has it: ``ne`` innermost first, ``offset`` from the data's beginning."""

    name: str
    ne: tuple[int, ...]
    type: int
    offset: int

    @property
    def rows(self) -> int:
        return math.prod(self.ne[1:])

    @property
    def elements(self) -> int:
        return math.prod(self.ne)


def _description(at: _Cursor) -> _Described:
    name, n_dims = at.string().decode("utf-8", "replace"), at.u32()
    if not 1 <= n_dims <= _MAX_DIMS:
        raise HeaderError(f"a tensor of {n_dims} dimensions")
    ne = struct.unpack(f"<{n_dims}Q", at.take(8 * n_dims))
    return _Described(name, ne, at.u32(), at.u64())


def _placed(
    described: list[_Described], data: int, length: int, nbytes: int, alignment: int
) -> Header:
    tensors, unknown = [], []
    guessed = _guessed_sizes(described, length - data, alignment)
    for d in described:
        size = _size(d) if d.type in TYPE_INFO else guessed.get(d)
        if size is None:
            unknown.append(d.name)
            continue
        if data + d.offset + size > length:
            missing = data + d.offset + size - length
            raise HeaderError(f"{missing} bytes of '{d.name}' are missing: it is cut short")
        if size:
            name = GgmlType(d.type).name if d.type in TYPE_INFO else f"type {d.type}"
            tensors.append(FilePlace(d.name, name, data + d.offset, size))
    return Header(tuple(tensors), nbytes, tuple(unknown))


def _size(d: _Described) -> int:
    type_ = GgmlType(d.type)
    if d.ne[0] % TYPE_INFO[type_].block_size:
        raise HeaderError(f"'{d.name}' has rows of {d.ne[0]}, which are not whole blocks")
    return row_size(type_, d.ne[0]) * d.rows


def _guessed_sizes(
    described: list[_Described], length: int, alignment: int
) -> dict[_Described, int]:
    """Return the bytes of tensors whose type is not known, where only one number can be right.

    ``length`` is the number of bytes behind the head. Nothing that is returned ends behind them.
    """
    ends = sorted({min(d.offset, length) for d in described} | {length})
    by_type: dict[int, list[_Described]] = defaultdict(list)
    for d in described:
        if d.type not in TYPE_INFO and d.elements and d.offset < length:
            by_type[d.type].append(d)
    sizes = {}
    for tensors in by_type.values():
        rooms = {d: ends[bisect.bisect_right(ends, d.offset)] - d.offset for d in tensors}
        # The one that leaves the fewest sizes, and of these such as would do for all others.
        first = max(tensors, key=lambda d: d.rows)
        found = [
            per_element
            for per_element in _bytes_per_element(first, rooms[first], alignment)
            if all(_fits(d, per_element, room, alignment) for d, room in rooms.items())
        ]
        if len(found) == 1:
            sizes.update({d: int(found[0] * d.elements) for d in tensors})
    return sizes


def _bytes_per_element(d: _Described, room: int, alignment: int) -> Iterator[Fraction]:
    """Yield what an element may take of a tensor with ``room`` bytes to the next one."""
    last = room // d.rows
    first = max(room - alignment, 0) // d.rows + 1
    if last - first < _MOST_SIZES:
        for row in range(first, last + 1):
            yield Fraction(row, d.ne[0])


def _fits(d: _Described, per_element: Fraction, room: int, alignment: int) -> bool:
    """Return whether rows of whole bytes leave less than the alignment of a tensor's room."""
    row = per_element * d.ne[0]
    return row.denominator == 1 and 0 <= room - row * d.rows < alignment
