#!/usr/bin/env bash
# Surprise: Packets of pcapng's Simple Packet Blocks, which have no time, are left out by dpkt
# without a word, and get the time of reading from scapy: another one each time the file is read.
#
# Why a good guess is wrong: One would expect an error, or None. A missing packet can't be told
# from one that was never captured, and a time of today looks like a time.
#
# Who it hurts: Tools that put streams together: with dpkt there are holes in a TCP stream of a
# sound file, with scapy these packets sort behind all others.
#
# Seen with: dpkt 1.9.8, scapy 2.6.1
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check dpkt==1.9.8 scapy==2.6.1

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
import time

logging.getLogger("scapy").setLevel(logging.ERROR)
import dpkt
import scapy
from scapy.utils import PcapNgReader


def simple() -> bytes:
    return block(3, struct.pack("<I", len(FRAME)) + FRAME)


file = section() + interface(6) + packet(0, TIME * 10**6) + simple()
seen = list(dpkt.pcapng.Reader(io.BytesIO(file)))
print(f"dpkt {dpkt.__version__}: {len(seen)} packet of 2")
assert len(seen) == 1, "this has changed"
before = time.time()
times = [float(packet.time) for packet in PcapNgReader(io.BytesIO(file))]
print(f"scapy {scapy.VERSION}: times {times}; it is {before:.0f}")
assert times[0] == TIME, "this has changed"
assert abs(times[1] - before) < 60, "this has changed"
PYTHON
