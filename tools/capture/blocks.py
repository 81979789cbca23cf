"""The blocks that a pcapng file is written of: little-endian, times in nanoseconds."""

from __future__ import annotations

import struct

SECTION = 0x0A0D0D0A
INTERFACE = 1
SIMPLE_PACKET = 3
NAME_RESOLUTION = 4
STATISTICS = 5
PACKET = 6

# Kind, size, interface, time (high and low word), bytes captured, bytes on the wire.
PACKET_HEAD = struct.Struct("<IIIIIII")
SIZE = struct.Struct("<I")

_BYTE_ORDER = 0x1A2B3C4D
_RESOLUTION = 9
_NANOSECONDS = 9

Option = tuple[int, bytes]


def padding(length: int) -> bytes:
    """Return what follows ``length`` bytes up to a multiple of four."""
    return bytes(-length % 4)


def options(*those: Option) -> bytes:
    """Return options by code and value, and their end; nothing if there are none."""
    if not those:
        return b""
    packed = b"".join(
        struct.pack("<HH", code, len(value)) + value + padding(len(value)) for code, value in those
    )
    return packed + bytes(4)


def block(kind: int, body: bytes) -> bytes:
    """Return a whole block; ``body`` is padded."""
    size = SIZE.pack(12 + len(body))
    return SIZE.pack(kind) + size + body + size


def section(*those: Option) -> bytes:
    """Return what a file begins with."""
    return block(SECTION, struct.pack("<IHHq", _BYTE_ORDER, 1, 0, -1) + options(*those))


def interface(link: int, *those: Option) -> bytes:
    """Return the block for frames of link layer ``link`` (LINKTYPE_*), by order of interfaces."""
    resolution = (_RESOLUTION, bytes([_NANOSECONDS]))
    return block(INTERFACE, struct.pack("<HHI", link, 0, 0) + options(*those, resolution))


def packet_ends(number: int, time_ns: int, captured: int, length: int) -> tuple[bytes, bytes]:
    """Return what stands before and behind the bytes of a frame.

    ``number`` is its interface's, ``captured`` its bytes in the file, ``length`` those it had.
    """
    behind = padding(captured)
    size = PACKET_HEAD.size + captured + len(behind) + SIZE.size
    time = time_ns >> 32, time_ns & 0xFFFFFFFF
    head = PACKET_HEAD.pack(PACKET, size, number, *time, captured, length)
    return head, behind + SIZE.pack(size)
