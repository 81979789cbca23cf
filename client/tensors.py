"""A client's tensors: shapes and parameters checked, their values to and from numpy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.ggml.types import GgmlType, row_size
from protocol.messages import MAX_PARAM_WORDS
from protocol.tensor import Dims, Tensor

Array = npt.NDArray[Any]

# What a type's data looks like to numpy; a type missing here (quantized) is rows of raw bytes.
# bfloat16 has no numpy type: its bits are handed out as uint16.
NUMPY_TYPES: dict[GgmlType, np.dtype[Any]] = {
    GgmlType.F32: np.dtype("<f4"),
    GgmlType.F16: np.dtype("<f2"),
    GgmlType.BF16: np.dtype("<u2"),
    GgmlType.F64: np.dtype("<f8"),
    GgmlType.I8: np.dtype("i1"),
    GgmlType.I16: np.dtype("<i2"),
    GgmlType.I32: np.dtype("<i4"),
    GgmlType.I64: np.dtype("<i8"),
}


class ShapeError(ValueError):
    """The operands don't fit the op: what ggml's constructor would have asserted."""


def require(condition: bool, message: str) -> None:
    """Raise ShapeError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ShapeError(message)


def dims(ne: Iterable[int]) -> Dims:
    """Return ``ne`` filled up with ones to four dimensions.

    Raises ShapeError for more or for negative ones.
    """
    values = tuple(int(n) for n in ne)
    require(1 <= len(values) <= 4, f"a tensor has 1 to 4 dimensions, not {len(values)}")
    require(all(n >= 0 for n in values), f"negative dimension in {values}")
    padded = values + (1,) * (4 - len(values))
    return padded[0], padded[1], padded[2], padded[3]


def encode_params(params: Iterable[int | float]) -> tuple[int, ...]:
    """Return 16 signed 32-bit words: of a float its float32 bits, of an int its low 32 bits."""
    words = [_param_word(p) for p in params]
    if len(words) > MAX_PARAM_WORDS:
        raise ShapeError(f"{len(words)} op_params, there is room for {MAX_PARAM_WORDS}")
    return tuple(words) + (0,) * (MAX_PARAM_WORDS - len(words))


def _param_word(value: int | float) -> int:
    if isinstance(value, float):
        # numpy rounds what is too big for float32 to infinity; struct would refuse it.
        with np.errstate(over="ignore"):
            return int(np.float32(value).view(np.int32))
    return ((int(value) + 0x80000000) & 0xFFFFFFFF) - 0x80000000


def to_bytes(tensor: Tensor, values: Array | bytes | bytearray | memoryview) -> memoryview:
    """Return what to upload for all of ``tensor``: ``values`` checked against its type and size.

    An array's shape is (ne3, ne2, ne1, ne0), leading ones left out or not; its dtype is cast to
    the tensor's where numpy knows the type. Bytes (or a uint8 array for a quantized tensor) go
    as they are. ShapeError when the size doesn't match; the tensor must be contiguous.
    """
    require(tensor.contiguous, f"{tensor!r} is not contiguous: upload what it views")
    if isinstance(values, np.ndarray):
        dtype = NUMPY_TYPES.get(tensor.type)
        if dtype is None:
            require(values.dtype == np.uint8, f"{tensor!r} takes blocks as uint8")
            dtype = values.dtype
        else:
            shape = tuple(reversed(tensor.ne))
            while len(shape) > values.ndim and shape[0] == 1:
                shape = shape[1:]
            require(values.shape == shape, f"{tensor!r} takes shape {shape}, not {values.shape}")
        dense = np.ascontiguousarray(values, dtype=dtype)
        view = dense.reshape(-1).view(np.uint8).data
    else:
        view = memoryview(values).cast("B")
    require(view.nbytes == tensor.nbytes, f"{tensor!r} holds {tensor.nbytes} B, got {view.nbytes}")
    return view


def from_bytes(tensor: Tensor, raw: Array) -> Array:
    """Return ``raw`` (uint8, as downloaded) as a strided array.

    Shape (ne3, ne2, ne1, ne0); of quantized types (ne3, ne2, ne1, bytes of a row), uint8.
    """
    dtype = NUMPY_TYPES.get(tensor.type)
    strides = tuple(reversed(tensor.nb))
    if dtype is None:
        shape = (*reversed(tensor.ne[1:]), row_size(tensor.type, tensor.ne[0]))
        return np.ndarray(shape, np.uint8, raw, strides=(*strides[:3], 1))
    return np.ndarray(tuple(reversed(tensor.ne)), dtype, raw, strides=strides)
