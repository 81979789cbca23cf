"""Normalisations of rows and of groups of channels, and the gradient of one."""

from __future__ import annotations

from conformance.differential.sketch import Sketch, family
from conformance.differential.values import ValueKind
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor

F32 = GgmlType.F32

_EPS = (1e-6, 1e-5, 0.0, 1e-12, 0.1)
# What isn't finite makes whole rows not-a-number, or all zeros but that element.
_KINDS = [ValueKind.NORMAL] * 5 + [ValueKind.INFINITE, ValueKind.SPECIAL]


def _rows(s: Sketch, layout: str) -> Tensor:
    """Rows of any length with any values, often far from zero."""
    ne = s.shape(s.pick((256, 4096, 16384)))
    if s.seldom():
        # A row that doesn't vary but for rounding has no defined direction; zeros do not vary.
        return s.leaf(F32, ne, ValueKind.CONSTANT, 0.0, layout=layout)
    low, high = s.pick(((0.0, 1.0), (0.0, 1e-4), (0.0, 1e15), (3.0, 1.0), (-20.0, 5.0)))
    return s.leaf(F32, ne, _KINDS, low, high, layout=layout)


def _register(op: Op, name: str, layout: str) -> None:
    @family(op, examples=300)
    def draw(s: Sketch, _: str) -> None:
        a = _rows(s, layout)
        s.output(getattr(s.g, name)(a, s.pick(_EPS), inplace=s.flag()))


# RMS_NORM reads dense rows only.
for _op, _name, _layout in (
    (Op.NORM, "norm", "any"),
    (Op.RMS_NORM, "rms_norm", "rows"),
    (Op.L2_NORM, "l2_norm", "any"),
):
    _register(_op, _name, _layout)


@family(Op.GROUP_NORM, examples=250)
def group_norm(s: Sketch, _: str) -> None:
    """Channels (dimension 2) may be no multiple of groups, and fewer than these."""
    channels = s.size(100)
    ne = (s.size(64), s.size(16), channels, s.integer(1, 3))
    low, high = s.pick(((0.0, 1.0), (0.0, 1e-4), (3.0, 1.0)))
    a = s.leaf(F32, ne, _KINDS, low, high, layout="rows")
    groups = s.pick((1, 2, 3, 8, 32, channels, s.integer(1, channels), channels + 1))
    s.output(s.g.group_norm(a, groups, s.pick(_EPS), inplace=s.flag()))


@family(Op.RMS_NORM_BACK, examples=250)
def rms_norm_back(s: Sketch, _: str) -> None:
    ne = s.shape()
    low, high = s.pick(((0.0, 1.0), (0.0, 1e-3), (0.0, 100.0), (2.0, 1.0)))
    x = s.leaf(F32, ne, ValueKind.NORMAL, low, high, layout="rows")
    gradient = s.leaf(F32, ne, ValueKind.NORMAL, layout="rows")
    s.output(s.g.rms_norm_back(gradient, x, s.pick((1e-6, 1e-5, 1e-3, 0.1))))
