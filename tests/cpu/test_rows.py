"""Kernels of GET_ROWS and SET_ROWS against their array references."""

from __future__ import annotations

import numpy as np
import pytest

from protocol.ggml.ops import Op
from protocol.ggml.types import CACHE_TYPES, DECODABLE, TYPE_INFO, GgmlType
from protocol.tensor import Tensor
from rpc_server.graph.errors import GraphError
from tests.ops.harness import by_both, guards_intact, nmse, run
from tests.ops.tensors import CONTEXT, node, permuted, raw, tensor, view

F32, F16, BF16, I32, I64 = GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.I32, GgmlType.I64
QUANTIZED = sorted(type_ for type_ in DECODABLE if TYPE_INFO[type_].quantized)

rng = np.random.default_rng(20261124)


def random_blocks(type_: GgmlType, ne: tuple[int, ...]) -> Tensor:
    """Any bytes are blocks of any type, but infinite scales would hide what is wrong."""
    t = tensor(type_, ne)
    memory = CONTEXT.memory(t.address, t.nbytes)
    memory[...] = rng.integers(0, 256, t.nbytes, np.uint8)
    halves = memory[: t.nbytes // 2 * 2].view(np.uint16)
    # The top exponent bit of every 16-bit word: keeps half floats below 2.
    halves &= 0xBFFF
    return t


@pytest.mark.parametrize("type_", QUANTIZED)
def test_get_rows_of_blocks(type_: GgmlType) -> None:
    table = random_blocks(type_, (512, 11))
    if type_ is GgmlType.MXFP4:
        # Scales are exponents: near 1, so that squares of values stay finite.
        CONTEXT.view(table).reshape(-1, 17)[:, 0] = rng.integers(110, 140, 11 * 16)
    if type_ is GgmlType.Q8_K:
        scales = rng.normal(0, 1, (22, 1)).astype(np.float32)
        CONTEXT.view(table).reshape(-1, 292)[:, :4] = scales.view(np.uint8)
    ids = tensor(I32, (5,), [3, 0, 10, 3, 7])
    expected, actual = by_both(node(Op.GET_ROWS, F32, (512, 5), [table, ids]))
    assert np.isfinite(expected).all()
    assert nmse(expected, actual) < 1e-12


@pytest.mark.parametrize("type_", [F32, F16, BF16, I32])
def test_get_rows_of_plain_types(type_: GgmlType) -> None:
    table = tensor(type_, (21, 6, 3, 2), rng.integers(-9, 9, (2, 3, 6, 21)))
    ids = tensor(I32, (4, 3, 2), rng.integers(0, 6, (2, 3, 4)))
    result = I32 if type_ is I32 else F32
    for n_threads in (1, 3):
        t = node(Op.GET_ROWS, result, (21, 4, 3, 2), [table, ids])
        expected, actual = by_both(t, n_threads)
        assert np.array_equal(expected, actual)


@pytest.mark.parametrize("index", [-1, 6, 1 << 30])
def test_get_rows_out_of_range(index: int) -> None:
    table, ids = tensor(F32, (8, 6), 1.0), tensor(I32, (3,), [0, index, 5])
    t = node(Op.GET_ROWS, F32, (8, 3), [table, ids])
    with pytest.raises(GraphError, match="out of range"):
        run(t, kernels=True)
    assert guards_intact(t)


def set_rows(
    type_: GgmlType, source: Tensor, ids: Tensor, n_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of a cache after a SET_ROWS by reference, and by the kernel."""
    found = []
    for kernels in (False, True):
        cache = tensor(type_, (source.ne[0], n_rows, *source.ne[2:]), 0.0)
        t = node(Op.SET_ROWS, type_, cache.ne, [source, ids, cache], inplace=cache)
        run(t, kernels=kernels, n_threads=3)
        assert guards_intact(cache)
        found.append(raw(cache))
    return found[0], found[1]


@pytest.mark.parametrize("type_", [F32, F16, BF16, *sorted(CACHE_TYPES)])
@pytest.mark.parametrize("source_type", [F32, F16])
@pytest.mark.parametrize("index_type", [I64, I32])
def test_set_rows_bit_for_bit(type_: GgmlType, source_type: GgmlType, index_type: GgmlType) -> None:
    content = rng.normal(0, 1, (1, 2, 7, 96))
    content[0, 0, 1] = 0
    content[0, 0, 2] = rng.integers(-3, 4, 96)
    source = tensor(source_type, (96, 7, 2), content)
    ids = tensor(index_type, (7, 1), rng.permutation(9)[:7])
    expected, actual = set_rows(type_, source, ids, 9)
    assert np.array_equal(expected, actual)


def test_quantizers_on_hard_values() -> None:
    """Ties, tiny and huge scales, equal extremes of both signs."""
    rows = [
        np.arange(-48, 48) / 2,
        np.tile([127.0, -127.0, 63.5, -63.5, 0.5, -0.5, 0.49999997, 1.5], 12),
        np.full(96, 1e-38),
        np.full(96, -3.0),
        rng.normal(0, 1e-6, 96),
        rng.normal(0, 6e4, 96),
        np.tile([8.0, -8.0], 48),
    ]
    source = tensor(F32, (96, len(rows)), np.array(rows, np.float32))
    ids = tensor(I64, (len(rows),), np.arange(len(rows)))
    for type_ in CACHE_TYPES:
        expected, actual = set_rows(type_, source, ids, len(rows))
        assert np.array_equal(expected, actual), type_.name


def test_set_rows_of_a_permuted_source_and_single_elements() -> None:
    source = permuted(tensor(F32, (64, 3, 5), rng.normal(0, 1, (5, 3, 64))), (0, 2, 1, 3))
    ids = tensor(I64, (5, 3), np.array([[4, 0, 2, 1, 3], [3, 4, 0, 1, 2], [0, 1, 2, 3, 4]]))
    expected, actual = set_rows(F16, source, ids, 6)
    assert np.array_equal(expected, actual)
    # A transposed cache of values is written element by element.
    flat = tensor(F32, (192,), rng.normal(0, 1, 192))
    single = view(flat, (1, 192), (4, 4, 768, 768))
    ids = tensor(I64, (192,), rng.permutation(256)[:192])
    expected, actual = set_rows(F16, single, ids, 256)
    assert np.array_equal(expected, actual)


@pytest.mark.parametrize("index", [-1, 9, 1 << 40])
def test_set_rows_out_of_range_writes_nothing(index: int) -> None:
    source = tensor(F32, (32, 4), 1.0)
    ids = tensor(I64, (4,), np.array([0, 1, 2, index]))
    for type_ in (F16, GgmlType.Q8_0):
        cache = tensor(type_, (32, 9), 0.0)
        before = raw(cache)
        t = node(Op.SET_ROWS, type_, cache.ne, [source, ids, cache], inplace=cache)
        with pytest.raises(GraphError, match="out of range"):
            run(t, kernels=True)
        assert np.array_equal(raw(cache), before)


@pytest.mark.parametrize("kernels", [True, False])
def test_indices_that_set_rows_writes_over_lead_nowhere(kernels: bool) -> None:
    """The first row lands on the second's index; a row of it would be behind the cache."""
    n_rows, index_row, behind = 64, 8, 500
    arena = tensor(F32, (4, 1024), 0.0)
    cache = view(arena, (4, n_rows), arena.nb)
    indices = view(arena, (2,), (8, 16, 16, 16), index_row * arena.nb[1])
    indices.type = I64
    CONTEXT.view(indices)[...] = [index_row, 0]
    source = tensor(F32, (4, 2), np.array([[0.0] * 4, [7.0] * 4]))
    CONTEXT.memory(source.address, 16).view(np.int64)[:] = [0, behind]
    t = node(Op.SET_ROWS, F32, cache.ne, [source, indices, cache], inplace=cache)
    if kernels:
        with pytest.raises(GraphError, match="out of range"):
            run(t, kernels=True, n_threads=1)
    else:
        # The reference has read all indices before it writes.
        run(t, kernels=False)
    assert not raw(arena)[cache.nbytes :].any()
