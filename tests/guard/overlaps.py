"""Small graphs whose results lie over their sources; contents that turn wrong when written over.

What such a graph computes is its client's own affair. What it may not do is to reach beyond the
client's memory: a number that decides where is read or written may be right when it is looked at
and wrong when it is used, because the node itself, or another thread, has written over it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import hypothesis
import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

import conformance.differential.families  # noqa: F401  (fills the table)
from conformance.differential.case import GraphCase
from conformance.differential.sketch import FAMILIES, Family, Sketch
from conformance.differential.values import ValueKind, leaf_bytes
from protocol.ggml.types import TYPE_INFO, GgmlType
from protocol.tensor import Dims, Tensor
from tests.guard.arena import Arena
from tests.guard.cases import draw_cases

Bytes = npt.NDArray[np.uint8]
Places = Mapping[Tensor, int]

_F32, _F16, _I32, _I64 = GgmlType.F32, GgmlType.F16, GgmlType.I32, GgmlType.I64

# Sizes of a dimension. Rows that a kernel does by vectors have up to 17 elements, or three blocks.
_SIZES = (1, 2, 3, 4, 5, 7, 8, 16, 17)
_MOST_BLOCKS = 3
# Of all tensors of a case.
MOST_BYTES = 56 << 10


class Small(Sketch):
    """Draws what families draw, in a few elements."""

    def size(self, most: int = 1031, *, least: int = 1, multiple: int = 1) -> int:
        sizes = [n * multiple for n in _SIZES if least <= n * multiple <= most]
        if multiple > 1:
            sizes = sizes[:_MOST_BLOCKS]
        return self.pick(sizes or [least])

    def shape(
        self, elements: int = 4096, *, block: int = 1, empty: bool = True, rank: int = 4
    ) -> Dims:
        return super().shape(min(elements, max(96, 3 * block)), block=block, empty=False, rank=rank)


# -- families --------------------------------------------------------------------------------------


def _some_indices(s: Small, below: int, count: int) -> Tensor:
    """``count`` <= ``below`` indices that the graph itself makes, of numbers it gets."""
    order = s.g.argsort(s.leaf(_F32, (below,), layout="dense"), s.flag())
    return s.g.view_1d(order, count)


def _rows_of_computed(s: Small, _: str) -> None:
    """Rows that are named by a result, which later results may lie over."""
    rows = s.size(8, least=2)
    ids = _some_indices(s, rows, s.integer(1, rows))
    table = s.leaf(s.pick((_F32, _F16)), (s.size(), rows), layout="rows")
    got = s.g.get_rows(table, ids)
    to = s.leaf(s.pick((_F32, _F16)), (got.ne[0], rows), layout="rows")
    s.output(s.g.set_rows(to, got, ids))
    s.output(s.g.add_id(got, s.leaf(_F32, (got.ne[0], rows)), ids))


def _rows_by_indices(s: Small, _: str) -> None:
    """SET_ROWS alone: no node before or behind it, one plane, rows as they are."""
    width, rows = s.size(), s.size(8, least=2)
    count = s.integer(1, rows)
    to, values = (
        s.leaf(_F32, (width, rows), layout="rows"),
        s.leaf(_F32, (width, count), layout="rows"),
    )
    ids = s.indices((count,), rows, type=_I64, distinct=True)
    s.output(s.g.set_rows(to, values, ids))


def _experts_of_computed(s: Small, type: GgmlType) -> None:
    """A mixture of experts: the largest of each token's numbers choose matrices."""
    k, m = 2 * TYPE_INFO[type].block_size, s.size(8)
    experts, tokens = s.integer(2, 5), s.integer(1, 12)
    used = s.integer(1, experts)
    order = s.g.argsort(s.leaf(_F32, (experts, tokens), layout="dense"), True)
    chosen = s.g.view_2d(order, used, tokens, order.nb[1], 0)
    weights = s.leaf(type, (k, m, experts), layout="rows")
    x = s.leaf(_F32, (k, s.pick((1, used)), tokens), layout="rows")
    s.output(s.g.mul_mat_id(weights, x, chosen))


