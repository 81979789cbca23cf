"""Ops of image encoders with windows and relative positions; all read their sources as dense."""

from __future__ import annotations

from conformance.differential.compare import EXACT
from conformance.differential.sketch import Sketch, family
from conformance.differential.type_sets import BF16, F16, F32
from conformance.differential.values import ValueKind
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType

_NUMBERS = (ValueKind.NORMAL, ValueKind.SPECIAL)


def _channels(s: Sketch, most: int) -> int:
    return 0 if s.seldom() and s.seldom() else s.size(most)


@family(Op.WIN_PART, examples=250)
def _win_part(s: Sketch, _: str) -> None:
    ne = (_channels(s, 100), s.integer(1, 20), s.integer(1, 20))
    a = s.leaf(F32, ne, _NUMBERS, layout="contiguous")
    s.output(s.g.win_part(a, s.pick((14, 1, 2, 7, ne[1], ne[2], s.integer(1, 30)))), EXACT)


@family(Op.WIN_UNPART, examples=300)
def _win_unpart(s: Sketch, _: str) -> None:
    width, height = s.integer(1, 20), s.integer(1, 20)
    window = s.pick((7, 1, 2, width, height, s.integer(1, 14)))
    number = -(-width // window) * -(-height // window)
    # More windows than the image takes are left over.
    number += s.pick((0, 0, 0, 1, 3))
    ne = (_channels(s, 64), window, window, number)
    a = s.leaf(F32, ne, _NUMBERS, layout="contiguous")
    s.output(s.g.win_unpart(a, width, height, window), EXACT)


@family(Op.GET_REL_POS, variants=[F16, BF16], examples=150)
def _get_rel_pos(s: Sketch, type: GgmlType) -> None:
    n = s.integer(1, 24)
    # Of more than one table the first counts.
    tables = s.pick((1, 1, 1, 2))
    a = s.leaf(type, (_channels(s, 100), 2 * n - 1, tables), _NUMBERS, layout="contiguous")
    s.output(s.g.get_rel_pos(a, n, n), EXACT)


@family(Op.ADD_REL_POS, variants=["new", "in place"], examples=125)
def _add_rel_pos(s: Sketch, where: str) -> None:
    n, a, b, batches = s.integer(1, 12), s.integer(1, 6), s.integer(1, 6), s.integer(1, 4)
    # There are no positions for what a has in dimension 3.
    scores = s.leaf(F32, (n * n, a * b, batches, s.pick((1, 1, 2))), _NUMBERS, layout="contiguous")
    width, height = (s.leaf(F32, (n, a, b, batches), _NUMBERS, layout="contiguous") for _ in "wh")
    s.output(s.g.add_rel_pos(scores, width, height, inplace=where == "in place"))
