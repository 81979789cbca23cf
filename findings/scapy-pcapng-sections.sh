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
. "$(dirname "$0")/common.bash"
install scapy==2.6.1

PYTHONPATH=$here venv/bin/python - <<'PYTHON'
import io

from pcapng_blocks import TIME, interface, packet, section

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
