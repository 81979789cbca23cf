"""Blocks of pcapng files, for the scripts that hold readers of these against one another."""

import struct

FRAME = bytes(12) + b"\x88\xb5" + bytes(46)
TIME = 1_700_000_000


def block(kind: int, body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    length = struct.pack("<I", len(body) + 12)
    return struct.pack("<I", kind) + length + body + length


def option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + value + bytes(-len(value) % 4)


def section() -> bytes:
    return block(0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1))


def interface(digits: int, offset: int = 0) -> bytes:
    """Ethernet, with times in 10^-digits seconds, to which offset seconds are to be added."""
    options = option(9, bytes([digits])) + (
        option(14, struct.pack("<q", offset)) if offset else b""
    )
    return block(1, struct.pack("<HHI", 1, 0, 0) + options + option(0, b""))


def packet(number: int, time: int) -> bytes:
    """An Enhanced Packet Block of an interface."""
    head = struct.pack("<5I", number, time >> 32, time & 0xFFFFFFFF, len(FRAME), len(FRAME))
    return block(6, head + FRAME)