def _largest(s: Small, _: str) -> None:
    rows = s.shape(120, empty=False)
    s.output(s.g.top_k(s.leaf(_F32, rows, layout="rows"), s.integer(1, rows[0])))


@dataclass(frozen=True, slots=True)
class Overlapping:
    """A family, and how many times as often as others it is drawn."""

    family: Family
    often: int


def _own(name: str, draws: Callable[[Any, Any], None], *variants: Any) -> Overlapping:
    return Overlapping(Family(name, None, variants or ("",), draws, 1), 20)


# Families with numbers that choose rows, matrices or states, or that sort such numbers.
INDEXED = frozenset(
    {
        "ADD_ID",
        "ARGSORT",
        "GET_ROWS",
        "GET_ROWS_BACK",
        "LIGHTNING_INDEXER",
        "MUL_MAT_ID",
        "POOL_2D_BACK",
        "ROPE",
        "SET_ROWS",
        "SSM_SCAN",
        "TOP_K",
    }
)


def families() -> dict[str, Overlapping]:
    """All of the differential tester's, and those that compute their own indices."""
    found = {
        name: Overlapping(family, 8 if name in INDEXED or "SET_ROWS" in name else 1)
        for name, family in FAMILIES.items()
    }
    for own in (
        _own("rows by indices", _rows_by_indices),
        _own("rows of computed indices", _rows_of_computed),
        _own("experts of computed indices", _experts_of_computed, _F32, _F16, GgmlType.Q8_0),
        _own("largest of computed", _largest),
    ):
        found[own.family.name] = own
    return found


def draw_small(family: Family, variant: Any, count: int, seed: int) -> list[GraphCase]:
    """``count`` cases of a variant at most, the same each time; none if all are too large."""
    try:
        return draw_cases(_small_cases(family, variant), count, seed)
    except Unsatisfiable:
        return []


def _small_cases(family: Family, variant: Any) -> st.SearchStrategy[GraphCase]:
    """Cases of one variant that fit into the arena."""

    @st.composite
    def cases(draw: Callable[[st.SearchStrategy[Any]], Any]) -> GraphCase:
        sketch = Small(draw)
        family.draws(sketch, variant)
        case = sketch.case()
        hypothesis.assume(sum(t.nbytes + Arena.UNIT for t in case.graph.roots) <= MOST_BYTES)
        return case

    return cases()


# -- layouts ---------------------------------------------------------------------------------------


def _aligned(t: Tensor, offset: int) -> int:
    """``offset`` moved down to where ``t`` may begin."""
    return offset // TYPE_INFO[t.type].alignment * TYPE_INFO[t.type].alignment


