"""Decoders of block types: uint8 (blocks, type size) to float32 (blocks, block size).

Most come from the ``gguf`` package, whose array code agrees with ggml bit for bit; here are the
types it lacks: the formats of activations, which no file holds, and the newest of weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from protocol.ggml.tables import FP4_VALUES, UE4M3_VALUES
from protocol.ggml.types import GgmlType

# uint8 and float32, a row for each block.
Bytes = np.ndarray[Any, Any]
Floats = np.ndarray[Any, Any]
Decoder = Callable[[Bytes], Floats]


def _f16(field: Bytes) -> Floats:
    return field.view(np.float16).astype(np.float32)


def _q1_0(blocks: Bytes) -> Floats:
    d = _f16(blocks[:, :2])
    bits = np.unpackbits(blocks[:, 2:], axis=-1, bitorder="little")
    return np.where(bits == 1, d, -d)


def _q2_0(blocks: Bytes) -> Floats:
    codes = (blocks[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
    q = codes.reshape(len(blocks), -1).astype(np.float32) - 1
    return q * _f16(blocks[:, :2])


def _q8_1(blocks: Bytes) -> Floats:
    return blocks[:, 4:].view(np.int8).astype(np.float32) * _f16(blocks[:, :2])


def _q8_k(blocks: Bytes) -> Floats:
    return blocks[:, 4:260].view(np.int8).astype(np.float32) * blocks[:, :4].view(np.float32)


def _nvfp4(blocks: Bytes) -> Floats:
    # Four sub-blocks of 16: a scale byte each, then 8 bytes of codes each, low nibbles first.
    codes = blocks[:, 4:].reshape(-1, 4, 8)
    q = FP4_VALUES[np.concatenate([codes & 15, codes >> 4], axis=-1)]
    values: Floats = q * UE4M3_VALUES[blocks[:, :4], None]
    return values.reshape(len(blocks), 64)


_OWN: dict[GgmlType, Decoder] = {
    GgmlType.Q1_0: _q1_0,
    GgmlType.Q2_0: _q2_0,
    GgmlType.Q8_1: _q8_1,
    GgmlType.Q8_K: _q8_k,
    GgmlType.NVFP4: _nvfp4,
}


@functools.cache
def decoder(type: GgmlType) -> Decoder:
    """Return the decoder of a quantized type."""
    if type in _OWN:
        return _OWN[type]
    # The package takes a while to import, and a graph of plain floats needs none of it.
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    number = GGMLQuantizationType(int(type))

    def decode(blocks: Bytes) -> Any:
        return dequantize(blocks, number)

    return decode
