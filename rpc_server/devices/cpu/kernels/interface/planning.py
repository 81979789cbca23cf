"""What the planner and its compiled loops agree on: ``kernels/planning.py`` has the loops.

Most of planning is arrays over nodes. Two things are not, since each step depends on the one
before: where scratch lies that several nodes share, and where threads have to meet. They are loops
over arrays of int64 that the planner has made, so that a graph of a hundred thousand nodes takes
them milliseconds, without the GIL.
"""

from __future__ import annotations

import enum

# Scratch that is kept at once for later nodes: each node looks through all of it.
MOST_KEPT = 64
# Places that a request for shared scratch is made of, at most.
MOST_SOURCES = 2

# Spans that a record is held against at most: a graph may have a million records between which
# nobody has to meet. Behind so many all threads meet.
MOST_SPANS = 512

# What a loop returns that was told to stop.
STOPPED = -(1 << 62)

# Words of what is kept for later nodes, for each of MOST_KEPT: what place_scratch works with.
KEPT_WORDS = 5 + 2 * MOST_SOURCES


class ScratchArgument(enum.IntEnum):
    """Arguments of ``place_scratch`` as words; all but NODES, LIMIT and STOP are addresses.

    By node: LOCAL is how many bytes it has for itself, REQUESTS where its requests begin, WRITTEN
    where the spans begin that it writes (both with an end). By request: GROUP is equal where the
    same is asked for, SIZE in bytes, SOURCES spans that it is made of, UNTIL the last node that has
    use for it. SPANS are written spans, KEPT is memory to work with. Results: START (by request, in
    bytes), FRESH (by request, 1 where it has to be made) and BASE (by node, where its own begins).
    STOP is the address of a word: as soon as it isn't 0 the loop ends.
    """

    NODES = 0
    LIMIT = 1
    LOCAL = 2
    REQUESTS = 3
    WRITTEN = 4
    GROUP = 5
    SIZE = 6
    SOURCES = 7
    UNTIL = 8
    SPANS = 9
    KEPT = 10
    START = 11
    FRESH = 12
    BASE = 13
    STOP = 14
