"""Fast readers and writers derived from construct declarations.

construct interprets a declaration field by field, which costs about 40 us for one ``rpc_tensor``;
a decode step carries half a dozen. All messages are flat sequences of integers, arrays and byte
strings, so the declaration is compiled once into a ``struct`` format, which takes 3 us.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from construct import Array, Bytes, FormatField, Padded, Struct

Buffer = bytes | bytearray | memoryview
# Takes the values of a message from position `at`; gives the field and the position behind it.
_Take = Callable[[tuple[Any, ...], int], tuple[Any, int]]
_Put = Callable[[Any, list[Any]], None]


class Message(SimpleNamespace):
    """A message read off the wire: one attribute a field, arrays as tuples, nested structs too."""


def _scalar(values: tuple[Any, ...], at: int) -> tuple[Any, int]:
    return values[at], at + 1


def _append(value: Any, out: list[Any]) -> None:
    out.append(value)


def _compile(declaration: Any) -> tuple[str, _Take, _Put]:
    if isinstance(declaration, FormatField):
        return declaration.fmtstr[1:], _scalar, _append
    if isinstance(declaration, Bytes):
        return f"{declaration.length}s", _scalar, _append
    if isinstance(declaration, Padded):
        # Padding: bytes without a name, zero when written.
        return f"{declaration.length}x", lambda values, at: (None, at), lambda value, out: None
    if isinstance(declaration, Array):
        return _compile_array(declaration)
    if isinstance(declaration, Struct):
        return _compile_struct(declaration)
    raise TypeError(f"no codec for {declaration!r}")


def _compile_array(declaration: Any) -> tuple[str, _Take, _Put]:
    count = int(declaration.count)
    form, take, put = _compile(declaration.subcon)
    if take is _scalar:

        def take_slice(values: tuple[Any, ...], at: int) -> tuple[Any, int]:
            return values[at : at + count], at + count

        def put_slice(items: Any, out: list[Any]) -> None:
            if len(items) != count:
                raise ValueError(f"{len(items)} items for an array of {count}")
            out.extend(items)

        return form * count, take_slice, put_slice

    def take_items(values: tuple[Any, ...], at: int) -> tuple[Any, int]:
        items = []
        for _ in range(count):
            item, at = take(values, at)
            items.append(item)
        return tuple(items), at

    def put_items(items: Any, out: list[Any]) -> None:
        if len(items) != count:
            raise ValueError(f"{len(items)} items for an array of {count}")
        for item in items:
            put(item, out)

    return form * count, take_items, put_items


def _compile_struct(declaration: Any) -> tuple[str, _Take, _Put]:
    # A Renamed field wraps its type; padding has no name.
    fields = [
        (field.name, *_compile(field.subcon if field.name else field))
        for field in declaration.subcons
    ]

    def take(values: tuple[Any, ...], at: int) -> tuple[Any, int]:
        record = Message()
        members = record.__dict__
        for name, _, take_field, _ in fields:
            value, at = take_field(values, at)
            if name:
                members[name] = value
        return record, at

    def put(value: Any, out: list[Any]) -> None:
        members = value if isinstance(value, Mapping) else value.__dict__
        for name, _, _, put_field in fields:
            put_field(members[name] if name else None, out)

    return "".join(form for _, form, _, _ in fields), take, put


class Codec:
    """Reads and writes one message of fixed size, as its construct declaration says."""

    __slots__ = ("_put", "_struct", "_take", "size")

    def __init__(self, declaration: Any) -> None:
        form, self._take, self._put = _compile(declaration)
        self._struct = struct.Struct("<" + form)
        self.size = self._struct.size
        if self.size != declaration.sizeof():
            raise TypeError(f"codec of {self.size} bytes for {declaration.sizeof()} declared")

    def parse(self, data: Buffer, offset: int = 0) -> Any:
        """Return the message at ``offset``.

        ``data`` must hold ``size`` bytes from there (struct.error).
        """
        return self._take(self._struct.unpack_from(data, offset), 0)[0]

    def build(self, value: Mapping[str, Any] | Message) -> bytes:
        """Return the bytes of a message given as a mapping or Message.

        Raises KeyError for a missing field.
        """
        out: list[Any] = []
        self._put(value, out)
        return self._struct.pack(*out)


@functools.cache
def codec(declaration: Any) -> Codec:
    """Return the codec of a declaration; compiled once."""
    return Codec(declaration)
