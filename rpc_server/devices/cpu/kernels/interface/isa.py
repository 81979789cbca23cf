"""Which instructions add up products of bytes: an instruction set is a constant of some kernels."""

from __future__ import annotations

import enum


class Isa(enum.IntEnum):
    """A way to add up four byte products; each needs what its name says.

    Those from NEON to I8MM are ARM's, of which the last two multiply F16 besides, and the last one
    two rows with two columns at once; the others are x86's, of which the last one multiplies pairs
    of BF16. Of those that a processor has the last is the best.
    """

    GENERIC = 0
    NEON = 1
    DOTPROD = 2
    FP16FML = 3
    I8MM = 4
    AVX2 = 5
    AVX_VNNI = 6
    AVX512 = 7
    AVX512_VNNI = 8
    AVX512_BF16 = 9

    @property
    def is_arm(self) -> bool:
        """True for those of ARM, whose registers are 32 of 16 bytes."""
        return Isa.NEON <= self <= Isa.I8MM
