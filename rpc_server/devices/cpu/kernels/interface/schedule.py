"""Which records run on one thread, and between which the threads have to meet.

A decode step of a small model is a thousand records of about a microsecond each, and a barrier
costs as much (far more on a machine that is busy with something else). So a record with little to
do runs on the first thread alone, and threads meet only where a record touches what another thread
may still be working on.
"""

from __future__ import annotations

import enum

# Below this many bytes read and written a record isn't worth a second thread.
SERIAL_BELOW = 24 << 10

# A half-open range of addresses.
Span = tuple[int, int]


class StepFlag(enum.IntFlag):
    """The flags by which the executor runs a record."""

    SERIAL = 1
    BARRIER_AFTER = 2
