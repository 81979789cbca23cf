"""The hash of the tensor cache in compiled code."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from protocol.ggml.hashing import FNV_OFFSET, fnv1a_64
from rpc_server.devices.cpu.catalog import fnv1a, library
from rpc_server.native.routine import CompileError

_FNV = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 3)


def compiled_hash() -> Callable[..., int]:
    """FNV-1a 64, called as protocol.ggml.hashing.fnv1a_64. Its code is got ready from here on."""
    library().request([fnv1a])

    def fnv(data: memoryview, value: int = FNV_OFFSET) -> int:
        array = np.frombuffer(data, np.uint8)
        try:
            run = _FNV(fnv1a.address)
        except CompileError:
            return fnv1a_64(data, value)
        # The system's numbers have a sign.
        begun = value - (1 << 64) if value >> 63 else value
        digest: int = run(array.ctypes.data, len(array), begun)
        return digest % (1 << 64)

    return fnv