def _units(size: int) -> int:
    return -(-size // Arena.UNIT) * Arena.UNIT


def written_roots(case: GraphCase) -> list[Tensor]:
    """The memory that nodes write, each once."""
    roots = [t if t.view_src is None else t.view_src for t in case.written]
    return list(dict.fromkeys(roots))


def pairs(case: GraphCase) -> list[tuple[Tensor, Tensor, int]]:
    """(result, source, distance): each place of a result at which it overlaps other memory.

    Those over indices come first.
    """
    found = []
    for result in written_roots(case):
        step = TYPE_INFO[result.type].alignment
        for other in case.graph.roots:
            if other is not result:
                first = _aligned(result, -result.nbytes) + step
                found += [(result, other, d) for d in range(first, other.nbytes, step)]
    return sorted(found, key=lambda pair: not is_index(case, pair[1]))


def side_by_side(
    case: GraphCase, pair: tuple[Tensor, Tensor, int] | None, random: np.random.Generator
) -> Places:
    """All roots apart but for the two of a pair; in any order, so that each may be at an end."""
    at, places = 0, dict[Tensor, int]()
    together = pair[:2] if pair else ()
    rest = [t for t in case.graph.roots if t not in together]
    order = [rest[i] for i in random.permutation(len(rest))]
    groups: list[Sequence[Tensor]] = [[t] for t in order]
    if pair:
        groups.insert(int(random.integers(len(groups) + 1)), pair[:2])
    for group in groups:
        if len(group) == 1:
            places[group[0]] = at
            at += _units(group[0].nbytes)
            continue
        assert pair is not None
        result, other, distance = pair
        # The one that begins first begins at a whole unit, or the other does.
        before = _units(max(-distance, 0))
        places[other], places[result] = at + before, at + before + distance
        at += _units(before + max(other.nbytes, distance + result.nbytes))
    return places


def anywhere(case: GraphCase, random: np.random.Generator) -> Places:
    """All roots anywhere in an arena hardly larger than the largest: most overlap."""
    largest = max(t.nbytes for t in case.graph.roots)
    room = _units(int(largest * random.choice([1.0, 1.2, 2.0])) + 2 * Arena.UNIT)
    return {t: _aligned(t, int(random.integers(room - t.nbytes + 1))) for t in case.graph.roots}


def layouts(case: GraphCase, count: int, random: np.random.Generator) -> Iterator[Places]:
    """``count`` of them: every pair if there are fewer, otherwise some; and others at random."""
    every = pairs(case)
    wanted = max(count * 2 // 3, 1)
    chosen: Sequence[int] = range(len(every))
    if len(every) > wanted:
        # Those over indices first: they are all there if they take three quarters at most.
        over = sum(is_index(case, other) for _, other, _ in every)
        first = min(over, max(wanted * 3 // 4, wanted - (len(every) - over)))
        chosen = [
            *random.choice(over, first, replace=False),
            *(over + random.choice(len(every) - over, wanted - first, replace=False)),
        ]
    for number in chosen:
        yield side_by_side(case, every[number], random)
    for _ in range(count - len(chosen)):
        yield anywhere(case, random)


# -- contents --------------------------------------------------------------------------------------

# What is no index of anything here: just behind the last, far away, negative.
_WRONG = np.array(
    [
        *range(-4, 0), *range(5, 40), -17, -100, -1000, 100, 255, 256, 1000, 4096, 65536, 1 << 20,
        0x7FFFFFFF, -0x80000000, 0x3F800000, -0x40800000,
    ],
    np.int32,
)  # fmt: skip


def is_index(case: GraphCase, t: Tensor) -> bool:
    """Whether a root holds whole numbers that may be indices: a leaf, or a result."""
    if t.type not in (_I32, _I64):
        return False
    return t not in case.fills or case.fills[t].kind in (
        ValueKind.INTEGERS,
        ValueKind.DISTINCT,
        ValueKind.RANGE,
    )


def wrong_numbers(size: int, random: np.random.Generator) -> Bytes:
    """Bytes that are wrong as indices of 32 bits, or (small again, or huge) of 64."""
    words = random.choice(_WRONG, -(-size // 8) * 2)
    if random.random() < 0.3:
        words[1::2] = words[::2] >> 31
    return words.view(np.uint8)[:size]


def fill(case: GraphCase, places: Places, memory: Bytes, random: np.random.Generator) -> None:
    """What the memory holds before the graph runs: indices that are right, the rest often not."""
    last = []
    # Results first: what they hold counts only where nothing else lies.
    for t in sorted(case.graph.roots, key=lambda t: t in case.fills):
        if t in case.fills and is_index(case, t):
            last.append(t)
            continue
        start = places[t]
        right = t in case.fills and random.random() < 0.4
        content = leaf_bytes(t, case.fills[t]) if right else wrong_numbers(t.nbytes, random)
        memory[start : start + t.nbytes] = content
    for t in last:
        memory[places[t] : places[t] + t.nbytes] = leaf_bytes(t, case.fills[t])


def size_of(places: Places) -> int:
    """Bytes of the arena that a layout takes."""
    return _units(max(start + t.nbytes for t, start in places.items()))
