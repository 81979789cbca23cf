"""LIGHTNING_INDEXER against plain loops, and what its contract refuses."""

from __future__ import annotations

import numpy as np
import pytest

import rpc_server.ops.slices
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.ops.table import ContractError, check
from tests.ops.harness import guards_intact, nmse, run
from tests.ops.tensors import node, permuted, tensor, values

F32, F16, Q8_0 = GgmlType.F32, GgmlType.F16, GgmlType.Q8_0
SIZE, HEADS, TOKENS, POSITIONS, STREAMS = 32, 3, 4, 7, 4


def sources(type_: GgmlType = F32, masks: int = 2) -> list[Tensor]:
    rng = np.random.default_rng(1)
    shapes = [
        (F32, (SIZE, HEADS, TOKENS, STREAMS)), (type_, (SIZE, 1, POSITIONS, STREAMS)),
        (F32, (HEADS, TOKENS, 1, STREAMS)), (F16, (POSITIONS, TOKENS, 1, masks)),
    ]  # fmt: skip
    made = [tensor(kind, ne, rng.standard_normal(ne[::-1])) for kind, ne in shapes]
    made[3] = tensor(F16, shapes[3][1], np.where(rng.random(shapes[3][1][::-1]) < 0.3, -np.inf, 0))
    return made


def indexed(given: list[Tensor]) -> Tensor:
    return node(Op.LIGHTNING_INDEXER, F32, (POSITIONS, TOKENS, 1, STREAMS), given)


def expected(given: list[Tensor]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    q, k, weights, mask = (values(s).astype(np.float64) for s in given)
    result = np.zeros((STREAMS, 1, TOKENS, POSITIONS))
    for s, token, position in np.ndindex(STREAMS, TOKENS, POSITIONS):
        for head in range(HEADS):
            product = q[s, token, head] @ k[s, position, 0]
            result[s, 0, token, position] += max(product, 0) * weights[s, 0, token, head]
        result[s, 0, token, position] += mask[s % mask.shape[0], 0, token, position]
    return result


@pytest.mark.parametrize("type_", [F32, F16, GgmlType.BF16, Q8_0, GgmlType.Q4_0])
@pytest.mark.parametrize("masks", [1, 2, 4])
def test_scores(type_: GgmlType, masks: int) -> None:
    given = sources(type_, masks)
    t = indexed(given)
    run(t, kernels=False)
    assert nmse(expected(given), values(t)) < 1e-11
    assert guards_intact(t)


def test_in_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc_server.ops.slices, "_BYTES_AT_ONCE", 4 * SIZE * 3)
    given = sources(Q8_0)
    t = indexed(given)
    run(t, kernels=False)
    assert nmse(expected(given), values(t)) < 1e-11


def test_views() -> None:
    given = sources()
    rng = np.random.default_rng(2)
    shape = (TOKENS, STREAMS, HEADS, SIZE)
    given[0] = permuted(tensor(F32, shape[::-1], rng.standard_normal(shape)), (0, 1, 3, 2))
    t = indexed(given)
    run(t, kernels=False)
    assert nmse(expected(given), values(t)) < 1e-11


def test_contract() -> None:
    check(indexed(sources()))
    with pytest.raises(ContractError, match="4 is not a multiple of 3"):
        check(indexed(sources(masks=3)))
    for i in range(4):
        bad = sources()
        bad[i] = tensor(F32, (1, 1, 1, 1), 0)
        with pytest.raises(ContractError, match=r"source [123] must|source 3 must not"):
            check(indexed(bad))
    keys = sources()
    keys[1] = tensor(F32, (SIZE, 2, POSITIONS, STREAMS), 0)
    with pytest.raises(ContractError, match="source 1 must be 32x1x7x4"):
        check(indexed(keys))
    t = indexed(sources())
    t.ne = (POSITIONS, TOKENS, 1, 1)
    with pytest.raises(ContractError, match="the result must be"):
        check(t)


def test_queries_without_elements_leave_the_mask() -> None:
    given = sources()
    given[:2] = [tensor(F32, (0, *s.ne[1:])) for s in given[:2]]
    t = indexed(given)
    run(t, kernels=False)
    turns = np.tile(values(given[3]), (2, 1, 1, 1)).reshape(STREAMS, 1, TOKENS, POSITIONS)
    np.testing.assert_array_equal(values(t), turns)
