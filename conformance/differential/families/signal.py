"""Pooling, resizing and mirrored ends of lines and pictures; embeddings of time steps."""

from __future__ import annotations

from dataclasses import dataclass

from client.builder import signals
from conformance.differential.compare import EXACT
from conformance.differential.sketch import Sketch, family
from conformance.differential.type_sets import F16, F32
from conformance.differential.values import ValueKind
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor

_NUMBERS = (ValueKind.NORMAL, ValueKind.SPECIAL)

# -- POOL_1D, POOL_2D, POOL_2D_BACK ----------------------------------------------------------------

_POOLS = {"max": signals.POOL_MAX, "avg": signals.POOL_AVG}


@dataclass(frozen=True, slots=True)
class _Window:
    """One dimension: windows over ``samples``. ggml's paddings may be fractions."""

    samples: int
    width: int
    stride: int
    padding: float


def _window(s: Sketch, most: int) -> _Window:
    """Numbers that leave at least one place; ``most`` samples beyond what that takes."""
    width, stride = s.pick((2, 1, 3, 5, 9)), s.pick((2, 1, 3, 7))
    padding = s.pick((0.0, 0.0, 1.0, float(width // 2), width - 1.0, 0.5, -1.0))
    covered = int(width - 2 * padding) + 1
    return _Window(max(covered, 1) + s.integer(0, most), width, stride, padding)


# Not-a-numbers count only until the next element of a window.
_POOLED = (
    ValueKind.NORMAL,
    ValueKind.INTEGERS,
    ValueKind.CONSTANT,
    ValueKind.INFINITE,
    ValueKind.SPECIAL,
)


def _pooled(s: Sketch, type: GgmlType, ne: tuple[int, ...]) -> Tensor:
    return s.leaf(type, ne, _POOLED, -2.0, 3.0, layout="even")


_VARIANTS = [(kind, type) for kind in _POOLS for type in (F32, F16)]


@family(Op.POOL_1D, variants=_VARIANTS, examples=75)
def _pool_1d(s: Sketch, variant: tuple[str, GgmlType]) -> None:
    kind, type = variant
    w = _window(s, 200)
    x = _pooled(s, type, (w.samples, *s.shape(200, rank=3)[:3]))
    s.output(s.g.pool_1d(x, _POOLS[kind], w.width, w.stride, int(w.padding)))


@family(Op.POOL_2D, variants=_VARIANTS, examples=75)
def _pool_2d(s: Sketch, variant: tuple[str, GgmlType]) -> None:
    kind, type = variant
    w, h = _window(s, 20), _window(s, 20)
    x = _pooled(s, type, (w.samples, h.samples, *s.shape(20, rank=2)[:2]))
    size, stride = (w.width, h.width), (w.stride, h.stride)
    s.output(s.g.pool_2d(x, _POOLS[kind], size, stride, (w.padding, h.padding)))


@family(Op.POOL_2D_BACK, variants=_VARIANTS, examples=75)
def _pool_2d_back(s: Sketch, variant: tuple[str, GgmlType]) -> None:
    kind, type = variant
    w, h = _window(s, 20), _window(s, 20)
    size, stride = (w.width, h.width), (w.stride, h.stride)
    padding = (w.padding, h.padding)
    if type is F16:
        # Where windows overlap upstream adds up F16 step by step, and of means their bits.
        stride = (max(w.width, w.stride), max(h.width, h.stride))
    ne = (w.samples, h.samples, *s.shape(20, rank=2, empty=False)[:2])
    x = s.leaf(type, ne, _POOLED, -2.0, 3.0, layout="contiguous")
    shape = s.g.pool_2d(x, _POOLS[kind], size, stride, padding).ne
    gradients = s.leaf(F32, shape, layout="contiguous")
    t = s.g.pool_2d_back(gradients, x, _POOLS[kind], size, stride, padding)
    if type is F16:
        # The type of the source, which ggml's constructor forgets: the op would read F32.
        t = s.g.op(Op.POOL_2D_BACK, F16, ne, (gradients, x), t.op_params)
    s.output(t)


# -- UPSCALE ---------------------------------------------------------------------------------------

_CORNERS = signals.SCALE_ALIGN_CORNERS
_MODES = {
    "nearest": signals.SCALE_NEAREST,
    "bilinear": signals.SCALE_BILINEAR,
    "bicubic": signals.SCALE_BICUBIC,
    "nearest corners": signals.SCALE_NEAREST | _CORNERS,
    "bilinear corners": signals.SCALE_BILINEAR | _CORNERS,
    "bicubic corners": signals.SCALE_BICUBIC | _CORNERS,
    "antialias": signals.SCALE_BILINEAR | signals.SCALE_ANTIALIAS,
    "antialias corners": signals.SCALE_BILINEAR | signals.SCALE_ANTIALIAS | _CORNERS,
}


@family(Op.UPSCALE, variants=list(_MODES), examples=50)
def _upscale(s: Sketch, name: str) -> None:
    ne = (s.size(33), s.size(33), s.size(4), s.size(4))
    kinds: tuple[ValueKind, ...] = (ValueKind.NORMAL, ValueKind.UNIFORM)
    if name.startswith("nearest"):
        kinds = _NUMBERS
    elif name.startswith("bilinear"):
        # The other modes have weights that are zero but for rounding.
        kinds = (ValueKind.NORMAL, ValueKind.NORMAL, ValueKind.INFINITE)
    a = s.leaf(F32, ne, kinds)
    if s.flag():
        to: tuple[int, ...] = tuple(n * s.pick((2, 1, 3, 4)) for n in ne[:2]) + ne[2:]
    else:
        to = (s.size(65), s.size(65), s.size(9), 0 if s.seldom() and s.seldom() else s.size(9))
    s.output(s.g.interpolate(a, to, _MODES[name]))


# -- PAD_REFLECT_1D --------------------------------------------------------------------------------


@family(Op.PAD_REFLECT_1D, examples=400)
def _pad_reflect_1d(s: Sketch, _: str) -> None:
    first, *outer = s.shape(4096)
    ne = (max(first, 1), *outer)
    a = s.leaf(F32, ne, _NUMBERS, layout="contiguous")
    before, behind = (s.pick((0, ne[0] - 1, s.integer(0, ne[0] - 1))) for _ in range(2))
    s.output(s.g.pad_reflect_1d(a, before, behind), EXACT)


# -- TIMESTEP_EMBEDDING ----------------------------------------------------------------------------


@family(Op.TIMESTEP_EMBEDDING, examples=350)
def _timestep_embedding(s: Sketch, _: str) -> None:
    kinds = (ValueKind.UNIFORM, ValueKind.INTEGERS, ValueKind.SPECIAL)
    low, high = s.pick(((0.0, 1.0), (0.0, 999.0), (-3.0, 3.0)))
    # What follows the first row is left out.
    steps = s.leaf(F32, (s.size(65), s.pick((1, 1, 2))), kinds, low, high, layout="rows")
    dim = s.pick((320, 1, 2, 3, 8, 9, 256, s.integer(1, 400)))
    s.output(s.g.timestep_embedding(steps, dim, s.pick((10000, 1, 2, 100, 1000000))))
