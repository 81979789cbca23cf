"""References of matrix products against sums written out, and what their contracts refuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.graph.errors import GraphError
from rpc_server.ops import slices
from rpc_server.ops.table import check
from tests.ops.harness import guards_intact, nmse, refused, rounded_source, run
from tests.ops.tensors import CONTEXT, node, permuted, tensor, values, view

F32, F16, BF16, Q4_0, Q8_0, I32 = (
    GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.Q4_0, GgmlType.Q8_0, GgmlType.I32,
)  # fmt: skip
# References multiply decoded values in float32, activations rounded as ggml rounds them for
# quantized weights: nothing but float32's own rounding is allowed beyond that.
LIMIT = 1e-11


@pytest.fixture(params=[1, 16 << 20], ids=["row by row", "at once"], autouse=True)
def bytes_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of single rows, and tiles larger than anything here."""
    monkeypatch.setattr(slices, "_BYTES_AT_ONCE", request.param)


def noise(type_: GgmlType, ne: Sequence[int], seed: int = 0) -> Tensor:
    rng = np.random.default_rng([seed, *ne])
    return tensor(type_, ne, rng.standard_normal(tensor(F32, ne).ne[::-1]).astype(np.float32))


def indices(ids: Sequence[Sequence[int]]) -> Tensor:
    t = tensor(I32, (len(ids[0]), len(ids)))
    CONTEXT.view(t)[0, 0] = ids
    return t


def mul_mat(a: Tensor, b: Tensor) -> Tensor:
    return node(Op.MUL_MAT, F32, (a.ne[1], *b.ne[1:]), [a, b])


def mul_mat_id(a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
    return node(Op.MUL_MAT_ID, F32, (a.ne[1], *ids.ne[:2]), [a, b, ids])


def out_prod(a: Tensor, b: Tensor) -> Tensor:
    return node(Op.OUT_PROD, F32, (a.ne[0], b.ne[0], *b.ne[2:]), [a, b])


def check_values(t: Tensor, expected: np.ndarray[Any, Any]) -> None:
    run(t, kernels=False)
    assert nmse(expected, values(t)) < LIMIT
    assert guards_intact(t)


def expected_product(a: Tensor, b: Tensor) -> np.ndarray[Any, Any]:
    w, x = values(a).astype(np.float64), rounded_source(b, a.type)
    result = np.zeros((b.ne[3], b.ne[2], b.ne[1], a.ne[1]))
    for i3, i2, column, row in np.ndindex(*result.shape):
        weights = w[i3 * a.ne[3] // b.ne[3], i2 * a.ne[2] // b.ne[2], row]
        result[i3, i2, column, row] = sum(weights * x[i3, i2, column])
    return result


@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        (F32, F32), (F32, F16), (F32, BF16), (F16, F32), (F16, F16), (BF16, F32), (BF16, BF16),
        (Q4_0, F32), (Q8_0, F32),
    ],
)  # fmt: skip
def test_types(weights: GgmlType, activations: GgmlType) -> None:
    a, b = noise(weights, (64, 5)), noise(activations, (64, 3), 1)
    check_values(mul_mat(a, b), expected_product(a, b))


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("batches", [1, 3])
def test_weights_repeat_over_dimensions_2_and_3(heads: int, batches: int) -> None:
    a, b = noise(F16, (8, 3, 2, 1)), noise(F32, (8, 2, 2 * heads, batches), 1)
    check_values(mul_mat(a, b), expected_product(a, b))
    a, b = noise(Q8_0, (32, 3, 1, batches)), noise(F32, (32, 2, heads, 2 * batches), 1)
    check_values(mul_mat(a, b), expected_product(a, b))


def test_permuted_sources_and_result() -> None:
    # As attention without FLASH_ATTN_EXT has them: heads side by side in each row.
    a = permuted(noise(F16, (8, 2, 5)), (0, 2, 1, 3))
    b = permuted(noise(F32, (8, 4, 3), 1), (0, 2, 1, 3))
    check_values(mul_mat(a, b), expected_product(a, b))
    result = mul_mat(a, b)
    wide = tensor(F32, (5, 3, 4), nb=(4, 32, 96, 384))
    wide.op, wide.src = result.op, result.src
    check_values(wide, expected_product(a, b))


