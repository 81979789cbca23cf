"""Products by CUDA kernels, in the emulation, against the array references."""

from __future__ import annotations

import numpy as np
import pytest

from protocol.ggml_ops import Op
from protocol.ggml_types import TYPE_INFO, GgmlType
from rpc_server.devices.cuda.planner import Launch
from rpc_server.graph.tensor import Tensor
from rpc_server.ops.table import ContractError
from rpc_server.types import DECODABLE
from tests.cuda import harness as cuda
from tests.ops.harness import CONTEXT, nmse, node, noise, permuted, tensor
from tests.ops.type_cases import random_content

pytestmark = cuda.needs_compiler

F32, F16, BF16, I32 = GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.I32
WEIGHTS = sorted(t for t in DECODABLE if TYPE_INFO[t].quantized or t in (F32, F16, BF16))

# As test-backend-ops: the part of the squares that may be wrong.
TOLERANCE = 5e-4
TOLERANCE_OF_FLOATS = 1e-7

# Their activations are rounded as Q8_1.
WITH_SUMS = (GgmlType.Q4_1, GgmlType.Q5_1)


def weights(type_: GgmlType, *ne: int, seed: int = 1) -> Tensor:
    t = tensor(type_, ne)
    content = random_content(type_, t.ne, seed, 100, None)
    CONTEXT.memory(t.address, t.nbytes)[...] = content
    return t


def check_product(a: Tensor, b: Tensor) -> None:
    t = node(Op.MUL_MAT, F32, (a.ne[1], *b.ne[1:]), [a, b])
    expected, actual = cuda.by_both(t)
    assert nmse(expected, actual) < (TOLERANCE if a.quantized else TOLERANCE_OF_FLOATS)


@pytest.mark.parametrize("type_", WEIGHTS, ids=lambda t: t.name)
def test_every_type(type_: GgmlType) -> None:
    """One column and several; rows that end within a block of threads; long rows and short ones."""
    block = max(TYPE_INFO[type_].block_size, 32)
    for m, k, n in (
        (5, block, 1),
        (19, 5 * block, 2),
        (3, 1280 // block * block, 3),
        (9, block, 11),
    ):
        check_product(weights(type_, k, m), noise((k, n)))


@pytest.mark.parametrize("type_", WEIGHTS, ids=lambda t: t.name)
def test_decoded_weights_are_exact(type_: GgmlType) -> None:
    """Ones in turn as columns: codes and scales of each place, to the roundings of a sum."""
    if not TYPE_INFO[type_].quantized:
        pytest.skip("floats are not decoded")
    k = TYPE_INFO[type_].block_size
    a = weights(type_, k, 3)
    columns = np.eye(k, dtype=np.float32)[:: max(k // 64, 1)]
    # Few enough at a time for kernels of our own.
    for at in range(0, len(columns), 16):
        b = tensor(F32, (k, 16), columns[at : at + 16])
        expected, actual = cuda.by_both(node(Op.MUL_MAT, F32, (3, 16), [a, b]))
        # A minimum that undoes a scale times a code leaves the roundings of both; of Q8_1 the sum
        # that a minimum is multiplied with is rounded to half precision.
        bound = 2.0**-10 if type_ in WITH_SUMS else 1e-5
        largest = float(np.abs(expected).max())
        np.testing.assert_allclose(actual, expected, rtol=bound, atol=largest * bound)


@pytest.mark.parametrize("type_", [F32, F16, BF16, GgmlType.Q4_0], ids=lambda t: t.name)
def test_batches_that_share_weights(type_: GgmlType) -> None:
    check_product(weights(type_, 64, 7, 2, 1), noise((64, 3, 4, 3)))


@pytest.mark.parametrize("type_", [F32, F16], ids=lambda t: t.name)
@pytest.mark.parametrize("k", [1, 3, 31, 70])
def test_rows_of_any_length(type_: GgmlType, k: int) -> None:
    check_product(weights(type_, k, 5), noise((k, 2)))


@pytest.mark.parametrize("type_", [F16, GgmlType.Q8_0], ids=lambda t: t.name)
def test_permuted_sources(type_: GgmlType) -> None:
    """As attention without FLASH_ATTN_EXT has them."""
    a = permuted(weights(type_, 64, 3, 5), (0, 2, 1, 3))
    b = permuted(noise((64, 3, 4)), (0, 2, 1, 3))
    check_product(a, permuted(noise((64, 3, 4)), (0, 2, 1, 3)) if b.ne[2] == a.ne[2] else b)


@pytest.mark.parametrize("type_", [F16, BF16], ids=lambda t: t.name)
def test_activations_of_other_types(type_: GgmlType) -> None:
    check_product(weights(type_, 96, 7), noise((96, 5), type_))


def test_activations_are_prepared_once() -> None:
    """Products that share a source share its codes: q, k and v."""
    x, k = noise((64, 1)), 64
    nodes = [node(Op.MUL_MAT, F32, (m, 1), [weights(GgmlType.Q4_0, k, m), x]) for m in (3, 5, 7)]
    launches, _ = cuda.plan(nodes)
    names = [launch.kernel.name for launch in launches if isinstance(launch, Launch)]
    assert names.count("quantize_columns") == 1


# -- experts ---------------------------------------------------------------------------------------


def routed(type_: GgmlType, inputs: int, ids: list[list[int]], experts: int = 4) -> Tensor:
    used = len(ids[0])
    a = weights(type_, 64, 9, experts)
    b = noise((64, inputs, len(ids)))
    chosen = tensor(I32, (used, len(ids)), np.array(ids))
    return node(Op.MUL_MAT_ID, F32, (9, used, len(ids)), [a, b, chosen])


@pytest.mark.parametrize("type_", [GgmlType.Q4_0, F16], ids=lambda t: t.name)
@pytest.mark.parametrize("inputs", [1, 2])
def test_experts(type_: GgmlType, inputs: int) -> None:
    expected, actual = cuda.by_both(routed(type_, inputs, [[0, 3], [2, 2], [1, 0]]))
    assert nmse(expected, actual) < (TOLERANCE if type_ is not F16 else TOLERANCE_OF_FLOATS)


@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1])
def test_an_expert_that_does_not_exist(bad: int) -> None:
    """The graph fails, and nothing beside the weights is read."""
    with pytest.raises(ContractError):
        cuda.run(routed(GgmlType.Q4_0, 1, [[0, bad]]))


@pytest.mark.parametrize("type_", [GgmlType.Q4_0, F16], ids=lambda t: t.name)
def test_experts_of_many_tokens(type_: GgmlType) -> None:
    """Pairs are sorted by expert: one with more than a group of columns, one with none."""
    rng = np.random.default_rng(1)
    ids = [[0, 1 + int(e)] for e in rng.integers(0, 2, 20)]
    expected, actual = cuda.by_both(routed(type_, 1, ids))
    assert nmse(expected, actual) < (TOLERANCE if type_ is not F16 else TOLERANCE_OF_FLOATS)


def test_an_expert_that_does_not_exist_among_many() -> None:
    with pytest.raises(ContractError):
        cuda.run(routed(GgmlType.Q4_0, 1, [[0, 1]] * 9 + [[4, 1]]))
