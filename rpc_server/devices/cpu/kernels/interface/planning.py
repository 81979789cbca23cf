"""What the planner and its compiled loops agree on: ``kernels/planning.py`` has the loops.

Planning asks of all nodes at once, as arrays, whatever it can. What it does node by node are loops
in compiled code, so that a graph of a hundred thousand nodes takes them milliseconds, without the
GIL: where scratch lies that several nodes share, the records of all nodes with their addresses, and
where threads have to meet.

Addresses are counted from *bases*. Each node has a row of them: where itself and its sources lie,
scratch of threads, its pieces of scratch, and 0 for addresses that are what they are.
"""

from __future__ import annotations

import enum

from rpc_server.devices.cpu.kernels.interface.abi import N_SLOTS

# Scratch that is kept at once for later nodes: each node looks through all of it.
MOST_KEPT = 64
# Places that a request for shared scratch is made of, at most.
MOST_SOURCES = 2

# Spans that a record is held against at most: a graph may have a million records between which
# nobody has to meet. Behind so many all threads meet.
MOST_SPANS = 512

# What a loop returns that was told to stop.
STOPPED = -(1 << 62)

# Bases: slots of the node, scratch of threads, pieces of scratch, nothing.
THREADS = N_SLOTS
PIECES = N_SLOTS + 1
MOST_PIECES = 6
NOTHING = PIECES + MOST_PIECES
BASES = NOTHING + 1

# Words of what is kept for later nodes, for each of MOST_KEPT: what place_scratch works with.
KEPT_WORDS = 5 + 2 * MOST_SOURCES

# Words of rows in a kind's table: a place is a word of a record and the address that goes there; a
# span is an address, bytes and whether they are written, or one of those that the node writes in
# all; a request is bytes, its piece of scratch and what it is made of; a piece is which one, and
# how far into the node's own scratch it begins. An address is a base and bytes from there on.
PLACE_WORDS = 3
SPAN_WORDS = 4
WRITTEN_WORDS = 3
REQUEST_WORDS = 2 + 3 * MOST_SOURCES
PIECE_WORDS = 2


class KindWord(enum.IntEnum):
    """The first words of a kind's table: how many rows there are of each, and at which word.

    LOCAL is how many bytes of scratch a node has for itself.
    """

    LOCAL = 0
    RECORDS = 1
    WORDS_AT = 2
    FIELDS_AT = 3
    PLACES_AT = 4
    SPANS_AT = 5
    WRITTEN = 6
    WRITTEN_AT = 7
    REQUESTS = 8
    REQUESTS_AT = 9
    PIECES = 10
    PIECES_AT = 11


class RecordField(enum.IntEnum):
    """The words of a kind's table for each record; behind the last one is a row with ends.

    FILLING is the request that the record fills, which is only run where that isn't there yet; -1
    for all others. PLACES and SPANS are its first rows of these.
    """

    WORK = 0
    PRIVATE = 1
    PARTS = 2
    FILLING = 3
    PLACES = 4
    SPANS = 5


class KindRow(enum.IntEnum):
    """The words of a graph for each of its kinds.

    TABLE is an address. KERNEL and KEY are what numbers of its kernels, and keys of its requests,
    are counted from.
    """

    TABLE = 0
    KERNEL = 1
    KEY = 2


class PlanArgument(enum.IntEnum):
    """Arguments of ``place_scratch`` and ``fill_records`` as words; arrays are their addresses.

    KINDS has rows of KindRow, WHICH by node the number of its kind, BASES by node a row of bases,
    of which the first SLOTS may be addresses of nodes and sources. KEYS are equal where the same is
    asked for. LIMIT is in bytes. STOP is a word: as soon as it isn't 0 the loop ends.

    To work with: KEPT, and USES, 1 << USE_BITS rows of an address and the last node that reads it,
    more than twice as many as there are sources of requests; SECRET is any odd number, by which
    they are found. FRESH is by request 1 where it has to be made.

    Results: where scratch does not suffice, NEEDED bytes; and of records what RecordTable says:
    NUMBERS, WORDS, POSITIONS, WORK, PRIVATE, PARTS, FIRST (with an end) and SPANS.
    """

    NODES = 0
    KINDS = 1
    WHICH = 2
    BASES = 3
    SLOTS = 4
    KEYS = 5
    LIMIT = 6
    STOP = 7
    KEPT = 8
    USES = 9
    USE_BITS = 10
    SECRET = 11
    FRESH = 12
    NEEDED = 13
    NUMBERS = 14
    WORDS = 15
    POSITIONS = 16
    WORK = 17
    PRIVATE = 18
    PARTS = 19
    FIRST = 20
    SPANS = 21
