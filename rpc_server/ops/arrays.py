"""Tensors as arrays: how an op's reference reads its sources and writes its result."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.types import from_f32, to_f32

NATIVE: dict[GgmlType, Any] = {
    GgmlType.F32: np.float32,
    GgmlType.F16: np.float16,
    GgmlType.F64: np.float64,
    GgmlType.I8: np.int8,
    GgmlType.I16: np.int16,
    GgmlType.I32: np.int32,
    GgmlType.I64: np.int64,
    # numpy has no bfloat16: views of it are the raw 16-bit patterns.
    GgmlType.BF16: np.uint16,
}


# Elements that are accumulated in one go, a millisecond or two.
_ACCUMULATED_AT_ONCE = 1 << 19


class ArrayContext:
    """Gives references their arrays on one device; this class is the one for host memory.

    ``xp`` is the array module the arrays belong to. ``look`` is called between two pieces of long
    work, at the latest when the next array is asked for: others may have the device meanwhile, and
    it raises what ends the graph if that was stopped.
    """

    xp: ModuleType = np

    def __init__(self, look: Callable[[], None] = lambda: None) -> None:
        self.look = look

    def memory(self, address: int, size: int) -> Any:
        """Return uint8[size] over device memory at ``address``."""
        if size == 0:
            return np.empty(0, np.uint8)
        return np.frombuffer(memoryview((ctypes.c_uint8 * size).from_address(address)), np.uint8)

    def view(self, t: Tensor) -> Any:
        """Return the tensor's memory through its strides: (ne3, ne2, ne1, ne0), native dtype.

        Quantized tensors come as uint8 (ne3, ne2, ne1, row bytes); BF16 as uint16 bit patterns.
        """
        self.look()
        memory = self.memory(t.address, t.nbytes)
        shape = t.ne[::-1]
        strides = t.nb[::-1]
        dtype = np.dtype(NATIVE.get(t.type, np.uint8))
        if t.type not in NATIVE:
            shape = (*shape[:3], t.row_size)
            strides = (*strides[:3], 1)
        if 0 in shape:
            return self.xp.empty(shape, dtype)
        return self.xp.ndarray(shape, dtype, memory, 0, strides)

    def f32(self, t: Tensor) -> Any:
        """Return float32 values, shape (ne3, ne2, ne1, ne0); a view of the memory if it is F32."""
        values = self.view(t)
        if t.type is GgmlType.F32:
            return values
        if t.type in NATIVE and t.type is not GgmlType.BF16:
            return values.astype(np.float32)
        if t.type is GgmlType.BF16:
            return (values.astype(np.uint32) << 16).view(np.float32)
        return to_f32(t.type, values, self.xp)

    def store(self, t: Tensor, values: Any) -> None:
        """Write ``values``, broadcast to (ne3, ne2, ne1, ne0), in the tensor's type."""
        if t.empty:
            return
        target = self.view(t)
        if t.type in NATIVE and t.type is not GgmlType.BF16:
            target[...] = values
            return
        full = self.xp.broadcast_to(self.xp.asarray(values, np.float32), t.ne[::-1])
        blocks = from_f32(t.type, self.xp.ascontiguousarray(full), self.xp)
        target[...] = blocks.view(np.uint16) if t.type is GgmlType.BF16 else blocks

    def accumulate(self, function: np.ufunc, x: Any) -> Any:
        """Return ``function.accumulate`` of float32 ``x`` along its last axis, in order.

        In pieces: numpy holds the interpreter's lock all the while, and the event loop with it.
        """
        if not x.size:
            return self.xp.empty(x.shape, self.xp.float32)
        rows = x.reshape(-1, x.shape[-1])
        done = self.xp.empty(rows.shape, self.xp.float32)
        n = rows.shape[1]
        together = max(_ACCUMULATED_AT_ONCE // n, 1)
        for first in range(0, len(rows), together):
            some = slice(first, first + together)
            for start in range(0, n, _ACCUMULATED_AT_ONCE):
                self.look()
                piece = rows[some, start : start + _ACCUMULATED_AT_ONCE]
                if start:
                    piece = self.xp.concatenate([done[some, start - 1 : start], piece], axis=1)
                sums = function.accumulate(piece, axis=1, dtype=self.xp.float32)
                done[some, start : start + _ACCUMULATED_AT_ONCE] = sums[:, bool(start) :]
        return done.reshape(x.shape)
