"""A tensor of a parsed graph: what every op's contract, reference and kernel reads."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

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


def label_of(op: Op, name: str, type: GgmlType, ne: Sequence[int]) -> str:
    """Return how messages name a tensor."""
    return f"{op} '{name}' ({type.name} {'x'.join(map(str, ne))})"


@dataclass(slots=True, eq=False)
class Tensor:
    """One tensor off the wire, its references resolved; compared by identity.

    ``ne`` are elements, ``nb`` bytes, innermost dimension first as in ggml. ``address`` is where
    element 0 lies (a host address or a device pointer), 0 if the data is not on this server.
    ``op_params`` are 16 signed 32-bit words.
    """

    id: int
    name: str
    type: GgmlType
    op: Op
    ne: Dims
    nb: Dims
    op_params: tuple[int, ...] = (0,) * 16
    flags: int = 0
    src: tuple[Tensor | None, ...] = (None,) * 10
    view_src: Tensor | None = None
    address: int = 0
    use_count: int = 0
    type_size: int = field(init=False)
    block_size: int = field(init=False)
    quantized: bool = field(init=False)

    def __post_init__(self) -> None:
        info = TYPE_INFO[self.type]
        self.type_size = info.type_size
        self.block_size = info.block_size
        self.quantized = info.quantized

    @property
    def nbytes(self) -> int:
        """Bytes from element 0 to behind the last one (ggml_nbytes)."""
        return tensor_nbytes(self.type, self.ne, self.nb)

    @property
    def nelements(self) -> int:
        return self.ne[0] * self.ne[1] * self.ne[2] * self.ne[3]

    @property
    def nrows(self) -> int:
        return self.ne[1] * self.ne[2] * self.ne[3]

    @property
    def empty(self) -> bool:
        return 0 in self.ne

    @property
    def row_size(self) -> int:
        """Bytes of one dense row of ne[0] elements (ggml_row_size)."""
        return row_size(self.type, self.ne[0])

    @property
    def contiguous_rows(self) -> bool:
        """Elements within a row are dense (ggml_is_contiguous_rows)."""
        return has_contiguous_rows(self.type, self.ne, self.nb)

    @property
    def contiguous(self) -> bool:
        """Dense in memory order; strides of dimensions of one element don't matter."""
        return is_contiguous(self.type, self.ne, self.nb)

    def contiguous_above(self, m: int) -> bool:
        """Return ggml_is_contiguous_<m>: dimensions 1 to ``m`` may have any stride."""
        return is_contiguous(self.type, self.ne, self.nb, m)

    @property
    def transposed(self) -> bool:
        return self.nb[0] > self.nb[1]

    def param_i32(self, i: int) -> int:
        return self.op_params[i]

    def param_f32(self, i: int) -> float:
        return float(struct.unpack("<f", struct.pack("<i", self.op_params[i]))[0])

    @property
    def label(self) -> str:
        """The name of this tensor in messages."""
        return label_of(self.op, self.name, self.type, self.ne)

    def same_shape(self, other: Tensor) -> bool:
        return self.ne == other.ne

    def can_repeat_to(self, other: Tensor) -> bool:
        """Return whether ``other`` is a whole number of copies of this in each dimension."""
        return all(o % s == 0 if s else o == 0 for s, o in zip(self.ne, other.ne, strict=True))
