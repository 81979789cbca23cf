"""Where the tensors of a GGUF file lie: the file's head, read without mapping the file.

What clients offer by hash are tensors, so of all that a head says only their names, types and
places are taken; metadata is stepped over. A type that this project doesn't know has no size here:
such a tensor is left out, and the rest of the file is as good as ever. Nothing of a file is trusted
before it is checked against the file's length.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import BinaryIO

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

_UINT32, _STRING, _ARRAY = 4, 8, 9
# Bytes of a metadata value by its type: numbers, then what has a length of its own.
_VALUE_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


class HeaderError(ValueError):
    """A file is no sound GGUF file; the message says why."""


@dataclass(frozen=True, slots=True)
class FilePlace:
    """One tensor of a file: ``size`` bytes from byte ``offset`` on."""

    name: str
    type: GgmlType
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Header:
    """The content of a file's head: its tensors, and its own length in bytes.

    ``unknown`` are the names of tensors whose type is not known here.
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
    return _placed(described, data, length, nbytes)


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


_Description = tuple[str, tuple[int, ...], int, int]


def _description(at: _Cursor) -> _Description:
    name, n_dims = at.string().decode("utf-8", "replace"), at.u32()
    if not 1 <= n_dims <= _MAX_DIMS:
        raise HeaderError(f"a tensor of {n_dims} dimensions")
    ne = struct.unpack(f"<{n_dims}Q", at.take(8 * n_dims))
    return name, ne, at.u32(), at.u64()


def _placed(described: list[_Description], data: int, length: int, nbytes: int) -> Header:
    tensors, unknown = [], []
    for name, ne, number, offset in described:
        if number not in TYPE_INFO:
            unknown.append(name)
            continue
        type_ = GgmlType(number)
        if ne[0] % TYPE_INFO[type_].block_size:
            raise HeaderError(f"'{name}' has rows of {ne[0]}, which are not whole blocks")
        size = row_size(type_, ne[0]) * math.prod(ne[1:])
        if data + offset + size > length:
            missing = data + offset + size - length
            raise HeaderError(f"{missing} bytes of '{name}' are missing: it is cut short")
        if size:
            tensors.append(FilePlace(name, type_, data + offset, size))
    return Header(tuple(tensors), nbytes, tuple(unknown))
