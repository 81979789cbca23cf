"""The hash of the tensor cache in compiled code."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from protocol.hashing import FNV_OFFSET, fnv1a_64
from rpc_server.devices.cpu.catalog import fnv1a, library
from rpc_server.native.routine import CompileError

_FNV = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 3)


def compiled_hash() -> Callable[[memoryview], int]:
    """FNV-1a 64 of bytes. The function's code is got ready from here on."""
    library().request([fnv1a])

    def fnv(data: memoryview) -> int:
        array = np.frombuffer(data, np.uint8)
        try:
            run = _FNV(fnv1a.address)
        except CompileError:
            return fnv1a_64(data)
        digest: int = run(array.ctypes.data, len(array), FNV_OFFSET - (1 << 64))
        return digest % (1 << 64)

    return fnv
