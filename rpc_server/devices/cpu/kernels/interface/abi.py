"""The kernel ABI of the CPU device: what a compiled kernel is given.

A kernel is a function ``int64 kernel(record, part, n_parts)`` that does one of so many parts of the
work; one that has scratch for each thread takes a fourth word, the thread. All share that signature
so that a plan is an array of (function pointer, record address) pairs which compiled code runs from
end to end, without Python between nodes (see ``executor``). Of a small record each thread does one
part; a large one has more, and the run may be paused between them.

A *record* is a row of int64 words, filled once when the plan is made:

====================  ==========================================================================
word                  meaning
====================  ==========================================================================
``10*s + 0``          slot ``s``: host address of element 0 (slot 0 = dst, 1.. = src0..src9)
``10*s + 1``          ggml type number
``10*s + 2 .. 5``     ne[0..3], elements
``10*s + 6 .. 9``     nb[0..3], bytes
``110 .. 125``        op_params[0..15], int32 sign-extended
``128 .. 151``        extra words, their meaning is the kernel's own
====================  ==========================================================================

A kernel returns 0, or a status from :class:`Status`; it must not allocate, raise, wait or touch
Python objects. It gets addresses whose extents the parser has checked against their buffers and
shapes that the op's contract has accepted. Values in tensors that decide where it reads or writes
(row indices) are its own to check: each is loaded once, by ``abi.load_index``, and the value that
was checked is the one that is used, since the node's result may lie over it.
"""

from __future__ import annotations

import enum

DST = 0
SRC0, SRC1, SRC2, SRC3, SRC4, SRC5, SRC6, SRC7, SRC8, SRC9 = range(1, 11)

SLOT_WORDS = 10
N_SLOTS = 11
PARAM_WORD = SLOT_WORDS * N_SLOTS
EXTRA_WORD = 128
N_EXTRA = 24
RECORD_WORDS = EXTRA_WORD + N_EXTRA


class Status(enum.IntEnum):
    """The result of a kernel; everything but OK ends the graph with an error naming the node."""

    OK = 0
    INDEX_OUT_OF_RANGE = 1
