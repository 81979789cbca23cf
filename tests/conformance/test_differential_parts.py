"""The parts of the differential tester, without a server: cases, values, blocks, comparison."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import conformance.differential.families  # noqa: F401  (fills the table)
from client.builder.graph import GraphBuilder
from client.tensors import dims
from conformance.differential.blocks import random_blocks
from conformance.differential.case import GraphCase
from conformance.differential.compare import (
    EXACT,
    CaseMemory,
    Check,
    Equality,
    difference,
    nmse,
)
from conformance.differential.endpoint import Endpoint, ServerUnavailable
from conformance.differential.explore import Judge, Mismatch
from conformance.differential.runner import Image
from conformance.differential.sketch import FAMILIES, Sketch
from conformance.differential.type_sets import DECODABLE, ENCODABLE, QUANTIZED
from conformance.differential.values import Fill, ValueKind, flushed, leaf_bytes
from protocol.ggml.types import TYPE_INFO, GgmlType, row_size
from protocol.tensor import Tensor
from rpc_server.types import ENCODABLE as SERVER_ENCODABLE
from rpc_server.types import to_f32

F32, F16, BF16, I32 = GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.I32
NAN, INF = float("nan"), float("inf")


def leaf(type: GgmlType, ne: Sequence[int]) -> Tensor:
    return GraphBuilder().new_tensor(type, ne)


# -- cases -----------------------------------------------------------------------------------------


def drawn() -> st.SearchStrategy[GraphCase]:
    """A case of any family."""
    pairs = [(f, v) for f in FAMILIES.values() for v in f.variants]
    return st.sampled_from(pairs).flatmap(lambda pair: pair[0].strategy(pair[1]))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn())
def test_a_case_survives_json(case: GraphCase) -> None:
    again = GraphCase.from_json(json.loads(case.dumps()))
    assert again.to_json() == case.to_json()
    assert again.key() == case.key()
    assert again.describe() == case.describe()
    first, second = Image.of(case), Image.of(again)
    np.testing.assert_array_equal(first.data, second.data)
    np.testing.assert_array_equal(first.untouched(case), second.untouched(again))


def added(seed: int = 0, n: int = 6) -> GraphCase:
    """(a + b), of which b repeats, in memory of its own."""
    g = GraphBuilder()
    a, b = g.new_tensor(F32, (n, 2)), g.new_tensor(F32, (n,))
    return GraphCase.of([(g.add(a, b), Check())], {a: Fill(seed=seed), b: Fill(seed=1)})


def test_equal_cases_are_those_that_differ_in_seeds_only() -> None:
    assert added(0).key() == added(5).key()
    assert added(0).key() != added(0, n=7).key()
    assert added(0).dumps() != added(5).dumps()


def test_a_description_names_ops_shapes_and_values() -> None:
    text = added().describe()
    assert "%2 = ADD(%0, %1) F32 ne=[6, 2, 1, 1]" in text
    assert "normal(0, 1) seed=0" in text
    assert text.endswith("compared: %2 by nmse 1e-07")


def test_a_case_knows_what_its_nodes_write() -> None:
    g = GraphBuilder()
    a, b = g.new_tensor(F32, (4,)), g.new_tensor(F32, (4,))
    view = g.reshape(a, 2, 2)
    inplace = g.sqr_inplace(view)
    case = GraphCase.of([(inplace, EXACT), (b, EXACT)], {a: Fill(), b: Fill()})
    assert case.written == [inplace]
    kept = ~Image.of(case).untouched(case)
    assert kept.sum() == a.nbytes


# -- values ----------------------------------------------------------------------------------------


RANDOM = (
    ValueKind.NORMAL,
    ValueKind.UNIFORM,
    ValueKind.INTEGERS,
    ValueKind.DISTINCT,
    ValueKind.SPECIAL,
    ValueKind.INFINITE,
    ValueKind.MASK,
)


@pytest.mark.parametrize("kind", [*RANDOM, ValueKind.RANGE, ValueKind.CONSTANT])
def test_values_are_the_same_each_time_and_follow_the_seed(kind: ValueKind) -> None:
    t = leaf(F32, (32, 8))
    first = leaf_bytes(t, Fill(kind, 3, 1.0, 4.0))
    assert first.size == t.nbytes
    np.testing.assert_array_equal(first, leaf_bytes(t, Fill(kind, 3, 1.0, 4.0)))
    changed = not np.array_equal(first, leaf_bytes(t, Fill(kind, 4, 1.0, 4.0)))
    assert changed == (kind in RANDOM)


@pytest.mark.parametrize("type", [F32, BF16])
def test_what_is_below_the_normal_numbers_is_flushed(type: GgmlType) -> None:
    dtype, cut = (np.uint32, 0) if type is F32 else (np.uint16, 16)
    given, expected = (
        (np.array(words, np.uint32) >> cut).astype(dtype)
        for words in (
            # Below, of both signs; the least that is normal; 1, an infinity and NaN.
            [0x0001_0000, 0x807F_0000, 0x0080_0000, 0x3F80_0000, 0xFF80_0000, 0x7FC1_0000],
            [0x0000_0000, 0x8000_0000, 0x0080_0000, 0x3F80_0000, 0xFF80_0000, 0x7FC1_0000],
        )
    )
    values = given.view(np.float32) if type is F32 else given
    np.testing.assert_array_equal(flushed(type, values).view(dtype), expected)
    # As bytes, too.
    np.testing.assert_array_equal(flushed(type, given.view(np.uint8)), expected.view(np.uint8))


@pytest.mark.parametrize(("got", "good"), [(np.nan, True), (-np.inf, False), (1.0, False)])
def test_an_infinity_times_what_was_flushed_is_no_number(got: float, good: bool) -> None:
    t = leaf(F32, (2, 1))

    def memory(value: float, flushes: bool) -> CaseMemory:
        return CaseMemory(np.array([value, 1], np.float32).view(np.uint8), {t: 0}, flushes)

    for flushes in (False, True):
        wrong = difference(Check(), t, memory(np.inf, flushes), memory(got, flushes))
        assert bool(wrong) == (not good or not flushes)


def test_other_types_have_nothing_to_flush() -> None:
    words = np.arange(1, 5, dtype=np.float16)
    assert flushed(F16, words) is words


@pytest.mark.parametrize("type", [F32, F16, BF16, I32])
def test_kinds_keep_their_promise(type: GgmlType) -> None:
    ne = (32, 16)

    def make(kind: ValueKind, low: float = 0.0, high: float = 1.0) -> npt.NDArray[np.float64]:
        raw = leaf_bytes(leaf(type, ne), Fill(kind, 1, low, high))
        if type is I32:
            return raw.view(np.int32).astype(np.float64).reshape(16, 32)
        return np.asarray(to_f32(type, raw.reshape(16, -1)), np.float64)

    uniform = make(ValueKind.UNIFORM, -3.0, 5.0)
    assert uniform.min() >= -3.0
    assert uniform.max() <= 5.0
    assert set(np.unique(make(ValueKind.INTEGERS, -2, 2))) == {-2, -1, 0, 1, 2}
    ranks = np.sort(make(ValueKind.DISTINCT, 16, 1.0), axis=1)
    np.testing.assert_array_equal(ranks, np.tile(np.arange(32.0), (16, 1)))
    assert (make(ValueKind.CONSTANT, 7.0) == 7).all()
    np.testing.assert_array_equal(make(ValueKind.RANGE, 2.0, 0.5)[0, 0:5:2], [2, 3, 4])
    if type is not I32:
        special = make(ValueKind.SPECIAL)
        assert np.isnan(special).any()
        assert (special == INF).any()
        assert (special == -INF).any()
        mask = make(ValueKind.MASK)
        assert set(np.unique(mask)) == {-INF, 0.0}
        assert (mask[:, 0] == 0).all()


def test_empty_leaves_have_no_bytes() -> None:
    for type in (F32, GgmlType.Q4_0, GgmlType.Q8_K):
        assert leaf_bytes(leaf(type, (256, 0)), Fill()).size == 0


# -- blocks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", QUANTIZED, ids=lambda t: t.name)
def test_random_blocks_hold_numbers(type: GgmlType) -> None:
    blocks = random_blocks(type, 64, np.random.default_rng(2))
    assert blocks.shape == (64, TYPE_INFO[type].type_size)
    if type in DECODABLE:
        values = to_f32(type, blocks)
        assert np.isfinite(values).all()
        assert len(np.unique(values)) > 32
        assert np.abs(values).max() < 1e4


def test_zeros_are_blocks_of_zeros() -> None:
    raw = leaf_bytes(leaf(GgmlType.Q5_0, (64, 2)), Fill(ValueKind.CONSTANT))
    assert (to_f32(GgmlType.Q5_0, raw.reshape(2, -1)) == 0).all()


def test_the_server_encodes_what_upstreams_does() -> None:
    assert {t for t in SERVER_ENCODABLE if TYPE_INFO[t].quantized} == set(ENCODABLE)


# -- comparison ------------------------------------------------------------------------------------


def memory(t: Tensor, values: object, dtype: npt.DTypeLike = np.float32) -> CaseMemory:
    return CaseMemory(np.array(values, dtype).reshape(-1).view(np.uint8), {t: 0})


def compared(
    check: Check, expected: object, actual: object, *, type: GgmlType = F32, ne: Sequence[int]
) -> str:
    t = leaf(type, ne)
    dtype = np.int32 if type is I32 else np.float32
    return difference(check, t, memory(t, expected, dtype), memory(t, actual, dtype))


@pytest.mark.parametrize(
    ("expected", "actual", "error"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([3.0, 4.0], [3.0, 4.5], 0.01),
        ([0.0, 0.0], [0.0, -0.0], 0.0),
        ([0.0, 0.0], [0.0, 1e-30], INF),
        ([NAN, INF, 1.0], [NAN, INF, 1.0], 0.0),
        ([NAN, 1.0], [INF, 1.0], INF),
        ([INF, 1.0], [-INF, 1.0], INF),
        ([1.0, 1.0], [1.0, NAN], INF),
        ([1.0, 1.0], [1.0, INF], INF),
    ],
)
def test_nmse(expected: list[float], actual: list[float], error: float) -> None:
    assert nmse(np.array(expected), np.array(actual)) == pytest.approx(error)


def test_a_wrong_element_is_named() -> None:
    wrong = compared(Check(), [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5.5, 6], ne=(3, 2))
    assert "[1, 1, 0, 0] is 5.5, expected 5.0 (1 of 6 off)" in wrong
    assert not compared(Check(bound=0.1), [1, 2, 3], [1, 2, 3.5], ne=(3,))


def test_exact_sees_the_sign_of_zero_and_the_bits_of_nan() -> None:
    assert not compared(EXACT, [0.0, NAN], [0.0, NAN], ne=(2,))
    assert "bits differ" in compared(EXACT, [0.0, 1.0], [-0.0, 1.0], ne=(2,))
    assert "[1, 0, 0, 0] is 9" in compared(EXACT, [1, 2], [1, 9], type=I32, ne=(2,))


@pytest.mark.parametrize(
    ("how", "order", "wrong"),
    [
        (Equality.ORDER, [2, 0, 1, 3], ""),
        (Equality.ORDER, [2, 1, 0, 3], ""),  # 0 and 1 are equal
        (Equality.ORDER, [2, 0, 3, 1], "[2, 0, 0, 0]"),
        (Equality.ORDER, [2, 0, 0, 3], "twice"),
        (Equality.ORDER, [2, 0, 1, 4], "index 4 of 4"),
        (Equality.ORDER, [2, 0, 1, -1], "index -1 of 4"),
        (Equality.SET, [3, 2, 1, 0], ""),
        (Equality.SET, [3, 3, 1, 0], "twice"),
    ],
)
def test_orders_are_compared_by_the_values_they_choose(
    how: Equality, order: list[int], wrong: str
) -> None:
    g = GraphBuilder()
    values, t = g.new_tensor(F32, (4,)), g.new_tensor(I32, (4,))
    image = np.array([5, 5, 1, 9], np.float32).view(np.uint8)

    def run(indices: list[int]) -> CaseMemory:
        both = np.concatenate([image, np.array(indices, np.int32).view(np.uint8)])
        return CaseMemory(both, {values: 0, t: 16})

    message = difference(Check(how, of=values), t, run([2, 0, 1, 3]), run(order))
    assert message == wrong or (wrong and wrong in message)


def test_a_set_of_other_values_differs() -> None:
    g = GraphBuilder()
    values, t = g.new_tensor(F32, (4,)), g.new_tensor(I32, (2,))

    def run(indices: list[int]) -> CaseMemory:
        parts = (
            np.array([5, 6, 1, 9], np.float32).view(np.uint8),
            np.array(indices, np.int32).view(np.uint8),
        )
        return CaseMemory(np.concatenate(parts), {values: 0, t: 16})

    check = Check(Equality.SET, of=values)
    assert not difference(check, t, run([3, 1]), run([1, 3]))
    assert difference(check, t, run([3, 1]), run([3, 0]))


# -- planted faults --------------------------------------------------------------------------------


def answered(case: GraphCase) -> tuple[Image, CaseMemory]:
    """A case and its memory after a + b was computed rightly."""
    image = Image.of(case)
    data = image.data.copy()
    node = case.outputs[0][0]
    a, b = (CaseMemory(data, image.offsets).array(s) for s in node.src if s is not None)
    at = image.offsets[node]
    data[at : at + node.nbytes] = (a + b).reshape(-1).view(np.uint8)
    return image, CaseMemory(data, image.offsets)


@pytest.fixture
def sound() -> tuple[GraphCase, Image, CaseMemory, CaseMemory]:
    """A case with the reference's memory and a copy of it to spoil."""
    case = added()
    image, right = answered(case)
    return case, image, right, CaseMemory(right.image.copy(), right.offsets)


