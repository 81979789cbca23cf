"""FNV-1a 64: the hash by which clients offer large tensors (SET_TENSOR_HASH).

Each byte depends on the one before, so no vector code helps: one compiled loop, without the GIL.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

FNV_OFFSET = 0xCBF29CE484222325
FNV_PRIME = 0x100000001B3


@functools.cache
def _compiled() -> Callable[[Any, Any], Any]:
    # numba takes half a second to import: only who hashes pays for it.
    import numba

    prime = np.uint64(FNV_PRIME)

    @numba.njit("uint64(Array(uint8, 1, 'C', readonly=True), uint64)", nogil=True)  # type: ignore[untyped-decorator]
    def run(data: Any, value: Any) -> Any:
        for byte in data:
            value = (value ^ np.uint64(byte)) * prime
        return value

    return run  # type: ignore[no-any-return]


def fnv1a_64(data: bytes | bytearray | memoryview, value: int = FNV_OFFSET) -> int:
    """Return FNV-1a 64 of ``data``; ``value`` continues a hash begun with the bytes before it."""
    array = np.frombuffer(data, np.uint8)
    if len(array) < 256:
        for byte in array.tolist():
            value = (value ^ byte) * FNV_PRIME & 0xFFFFFFFFFFFFFFFF
        return value
    return int(_compiled()(array, np.uint64(value)))