@pytest.mark.parametrize("inputs", [1, 2, 4])
@pytest.mark.parametrize("type_", [F32, Q4_0])
def test_experts(type_: GgmlType, inputs: int) -> None:
    a, b = noise(type_, (32, 5, 6)), noise(F32, (32, inputs, 3), 1)
    chosen = [[0, 5, 2, 3], [5, 0, 5, 1], [2, 2, 2, 2]]
    w, x = values(a).astype(np.float64)[0], rounded_source(b, type_)[0]
    expected = np.zeros((1, 3, 4, 5))
    for token, slot, row in np.ndindex(3, 4, 5):
        weights = w[chosen[token][slot], row]
        expected[0, token, slot, row] = sum(weights * x[token, slot % inputs])
    check_values(mul_mat_id(a, b, indices(chosen)), expected)


def test_experts_of_a_longer_list() -> None:
    # The most likely experts are the first columns of all of them, sorted.
    a, b, all_ids = noise(F16, (8, 5, 4)), noise(F16, (8, 1, 2), 1), indices([[3, 1, 0, 2]] * 2)
    ids = view(all_ids, (2, 2), all_ids.nb)
    expected = values(a).astype(np.float64)[0][[3, 1]] @ values(b).astype(np.float64)[0, 0, 0]
    t = mul_mat_id(a, b, ids)
    run(t, kernels=False)
    assert nmse(expected, values(t)[0, 0]) < LIMIT


@pytest.mark.parametrize("expert", [-1, 4, 1 << 20, -(1 << 31)])
def test_no_such_expert(expert: int) -> None:
    a, b = noise(F32, (8, 5, 4)), noise(F32, (8, 1, 2), 1)
    t = mul_mat_id(a, b, indices([[0, 1], [3, expert]]))
    with pytest.raises(GraphError, match=f"index {expert} is out of range"):
        run(t, kernels=False)


