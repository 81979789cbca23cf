"""Values that codes of the non-linear block types stand for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# E2M1, doubled so that all are whole numbers: MXFP4 and NVFP4, whose scales are halved in turn.
FP4_VALUES: NDArray[np.float32] = np.array(
    [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32
)

# IQ4_NL and IQ4_XS.
IQ4_VALUES: NDArray[np.float32] = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)


def _ue4m3() -> NDArray[np.float32]:
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(
        exponent == 0, np.ldexp(mantissa, -9), np.ldexp(1 + mantissa / 8, exponent - 7)
    )
    # 0x7F is the format's NaN, which ggml reads as 0.
    value[0x7F] = 0
    halved: NDArray[np.float32] = (value * 0.5).astype(np.float32)
    return halved


# Half the value of each unsigned E4M3 byte: the scales of NVFP4.
UE4M3_VALUES: NDArray[np.float32] = _ue4m3()

# Half the value of each E8M0 byte: the scales of MXFP4.
E8M0_VALUES: NDArray[np.float32] = np.ldexp(1.0, np.arange(256) - 128).astype(np.float32)
