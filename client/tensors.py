"""A client's view of one ggml tensor: shape, strides, op, and where its data lies on a server."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.ggml.ops import Op
from protocol.ggml.types import (
    TYPE_INFO,
    GgmlType,
    has_contiguous_rows,
    is_contiguous,
    row_size,
)
from protocol.ggml.types import nbytes as tensor_nbytes

Dims = tuple[int, int, int, int]
Array = npt.NDArray[Any]

MAX_SOURCES = 10
MAX_PARAMS = 16
MAX_NAME_BYTES = 63  # the wire's 64 less the terminating zero

FLAG_INPUT = 1
FLAG_OUTPUT = 2
FLAG_PARAM = 4
FLAG_COMPUTE = 16

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


def contiguous_strides(type: GgmlType, ne: Dims) -> Dims:
    """Return the byte strides of dense data in ``ne`` elements, as ggml_new_tensor sets them."""
    nb0 = TYPE_INFO[type].type_size
    # Whole blocks only: views of part of a block keep ggml's (truncating) arithmetic.
    nb1 = nb0 * (ne[0] // TYPE_INFO[type].block_size)
    return nb0, nb1, nb1 * ne[1], nb1 * ne[1] * ne[2]


def encode_params(params: Iterable[int | float]) -> tuple[int, ...]:
    """Return 16 signed 32-bit words: of a float its float32 bits, of an int its low 32 bits."""
    words = [_param_word(p) for p in params]
    if len(words) > MAX_PARAMS:
        raise ShapeError(f"{len(words)} op_params, there is room for {MAX_PARAMS}")
    return tuple(words) + (0,) * (MAX_PARAMS - len(words))


def _param_word(value: int | float) -> int:
    if isinstance(value, float):
        # numpy rounds what is too big for float32 to infinity; struct would refuse it.
        with np.errstate(over="ignore"):
            return int(np.float32(value).view(np.int32))
    return ((int(value) + 0x80000000) & 0xFFFFFFFF) - 0x80000000


class Tensor:
    """A leaf, a node or a view of a graph; compared by identity.

    ``ne`` are elements and ``nb`` bytes, innermost dimension first as in ggml. ``id`` is any
    number that is unique within what one connection sends. ``buffer`` (the server's handle) and
    ``data`` (an address in that buffer) are 0 until the tensor is placed.
    """

    __slots__ = (
        "buffer", "data", "flags", "id", "name", "nb", "ne", "op", "op_params", "src", "type",
        "view_offs", "view_src",
    )  # fmt: skip

    def __init__(
        self,
        id: int,
        type: GgmlType,
        ne: Dims,
        *,
        op: Op = Op.NONE,
        params: Iterable[int | float] = (),
        src: Iterable[Tensor | None] = (),
        nb: Dims | None = None,
        view_src: Tensor | None = None,
        view_offs: int = 0,
        name: str = "",
    ) -> None:
        self.id = id
        self.type = type
        self.ne = ne
        self.nb = contiguous_strides(type, ne) if nb is None else nb
        self.op = op
        self.op_params = encode_params(params)
        self.src: tuple[Tensor | None, ...] = tuple(src)
        require(len(self.src) <= MAX_SOURCES, f"{len(self.src)} sources, the wire has room for 10")
        self.view_src = view_src
        self.view_offs = view_offs
        self.name = name
        self.flags = 0
        self.buffer = 0
        self.data = 0

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.ne))
        return f"<Tensor {self.id} {self.name!r} {self.op} {self.type.name} {shape}>"

    @property
    def nbytes(self) -> int:
        """Bytes from element 0 to behind the last one (ggml_nbytes)."""
        return tensor_nbytes(self.type, self.ne, self.nb)

    @property
    def nelements(self) -> int:
        return self.ne[0] * self.ne[1] * self.ne[2] * self.ne[3]

    @property
    def quantized(self) -> bool:
        return TYPE_INFO[self.type].quantized

    @property
    def contiguous(self) -> bool:
        """Dense and in order (ggml_is_contiguous)."""
        return is_contiguous(self.type, self.ne, self.nb)

    def contiguous_above(self, m: int) -> bool:
        """Return ggml_is_contiguous_<m>: dimensions 1 to ``m`` may have any stride."""
        return is_contiguous(self.type, self.ne, self.nb, m)

    @property
    def contiguous_rows(self) -> bool:
        """Elements within a row are dense (ggml_is_contiguous_rows)."""
        return has_contiguous_rows(self.type, self.ne, self.nb)

    @property
    def transposed(self) -> bool:
        return self.nb[0] > self.nb[1]

    def place(self, buffer: int, address: int) -> None:
        """Say where the data lies: in the server's ``buffer``, element 0 at ``address``.

        Of a view only what it views is placed: its own place follows from that.
        """
        require(self.view_src is None, f"{self!r} is a view: place {self.view_src!r}")
        self.buffer = buffer
        self.data = address

    @property
    def placed(self) -> bool:
        root = self if self.view_src is None else self.view_src
        return root.buffer != 0

    @property
    def location(self) -> tuple[int, int]:
        """Buffer handle and address of element 0; (0, 0) when not placed."""
        if self.view_src is None:
            return self.buffer, self.data
        buffer, data = self.view_src.location
        return (buffer, data + self.view_offs) if buffer else (0, 0)

    def fields(self, use_count: int = 0) -> dict[str, Any]:
        """Return the wire's rpc_tensor as its fields; ``nb`` keeps 32 bits, as the wire does."""
        buffer, data = self.location
        src = [0 if s is None else s.id for s in self.src]
        return {
            "id": self.id,
            "type": int(self.type),
            "buffer": buffer,
            "ne": list(self.ne),
            "nb": [stride & 0xFFFFFFFF for stride in self.nb],
            "op": self.op,
            "op_params": list(self.op_params),
            "flags": self.flags,
            "src": src + [0] * (MAX_SOURCES - len(src)),
            "view_src": 0 if self.view_src is None else self.view_src.id,
            "view_offs": self.view_offs,
            "data": data,
            "name": wire_name(self.name),
            "use_count": use_count,
        }


def wire_name(name: str) -> bytes:
    """Return ``name`` in UTF-8, cut to what the wire holds beside its terminating zero."""
    return name.encode()[:MAX_NAME_BYTES].split(b"\0")[0]


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


def param_f32(tensor: Tensor, index: int) -> float:
    """Return word ``index`` of the op_params read as float32."""
    return float(struct.unpack("<f", struct.pack("<i", tensor.op_params[index]))[0])
