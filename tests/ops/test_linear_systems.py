"""Solutions of triangular systems put back into their equations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.ops.table import ContractError, check
from tests.ops.harness import guards_intact, nmse, run
from tests.ops.tensors import node, permuted, tensor, values

F32 = GgmlType.F32


def system(n: int, k: int, batches: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """A (with noise above the diagonal, which doesn't count) and B."""
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((*batches[::-1], n, n)) * 0.3
    diagonal = np.arange(n)
    a[..., diagonal, diagonal] = 1 + abs(a[..., diagonal, diagonal])
    b = rng.standard_normal((*batches[::-1], n, k))
    return tensor(F32, (n, n, *batches), a), tensor(F32, (k, n, *batches), b)


def solution(a: Tensor, b: Tensor, inplace: bool = False) -> Tensor:
    return node(Op.SOLVE_TRI, F32, b.ne, [a, b], inplace=b if inplace else None)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 5), st.tuples(st.integers(1, 3), st.integers(1, 2)))
def test_solutions_solve(n: int, k: int, batches: tuple[int, int]) -> None:
    a, b = system(n, k, batches)
    t = solution(a, b)
    run(t, kernels=False)
    lower = np.tril(values(a).astype(np.float64))
    assert nmse(values(b), lower @ values(t).astype(np.float64)) < 1e-11
    assert guards_intact(t)


def test_in_place() -> None:
    a, b = system(9, 4, (2, 1))
    expected = solution(a, b)
    run(expected, kernels=False)
    t = solution(a, b, inplace=True)
    run(t, kernels=False)
    np.testing.assert_array_equal(values(t), values(expected))


def test_batches_in_another_order() -> None:
    a, b = system(5, 3, (2, 3))
    a, b = (permuted(s, (0, 1, 3, 2)) for s in (a, b))
    t = solution(a, b)
    expected = solution(tensor(F32, a.ne, values(a)), tensor(F32, b.ne, values(b)))
    run([t, expected], kernels=False)
    np.testing.assert_array_equal(values(t), values(expected))


def test_contract() -> None:
    a, b = system(5, 3, (2, 1))
    check(solution(a, b))
    for bad in (system(4, 3, (2, 1))[0], system(5, 3, (1, 1))[0]):
        with pytest.raises(ContractError, match="source 0 must be 5x5x2x1"):
            check(solution(bad, b))
    t = node(Op.SOLVE_TRI, F32, (3, 5, 2), [a, system(5, 4, (2, 1))[1]])
    with pytest.raises(ContractError, match="source 1 must be"):
        check(t)
    flat = tensor(F32, (5, 5, 2), nb=(4, 0, 0, 0))
    with pytest.raises(ContractError, match="elements of source 0 overlap"):
        check(solution(flat, b))
