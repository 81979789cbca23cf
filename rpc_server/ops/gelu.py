"""GELU and its quick form by table, as ggml's CPU looks them up.

For F32 and F16 ggml rounds the argument to half precision and reads the result, in half precision
too, from a table of all 65536; far from 0 F32 takes the function's limits. Results differ from the
exact function by up to 2^-10, so only the same table gives the same numbers. BF16 has no table in
ggml; it gets one here, as its arguments are no more.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.ggml.types import GgmlType

Floats = npt.NDArray[np.float32]

# Beyond it on either side GELU of F32 is the argument, or 0.
FAR = np.float32(10)


def _c_function(name: str, otherwise: Callable[[Any], Any]) -> Callable[[Floats], Floats]:
    """C's ``name`` of floats, which ggml uses; ``otherwise`` in double precision without it."""
    try:
        function = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return lambda x: np.asarray(otherwise(x.astype(np.float64)), np.float32)
    function.argtypes = [ctypes.c_float]
    function.restype = ctypes.c_float
    return lambda x: np.fromiter(map(function, x.tolist()), np.float32, len(x))


def _gelu(x: Floats) -> Floats:
    # Fused, as compilers make it of ggml's expression.
    squared = (x * np.float32(0.044715)).astype(np.float64) * x.astype(np.float64)
    inner = np.float32(0.79788456080286535588) * x * (1 + squared).astype(np.float32)
    tanh = _c_function("tanhf", np.tanh)(inner)
    return np.asarray(np.float32(0.5) * x * (1 + tanh), np.float32)


def _gelu_quick(x: Floats) -> Floats:
    grown = _c_function("expf", np.exp)(np.float32(-1.702) * x)
    return np.asarray(x * (1 / (1 + grown)), np.float32)


@functools.cache
def table(quick: bool, type: GgmlType) -> Floats:
    """Return float32[65536]: the result for each bit pattern of ``type``, F16 or BF16."""
    bits = np.arange(1 << 16, dtype=np.uint32)
    half = type is GgmlType.F16
    with np.errstate(all="ignore"):
        if half:
            x = bits.astype(np.uint16).view(np.float16).astype(np.float32)
        else:
            x = (bits << 16).view(np.float32)
        y = _gelu_quick(x) if quick else _gelu(x)
        return y.astype(np.float16).astype(np.float32) if half else y


def look_up(xp: ModuleType, x: Any, type: GgmlType, *, quick: bool) -> Any:
    """Return GELU of float32 ``x`` that came from ``type``: F32, F16 or BF16."""
    if type is GgmlType.BF16:
        return xp.asarray(table(quick, type))[x.view(xp.uint32) >> 16]
    bits = xp.ascontiguousarray(x).astype(xp.float16).view(xp.uint16)
    y = xp.asarray(table(quick, GgmlType.F16))[bits]
    if quick or type is GgmlType.F16:
        return y
    y = xp.where(x >= FAR, x, y)
    return xp.where(x <= -FAR, xp.float32(0), y)
