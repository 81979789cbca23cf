"""Valid graphs: those of the differential tester's families, and chains of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import conformance.differential.families  # noqa: F401  (fills the table)
from conformance.differential.case import GraphCase
from conformance.differential.sketch import FAMILIES, Family, Sketch
from conformance.differential.values import Fill, ValueKind
from protocol.ggml.types import GgmlType
from protocol.tensor import Dims, Tensor
from tests.examples import without_our_numbers

# What later nodes may read instead of a leaf. Of other types values are indices, or blocks.
_NUMBERS = (GgmlType.F32, GgmlType.F16, GgmlType.BF16)
_INDICES = (ValueKind.INTEGERS, ValueKind.DISTINCT, ValueKind.RANGE)
_LONGEST = 5
# A chain grows with what is broadcast, and is dropped beyond this.
_MOST_BYTES = 4 << 20


class _Chain(Sketch):
    """Draws leaves, of which some are results that were computed before."""

    def _root(self, type: GgmlType, ne: Dims, fill: Fill, name: str) -> Tensor:
        if type in _NUMBERS and fill.kind not in _INDICES and self.flag():
            for t, _ in reversed(self.outputs):
                if t.type is type and t.contiguous and t.nelements >= ne[0] * ne[1] * ne[2] * ne[3]:
                    return self._part(t, ne)
        return super()._root(type, ne, fill, name)

    def _part(self, t: Tensor, ne: Dims) -> Tensor:
        """The first elements of ``t`` in another shape."""
        size = t.nb[0]
        nb1 = size * ne[0]
        return self.g.view_4d(t, *ne, nb1, nb1 * ne[1], nb1 * ne[1] * ne[2], 0)


def _pairs() -> list[tuple[Family, Any]]:
    return [(family, variant) for family in FAMILIES.values() for variant in family.variants]


@st.composite
def chains(draw: Callable[[st.SearchStrategy[Any]], Any]) -> GraphCase:
    """Graphs of several families, each reading what those before it computed."""
    pairs = _pairs()
    sketch = _Chain(draw)
    for _ in range(draw(st.integers(2, _LONGEST))):
        family, variant = draw(st.sampled_from(pairs))
        family.draws(sketch, variant)
    case = sketch.case()
    hypothesis.assume(sum(t.nbytes for t in case.graph.roots) <= _MOST_BYTES)
    return case


def draw_cases(strategy: st.SearchStrategy[GraphCase], count: int, seed: int) -> list[GraphCase]:
    """``count`` cases at most, the same for the same seed, in any process."""
    cases: list[GraphCase] = []

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
    )
    @given(strategy)
    def collect(case: GraphCase) -> None:
        cases.append(case)

    with without_our_numbers():
        collect()
    return cases


def any_case() -> st.SearchStrategy[GraphCase]:
    """A case of any family and variant."""
    return st.sampled_from(_pairs()).flatmap(lambda pair: pair[0].strategy(pair[1]))
