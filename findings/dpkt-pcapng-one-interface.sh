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
. "$(dirname "$0")/common.bash"
install dpkt==1.9.8

PYTHONPATH=$here venv/bin/python - <<'PYTHON'
import io

from pcapng_blocks import TIME, interface, packet, section

import dpkt

file = section() + interface(6) + interface(9)
file += packet(0, TIME * 10**6) + packet(1, TIME * 10**9)
times = [time for time, _ in dpkt.pcapng.Reader(io.BytesIO(file))]
print(f"dpkt {dpkt.__version__}: two packets of {TIME} are read as of", *map(int, times))
assert times == [TIME, TIME * 1000], "this has changed"
PYTHON
