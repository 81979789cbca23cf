#!/usr/bin/env bash
# Surprise: Of three readers of pcapng for Python only one applies if_tsoffset, the seconds to be
# added to each time of an interface: dpkt does, scapy and python-pcapng don't. The last one even
# parses the option and has a property for the time.
#
# Why a good guess is wrong: The option stands beside if_tsresol, which all three apply, and the
# format says that it must be added. Readers that agree on everything else differ by what may be
# 50 years.
#
# Who it hurts: Tools that compare captures by time, and those that write pcapng: with an offset,
# as some hardware writes it to keep its counters short, results depend on the library.
#
# Seen with: dpkt 1.9.8, scapy 2.6.1, python-pcapng 2.1.1
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check dpkt==1.9.8 scapy==2.6.1 python-pcapng==2.1.1

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
import dpkt
import pcapng
from pcapng.blocks import EnhancedPacket
from scapy.utils import PcapNgReader

OFFSET = 1_600_000_000
file = section() + interface(6, OFFSET) + packet(0, (TIME - OFFSET) * 10**6)
times = {
    "dpkt 1.9.8": next(time for time, _ in dpkt.pcapng.Reader(io.BytesIO(file))),
    "scapy 2.6.1": float(next(iter(PcapNgReader(io.BytesIO(file)))).time),
    "python-pcapng 2.1.1": next(
        found.timestamp
        for found in pcapng.FileScanner(io.BytesIO(file))
        if isinstance(found, EnhancedPacket)
    ),
}
for reader, time in times.items():
    print(f"{reader:20} {time:.0f}" + ("" if time == TIME else f" instead of {TIME}"))
assert list(times.values()) == [TIME, TIME - OFFSET, TIME - OFFSET], "this has changed"
PYTHON