Sound = tuple[GraphCase, Image, CaseMemory, CaseMemory]


def test_a_right_answer_passes(sound: Sound) -> None:
    case, image, right, copy = sound
    Judge._compare(case, image, right, copy, "")


def test_one_changed_element_is_found(sound: Sound) -> None:
    case, image, right, spoiled = sound
    spoiled.array(case.outputs[0][0])[0, 0, 1, 4] += 0.5
    with pytest.raises(Mismatch, match=r"output 0: NMSE .*\[4, 1, 0, 0\].*\(1 of 12 off\)"):
        Judge._compare(case, image, right, spoiled, "")


def test_an_element_that_is_not_written_is_found(sound: Sound) -> None:
    case, image, right, spoiled = sound
    node = case.outputs[0][0]
    last = image.offsets[node] + node.nbytes - 4
    spoiled.image[last : last + 4] = image.data[last : last + 4]
    with pytest.raises(Mismatch, match=r"\[5, 1, 0, 0\] is nan"):
        Judge._compare(case, image, right, spoiled, "")


@pytest.mark.parametrize("where", ["before", "behind", "source"])
def test_one_byte_written_outside_is_found(sound: Sound, where: str) -> None:
    case, image, right, spoiled = sound
    node = case.outputs[0][0]
    start = image.offsets[node]
    source = node.src[0]
    assert source is not None
    places = {"before": start - 1, "behind": start + node.nbytes, "source": image.offsets[source]}
    spoiled.image[places[where]] ^= 1
    with pytest.raises(Mismatch, match=f"wrote outside its tensors: byte {places[where]} "):
        Judge._compare(case, image, right, spoiled, "")


