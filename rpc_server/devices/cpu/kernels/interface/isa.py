"""Which instructions add up products of bytes: an instruction set is a constant of some kernels."""

from __future__ import annotations

import enum


class Isa(enum.IntEnum):
    """A way to add up four byte products; each needs what its name says.

    The last one multiplies pairs of BF16 besides.
    """

    GENERIC = 0
    AVX2 = 1
    AVX_VNNI = 2
    AVX512 = 3
    AVX512_VNNI = 4
    AVX512_BF16 = 5