@pytest.mark.parametrize("type_", [F32, F16, Q8_0])
def test_outer_products(type_: GgmlType) -> None:
    a, b = noise(type_, (32, 7, 2, 1)), noise(F32, (3, 7, 4, 2), 1)
    w, x = values(a).astype(np.float64), values(b).astype(np.float64)
    expected = np.zeros((2, 4, 3, 32))
    for i3, i2, column, k in np.ndindex(2, 4, 3, 7):
        expected[i3, i2, column] += x[i3, i2, k, column] * w[0, i2 // 2, k]
    check_values(out_prod(a, b), expected)


def test_outer_product_with_transposed_columns() -> None:
    a, b = noise(F32, (4, 7)), permuted(noise(F32, (7, 3), 1), (1, 0, 2, 3))
    expected = values(b).astype(np.float64)[0, 0].T @ values(a).astype(np.float64)[0, 0]
    check_values(out_prod(a, b), expected[None, None])


@pytest.mark.parametrize("weights", [Q4_0, GgmlType.Q4_1, GgmlType.Q5_K, GgmlType.IQ2_S])
@pytest.mark.parametrize("type_", [Q8_0, GgmlType.Q8_1, GgmlType.Q8_K])
def test_activations_that_come_quantized(weights: GgmlType, type_: GgmlType) -> None:
    a = tensor(weights, (256, 5, 2))
    CONTEXT.memory(a.address, a.nbytes)[...] = np.resize(np.arange(0, 61, dtype=np.uint8), a.nbytes)
    b, ids = noise(type_, (256, 2, 2)), indices([[0, 1], [1, 1]])
    w, x = values(a)[0], values(b)[0]
    t = mul_mat(a, b)
    run(t, kernels=False)
    assert nmse(x @ w.transpose(0, 2, 1), values(t)[0]) < LIMIT
    t = mul_mat_id(a, b, ids)
    run(t, kernels=False)
    expected = [
        [w[ids] @ x[i, j] for j, ids in enumerate(row)] for i, row in enumerate([[0, 1], [1, 1]])
    ]
    assert nmse(np.array(expected), values(t)[0]) < LIMIT


def test_contract_of_mul_mat() -> None:
    a, b = noise(F32, (32, 5, 2)), noise(F32, (32, 3, 4))
    check(mul_mat(a, b))
    refused(node(Op.MUL_MAT, F16, (5, 3, 4), [a, b]), "the result must not be F16")
    refused(node(Op.MUL_MAT, F32, (5, 3, 5), [a, b]), "the result must be 5x3x4x1")
    refused(node(Op.MUL_MAT, F32, (6, 3, 4), [a, b]), "the result must be")
    refused(mul_mat(a, noise(F32, (31, 3, 4))), "rows of 32 and of 31")
    refused(mul_mat(a, noise(F32, (32, 3, 3))), "3 is not a multiple of 2")
    refused(mul_mat(noise(F32, (32, 5, 1, 2)), noise(F32, (32, 3))), "1 is not a multiple of 2")
    refused(mul_mat(tensor(F32, (32, 5, 0)), b), "4 is not a multiple of 0")
    refused(mul_mat(tensor(F32, (0, 5)), tensor(F32, (0, 3))), "are empty")
    refused(mul_mat(tensor(I32, (32, 5)), b), "source 0 must not be I32")
    refused(mul_mat(noise(Q8_0, (32, 5)), noise(F16, (32, 3))), "source 1 must not be F16")
    refused(mul_mat(noise(F32, (32, 5)), noise(Q8_0, (32, 3))), "source 1 must not be Q8_0")
    q4_0 = noise(GgmlType.Q4_0, (32, 3))
    refused(mul_mat(noise(Q8_0, (32, 5)), q4_0), "source 1 must not be Q4_0")
    refused(mul_mat(permuted(noise(F32, (5, 32)), (1, 0, 2, 3)), b), "source 0 must have dense")
    strided = tensor(F32, (32, 3), nb=(8, 256, 768, 768))
    refused(mul_mat(a, strided), "source 1 must have dense")
    blocks = tensor(Q8_0, (32, 5), nb=(68, 68, 340, 340))
    refused(mul_mat(blocks, b), "dense rows of blocks")
    overlapping = mul_mat(a, b)
    overlapping.nb = (4, 4, 60, 240)
    refused(overlapping, "overlap")


def test_empty_products_pass() -> None:
    check(mul_mat(noise(F32, (32, 5)), tensor(F32, (32, 0))))
    check(mul_mat(tensor(F32, (0, 0)), tensor(F32, (0, 3))))


def test_contract_of_mul_mat_id() -> None:
    a, b, ids = noise(F32, (32, 5, 4)), noise(F32, (32, 2, 3)), indices([[0, 1]] * 3)
    check(mul_mat_id(a, b, ids))
    refused(mul_mat_id(noise(F32, (32, 5, 4, 2)), b, ids), "source 0 must be 32x5x4x1")
    refused(mul_mat_id(a, noise(F32, (32, 2, 4)), ids), "source 1 must be")
    refused(mul_mat_id(a, noise(F32, (32, 2, 3, 2)), ids), "source 1 must be")
    refused(mul_mat_id(a, noise(F32, (32, 3, 3)), ids), "2 is not a multiple of 3")
    refused(mul_mat_id(a, tensor(F32, (32, 0, 3)), ids), "2 is not a multiple of 0")
    refused(mul_mat_id(a, b, tensor(F32, (2, 3))), "source 2 must not be F32")
    refused(mul_mat_id(a, b, tensor(I32, (2, 3, 2))), "source 2 must be")
    refused(node(Op.MUL_MAT_ID, F32, (5, 2, 4), [a, b, ids]), "the result must be")


def test_contract_of_out_prod() -> None:
    a, b = noise(F32, (4, 7, 2)), noise(F32, (3, 7, 4))
    check(out_prod(a, b))
    refused(out_prod(a, noise(F32, (3, 6, 4))), "7 rows and 6")
    refused(out_prod(a, noise(F32, (3, 7, 3))), "3 is not a multiple of 2")
    refused(out_prod(a, noise(F16, (3, 7, 4))), "source 1 must not be F16")
    refused(node(Op.OUT_PROD, F32, (3, 4, 4), [a, b]), "the result must be")
    endless = tensor(F32, (4, 1 << 40), nb=(4, 0, 0, 0))
    refused(out_prod(endless, tensor(F32, (1, 1 << 40), nb=(0, 0, 0, 0))), "overlap")
