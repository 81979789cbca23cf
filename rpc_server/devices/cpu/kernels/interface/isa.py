"""Which instructions add up products of bytes: an instruction set is a constant of some kernels."""

from __future__ import annotations

import enum


class Isa(enum.IntEnum):
    """A way to add up four byte products; each needs what its name says.

    Those up to FP16FML are ARM's, which multiplies F16 besides; the others are x86's, of which the
    last one multiplies pairs of BF16. Of those that a processor has the last is the best.
    """

    GENERIC = 0
    NEON = 1
    DOTPROD = 2
    FP16FML = 3
    AVX2 = 4
    AVX_VNNI = 5
    AVX512 = 6
    AVX512_VNNI = 7
    AVX512_BF16 = 8

    @property
    def is_arm(self) -> bool:
        """True for those of ARM, whose registers are 32 of 16 bytes."""
        return Isa.NEON <= self <= Isa.FP16FML
