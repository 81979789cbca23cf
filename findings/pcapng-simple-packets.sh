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
. "$(dirname "$0")/common.bash"
install dpkt==1.9.8 scapy==2.6.1

PYTHONPATH=$here venv/bin/python - <<'PYTHON'
import io
import struct

from pcapng_blocks import FRAME, TIME, block, interface, packet, section

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
