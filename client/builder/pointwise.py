"""Ops on single elements and on rows: arithmetic, activations, norms, reductions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from client.builder.nodes import NodeFactory, require_mask_and_sinks
from client.tensors import dims, require
from protocol.ggml.ops import GluOp, Op, UnaryOp
from protocol.ggml.types import TYPE_INFO, GgmlType
from protocol.tensor import Tensor

# The families below differ in a name only, so they are made from it. `Any` is the builder.
_Unary = Callable[[Any, Tensor], Tensor]
_Binary = Callable[[Any, Tensor, Tensor], Tensor]
_Glu = Callable[[Any, Tensor], Tensor]
_GluSplit = Callable[[Any, Tensor, Tensor], Tensor]


def _mapped(op: Op) -> tuple[_Unary, _Unary]:
    """An op of its own that maps elements; and in place."""

    def new(self: NodeFactory, a: Tensor) -> Tensor:
        return self.like(op, a, (a,))

    def inplace(self: NodeFactory, a: Tensor) -> Tensor:
        return self.like(op, a, (a,), inplace=True)

    return new, inplace


def _unary(kind: UnaryOp) -> tuple[_Unary, _Unary]:
    """A kind of UNARY; and in place."""

    def new(self: PointwiseOps, a: Tensor) -> Tensor:
        return self.unary(a, kind)

    def inplace(self: PointwiseOps, a: Tensor) -> Tensor:
        return self.unary(a, kind, inplace=True)

    return new, inplace


def _broadcast(op: Op) -> tuple[_Binary, _Binary]:
    """An op on ``a`` and ``b`` repeated to the shape of ``a``; and in the memory of ``a``."""

    def check(a: Tensor, b: Tensor) -> None:
        require(b.can_repeat_to(a), f"{op}: {b!r} can't be repeated to {a!r}")

    def new(self: NodeFactory, a: Tensor, b: Tensor) -> Tensor:
        check(a, b)
        return self.like(op, a, (a, b))

    def inplace(self: NodeFactory, a: Tensor, b: Tensor) -> Tensor:
        check(a, b)
        return self.like(op, a, (a, b), inplace=True)

    return new, inplace


def _glu(kind: GluOp) -> tuple[_Glu, _Glu, _GluSplit]:
    """A kind of GLU: on the halves of rows, on them swapped, on two tensors."""

    def halves(self: PointwiseOps, a: Tensor) -> Tensor:
        return self.glu(a, kind)

    def swapped(self: PointwiseOps, a: Tensor) -> Tensor:
        return self.glu(a, kind, swapped=True)

    def split(self: PointwiseOps, a: Tensor, b: Tensor) -> Tensor:
        return self.glu_split(a, b, kind)

    return halves, swapped, split


class PointwiseOps(NodeFactory):
    """Results have the type and shape of the first source unless said otherwise."""

    add, add_inplace = _broadcast(Op.ADD)
    sub, sub_inplace = _broadcast(Op.SUB)
    mul, mul_inplace = _broadcast(Op.MUL)
    div, div_inplace = _broadcast(Op.DIV)

    sqr, sqr_inplace = _mapped(Op.SQR)
    sqrt, sqrt_inplace = _mapped(Op.SQRT)
    log, log_inplace = _mapped(Op.LOG)
    sin, sin_inplace = _mapped(Op.SIN)
    cos, cos_inplace = _mapped(Op.COS)

    abs, abs_inplace = _unary(UnaryOp.ABS)
    sgn, sgn_inplace = _unary(UnaryOp.SGN)
    neg, neg_inplace = _unary(UnaryOp.NEG)
    step, step_inplace = _unary(UnaryOp.STEP)
    tanh, tanh_inplace = _unary(UnaryOp.TANH)
    elu, elu_inplace = _unary(UnaryOp.ELU)
    relu, relu_inplace = _unary(UnaryOp.RELU)
    sigmoid, sigmoid_inplace = _unary(UnaryOp.SIGMOID)
    gelu, gelu_inplace = _unary(UnaryOp.GELU)
    gelu_quick, gelu_quick_inplace = _unary(UnaryOp.GELU_QUICK)
    gelu_erf, gelu_erf_inplace = _unary(UnaryOp.GELU_ERF)
    silu, silu_inplace = _unary(UnaryOp.SILU)
    hardswish, hardswish_inplace = _unary(UnaryOp.HARDSWISH)
    hardsigmoid, hardsigmoid_inplace = _unary(UnaryOp.HARDSIGMOID)
    exp, exp_inplace = _unary(UnaryOp.EXP)
    expm1, expm1_inplace = _unary(UnaryOp.EXPM1)
    softplus, softplus_inplace = _unary(UnaryOp.SOFTPLUS)
    floor, floor_inplace = _unary(UnaryOp.FLOOR)
    ceil, ceil_inplace = _unary(UnaryOp.CEIL)
    round, round_inplace = _unary(UnaryOp.ROUND)
    trunc, trunc_inplace = _unary(UnaryOp.TRUNC)

    reglu, reglu_swapped, reglu_split = _glu(GluOp.REGLU)
    geglu, geglu_swapped, geglu_split = _glu(GluOp.GEGLU)
    swiglu, swiglu_swapped, swiglu_split = _glu(GluOp.SWIGLU)
    geglu_erf, geglu_erf_swapped, geglu_erf_split = _glu(GluOp.GEGLU_ERF)
    geglu_quick, geglu_quick_swapped, geglu_quick_split = _glu(GluOp.GEGLU_QUICK)

    def unary(self, a: Tensor, kind: UnaryOp, *, inplace: bool = False) -> Tensor:
        """Return UNARY of any kind without parameters."""
        require(a.contiguous_rows, f"{kind.name}: rows of {a!r} are not contiguous")
        return self.like(Op.UNARY, a, (a,), (int(kind),), inplace=inplace)

    def xielu(self, a: Tensor, alpha_n: float, alpha_p: float, beta: float, eps: float) -> Tensor:
        """Apply xIELU; both alphas go through softplus here, as in ggml."""
        params = (
            int(UnaryOp.XIELU),
            beta + _softplus(alpha_n),
            _softplus(alpha_p),
            float(beta),
            float(eps),
        )
        return self.like(Op.UNARY, a, (a,), params)

    def leaky_relu(self, a: Tensor, negative_slope: float, *, inplace: bool = False) -> Tensor:
        return self.like(Op.LEAKY_RELU, a, (a,), (float(negative_slope),), inplace=inplace)

    def glu(self, a: Tensor, kind: GluOp, *, swapped: bool = False) -> Tensor:
        """Gate one half of the rows of ``a`` by the other; half as many columns result."""
        require(a.contiguous_above(1), f"{kind.name}: {a!r} is not contiguous in rows")
        ne = (a.ne[0] // 2, *a.ne[1:])
        return self.op(Op.GLU, a.type, ne, (a, None), (int(kind), int(swapped)))

    def glu_split(self, a: Tensor, b: Tensor, kind: GluOp) -> Tensor:
        """Gate value ``b`` by ``a``, of the same type and shape."""
        return self._glu_pair(a, b, (int(kind), 0))

    def swiglu_oai(self, a: Tensor, b: Tensor, alpha: float, limit: float) -> Tensor:
        return self._glu_pair(a, b, (int(GluOp.SWIGLU_OAI), 0, float(alpha), float(limit)))

    def swiglu_clamp(self, a: Tensor, b: Tensor, limit: float) -> Tensor:
        return self._glu_pair(a, b, (int(GluOp.SWIGLU_CLAMP), 0, 0.0, float(limit)))

    def _glu_pair(self, a: Tensor, b: Tensor, params: tuple[int | float, ...]) -> Tensor:
        for source in (a, b):
            require(source.contiguous_above(1), f"GLU: {source!r} is not contiguous in rows")
        require(a.ne == b.ne and a.type == b.type, f"GLU: {a!r} and {b!r} differ")
        return self.op(Op.GLU, a.type, a.ne, (a, b), params)

    # -- with parameters

    def scale(self, a: Tensor, s: float, b: float = 0.0, *, inplace: bool = False) -> Tensor:
        """Return ``a * s + b`` (ggml_scale and ggml_scale_bias)."""
        padded_1d = (
            a.nb[0] == TYPE_INFO[a.type].type_size
            and a.nb[2] == a.nb[1] * a.ne[1]
            and a.nb[3] == a.nb[2] * a.ne[2]
        )
        require(padded_1d, f"scale: rows of {a!r} do not follow each other evenly")
        return self.like(Op.SCALE, a, (a,), (float(s), float(b)), inplace=inplace)

    def clamp(self, a: Tensor, min: float, max: float, *, inplace: bool = False) -> Tensor:
        return self.like(Op.CLAMP, a, (a,), (float(min), float(max)), inplace=inplace)

    def fill(self, a: Tensor, value: float, *, inplace: bool = False) -> Tensor:
        """Return a tensor like ``a`` with one value everywhere."""
        require(a.type in (GgmlType.F32, GgmlType.F16), f"fill: {a!r} is not F32 or F16")
        require(a.contiguous, f"fill: {a!r} is not contiguous")
        return self.like(Op.FILL, a, (a,), (float(value),), inplace=inplace)

    def add_id(self, a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
        """Return ``a[:, e, t] + b[:, ids[e, t]]``; ids are I32."""
        require(ids.type == GgmlType.I32, f"add_id: {ids!r} is not I32")
        fits = a.ne[0] == b.ne[0] and a.ne[1] == ids.ne[0] and a.ne[2] == ids.ne[1]
        require(fits, f"add_id: {a!r}, {b!r} and {ids!r} don't fit")
        return self.like(Op.ADD_ID, a, (a, b, ids))

    # -- rows

    def norm(self, a: Tensor, eps: float, *, inplace: bool = False) -> Tensor:
        return self.like(Op.NORM, a, (a,), (float(eps),), inplace=inplace)

    def rms_norm(self, a: Tensor, eps: float, *, inplace: bool = False) -> Tensor:
        return self.like(Op.RMS_NORM, a, (a,), (float(eps),), inplace=inplace)

    def l2_norm(self, a: Tensor, eps: float, *, inplace: bool = False) -> Tensor:
        return self.like(Op.L2_NORM, a, (a,), (float(eps),), inplace=inplace)

    def group_norm(self, a: Tensor, n_groups: int, eps: float, *, inplace: bool = False) -> Tensor:
        """Normalize over dimensions 0, 1 and a share of 2."""
        return self.like(Op.GROUP_NORM, a, (a,), (n_groups, float(eps)), inplace=inplace)

    def sum(self, a: Tensor) -> Tensor:
        """Return the sum of all elements, one element."""
        return self.op(Op.SUM, a.type, (1,), (a,))

    def sum_rows(self, a: Tensor) -> Tensor:
        """Return the sum of each row, one element a row."""
        return self.op(Op.SUM_ROWS, a.type, (1, *a.ne[1:]), (a,))

    def mean(self, a: Tensor) -> Tensor:
        """Return the mean of each row, one F32 a row."""
        return self.op(Op.MEAN, GgmlType.F32, (1, *a.ne[1:]), (a,))

    def cumsum(self, a: Tensor) -> Tensor:
        """Return running sums along rows; F32."""
        require(a.type == GgmlType.F32, f"cumsum: {a!r} is not F32")
        return self.like(Op.CUMSUM, a, (a,))

    def argmax(self, a: Tensor) -> Tensor:
        """Return the I32 position of each row's maximum, (ne1); ``a`` is a matrix."""
        require(a.ne[2:] == (1, 1), f"argmax: {a!r} is not a matrix")
        return self.op(Op.ARGMAX, GgmlType.I32, (a.ne[1],), (a,))

    def argsort(self, a: Tensor, descending: bool = False) -> Tensor:
        """Return I32 positions that sort each row."""
        return self.op(Op.ARGSORT, GgmlType.I32, a.ne, (a,), (int(descending),))

    def top_k(self, a: Tensor, k: int) -> Tensor:
        """Return I32 positions of each row's ``k`` greatest, in no certain order."""
        require(a.ne[0] >= k, f"top_k: rows of {a!r} have less than {k}")
        return self.op(Op.TOP_K, GgmlType.I32, (k, *a.ne[1:]), (a,))

    def soft_max(self, a: Tensor, *, inplace: bool = False) -> Tensor:
        return self.soft_max_ext(a, None, 1.0, 0.0, inplace=inplace)

    def soft_max_ext(
        self,
        a: Tensor,
        mask: Tensor | None,
        scale: float,
        max_bias: float,
        *,
        sinks: Tensor | None = None,
        inplace: bool = False,
    ) -> Tensor:
        """Return softmax of ``a * scale + mask * slope`` along rows.

        ``mask`` is F16 or F32, (ne0, at least ne1) and repeated in dimensions 2 and 3; ``sinks``
        (ggml_soft_max_add_sinks) one F32 for each of dimension 2.
        """
        require(a.contiguous, f"soft_max: {a!r} is not contiguous")
        if mask is not None:
            require(mask.type in (GgmlType.F16, GgmlType.F32), f"soft_max: type of {mask!r}")
            fits = (
                mask.contiguous
                and mask.ne[0] == a.ne[0]
                and mask.ne[1] >= a.ne[1]
                and _divides(mask.ne[2], a.ne[2])
                and _divides(mask.ne[3], a.ne[3])
            )
            require(fits, f"soft_max: mask {mask!r} doesn't fit {a!r}")
        require_mask_and_sinks("soft_max", a, mask, max_bias, sinks)
        return self.like(
            Op.SOFT_MAX, a, (a, mask, sinks), (float(scale), float(max_bias)), inplace=inplace
        )

    def diag_mask_inf(self, a: Tensor, n_past: int, *, inplace: bool = False) -> Tensor:
        """Put minus infinity right of the diagonal that starts at column ``n_past``."""
        return self.like(Op.DIAG_MASK_INF, a, (a,), (n_past,), inplace=inplace)

    # -- shapes

    def repeat(self, a: Tensor, *ne: int) -> Tensor:
        """Return ``a`` repeated to the shape ``ne`` (ggml_repeat_4d)."""
        shape = dims(ne)
        fits = 0 in a.ne or all(_divides(n, m) for n, m in zip(a.ne, shape, strict=True))
        require(fits, f"repeat: {a!r} can't be repeated to {shape}")
        return self.op(Op.REPEAT, a.type, shape, (a,))

    def concat(self, a: Tensor, b: Tensor, dim: int) -> Tensor:
        """Return ``b`` behind ``a`` in dimension ``dim``; type and other dimensions agree."""
        require(0 <= dim < 4, f"concat: there is no dimension {dim}")
        require(a.type == b.type, f"concat: {a!r} and {b!r} differ in type")
        ne = list(a.ne)
        for d in range(4):
            if d == dim:
                ne[d] += b.ne[d]
            else:
                require(a.ne[d] == b.ne[d], f"concat: {a!r} and {b!r} differ in dimension {d}")
        return self.op(Op.CONCAT, a.type, ne, (a, b), (dim,))

    def pad(self, a: Tensor, p0: int, p1: int = 0, p2: int = 0, p3: int = 0) -> Tensor:
        """Put zeros behind the ends of the dimensions."""
        return self.pad_ext(a, (0, 0, 0, 0), (p0, p1, p2, p3))

    def pad_ext(
        self,
        a: Tensor,
        before: tuple[int, int, int, int],
        after: tuple[int, int, int, int],
        *,
        circular: bool = False,
    ) -> Tensor:
        """Put zeros (or with ``circular`` the other end) before and after each dimension."""
        ne = [n + p + q for n, p, q in zip(a.ne, before, after, strict=True)]
        params = [p for pair in zip(before, after, strict=True) for p in pair]
        return self.op(Op.PAD, a.type, ne, (a,), (*params, int(circular)))

    def roll(self, a: Tensor, *shifts: int) -> Tensor:
        """Rotate dimensions by ``shifts`` (up to four, |shift| below the dimension)."""
        require(a.nb[0] == TYPE_INFO[a.type].type_size, f"roll: rows of {a!r} are not dense")
        full = (*shifts, 0, 0, 0, 0)[:4]
        fits = all(-n < shift < n for n, shift in zip(a.ne, full, strict=True))
        require(fits, f"roll: {shifts} of {a!r}")
        return self.like(Op.ROLL, a, (a,), full)


def _divides(n: int, m: int) -> bool:
    return n != 0 and m % n == 0


def _softplus(x: float) -> float:
    return x if x > 20 else math.log1p(math.exp(x))
