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
. "$(dirname "$0")/common.bash"
install dpkt==1.9.8 scapy==2.6.1 python-pcapng==2.1.1

PYTHONPATH=$here venv/bin/python - <<'PYTHON'
import io

from pcapng_blocks import TIME, interface, packet, section

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
