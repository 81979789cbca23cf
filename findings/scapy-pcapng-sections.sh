#!/usr/bin/env bash
# Surprise: scapy doesn't begin anew where a second section of a pcapng file begins: interface 0
# of that section is taken for interface 0 of the first one, with its link type and its
# resolution.
#
# Why a good guess is wrong: That files may be put one after the other with cat is what sections
# are for, and interfaces are counted from 0 in each (the format's section 4.1). Two captures of
# the same program on the same machine are read well, so that it doesn't show.
#
# Who it hurts: Tools that read rotated captures joined with cat, or captures by two programs:
# packets are taken for another link type, and times are wrong by powers of ten. No error.
#
# Seen with: scapy 2.6.1
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check scapy==2.6.1

venv/bin/python - <<'PYTHON'
import io
import struct


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
    options = option(9, bytes([digits])) + (option(14, struct.pack("<q", offset)) if offset else b"")
    return block(1, struct.pack("<HHI", 1, 0, 0) + options + option(0, b""))


def packet(number: int, time: int) -> bytes:
    """An Enhanced Packet Block of an interface."""
    head = struct.pack("<5I", number, time >> 32, time & 0xFFFFFFFF, len(FRAME), len(FRAME))
    return block(6, head + FRAME)


FRAME = bytes(12) + b"\x88\xb5" + bytes(46)
TIME = 1_700_000_000

import logging

logging.getLogger("scapy").setLevel(logging.ERROR)
import scapy
from scapy.utils import RawPcapNgReader

first = section() + interface(9) + packet(0, TIME * 10**9)
second = section() + interface(6) + packet(0, TIME * 10**6)


def times(file: bytes) -> list[float]:
    found = []
    for _, about in RawPcapNgReader(io.BytesIO(file)):
        found.append(((about.tshigh << 32) + about.tslow) / about.tsresol)
    return found


print("scapy", scapy.VERSION)
print("one by one: ", times(first), times(second))
joined = times(first + second)
print("joined:     ", joined)
assert times(second) == [TIME], "this has changed"
assert joined == [TIME, TIME / 1000], "this has changed"
PYTHON
