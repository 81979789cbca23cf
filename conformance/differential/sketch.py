"""What strategies draw with: shapes, leaves laid out in every way that ggml allows, outputs.

A strategy is a function that gets a :class:`Sketch`, draws leaves and parameters with it, builds
nodes with ``s.g`` (ggml's constructors) and names the outputs::

    @family(Op.SQR, variants=[F32, F16], examples=40)
    def sqr(s: Sketch, type: GgmlType) -> None:
        s.output(s.g.sqr(s.leaf(type, s.shape())))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from hypothesis import strategies as st

from client.builder.graph import GraphBuilder
from client.tensors import dims
from conformance.differential.case import GraphCase
from conformance.differential.compare import Check
from conformance.differential.values import Fill, ValueKind
from protocol.ggml.ops import Op
from protocol.ggml.types import TYPE_INFO, GgmlType, row_size
from protocol.tensor import Dims, Tensor

T = TypeVar("T")

# Sizes of a dimension: small ones, powers of two and their neighbours, and some in between.
_SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129, 256)
_LARGE = (257, 300, 511, 512, 513, 1000, 1024, 1031)


class Sketch:
    """One case while it is drawn."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self._draw = draw
        self.g = GraphBuilder()
        self.outputs: list[tuple[Tensor, Check]] = []
        self.fills: dict[Tensor, Fill] = {}

    # -- plain draws

    def pick(self, options: Sequence[T]) -> T:
        """Draw one of ``options``; a failing case shrinks towards the first."""
        choice: T = self._draw(st.sampled_from(options))
        return choice

    def flag(self) -> bool:
        return bool(self._draw(st.booleans()))

    def seldom(self) -> bool:
        """Draw True about once in eight; it shrinks towards False."""
        return self.pick((False,) * 7 + (True,))

    def integer(self, low: int, high: int) -> int:
        """Draw an integer between two, both included."""
        return int(self._draw(st.integers(low, high)))

    def real(self, low: float, high: float) -> float:
        """Draw a float32 between the bounds."""
        return float(self._draw(st.floats(low, high, width=32)))

    # -- shapes

    def size(self, most: int = 1031, *, least: int = 1, multiple: int = 1) -> int:
        """Draw the size of one dimension: a multiple of ``multiple`` between the bounds."""
        sizes = [n * multiple for n in (*_SIZES, *_LARGE) if least <= n * multiple <= most]
        return self.pick(sizes or [least])

    def shape(
        self, elements: int = 4096, *, block: int = 1, empty: bool = True, rank: int = 4
    ) -> Dims:
        """Draw a shape of at most ``elements`` elements; dimension 0 holds whole blocks.

        Dimensions of 1 occur in every place, and with ``empty`` now and then one of 0.
        """
        left = max(elements, block)
        ne = [self.size(left, least=block, multiple=block)]
        left //= ne[0]
        for _ in range(1, self.integer(1, rank)):
            ne.append(self.size(min(left, 16)))
            left = max(left // ne[-1], 1)
        if self.seldom():
            ne[0], left = block, 1
        if empty and self.seldom() and self.seldom():
            ne[self.integer(0, len(ne) - 1)] = 0
        return dims(ne)

    def broadcast_to(self, ne: Sequence[int]) -> Dims:
        """Draw a shape that ggml repeats to ``ne``: each dimension divides it."""
        return dims([self.pick(_divisors(n)) if n else 0 for n in ne])

    # -- leaves

    def seed(self) -> int:
        return self.integer(0, 0xFFFF)

    def leaf(
        self,
        type: GgmlType,
        ne: Sequence[int],
        kind: ValueKind | Sequence[ValueKind] = ValueKind.NORMAL,
        low: float = 0.0,
        high: float = 1.0,
        *,
        layout: str = "any",
        name: str = "",
    ) -> Tensor:
        """Draw a tensor of values, by ``kind`` (or one of several).

        ``layout``: "dense"; "contiguous": dense, but maybe a part of something larger; "even": rows
        may be padded, all by the same; "rows": elements of a row are dense, rows may be padded,
        permuted or part of something larger; "planes": as "rows", for dimensions 0 and 1 as one
        that is dense; "any": dimension 0 may be strided too (not of quantized types).
        """
        shape = dims(ne)
        kinds = (kind,) if isinstance(kind, str) else kind
        fill = Fill(ValueKind(self.pick(kinds)), self.seed(), low, high)
        # Two in five are dense: the fast paths need their share.
        if layout == "dense" or 0 in shape or self.integer(0, 4) < 2:
            return self._root(type, shape, fill, name)
        if layout == "contiguous":
            return self._slice(type, shape, fill, name)
        if layout == "even":
            return self._padded(type, shape, fill, name)
        if layout == "planes":
            return self._planes(type, shape, fill, name)
        return self._strided(type, shape, fill, name, whole_rows=layout == "rows")

    def _root(self, type: GgmlType, ne: Dims, fill: Fill, name: str) -> Tensor:
        t = self.g.new_tensor(type, ne, name)
        self.fills[t] = fill
        return t

    def _slice(self, type: GgmlType, ne: Dims, fill: Fill, name: str) -> Tensor:
        """A view of rows in the middle of more rows."""
        before, after = self.integer(0, 3), self.integer(0, 3)
        rows = before + ne[1] * ne[2] * ne[3] + after
        root = self._root(type, dims([ne[0], rows]), fill, name)
        nb1 = root.nb[1]
        nb2, nb3 = nb1 * ne[1], nb1 * ne[1] * ne[2]
        return self.g.view_4d(root, *ne, nb1, nb2, nb3, before * nb1)

    def _padded(self, type: GgmlType, ne: Dims, fill: Fill, name: str) -> Tensor:
        """A view of some columns of longer rows."""
        info = TYPE_INFO[type]
        pad = self.integer(0, 3)
        before = self.integer(0, pad)
        root = self._root(type, dims([ne[0] + pad * info.block_size, *ne[1:]]), fill, name)
        _, nb1, nb2, nb3 = root.nb
        return self.g.view_4d(root, *ne, nb1, nb2, nb3, before * info.type_size)

    def _planes(self, type: GgmlType, ne: Dims, fill: Fill, name: str) -> Tensor:
        """Rows that are seen as dense matrices."""
        flat = dims([ne[0] * ne[1], ne[2], ne[3]])
        rows = self._strided(type, flat, fill, name, whole_rows=True)
        return self.g.view_4d(rows, *ne, row_size(type, ne[0]), rows.nb[1], rows.nb[2])

    def _strided(
        self, type: GgmlType, ne: Dims, fill: Fill, name: str, *, whole_rows: bool
    ) -> Tensor:
        """A view of a larger tensor: padding in any dimension, dimensions in any order."""
        info = TYPE_INFO[type]
        fixed = whole_rows or info.quantized
        order = [0, *self._draw(st.permutations([1, 2, 3]))]
        if not fixed:
            order = list(self._draw(st.permutations([0, 1, 2, 3])))
        # Dimension i of the memory becomes dimension order[i] of the result.
        memory = [ne[axis] for axis in order]
        pad = [self.integer(0, 2) for _ in range(4)]
        before = [self.integer(0, p) for p in pad]
        unit = info.block_size
        outer = [memory[0] + pad[0] * unit, *(memory[i] + pad[i] for i in (1, 2, 3))]
        root = self._root(type, dims(outer), fill, name)
        nb1 = row_size(type, outer[0])
        nb2, nb3 = nb1 * outer[1], nb1 * outer[1] * outer[2]
        offset = before[0] * info.type_size + before[1] * nb1 + before[2] * nb2 + before[3] * nb3
        w, h, d, n = memory
        view = self.g.view_4d(root, w, h, d, n, nb1, nb2, nb3, offset)
        if order == [0, 1, 2, 3]:
            return view
        return self.g.permute(view, *order)

    def indices(
        self,
        ne: Sequence[int],
        below: int,
        *,
        type: GgmlType = GgmlType.I32,
        distinct: bool = False,
        layout: str = "dense",
    ) -> Tensor:
        """Draw integers from 0 to ``below`` - 1.

        With ``distinct`` no two are equal in a row (ne0 <= below).

        Distinct ones are ``ne0`` of a row's permutation, through a view.
        """
        if not distinct:
            return self.leaf(type, ne, ValueKind.INTEGERS, 0, below - 1, layout=layout)
        shape = dims(ne)
        fill = Fill(ValueKind.DISTINCT, self.seed(), below // 2, 1.0)
        root = self._root(type, dims([below, *shape[1:]]), fill, "")
        return self.g.view_4d(root, *shape, root.nb[1], root.nb[2], root.nb[3], 0)

    # -- outputs

    def output(self, t: Tensor, check: Check | None = None) -> None:
        """Compare ``t`` (by NMSE 1e-7 unless said otherwise)."""
        self.outputs.append((t, check or Check()))

    def case(self) -> GraphCase:
        return GraphCase.of(self.outputs, self.fills)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


Draws = Callable[[Sketch, Any], None]


@dataclass(frozen=True, slots=True)
class Family:
    """Strategies of one op (or of one fused sequence): one for each variant.

    ``examples`` is how many cases of each variant a full run draws.
    """

    name: str
    op: Op | None
    variants: tuple[Any, ...]
    draws: Draws
    examples: int

    def strategy(self, variant: Any) -> st.SearchStrategy[GraphCase]:
        """Return cases of one variant."""

        @st.composite
        def cases(draw: Callable[[st.SearchStrategy[Any]], Any]) -> GraphCase:
            sketch = Sketch(draw)
            self.draws(sketch, variant)
            return sketch.case()

        return cases()


FAMILIES: dict[str, Family] = {}


def family(
    op: Op | str, *, variants: Sequence[Any] = ("",), examples: int = 60
) -> Callable[[Draws], Draws]:
    """Register a strategy for ``op``; a str names a sequence of ops."""

    def register(draws: Draws) -> Draws:
        name = op.value if isinstance(op, Op) else op
        if name in FAMILIES:
            raise RuntimeError(f"two families for {name}")
        known = op if isinstance(op, Op) else None
        FAMILIES[name] = Family(name, known, tuple(variants), draws, examples)
        return draws

    return register


def label(variant: Any) -> str:
    """Return a variant's name on the command line and in tables."""
    if isinstance(variant, GgmlType):
        return variant.name.lower()
    if isinstance(variant, tuple):
        return "->".join(label(v) for v in variant)
    return str(getattr(variant, "name", variant)).lower()
