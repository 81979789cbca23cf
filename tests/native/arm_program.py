"""Code for 64-bit ARM as a program of its own, run by QEMU: no system of that kind is needed.

The program calls a routine, writes a piece of its memory to stdout and ends with what the routine
returned.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

QEMU = "qemu-aarch64"
needs_qemu = pytest.mark.skipif(
    shutil.which(QEMU) is None, reason=f"no {QEMU}: on Debian, apt-get install qemu-user"
)

# Where things lie; images begin with a page.
CODE, IMAGE, MEMORY = 0x400000, 0x500000, 0x10000000

_EXECUTABLE, _AARCH64, _LOAD, _ALL = 2, 183, 1, 7
_HEADER, _SEGMENT = 64, 56
_WRITE, _EXIT = 64, 93
_CALL_X16, _SYSTEM, _X0_TO_X19, _X19_TO_X0 = 0xD63F0200, 0xD4000001, 0xAA0003F3, 0xAA1303E0


def _set(register: int, value: int) -> list[int]:
    """Instructions that give a register a value: movz, then movk for each 16 bits."""
    words = [0xD2800000 | (value & 0xFFFF) << 5 | register]
    for part in (1, 2, 3):
        words.append(0xF2800000 | part << 21 | (value >> 16 * part & 0xFFFF) << 5 | register)
    return words


def _program(entry: int, arguments: Sequence[int], result: tuple[int, int]) -> bytes:
    words = []
    for register, value in enumerate(arguments):
        words += _set(register, value)
    words += [*_set(16, IMAGE + entry), _CALL_X16, _X0_TO_X19]
    at, size = result
    words += [*_set(0, 1), *_set(1, at), *_set(2, size), *_set(8, _WRITE), _SYSTEM]
    words += [_X19_TO_X0, *_set(8, _EXIT), _SYSTEM]
    return struct.pack(f"<{len(words)}I", *words)


def _executable(segments: Mapping[int, bytes]) -> bytes:
    """An ELF file of segments by their addresses, the first of which is where it starts."""
    head = struct.pack(
        "<16s2HI3QI6H",
        *(b"\x7fELF\x02\x01\x01", _EXECUTABLE, _AARCH64, 1, min(segments), _HEADER, 0, 0),
        *(_HEADER, _SEGMENT, len(segments), 0, 0, 0),
    )
    page = 0x10000
    at, table, content = page, b"", b""
    for address, data in sorted(segments.items()):
        size = len(data)
        table += struct.pack("<2I6Q", _LOAD, _ALL, at, address, address, size, size, page)
        padded = data + bytes(-size % page)
        content += padded
        at += len(padded)
    return (head + table).ljust(page, b"\0") + content


def run(
    folder: Path,
    image: bytes,
    entry: int,
    arguments: Sequence[int],
    memory: bytes = bytes(8),
    result: tuple[int, int] = (0, 0),
    processor: str = "max",
) -> tuple[int, bytes]:
    """Call a routine of an image.

    Returns its result's lowest byte, and of its memory, ``memory`` at MEMORY, the ``result``:
    address and bytes.
    """
    program = _program(entry, arguments, (result[0] or MEMORY, result[1]))
    file = folder / "program"
    file.write_bytes(_executable({CODE: program, IMAGE: image, MEMORY: memory}))
    file.chmod(0o755)
    done = subprocess.run(
        [QEMU, "-cpu", processor, str(file)], capture_output=True, check=False, timeout=120
    )
    assert done.returncode >= 0, done.stderr.decode()
    return done.returncode, done.stdout
