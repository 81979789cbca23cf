"""Ops that view, copy and fill memory, and those that move rows, against plain numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.ggml.ops import Op
from protocol.ggml.types import DECODABLE, TYPE_INFO, GgmlType
from protocol.tensor import Tensor
from rpc_server.graph.errors import GraphError
from rpc_server.ops.table import check
from rpc_server.types import (
    ENCODABLE,
    from_f32,
    to_f32,
)
from tests.ops import harness
from tests.ops.harness import ran, refused
from tests.ops.tensors import CONTEXT, four, node, params, permuted, tensor, values, view

F32, F16, BF16, I32, I64 = (
    GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.I32, GgmlType.I64,
)  # fmt: skip
FLOATS = (F32, F16, BF16)
QUANTIZED = sorted(t for t in ENCODABLE if TYPE_INFO[t].quantized)
RNG = np.random.default_rng(7)


def random(*ne: int) -> np.ndarray[Any, Any]:
    """Float32 values for a tensor of dimensions ``ne``; exact in every float type."""
    return (RNG.integers(-64, 65, four(ne)[::-1]) / 16).astype(np.float32)


# -- views -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [Op.NONE, Op.RESHAPE, Op.VIEW, Op.PERMUTE, Op.TRANSPOSE])
def test_views_need_no_memory_and_run_nothing(op: Op) -> None:
    t = node(op, F32, (4, 2), [tensor(F32, (8,))])
    t.address = 0
    assert check(t).is_view
    harness.run(t, kernels=False)


# -- DUP, CONT, CPY --------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [Op.DUP, Op.CONT, Op.CPY])
@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("of", FLOATS)
def test_copies_convert_between_floats(op: Op, of: GgmlType, to: GgmlType) -> None:
    x = random(5, 3, 2)
    np.testing.assert_array_equal(ran(node(op, to, (5, 3, 2), [tensor(of, (5, 3, 2), x)])), x)


@pytest.mark.parametrize("of", FLOATS)
def test_to_i32_cuts_off_and_back_is_exact(of: GgmlType) -> None:
    integers = node(Op.CPY, I32, (4,), [tensor(of, (4,), [[[[1.9, -1.9, 0.5, 7]]]])])
    assert ran(integers).ravel().tolist() == [1, -1, 0, 7]
    assert ran(node(Op.CPY, F32, (4,), [integers])).ravel().tolist() == [1, -1, 0, 7]


def test_cont_of_a_permuted_tensor() -> None:
    x = random(4, 3, 2)
    source = permuted(tensor(F32, (4, 3, 2), x), (2, 0, 1, 3))
    assert source.ne == (3, 2, 4, 1)
    t = node(Op.CONT, F32, source.ne, [source])
    np.testing.assert_array_equal(ran(t), x.transpose(0, 3, 1, 2))


def test_cpy_into_a_transposed_view_of_another_shape() -> None:
    # As a V cache is written: columns of a half-precision matrix.
    cache = tensor(F16, (8, 4), np.zeros(1))
    column = view(cache, (2, 4), (16, 2, 0, 0), offset=2 * 3)
    column.ne, column.nb = (2, 4, 1, 1), (2, 16, 64, 64)
    x = random(8)
    t = node(Op.CPY, F16, column.ne, [tensor(F32, (8,), x), column], inplace=column)
    harness.run(t, kernels=False)
    expected = np.zeros((4, 8), np.float32)
    expected[:, 3:5] = x.reshape(4, 2)
    np.testing.assert_array_equal(values(cache)[0, 0], expected)


@pytest.mark.parametrize("type_", QUANTIZED, ids=lambda t: t.name)
def test_copies_to_and_from_quantized_types(type_: GgmlType) -> None:
    n = max(TYPE_INFO[type_].block_size, 64)
    x = random(n, 3)
    quantized = node(Op.CPY, type_, (n, 3), [tensor(F16, (n, 3), x)])
    expected = to_f32(type_, from_f32(type_, x))
    np.testing.assert_array_equal(ran(quantized), expected)
    copy = node(Op.DUP, type_, (3 * n,), [quantized])
    np.testing.assert_array_equal(ran(copy).ravel(), expected.ravel())
    np.testing.assert_array_equal(ran(node(Op.CPY, F32, (n, 3), [copy])), expected)


def test_copy_onto_itself_reversed_reads_before_it_writes() -> None:
    t = tensor(F32, (3, 3), np.arange(9).reshape(1, 1, 3, 3))
    harness.run(node(Op.CPY, F32, (3, 3), [permuted(t, (1, 0, 2, 3))], inplace=t), kernels=False)
    np.testing.assert_array_equal(values(t)[0, 0], np.arange(9).reshape(3, 3).T)


def test_copy_contracts() -> None:
    refused(node(Op.CONT, F32, (5,), [tensor(F32, (4,))]), "4 elements")
    refused(node(Op.CPY, I64, (4,), [tensor(F32, (4,))]), "no conversion from F32 to I64")
    refused(node(Op.CPY, GgmlType.IQ3_S, (256,), [tensor(F32, (256,))]), "to IQ3_S")
    refused(node(Op.CPY, GgmlType.Q4_0, (32,), [tensor(GgmlType.Q8_0, (32,))]), "to Q4_0")
    refused(node(Op.CPY, F32, (4,), [None]), "source 0 is missing")
    refused(node(Op.CPY, F32, (8,), [tensor(F32, (8,))], nb=(0, 32, 32, 32)), "overlap")
    strided = tensor(GgmlType.Q8_0, (32, 2))
    strided.nb = (1, 34, 68, 68)
    refused(node(Op.CPY, F32, (32, 2), [strided]), "dense rows of blocks")
    absent = tensor(F32, (4,))
    absent.address = 0
    refused(node(Op.CPY, F32, (4,), [absent]), "not here")


def test_empty_nodes_pass_and_run_nothing() -> None:
    t = node(Op.CPY, F32, (0, 3), [tensor(F32, (0, 3))])
    check(t)
    harness.run(t, kernels=False)


# -- SET, ACC --------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("op", [Op.SET, Op.ACC])
def test_set_and_acc_change_a_part(op: Op, inplace: bool) -> None:
    x, y = random(6, 4), random(2, 3)
    a = tensor(F32, (6, 4), x)
    # Rows 1 to 3, columns 2 and 3.
    words = params(24, 96, 96, 24 + 8, int(inplace))
    t = node(op, F32, (6, 4), [a, tensor(F32, (2, 3), y)], words, inplace=a if inplace else None)
    expected = x.copy()
    expected[0, 0, 1:, 2:4] = y + (expected[0, 0, 1:, 2:4] if op is Op.ACC else 0)
    np.testing.assert_array_equal(ran(t), expected)


def test_set_of_integers() -> None:
    t = node(Op.SET, I32, (4,), [tensor(I32, (4,), 1), tensor(I32, (2,), 9)], params(16, 16, 16, 8))
    assert ran(t).ravel().tolist() == [1, 1, 9, 9]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((24, 96, 96, 80), "would end at byte"),
        ((1 << 30, 96, 96, 0), "would end at byte"),
        ((24, 96, 96, -4), "not whole elements"),
        ((-24, 96, 96, 72), "not whole elements"),
        ((24, 96, 96, 2), "not whole elements"),
        ((0, 0, 0, 0), "overlap"),
    ],
)
def test_set_refuses_parts_outside(words: tuple[int, ...], text: str) -> None:
    sources = [tensor(F32, (6, 4)), tensor(F32, (2, 3))]
    refused(node(Op.SET, F32, (6, 4), sources, params(*words)), text)


# -- CONCAT, REPEAT --------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", range(4))
@pytest.mark.parametrize("type_", [F32, F16, BF16, I32])
def test_concat(type_: GgmlType, dim: int) -> None:
    ne = [4, 3, 2, 2]
    ne[dim] = 5
    x, y = random(4, 3, 2, 2).round(), random(*ne).round()
    a, b = tensor(type_, (4, 3, 2, 2), x), permuted(tensor(type_, ne[::-1], y.T), (3, 2, 1, 0))
    expected = np.concatenate([x, y], axis=3 - dim)
    t = node(Op.CONCAT, type_, expected.shape[::-1], [a, b], params(dim))
    np.testing.assert_array_equal(ran(t), expected)


def test_concat_of_blocks() -> None:
    x, y = (from_f32(GgmlType.Q8_0, random(n, 2)) for n in (32, 96))
    a, b = tensor(GgmlType.Q8_0, (32, 2)), tensor(GgmlType.Q8_0, (96, 2))
    for t, blocks in ((a, x), (b, y)):
        CONTEXT.view(t)[...] = blocks
    t = node(Op.CONCAT, GgmlType.Q8_0, (128, 2), [a, b], params(0))
    harness.run(t, kernels=False)
    np.testing.assert_array_equal(CONTEXT.view(t), np.concatenate([x, y], axis=-1))


def test_concat_contracts() -> None:
    a, b = tensor(F32, (4, 2)), tensor(F32, (4, 3))
    refused(node(Op.CONCAT, F32, (4, 5), [a, b], params(4)), "no dimension 4")
    refused(node(Op.CONCAT, F32, (4, 5), [a, b], params(-1)), "no dimension -1")
    refused(node(Op.CONCAT, F32, (4, 5), [a, b], params(0)), "source 1 must be 4x2")
    refused(node(Op.CONCAT, F32, (4, 6), [a, b], params(1)), "result must be 4x5")
    refused(node(Op.CONCAT, F16, (4, 5), [a, b], params(1)), "source 0 must not be F32")


@settings(max_examples=30, deadline=None)
@given(st.tuples(*[st.integers(1, 3)] * 4), st.tuples(*[st.integers(1, 3)] * 4))
def test_repeat_and_back(ne: tuple[int, ...], times: tuple[int, ...]) -> None:
    x = random(*ne)
    large = tuple(n * k for n, k in zip(ne, times, strict=True))
    t = node(Op.REPEAT, F32, large, [tensor(F32, ne, x)])
    repeated = ran(t)
    for index in np.ndindex(repeated.shape):
        assert repeated[index] == x[tuple(i % n for i, n in zip(index, x.shape, strict=True))]
    summed = ran(node(Op.REPEAT_BACK, F32, ne, [t]))
    np.testing.assert_array_equal(summed, x * math.prod(times))


def test_repeat_contracts() -> None:
    refused(node(Op.REPEAT, F32, (6, 3), [tensor(F32, (4, 3))]), "whole copies")
    refused(node(Op.REPEAT, GgmlType.Q8_0, (64,), [tensor(GgmlType.Q8_0, (32,))]), "Q8_0")
    refused(node(Op.REPEAT_BACK, F32, (4,), [tensor(F32, (6,))]), "whole copies")
    refused(node(Op.REPEAT_BACK, F32, (4,), [tensor(F16, (4,))]), "F16")
    refused(node(Op.REPEAT, F32, (4,), [tensor(F32, (0,))]), "whole copies")


# -- GET_ROWS, SET_ROWS, ADD_ID --------------------------------------------------------------------


def indices(type_: GgmlType, ids: Any, *ne: int) -> Tensor:
    t = tensor(type_, ne)
    CONTEXT.view(t)[...] = np.reshape(ids, four(ne)[::-1])
    return t


@pytest.mark.parametrize("type_", sorted(DECODABLE), ids=lambda t: t.name)
def test_get_rows_of_every_type(type_: GgmlType) -> None:
    n = TYPE_INFO[type_].block_size * (2 if TYPE_INFO[type_].quantized else 5)
    table = tensor(type_, (n, 7, 2, 3))
    rows = CONTEXT.view(table)
    # Small bytes: no scale is infinite.
    rows[...] = RNG.integers(0, 60, rows.shape)
    ids = RNG.integers(0, 7, (3, 2, 4))
    t = node(Op.GET_ROWS, F32, (n, 4, 2, 3), [table, indices(I32, ids, 4, 2, 3)])
    expected = np.stack([[values(table)[i, j][ids[i, j]] for j in (0, 1)] for i in range(3)])
    np.testing.assert_array_equal(ran(t), expected)


def test_get_rows_of_integers_and_of_a_view() -> None:
    table = indices(I32, range(2**24 + 1, 2**24 + 13), 4, 3)
    part = view(table, (2, 3), (4, 16, 48, 48), offset=4)
    t = node(Op.GET_ROWS, I32, (2, 2), [part, indices(I32, [2, 0], 2)])
    harness.run(t, kernels=False)
    assert (CONTEXT.view(t)[0, 0] - 2**24).tolist() == [[10, 11], [2, 3]]


@pytest.mark.parametrize("bad", [-1, 3, 2**31 - 1])
def test_rows_out_of_range(bad: int) -> None:
    table, ids = tensor(F32, (4, 3)), indices(I32, [0, bad], 2)
    for t in (
        node(Op.GET_ROWS, F32, (4, 2), [table, ids]),
        node(Op.GET_ROWS_BACK, F32, (4, 3), [tensor(F32, (4, 2)), ids]),
        node(Op.SET_ROWS, F32, (4, 3), [tensor(F32, (4, 2)), ids], inplace=table),
        node(Op.ADD_ID, F32, (4, 2), [tensor(F32, (4, 2)), table, ids]),
    ):
        with pytest.raises(GraphError, match=f"index {bad} is out of range, there are 3 rows"):
            harness.run(t, kernels=False)


def test_get_rows_from_an_empty_table() -> None:
    t = node(Op.GET_ROWS, F32, (4, 1), [tensor(F32, (4, 0)), indices(I32, [0], 1)])
    with pytest.raises(GraphError, match="there are 0 rows"):
        harness.run(t, kernels=False)


def test_get_rows_contracts() -> None:
    table, ids = tensor(F32, (4, 3)), tensor(I32, (2,))
    refused(node(Op.GET_ROWS, F32, (4, 3), [table, ids]), "result must be 4x2")
    refused(node(Op.GET_ROWS, F32, (5, 2), [table, ids]), "result must be 4x2")
    refused(node(Op.GET_ROWS, F32, (4, 2, 2), [table, tensor(I32, (2, 2))]), "source 1 must be")
    refused(node(Op.GET_ROWS, F32, (4, 2), [table, tensor(I64, (2,))]), "I64")
    refused(node(Op.GET_ROWS, F16, (4, 2), [table, ids]), "result must not be F16")
    refused(node(Op.GET_ROWS, I32, (4, 2), [table, ids]), "result must not be I32")
    refused(node(Op.GET_ROWS, F32, (4, 2), [table, None]), "source 1 is missing")
    columns = permuted(tensor(F32, (3, 4)), (1, 0, 2, 3))
    refused(node(Op.GET_ROWS, F32, (4, 2), [columns, ids]), "dense rows")


def test_get_rows_back_adds_up() -> None:
    x = random(4, 3)
    t = node(Op.GET_ROWS_BACK, F32, (4, 5), [tensor(F16, (4, 3), x), indices(I32, [1, 4, 1], 3)])
    expected = np.zeros((5, 4), np.float32)
    expected[1], expected[4] = x[0, 0, 0] + x[0, 0, 2], x[0, 0, 1]
    np.testing.assert_array_equal(ran(t)[0, 0], expected)


@pytest.mark.parametrize("index_type", [I32, I64])
@pytest.mark.parametrize("type_", sorted(ENCODABLE), ids=lambda t: t.name)
def test_set_rows_into_every_type(type_: GgmlType, index_type: GgmlType) -> None:
    n = TYPE_INFO[type_].block_size * (1 if TYPE_INFO[type_].quantized else 5)
    # Rows of a wider cache, as those of one head are.
    cache = tensor(type_, (2 * n, 6, 2, 2), 0)
    part = view(cache, (n, 6, 2, 2), cache.nb)
    x, ids = random(n, 3, 2, 2), [4, 0, 5]
    sources = [tensor(F32, (n, 3, 2, 2), x), indices(index_type, ids, 3), part]
    before = values(cache)
    harness.run(node(Op.SET_ROWS, type_, part.ne, sources, inplace=part), kernels=False)
    after = values(cache)
    np.testing.assert_array_equal(after[:, :, ids, :n], to_f32(type_, from_f32(type_, x)))
    np.testing.assert_array_equal(after[:, :, [1, 2, 3]], before[:, :, [1, 2, 3]])
    np.testing.assert_array_equal(after[..., n:], before[..., n:])


def test_set_rows_of_i32_cuts_off() -> None:
    cache, x = tensor(I32, (3, 4), 9), [[1.9, -1.9, 0.5]]
    sources = [tensor(F32, (3, 1), [[x]]), indices(I64, [2], 1)]
    harness.run(node(Op.SET_ROWS, I32, cache.ne, sources, inplace=cache), kernels=False)
    assert values(cache)[0, 0].tolist() == [[9] * 3, [9] * 3, [1, -1, 0], [9] * 3]


def test_set_rows_with_index_planes_of_its_own_and_no_third_source() -> None:
    cache = tensor(F16, (4, 5, 4, 3), 0)
    x = random(4, 2, 4, 3)
    ids = np.stack([RNG.permutation(5)[:2] for _ in range(6)]).reshape(3, 2, 2)
    sources = [tensor(F16, (4, 2, 4, 3), x), indices(I64, ids, 2, 2, 3)]
    harness.run(node(Op.SET_ROWS, F16, cache.ne, sources, inplace=cache), kernels=False)
    expected = np.zeros((3, 4, 5, 4), np.float32)
    for i3, i2, i in np.ndindex(3, 4, 2):
        expected[i3, i2, ids[i3, i2 % 2, i]] = x[i3, i2, i]
    np.testing.assert_array_equal(values(cache), expected)


def test_set_rows_without_rows_changes_nothing() -> None:
    cache = tensor(F32, (4, 5), 7)
    t = node(Op.SET_ROWS, F32, cache.ne, [tensor(F32, (4, 0)), tensor(I64, (0,))], inplace=cache)
    assert (ran(t) == 7).all()


def test_set_rows_contracts() -> None:
    def set_rows(
        v: Tensor, ids: Tensor, type_: GgmlType = F32, ne: tuple[int, ...] = (4, 5)
    ) -> Tensor:
        cache = tensor(type_, ne)
        return node(Op.SET_ROWS, type_, ne, [v, ids], inplace=cache)

    check(set_rows(tensor(F32, (4, 2)), tensor(I64, (2,))))
    refused(set_rows(tensor(F32, (3, 2)), tensor(I64, (2,))), "source 0 must be 4x2")
    refused(set_rows(tensor(F32, (4, 2, 2)), tensor(I64, (2,))), "source 0 must be 4x2x1")
    refused(set_rows(tensor(F32, (4, 2)), tensor(I64, (3,))), "source 1 must be 2x1")
    refused(set_rows(tensor(F32, (4, 2)), tensor(F32, (2,))), "source 1 must not be F32")
    refused(set_rows(tensor(I32, (4, 2)), tensor(I64, (2,))), "source 0 must not be I32")
    refused(set_rows(tensor(F32, (4, 2, 3)), tensor(I64, (2, 2)), ne=(4, 5, 3)), "index planes")
    refused(set_rows(tensor(F32, (4, 2, 3)), tensor(I64, (2, 0)), ne=(4, 5, 3)), "index planes")
    refused(set_rows(tensor(F32, (256, 2)), tensor(I64, (2,)), GgmlType.IQ3_S, (256, 5)), "IQ3_S")


def test_add_id() -> None:
    x, bias, ids = random(4, 2, 3), random(4, 5), RNG.integers(0, 5, (3, 2))
    sources = [tensor(F32, (4, 2, 3), x), tensor(F32, (4, 5), bias), indices(I32, ids, 2, 3)]
    expected = x + bias[0, 0][ids]
    np.testing.assert_array_equal(ran(node(Op.ADD_ID, F32, (4, 2, 3), sources)), expected)
    a, b, i = sources
    refused(node(Op.ADD_ID, F32, (4, 2, 3), [a, tensor(F32, (3, 5)), i]), "source 1 must be")
    refused(node(Op.ADD_ID, F32, (4, 2, 3), [a, b, tensor(I32, (2, 2))]), "source 2 must be")
    refused(node(Op.ADD_ID, F32, (4, 2, 3), [a, b, tensor(I32, (2, 3, 0))]), "source 2 must be")
    refused(node(Op.ADD_ID, F32, (4, 2, 3), [a, tensor(F32, (4, 5, 0)), i]), "source 1 must be")


# -- PAD, ROLL, FILL, ARANGE -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["constant", "wrap"])
def test_pad(mode: Any) -> None:
    x = random(3, 2, 1, 2)
    around = ((2, 1), (0, 1), (3, 4), (1, 5))
    expected = np.pad(x, around, mode)
    words = [n for pair in around[::-1] for n in pair]
    source = permuted(tensor(F32, (2, 1, 2, 3), x.T), (3, 2, 1, 0))
    assert source.ne == (3, 2, 1, 2)
    t = node(Op.PAD, F32, expected.shape[::-1], [source], params(*words, int(mode == "wrap")))
    np.testing.assert_array_equal(ran(t), expected)


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("around", [0, 1])
def test_negative_pads_cut_off(around: int, kernels: bool) -> None:
    x = random(4, 3)
    t = node(
        Op.PAD, F32, (5, 1), [tensor(F32, (4, 3), x)], params(-1, 2, -1, -1, 0, 0, 0, 0, around)
    )
    harness.run(t, kernels=kernels)
    beyond = x[..., 1:2, :2] if around else np.zeros((1, 1, 1, 2))
    np.testing.assert_array_equal(values(t), np.concatenate([x[..., 1:2, 1:], beyond], -1))
    # What is cut off to the left of everything leaves nothing.
    t = node(Op.PAD, F32, (2, 3), [tensor(F32, (4, 3), x)], params(-10, 8))
    harness.run(t, kernels=kernels)
    assert not values(t).any()


def test_pad_contracts() -> None:
    refused(node(Op.PAD, F32, (5,), [tensor(F32, (4,))], params(0, 2)), "result must be 6x1")
    refused(node(Op.PAD, F32, (4,), [tensor(F32, (4,))], params(-1, 0)), "result must be 3x1")
    words = params(0, 2, 0, 0, 0, 0, 0, 0, 1)
    refused(node(Op.PAD, F32, (2,), [tensor(F32, (0,))], words), "nothing to repeat")


def test_roll() -> None:
    x = random(5, 4, 3, 2)
    t = node(Op.ROLL, F32, (5, 4, 3, 2), [tensor(F32, (5, 4, 3, 2), x)], params(1, -3, 2, 1))
    y = ran(t)
    for i3, i2, i1, i0 in np.ndindex(x.shape):
        assert y[i3, i2, i1, i0] == x[(i3 - 1) % 2, (i2 - 2) % 3, (i1 + 3) % 4, (i0 - 1) % 5]
    refused(node(Op.ROLL, F32, (5,), [tensor(F32, (5,))], params(5)), "roll by 5 of 5")


def test_roll_in_place() -> None:
    a = tensor(F32, (4,), [[[[1, 2, 3, 4]]]])
    assert ran(node(Op.ROLL, F32, (4,), [a], params(1), inplace=a)).ravel().tolist() == [4, 1, 2, 3]


@pytest.mark.parametrize("type_", [F32, F16])
def test_fill(type_: GgmlType) -> None:
    t = node(Op.FILL, type_, (4, 3), [tensor(type_, (4, 3))], params(-2.5))
    assert (ran(t) == -2.5).all()
    refused(node(Op.FILL, BF16, (4,), [tensor(BF16, (4,))]), "BF16")


def test_fill_of_rows_apart() -> None:
    whole = tensor(F32, (6, 3), 1)
    part = view(whole, (4, 3), whole.nb, 4)
    t = node(Op.FILL, F32, (4, 3), [part], params(7.0), inplace=part)
    harness.run(t, kernels=False)
    expected = np.ones((1, 1, 3, 6))
    expected[..., 1:5] = 7
    np.testing.assert_array_equal(values(whole), expected)


def test_arange() -> None:
    t = node(Op.ARANGE, F32, (4,), [], params(1.0, 3.0, 0.5))
    assert ran(t).ravel().tolist() == [1, 1.5, 2, 2.5]
    down = node(Op.ARANGE, F32, (3,), [], params(3.0, 0.0, -1.0))
    assert ran(down).ravel().tolist() == [3, 2, 1]


@pytest.mark.parametrize(
    "words", [(0.0, 4.0, 1.0), (0.0, 3.0, 0.0), (0.0, math.nan, 1.0), (0.0, math.inf, 1.0)]
)
def test_arange_of_another_length(words: tuple[float, ...]) -> None:
    refused(node(Op.ARANGE, F32, (3,), [], params(*words)), "are not 3 values")


# -- DIAG, TRI, masks ------------------------------------------------------------------------------


def test_diag() -> None:
    x = random(4, 1, 2, 3)
    y = ran(node(Op.DIAG, F32, (4, 4, 2, 3), [tensor(F32, (4, 1, 2, 3), x)]))
    for i3, i2 in np.ndindex(3, 2):
        np.testing.assert_array_equal(y[i3, i2], np.diag(x[i3, i2, 0]))
    refused(node(Op.DIAG, F32, (4, 4), [tensor(F32, (4, 4))]), "source 0 must be 4x1")
    refused(node(Op.DIAG, F32, (4, 3), [tensor(F32, (4, 1))]), "result must be 4x4")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (0, lambda x: np.triu(x)),
        (1, lambda x: np.triu(x, 1)),
        (2, lambda x: np.tril(x)),
        (3, lambda x: np.tril(x, -1)),
    ],
)
def test_tri(kind: int, expected: Any) -> None:
    x = random(4, 4, 3)
    t = node(Op.TRI, F32, (4, 4, 3), [tensor(F32, (4, 4, 3), x)], params(kind))
    np.testing.assert_array_equal(ran(t), expected(x))


def test_tri_contracts() -> None:
    refused(node(Op.TRI, F32, (4, 3), [tensor(F32, (4, 3))]), "square")
    refused(node(Op.TRI, F32, (4, 4), [tensor(F32, (4, 4))], params(4)), "no triangle 4")


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("op", "value"), [(Op.DIAG_MASK_INF, -np.inf), (Op.DIAG_MASK_ZERO, 0)])
def test_diag_mask(op: Op, value: float, inplace: bool) -> None:
    x = random(6, 3, 2) + 9
    a = tensor(F32, (6, 3, 2), x)
    t = node(op, F32, (6, 3, 2), [a], params(2), inplace=a if inplace else None)
    expected = x.copy()
    for row in range(3):
        expected[..., row, 2 + row + 1 :] = value
    np.testing.assert_array_equal(ran(t), expected)
    refused(node(op, F32, (6, 3, 2), [a], params(-1)), "n_past is -1")