def test_a_byte_between_the_rows_of_a_view_is_found() -> None:
    g = GraphBuilder()
    root = g.new_tensor(F32, (4, 3))
    view = g.sqr_inplace(g.view_2d(root, 2, 3, root.nb[1], 4))
    case = GraphCase.of([(view, EXACT)], {root: Fill()})
    image = Image.of(case)
    right = CaseMemory(image.data.copy(), image.offsets)
    right.array(view)[...] **= 2
    spoiled = CaseMemory(right.image.copy(), right.offsets)
    Judge._compare(case, image, right, spoiled, "")
    spoiled.image[image.offsets[root] + 12] ^= 1
    with pytest.raises(Mismatch, match="wrote outside its tensors"):
        Judge._compare(case, image, right, spoiled, "")


# -- sketches --------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], bool]] = {
    "dense": lambda t: t.contiguous and t.view_src is None,
    "contiguous": lambda t: t.contiguous,
    "even": lambda t: t.contiguous_above(1),
    "rows": lambda t: t.contiguous_rows,
    "planes": lambda t: t.contiguous_rows and t.nb[1] == row_size(t.type, t.ne[0]),
    "any": lambda t: True,
}


@pytest.mark.parametrize("type", [F32, GgmlType.Q4_0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_leaves_are_laid_out_as_asked(layout: str, type: GgmlType) -> None:
    @settings(max_examples=40, deadline=None, database=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        s = Sketch(data.draw)
        ne = s.shape(2048, block=TYPE_INFO[type].block_size)
        t = s.leaf(type, ne, layout=layout)
        assert t.ne == dims(ne)
        assert LAYOUTS[layout](t)
        root = t if t.view_src is None else t.view_src
        assert root in s.fills
        assert t.view_offs + t.nbytes <= root.nbytes

    check()


# -- servers ---------------------------------------------------------------------------------------


async def test_a_server_that_ends_at_once_is_not_started_again() -> None:
    endpoint = Endpoint(command=shlex.join([sys.executable, "-c", "raise SystemExit(3)"]))
    with pytest.raises(ServerUnavailable, match="ended before it answered"):
        await endpoint.connect()
    assert endpoint.starts == 1
    endpoint.close()
