#!/usr/bin/env bash
# Surprise: dpkt reads the times of all packets of a pcapng file in the resolution of the first
# interface. In a file with one interface in microseconds and one in nanoseconds the second one's
# packets are a thousand times too late, tens of thousands of years from now. No error.
#
# Why a good guess is wrong: Each interface has a resolution of its own in the format
# (if_tsresol), dpkt does read that option, and files with one interface, which is nearly all that
# one tests with, are right.
#
# Who it hurts: Tools that join captures: tshark and mergecap write one file from interfaces of
# different resolution (two cards, or a card and a USB port). Connections are sorted and cut by
# time.
#
# Seen with: dpkt 1.9.8
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check dpkt==1.9.8

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

import dpkt

file = section() + interface(6) + interface(9)
file += packet(0, TIME * 10**6) + packet(1, TIME * 10**9)
times = [time for time, _ in dpkt.pcapng.Reader(io.BytesIO(file))]
print(f"dpkt {dpkt.__version__}: two packets of {TIME} are read as of", *map(int, times))
assert times == [TIME, TIME * 1000], "this has changed"
PYTHON
