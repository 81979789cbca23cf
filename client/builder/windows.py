"""Ops of image encoders with windows and relative positions."""

from __future__ import annotations

from client.builder.nodes import NodeFactory
from client.tensors import require
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor


class WindowOps(NodeFactory):
    """Results are F32 unless said otherwise."""

    def win_part(self, a: Tensor, width: int) -> Tensor:
        """Cut (C, W, H) into windows (C, width, width, number), zeros beyond the edges."""
        require(a.type == GgmlType.F32 and a.ne[3] == 1, f"win_part: {a!r} is no F32 image")
        require(width > 0, f"win_part: windows of width {width}")
        across, down = (-(-n // width) for n in a.ne[1:3])
        ne = (a.ne[0], width, width, across * down)
        return self.op(Op.WIN_PART, GgmlType.F32, ne, (a,), (across, down, width))

    def win_unpart(self, a: Tensor, w0: int, h0: int, width: int) -> Tensor:
        """Return the image (C, w0, h0) that :meth:`win_part` cut into windows."""
        require(a.type == GgmlType.F32, f"win_unpart: {a!r} is not F32")
        return self.op(Op.WIN_UNPART, GgmlType.F32, (a.ne[0], w0, h0), (a,), (width,))

    def get_rel_pos(self, a: Tensor, qh: int, kh: int) -> Tensor:
        """Return the row of the 16-bit ``a`` (C, 2*kh - 1) for each distance: F16 (C, kh, qh)."""
        require(qh == kh, f"get_rel_pos: {qh} and {kh} differ")
        require(a.ne[1] == 2 * qh - 1, f"get_rel_pos: {a!r} for {qh} positions")
        return self.op(Op.GET_REL_POS, GgmlType.F16, (a.ne[0], kh, qh), (a,))

    def add_rel_pos(self, a: Tensor, pw: Tensor, ph: Tensor, *, inplace: bool = False) -> Tensor:
        """Add to each row of ``a`` (n*n, a*b, batches) ``pw`` along n and ``ph`` across.

        These are F32 (n, a, b, batches).
        """
        require(pw.ne == ph.ne, f"add_rel_pos: {pw!r} and {ph!r} differ")
        for source in (a, pw, ph):
            require(source.contiguous, f"add_rel_pos: {source!r} is not contiguous")
        for source in (pw, ph):
            require(source.type == GgmlType.F32, f"add_rel_pos: {source!r} is not F32")
        fits = (pw.ne[0] ** 2, pw.ne[1] * pw.ne[2], pw.ne[3]) == a.ne[:3]
        require(fits, f"add_rel_pos: {pw!r} doesn't fit {a!r}")
        return self.like(Op.ADD_REL_POS, a, (a, pw, ph), (int(inplace),), inplace=inplace)
