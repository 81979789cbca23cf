"""The hash by which tensors are offered, in compiled code."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from protocol.ggml.hashing import FNV_OFFSET, fnv1a_64
from rpc_server.devices.cpu.catalog import fnv1a, fnv1a_lanes, library
from rpc_server.native.routine import CompileError

_FNV = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 3)
_LANES = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 4)
_WIDTH = 8


def compiled_hash() -> Callable[..., int]:
    """Return FNV-1a 64, called as protocol.ggml.hashing.fnv1a_64.

    Its code is got ready from here on.
    """
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


class CompiledLanes:
    """Goes on with several hashes at once, see rpc_server.models.hashing.HashLanes."""

    width = _WIDTH

    def __init__(self) -> None:
        library().request([fnv1a_lanes])

    def __call__(self, rows: npt.NDArray[np.uint8], size: int, values: Sequence[int]) -> list[int]:
        """Return ``values``, each gone on from over ``size`` bytes of its row."""
        assert len(values) <= len(rows) == _WIDTH
        assert size <= rows.shape[1]
        try:
            run = _LANES(fnv1a_lanes.address)
        except CompileError:
            return [
                fnv1a_64(row[:size].data, value) for row, value in zip(rows, values, strict=False)
            ]
        state = np.zeros(_WIDTH, np.uint64)
        state[: len(values)] = values
        run(rows.ctypes.data, rows.strides[0], size, state.ctypes.data)
        return [int(value) for value in state[: len(values)]]
