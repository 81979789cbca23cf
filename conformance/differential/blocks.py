"""Random data of quantized types: any code a block can hold, with scales that are numbers.

Blocks are made byte by byte, not by quantizing values, so that codes occur which a quantizer would
not choose. What may not be random is a block's scale: the offsets below are those of the structs in
ggml-common.h.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.ggml.types import TYPE_INFO, GgmlType

Bytes = npt.NDArray[np.uint8]

_SCALE_FIRST = "Q4_0 Q5_0 Q8_0 IQ1_S IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS Q1_0 Q2_0"
# Where the F16 scales (and minima) of a block lie.
F16_SCALES: dict[GgmlType, tuple[int, ...]] = {
    **{GgmlType[name]: (0,) for name in _SCALE_FIRST.split()},
    **{GgmlType[name]: (0, 2) for name in ("Q4_1", "Q5_1", "Q8_1", "Q4_K", "Q5_K")},
    GgmlType.Q2_K: (80, 82),
    GgmlType.Q3_K: (108,),
    GgmlType.Q6_K: (208,),
    GgmlType.TQ1_0: (52,),
    GgmlType.TQ2_0: (64,),
}


def random_blocks(type: GgmlType, count: int, random: np.random.Generator) -> Bytes:
    """Return ``count`` blocks of a quantized type as uint8[count, type_size]."""
    if not count:
        return np.empty((0, TYPE_INFO[type].type_size), np.uint8)
    blocks = random.integers(0, 256, (count, TYPE_INFO[type].type_size), np.uint8)
    scales = (random.standard_normal((count, 2)) * 0.05).astype(np.float16)
    for i, at in enumerate(F16_SCALES.get(type, ())):
        blocks[:, at : at + 2] = _bytes_of(scales[:, i])
    if type is GgmlType.IQ1_M:
        # The scale's four nibbles are the high ones of the four words of block scales.
        bits = scales[:, 0].view(np.uint16)
        words = blocks[:, 48:56].copy().view("<u2")
        for i in range(4):
            words[:, i] = (words[:, i] & 0x0FFF) | (((bits >> (4 * i)) & 0xF) << 12)
        blocks[:, 48:56] = words.view(np.uint8)
    elif type is GgmlType.MXFP4:
        # A power of two with bias 127 (E8M0).
        blocks[:, 0] = random.integers(118, 132, count)
    elif type is GgmlType.NVFP4:
        # Four unsigned scales with four bits of exponent and three of mantissa (bias 7).
        blocks[:, 0:4] = random.integers(0x18, 0x50, (count, 4))
    elif type is GgmlType.Q8_K:
        blocks[:, 4:260] = _activation_codes(blocks[:, 4:260])
        blocks[:, 0:4] = _bytes_of(scales[:, 0].astype(np.float32))
        sums = blocks[:, 4:260].view(np.int8).reshape(count, 16, 16).sum(2, dtype=np.int16)
        blocks[:, 260:292] = _bytes_of(sums)
    elif type is GgmlType.Q8_0:
        blocks[:, 2:34] = _activation_codes(blocks[:, 2:34])
    if type is GgmlType.Q8_1:
        # The second word is the scale times the sum of the codes.
        blocks[:, 4:36] = _activation_codes(blocks[:, 4:36])
        total = blocks[:, 4:36].view(np.int8).sum(1, dtype=np.int32)
        blocks[:, 2:4] = _bytes_of((scales[:, 0].astype(np.float32) * total).astype(np.float16))
    return blocks


def _activation_codes(codes: Bytes) -> Bytes:
    """Codes with -127 for -128, which no quantizer makes: upstream's products can't negate it."""
    return np.where(codes == 0x80, np.uint8(0x81), codes)


def _bytes_of(values: npt.NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)
