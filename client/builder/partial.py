"""Ops that write or keep a part of a tensor, and small ones that have no family."""

from __future__ import annotations

import enum

from client.builder.nodes import NodeFactory
from client.tensors import require
from protocol.ggml.ops import Op
from protocol.ggml.types import TYPE_INFO, GgmlType
from protocol.tensor import Tensor

_MAX_OFFSET = 1 << 30

# Strides of a part's dimensions 1 to 3, and where it begins.
Layout = tuple[int, int, int, int]


class Triangle(enum.IntEnum):
    """The part of a matrix that stays (``enum ggml_tri_type``)."""

    UPPER_DIAG = 0
    UPPER = 1
    LOWER_DIAG = 2
    LOWER = 3


def _scalar(a: Tensor) -> bool:
    return a.ne == (1, 1, 1, 1)


class PartialOps(NodeFactory):
    """Results have the type and shape of the first source unless said otherwise."""

    def add1(self, a: Tensor, b: Tensor, *, inplace: bool = False) -> Tensor:
        """Return ``a`` plus the one element of ``b``."""
        require(_scalar(b), f"add1: {b!r} has more than one element")
        padded_1d = (
            a.nb[0] == TYPE_INFO[a.type].type_size
            and a.nb[2] == a.nb[1] * a.ne[1]
            and a.nb[3] == a.nb[2] * a.ne[2]
        )
        require(padded_1d, f"add1: rows of {a!r} do not follow each other evenly")
        return self.like(Op.ADD1, a, (a, b), inplace=inplace)

    def add_cast(self, a: Tensor, b: Tensor, type: GgmlType) -> Tensor:
        """Add to a quantized or 16-bit ``a`` with a result of another type."""
        rows = a.ne[0] == b.ne[0] and b.can_repeat_to(a)
        require(rows, f"add_cast: rows of {b!r} can't be repeated to {a!r}")
        narrow = a.quantized or a.type in (GgmlType.F16, GgmlType.BF16)
        require(narrow, f"add_cast: {a!r} is neither quantized nor of 16 bits")
        return self.op(Op.ADD, type, a.ne, (a, b))

    def acc(self, a: Tensor, b: Tensor, *layout: *Layout, inplace: bool = False) -> Tensor:
        """Add ``b`` to a part of ``a``; ``layout`` is nb1, nb2, nb3 and its offset, in bytes."""
        require(a.contiguous, f"acc: {a!r} is not contiguous")
        both = a.type == b.type == GgmlType.F32
        require(both, f"acc: {a!r} or {b!r} is not F32")
        return self._write(Op.ACC, a, b, layout, inplace=inplace)

    def set(self, a: Tensor, b: Tensor, *layout: *Layout, inplace: bool = False) -> Tensor:
        """Return ``a`` with ``b`` in place of the part that :meth:`acc` adds to."""
        require(0 <= layout[3] < _MAX_OFFSET, f"set: offset {layout[3]}")
        return self._write(Op.SET, a, b, layout, inplace=inplace)

    def set_1d(self, a: Tensor, b: Tensor, offset: int, *, inplace: bool = False) -> Tensor:
        """Do :meth:`set` with the strides of ``a``."""
        return self.set(a, b, *a.nb[1:], offset, inplace=inplace)

    def set_2d(
        self, a: Tensor, b: Tensor, nb1: int, offset: int, *, inplace: bool = False
    ) -> Tensor:
        """Do :meth:`set` with rows ``nb1`` bytes apart."""
        return self.set(a, b, nb1, *a.nb[2:], offset, inplace=inplace)

    def _write(self, op: Op, a: Tensor, b: Tensor, layout: Layout, *, inplace: bool) -> Tensor:
        require(b.nelements <= a.nelements, f"{op}: {b!r} has more elements than {a!r}")
        return self.like(op, a, (a, b), (*layout, int(inplace)), inplace=inplace)

    def diag(self, a: Tensor) -> Tensor:
        """Return rows (n, 1, ...) as the diagonals of matrices (n, n, ...)."""
        require(a.ne[1] == 1, f"diag: {a!r} has more than one row")
        return self.op(Op.DIAG, a.type, (a.ne[0], a.ne[0], *a.ne[2:]), (a,))

    def tri(self, a: Tensor, triangle: Triangle) -> Tensor:
        """Square matrices of which a triangle stays; the rest is 0."""
        fits = a.type == GgmlType.F32 and a.contiguous and a.ne[0] == a.ne[1]
        require(fits, f"tri: {a!r} are no contiguous square matrices of F32")
        return self.like(Op.TRI, a, (a,), (int(triangle),))

    def diag_mask_zero(self, a: Tensor, n_past: int, *, inplace: bool = False) -> Tensor:
        """Put zeros right of the diagonal that starts at column ``n_past``."""
        return self.like(Op.DIAG_MASK_ZERO, a, (a,), (n_past,), inplace=inplace)
