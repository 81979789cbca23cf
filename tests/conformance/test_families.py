"""Families of the differential tester, without servers: every op has one, all cases are valid."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

import conformance.differential.families  # noqa: F401  (fills the table)
from conformance.differential.case import GraphCase
from conformance.differential.runner import Image
from conformance.differential.sketch import FAMILIES, Family, label
from conformance.differential.uncovered import UNCOVERED
from protocol.dialects import DIALECTS
from protocol.ggml.ops import OPS_101, VIEWS, Op
from tests.parameters import mostly_slow

COVERED = {f.op for f in FAMILIES.values() if f.op is not None}


@pytest.mark.parametrize("op", OPS_101, ids=lambda op: op.value)
def test_every_op_has_a_family_or_a_reason_for_none(op: Op) -> None:
    assert (op in COVERED) != (op in UNCOVERED)


@pytest.mark.parametrize("op", UNCOVERED, ids=lambda op: op.value)
def test_reasons_are_given(op: Op) -> None:
    assert UNCOVERED[op]
    assert op in OPS_101


NEWEST = DIALECTS[0]


def check(case: GraphCase) -> None:
    """Something is compared, all lies in memory of its own, and it fits on the wire and in JSON."""
    assert case.outputs
    assert set(case.fills) == set(case.graph.leaves)
    image = Image.of(case)
    for t in case.graph.tensors:
        root = t if t.view_src is None else t.view_src
        offset = 0 if t.view_src is None else t.view_offs
        assert offset + t.nbytes <= root.nbytes
        assert root in image.offsets
    again = GraphCase.from_json(json.loads(case.dumps()))
    assert again.to_json() == case.to_json()
    assert again.key() == case.key()
    # Tensors have other ids now, which are as long.
    assert len(again.graph.encode(NEWEST)) == len(case.graph.encode(NEWEST))


def draw(family: Family, variant: Any) -> list[GraphCase]:
    """A few cases, the same in each run."""
    drawn: list[GraphCase] = []

    def keep(case: GraphCase) -> None:
        drawn.append(case)

    search = settings(
        max_examples=2,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    search(given(family.strategy(variant))(keep))()
    return drawn


@pytest.mark.parametrize("name", mostly_slow(FAMILIES, quick=30))
def test_every_variant_draws_valid_cases(name: str) -> None:
    family = FAMILIES[name]
    assert len({label(v) for v in family.variants}) == len(family.variants)
    for variant in family.variants:
        cases = draw(family, variant)
        assert cases
        for case in cases:
            check(case)
            # Of quantized types, and of small tensors, chains of views can't have just any.
            if family.op is not None and family.op not in VIEWS:
                assert family.op in {t.op for t in case.graph.nodes}
