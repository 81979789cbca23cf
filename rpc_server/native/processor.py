"""What a processor can do that LLVM does not see by itself.

LLVM knows an ARM processor's instructions by its model, and of a model that it doesn't know (or a
virtual machine doesn't tell) only a few of them. Linux tells them all, as bits of two words that a
process is started with (``AT_HWCAP`` and ``AT_HWCAP2`` of getauxval(3)).
"""

from __future__ import annotations

import ctypes
import platform
import sys

# Bits of AT_HWCAP (16) and AT_HWCAP2 (26), as asm/hwcap.h has them, and LLVM's names of what they
# stand for.
_TOLD: dict[int, dict[int, str]] = {
    16: {8: "lse", 10: "fullfp16", 12: "rdm", 20: "dotprod", 23: "fp16fml"},
    26: {13: "i8mm", 14: "bf16"},
}


def features_of(words: dict[int, int]) -> list[str]:
    """Return LLVM's names of the features in the auxiliary vector's ``words``, by their number."""
    return [
        name
        for number, names in _TOLD.items()
        for bit, name in names.items()
        if words.get(number, 0) >> bit & 1
    ]


def told_features() -> list[str]:
    """Return LLVM's names of features that the system says this processor has; [] if not on ARM."""
    if sys.platform != "linux" or platform.machine() != "aarch64":
        return []
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.argtypes, getauxval.restype = [ctypes.c_ulong], ctypes.c_ulong
    return features_of({number: getauxval(number) for number in _TOLD})
