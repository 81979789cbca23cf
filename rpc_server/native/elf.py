"""From an object file to an image: sections laid out, references between them resolved.

Only what LLVM emits for position-independent x86-64 code in ELF files; anything else raises
UnsupportedError, and the object file is kept as it is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from rpc_server.native.image import ENTRY

_MACHINE_X86_64 = 62
_PROGBITS, _SYMTAB, _RELA = 1, 2, 4
_WRITE, _ALLOC = 1, 2
_UNDEFINED = 0

# Types of relocations: 32 bits relative to their place, directly or by way of a slot that holds the
# address.
_PC32, _PLT32 = 2, 4
_GOTPCREL = (9, 41, 42)

# jmp *slot(%rip)
_JUMP = b"\xff\x25"
_STUB_SIZE = 8


class UnsupportedError(Exception):
    """The object file has something that is not known here."""


@dataclass(slots=True)
class _Section:
    name: str
    kind: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    align: int


@dataclass(slots=True)
class _Symbol:
    name: str
    section: int
    value: int


def _name(table: bytes, at: int) -> str:
    return table[at : table.index(b"\0", at)].decode()


class _Object:
    """Sections and symbols of an ELF object file."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        # 64 bits, little endian, version 1.
        if data[:7] != b"\x7fELF\x02\x01\x01" or len(data) < 64:
            raise UnsupportedError("not a 64-bit little-endian ELF file")
        (machine,) = struct.unpack_from("<H", data, 18)
        if machine != _MACHINE_X86_64:
            raise UnsupportedError(f"machine {machine}")
        (table,) = struct.unpack_from("<Q", data, 40)
        _, count, names = struct.unpack_from("<3H", data, 58)
        rows = [struct.unpack_from("<2I4Q2I2Q", data, table + 64 * i) for i in range(count)]
        strings = data[rows[names][4] :]
        self.sections = [
            _Section(_name(strings, row[0]), row[1], row[2], row[4], row[5], row[6], row[7], row[8])
            for row in rows
        ]
        self.symbols: list[_Symbol] = []
        for section in self.sections:
            if section.kind == _SYMTAB:
                strings = data[self.sections[section.link].offset :]
                for at in range(section.offset, section.offset + section.size, 24):
                    name, index, value = struct.unpack_from("<I2xHQ", data, at)
                    self.symbols.append(_Symbol(_name(strings, name), index, value))

    def relocations(self, section: _Section) -> Iterator[tuple[int, int, _Symbol, int]]:
        """(offset, type, symbol, addend) of a section of relocations."""
        for at in range(section.offset, section.offset + section.size, 24):
            offset, kind, symbol, addend = struct.unpack_from("<QIIq", self.data, at)
            yield offset, kind, self.symbols[symbol], addend


def link(data: bytes) -> tuple[bytes, int, dict[str, int]]:
    """Return the image, the entry's offset, and the offset of each imported function's slot.

    Raises UnsupportedError.
    """
    file = _Object(data)
    image = bytearray()

    def align(to: int) -> int:
        image.extend(bytes(-len(image) % max(to, 1)))
        return len(image)

    places: dict[int, int] = {}
    for index, section in enumerate(file.sections):
        # Tables for unwinding the stack are left out: nothing here throws.
        if not section.flags & _ALLOC or not section.size or section.name == ".eh_frame":
            continue
        # Images are read-only; a pointer among constants would depend on where one lies.
        if section.kind != _PROGBITS or section.flags & _WRITE:
            raise UnsupportedError(f"section {section.name}")
        places[index] = align(section.align)
        image += file.data[section.offset : section.offset + section.size]

    slots: dict[str, int] = {}
    stubs: dict[str, int] = {}
    relocations = [
        (places[section.info] + offset, kind, symbol, addend)
        for section in file.sections
        if section.kind == _RELA and section.info in places
        for offset, kind, symbol, addend in file.relocations(section)
    ]
    for _, kind, symbol, _ in relocations:
        if symbol.section == _UNDEFINED and symbol.name not in slots:
            if kind != _PLT32 and kind not in _GOTPCREL:
                raise UnsupportedError(f"relocation {kind} against {symbol.name}")
            slots[symbol.name] = align(8)
            image += bytes(8)
            stubs[symbol.name] = align(_STUB_SIZE)
            jump = slots[symbol.name] - (stubs[symbol.name] + len(_JUMP) + 4)
            image += _JUMP + struct.pack("<i", jump) + bytes(_STUB_SIZE - len(_JUMP) - 4)

    def address(symbol: _Symbol) -> int:
        if symbol.section not in places:
            raise UnsupportedError(f"symbol {symbol.name} in section {symbol.section}")
        return places[symbol.section] + symbol.value

    for place, kind, symbol, addend in relocations:
        if symbol.section == _UNDEFINED:
            target = stubs[symbol.name] if kind == _PLT32 else slots[symbol.name]
        elif kind in (_PC32, _PLT32):
            target = address(symbol)
        else:
            raise UnsupportedError(f"relocation {kind}")
        struct.pack_into("<i", image, place, target + addend - place)
    entry = next((s for s in file.symbols if s.name == ENTRY), None)
    if entry is None:
        raise UnsupportedError(f"no symbol '{ENTRY}'")
    return bytes(image), address(entry), slots
