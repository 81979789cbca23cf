"""From an object file to an image: sections laid out, references between them resolved.

Only what LLVM emits for position-independent code of x86-64 and 64-bit ARM in ELF files; anything
else raises UnsupportedError, and the object file is kept as it is.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rpc_server.native.image import ENTRY

_PROGBITS, _SYMTAB, _RELA = 1, 2, 4
_WRITE, _ALLOC = 1, 2
_UNDEFINED = 0

# -- what processors differ in ---------------------------------------------------------------------

# Makes what lies at a place of the image refer to an offset of it.
Patch = Callable[[bytearray, int, int], None]


@dataclass(frozen=True, slots=True)
class _Machine:
    """A processor's ways to refer to something: relocations by their numbers."""

    # To what is in the image; in a call; and to the slot that holds an imported function's address.
    patches: dict[int, Patch]
    calls: frozenset[int]
    slots: frozenset[int]
    # Code that jumps to where a slot says, and how it refers to that: place, relocation, addend.
    stub: bytes
    stub_relocations: tuple[tuple[int, int, int], ...]


def _relative(image: bytearray, place: int, target: int) -> None:
    struct.pack_into("<i", image, place, target - place)


def _field(image: bytearray, place: int, value: int, bits: int, at: int) -> None:
    """Put ``value`` into ``bits`` bits of the instruction at ``place``, from bit ``at`` on."""
    (word,) = struct.unpack_from("<I", image, place)
    mask = (1 << bits) - 1
    struct.pack_into("<I", image, place, word & ~(mask << at) | (value & mask) << at)


def _branch(image: bytearray, place: int, target: int) -> None:
    _field(image, place, (target - place) >> 2, 26, 0)


_PAGE_BITS = 12


def _page(image: bytearray, place: int, target: int) -> None:
    """The target's page, counted from the instruction's; an image begins with one."""
    pages = (target >> _PAGE_BITS) - (place >> _PAGE_BITS)
    _field(image, place, pages, 2, 29)
    _field(image, place, pages >> 2, 19, 5)


def _within_page(shift: int) -> Patch:
    """The target's place in its page, in units of what an instruction loads or stores."""

    def patch(image: bytearray, place: int, target: int) -> None:
        within = target & (1 << _PAGE_BITS) - 1
        if within & (1 << shift) - 1:
            raise UnsupportedError("an operand that is not aligned")
        _field(image, place, within >> shift, 12, 10)

    return patch


# R_X86_64_PC32 and PLT32, GOTPCREL and its two that may be relaxed; the stub is jmp *slot(%rip).
_PC32, _PLT32 = 2, 4
_X86_64 = _Machine(
    {_PC32: _relative, _PLT32: _relative, 9: _relative, 41: _relative, 42: _relative},
    calls=frozenset((_PLT32,)),
    slots=frozenset((9, 41, 42)),
    stub=b"\xff\x25" + bytes(6),
    stub_relocations=((2, _PC32, -4),),
)

# R_AARCH64_PREL32; ADR_PREL_PG_HI21 and those of what lies within the page: ADD, and loads and
# stores of 1, 2, 4, 8 and 16 bytes; JUMP26 and CALL26; ADR_GOT_PAGE and LD64_GOT_LO12_NC. The stub
# is adrp x16, slot; ldr x16, [x16, slot]; br x16.
_ADRP, _LOAD_8 = 275, 286
_AARCH64 = _Machine(
    {
        261: _relative,
        _ADRP: _page,
        277: _within_page(0),
        278: _within_page(0),
        284: _within_page(1),
        285: _within_page(2),
        _LOAD_8: _within_page(3),
        299: _within_page(4),
        282: _branch,
        283: _branch,
        311: _page,
        312: _within_page(3),
    },
    calls=frozenset((282, 283)),
    slots=frozenset((311, 312)),
    stub=struct.pack("<4I", 0x90000010, 0xF9400210, 0xD61F0200, 0),
    stub_relocations=((0, _ADRP, 0), (4, _LOAD_8, 0)),
)
_MACHINES = {62: _X86_64, 183: _AARCH64}


# -- object files ----------------------------------------------------------------------------------


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
        if machine not in _MACHINES:
            raise UnsupportedError(f"machine {machine}")
        self.machine = _MACHINES[machine]
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

    machine = file.machine
    slots: dict[str, int] = {}
    stubs: dict[str, int] = {}
    # Where, how, to what and how far from it.
    found: list[tuple[int, int, int, int]] = []
    relocations = [
        (places[section.info] + offset, kind, symbol, addend)
        for section in file.sections
        if section.kind == _RELA and section.info in places
        for offset, kind, symbol, addend in file.relocations(section)
    ]
    for place, kind, symbol, addend in relocations:
        if symbol.section != _UNDEFINED:
            if kind not in machine.patches or kind in machine.slots:
                raise UnsupportedError(f"relocation {kind}")
            if symbol.section not in places:
                raise UnsupportedError(f"symbol {symbol.name} in section {symbol.section}")
            found.append((place, kind, places[symbol.section] + symbol.value, addend))
            continue
        if kind not in machine.calls | machine.slots:
            raise UnsupportedError(f"relocation {kind} against {symbol.name}")
        if symbol.name not in slots:
            slots[symbol.name] = align(8)
            image += bytes(8)
            stub = stubs[symbol.name] = align(8)
            image += machine.stub
            for offset, how, further in machine.stub_relocations:
                found.append((stub + offset, how, slots[symbol.name], further))
        target = stubs[symbol.name] if kind in machine.calls else slots[symbol.name]
        found.append((place, kind, target, addend))
    for place, kind, target, addend in found:
        machine.patches[kind](image, place, target + addend)
    entry = next((s for s in file.symbols if s.name == ENTRY), None)
    if entry is None:
        raise UnsupportedError(f"no symbol '{ENTRY}'")
    if entry.section not in places:
        raise UnsupportedError(f"symbol {ENTRY} in section {entry.section}")
    return bytes(image), places[entry.section] + entry.value, slots
