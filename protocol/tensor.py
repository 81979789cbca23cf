"""A tensor: what a client builds and sends, and what a server reads, plans and computes.

One class for both, with the fields of ggml's own. Where a tensor lies is told in two ways. Those
with memory of their own have an ``address``. A view that a client builds lies in what it views, and
may be made before that has a place: its ``location`` follows from there (:func:`place_views` notes
it). What comes off the wire brings an address of its own, views too, and is checked to lie in a
buffer by that (rpc_server/graph/parse.py); nothing is ever derived from what it says it views.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from protocol.ggml.ops import Op
from protocol.ggml.types import TYPE_INFO, GgmlType, has_contiguous_rows, is_contiguous, row_size
from protocol.ggml.types import nbytes as tensor_nbytes
from protocol.messages import MAX_NAME, MAX_PARAM_WORDS, MAX_SOURCES

Dims = tuple[int, int, int, int]

NO_PARAMS = (0,) * MAX_PARAM_WORDS
NO_SOURCES = (None,) * MAX_SOURCES


def contiguous_strides(type: GgmlType, ne: Sequence[int]) -> Dims:
    """Return the byte strides of dense data in ``ne`` elements, as ggml_new_tensor sets them."""
    nb0 = TYPE_INFO[type].type_size
    # Whole blocks only: views of part of a block keep ggml's (truncating) arithmetic.
    nb1 = nb0 * (ne[0] // TYPE_INFO[type].block_size)
    return nb0, nb1, nb1 * ne[1], nb1 * ne[1] * ne[2]


def padded_sources(given: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Return sources as a tensor has them: ten, None where there is none.

    Raises ValueError for more.
    """
    found = tuple(given)
    if len(found) > MAX_SOURCES:
        raise ValueError(f"{len(found)} sources, a tensor has {MAX_SOURCES} at most")
    return found + NO_SOURCES[len(found) :]


def label_of(op: Op, name: str, type: GgmlType, ne: Sequence[int]) -> str:
    """Return how messages name a tensor."""
    return f"{op} '{name}' ({type.name} {'x'.join(map(str, ne))})"


def wire_name(name: str) -> bytes:
    """Return ``name`` in UTF-8, cut to what the wire holds beside its terminating zero."""
    return name.encode()[: MAX_NAME - 1].split(b"\0")[0]


@dataclass(slots=True, eq=False, repr=False)
class Tensor:
    """A leaf, a node or a view of a graph; compared by identity.

    ``ne`` are elements and ``nb`` bytes, innermost dimension first as in ggml. ``id`` is any number
    that is unique within what one connection sends. ``op_params`` are 16 signed 32-bit words.
    ``src`` has ten entries, None where there is no source.

    ``address`` is where element 0 lies: for a client one in the server's ``buffer`` (its handle),
    for a server one of the host or of a device; 0 if the data has no place, or is not here.
    ``view_offs`` are the bytes from the start of ``view_src`` on at which a client's view begins.
    """

    id: int
    type: GgmlType
    ne: Dims
    nb: Dims
    op: Op = Op.NONE
    op_params: tuple[int, ...] = NO_PARAMS
    src: tuple[Tensor | None, ...] = NO_SOURCES
    name: str = ""
    flags: int = 0
    view_src: Tensor | None = None
    view_offs: int = 0
    buffer: int = 0
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

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.ne))
        return f"<Tensor {self.id} {self.name!r} {self.op} {self.type.name} {shape}>"

    @property
    def label(self) -> str:
        """The name of this tensor in messages."""
        return label_of(self.op, self.name, self.type, self.ne)

    # -- sizes and layout

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
        """Dense and in order; strides of dimensions of one element don't matter."""
        return is_contiguous(self.type, self.ne, self.nb)

    def contiguous_above(self, m: int) -> bool:
        """Return ggml_is_contiguous_<m>: dimensions 1 to ``m`` may have any stride."""
        return is_contiguous(self.type, self.ne, self.nb, m)

    @property
    def transposed(self) -> bool:
        return self.nb[0] > self.nb[1]

    def same_shape(self, other: Tensor) -> bool:
        return self.ne == other.ne

    def can_repeat_to(self, other: Tensor) -> bool:
        """Return whether ``other`` is a whole number of copies of this in each dimension.

        Of a tensor without elements only one without elements is (ggml_can_repeat).
        """
        if 0 in self.ne:
            return 0 in other.ne
        return all(o % s == 0 for s, o in zip(self.ne, other.ne, strict=True))

    # -- parameters

    def param_i32(self, i: int) -> int:
        return self.op_params[i]

    def param_f32(self, i: int) -> float:
        """Return word ``i`` of the op_params read as float32."""
        return float(struct.unpack("<f", struct.pack("<i", self.op_params[i]))[0])

    # -- a client's: where its data lies on a server, and how it is sent

    def place(self, buffer: int, address: int) -> None:
        """Say where the data lies: in the server's ``buffer``, element 0 at ``address``.

        Of a view only what it views is placed: its own place follows from that. Raises ValueError
        for a view.
        """
        if self.view_src is not None:
            raise ValueError(f"{self!r} is a view: place {self.view_src!r}")
        self.buffer = buffer
        self.address = address

    @property
    def placed(self) -> bool:
        root = self if self.view_src is None else self.view_src
        return root.buffer != 0

    @property
    def location(self) -> tuple[int, int]:
        """Buffer handle and address of element 0; (0, 0) when not placed."""
        if self.view_src is None:
            return self.buffer, self.address
        buffer, address = self.view_src.location
        return (buffer, address + self.view_offs) if buffer else (0, 0)

    def fields(self, use_count: int = 0) -> dict[str, Any]:
        """Return the wire's rpc_tensor as its fields; ``nb`` keeps 32 bits, as the wire does."""
        buffer, address = self.location
        return {
            "id": self.id,
            "type": int(self.type),
            "buffer": buffer,
            "ne": list(self.ne),
            "nb": [stride & 0xFFFFFFFF for stride in self.nb],
            "op": self.op,
            "op_params": list(self.op_params),
            "flags": self.flags,
            "src": [0 if s is None else s.id for s in self.src],
            "view_src": 0 if self.view_src is None else self.view_src.id,
            "view_offs": self.view_offs,
            "data": address,
            "name": wire_name(self.name),
            "use_count": use_count,
        }


def place_views(tensors: Iterable[Tensor]) -> None:
    """Note in a client's views where they lie, for who reads addresses as off the wire."""
    for t in tensors:
        if t.view_src is not None:
            t.buffer, t.address = t.location
