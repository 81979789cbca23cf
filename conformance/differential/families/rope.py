"""ROPE and ROPE_BACK: every mode, scaling and place of the turned elements."""

from __future__ import annotations

from client.builder.products import ROPE_IMROPE, ROPE_MROPE, ROPE_NEOX, ROPE_NORMAL, ROPE_VISION
from conformance.differential.sketch import Sketch, family
from conformance.differential.values import ValueKind
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor

F32, F16, I32 = GgmlType.F32, GgmlType.F16, GgmlType.I32

MODES = {
    "normal": ROPE_NORMAL,
    "neox": ROPE_NEOX,
    "mrope": ROPE_MROPE,
    "imrope": ROPE_IMROPE,
    "vision": ROPE_VISION,
}
_VARIANTS = [(mode, type) for mode in MODES for type in (F32, F16)]

Sections = tuple[int, int, int, int]


def head_size(s: Sketch, multiple: int) -> int:
    sizes = (2, 4, 8, 16, 36, 40, 64, 72, 80, 96, 112, 128, 192, 256, 512)
    return s.pick([n for n in sizes if n % multiple == 0])


def positions(s: Sketch, n_tokens: int, per_token: int = 1) -> Tensor:
    """Draw small and large positions, as in a prompt or in any order; some below zero."""
    ne = (n_tokens * per_token,)
    start = s.pick((0, 1, 7, 500, 4096, 131_071, 1_000_000))
    if s.flag():
        return s.leaf(I32, ne, ValueKind.RANGE, start, 1.0, layout="dense")
    low, high = s.pick(((0, 63), (0, 4095), (100_000, 1_000_000), (-100, 100)))
    return s.leaf(I32, ne, ValueKind.INTEGERS, low, high, layout="dense")


def sections(s: Sketch, width: int) -> Sections:
    """Draw shares of time, height, width and the rest, of which one of the first is not empty."""
    quarter = max(width // 8, 1)
    left = width
    sizes = []
    for _ in range(4):
        sizes.append(min(s.pick((quarter, 0, 1, s.integer(0, max(width // 4, 1)))), left))
        left -= sizes[-1]
    if not any(sizes[:3]):
        sizes[:3] = [1, 0, 0]
        sizes[3] = min(sizes[3], width - 1)
    return sizes[0], sizes[1], sizes[2], sizes[3]


def _register(op: Op) -> None:
    @family(op, variants=_VARIANTS, examples=60 if op is Op.ROPE else 30)
    def draw(s: Sketch, variant: tuple[str, GgmlType]) -> None:
        mode, type = MODES[variant[0]], variant[1]
        vision, multi = mode == ROPE_VISION, bool(mode & ROPE_MROPE)
        ne0 = head_size(s, 4 if vision else 2)
        n_tokens = s.pick((1, 2, s.size(64)))
        heads = s.size(max(min(20, 16384 // (ne0 * n_tokens)), 1))
        kinds = [ValueKind.NORMAL] * 7 + [ValueKind.SPECIAL]
        x = s.leaf(type, (ne0, heads, n_tokens, s.pick((1, 1, 2))), kinds, layout="rows")
        if vision:
            n_dims, n_offs = ne0 // 2, 0
        else:
            n_dims = s.pick((ne0, 2 * s.integer(1, ne0 // 2)))
            n_offs = 2 * s.integer(0, (ne0 - n_dims) // 2) if s.flag() else 0
        factors = None
        if s.flag():
            n_factors = s.pick((ne0 // 2, n_dims // 2)) if not vision else ne0 // 2
            high = s.pick((1.1, 40.0))
            factors = s.leaf(F32, (n_factors,), ValueKind.UNIFORM, 0.9, high, layout="dense")
        yarn = s.flag()
        build = s.g.rope_ext if op is Op.ROPE else s.g.rope_ext_back
        y = build(
            x,
            positions(s, n_tokens, 4 if multi else 1),
            factors,
            n_dims,
            mode,
            s.pick((4096, 512, 131_072)) if yarn else s.pick((0, 4096)),
            s.pick((10000.0, 500_000.0, 1e6, 100.0)),
            s.pick((1.0, 0.25, 0.0625, 1.4245)),
            s.pick((1.0, 0.7465, -0.5)) if yarn else 0.0,
            s.pick((1.0, 1.4245)),
            s.pick((32.0, 8.0)) if yarn else s.pick((0.0, 32.0)),
            1.0 if yarn else s.pick((0.0, 1.0)),
            sections=sections(s, ne0) if multi else (0, 0, 0, 0),
            n_offs=n_offs,
            inplace=s.flag(),
        )
        s.output(y)


for _op in (Op.ROPE, Op.ROPE_BACK):
    _register(_op)
