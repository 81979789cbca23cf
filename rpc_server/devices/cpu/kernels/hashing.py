"""FNV-1a 64, by which clients offer large tensors."""

from __future__ import annotations

import numpy as np

from protocol.ggml.hashing import FNV_PRIME
from rpc_server.devices.cpu.kernels.intrinsics import load_u8
from rpc_server.native.source import routine

_PRIME = np.int64(FNV_PRIME)


@routine
def fnv1a(address, size, value):  # type: ignore[no-untyped-def]
    """The hash of ``size`` bytes, going on from ``value``: unsigned numbers as int64."""
    for at in range(address, address + size):
        value = (value ^ load_u8(at)) * _PRIME
    return value
