"""FNV-1a 64, by which clients offer large tensors."""

from __future__ import annotations

import numpy as np

from protocol.ggml.hashing import FNV_PRIME
from rpc_server.devices.cpu.kernels.intrinsics import load_i64, load_u8, store_i64
from rpc_server.native.source import routine

_PRIME = np.int64(FNV_PRIME)


@routine
def fnv1a(address, size, value):  # type: ignore[no-untyped-def]
    """Return the hash of ``size`` bytes, going on from ``value``: unsigned numbers as int64."""
    for at in range(address, address + size):
        value = (value ^ load_u8(at)) * _PRIME
    return value


@routine
def fnv1a_lanes(address, stride, size, values):  # type: ignore[no-untyped-def]
    """Go on with the 8 hashes at ``values``, each over ``size`` bytes ``stride`` from the last's.

    Each hash waits for its last byte's product: eight of them take hardly longer than one.
    """
    a, b = load_i64(values), load_i64(values + 8)
    c, d = load_i64(values + 16), load_i64(values + 24)
    e, f = load_i64(values + 32), load_i64(values + 40)
    g, h = load_i64(values + 48), load_i64(values + 56)
    for at in range(address, address + size):
        a = (a ^ load_u8(at)) * _PRIME
        b = (b ^ load_u8(at + stride)) * _PRIME
        c = (c ^ load_u8(at + 2 * stride)) * _PRIME
        d = (d ^ load_u8(at + 3 * stride)) * _PRIME
        e = (e ^ load_u8(at + 4 * stride)) * _PRIME
        f = (f ^ load_u8(at + 5 * stride)) * _PRIME
        g = (g ^ load_u8(at + 6 * stride)) * _PRIME
        h = (h ^ load_u8(at + 7 * stride)) * _PRIME
    store_i64(values, a)
    store_i64(values + 8, b)
    store_i64(values + 16, c)
    store_i64(values + 24, d)
    store_i64(values + 32, e)
    store_i64(values + 40, f)
    store_i64(values + 48, g)
    store_i64(values + 56, h)
    return 0
