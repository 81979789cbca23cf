"""Kernels of CPY, CONT and DUP against their array references."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.ggml.ops import Op
from protocol.ggml.types import CACHE_TYPES, GgmlType
from protocol.tensor import contiguous_strides
from tests.ops.harness import by_both, guards_intact, run
from tests.ops.tensors import CONTEXT, node, permuted, raw, tensor, view

F32, F16, BF16, I32 = GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.I32

rng = np.random.default_rng(20261124)


def assert_equal(t, n_threads: int = 2) -> None:  # type: ignore[no-untyped-def]
    expected, actual = by_both(t, n_threads)
    assert np.array_equal(expected, actual)


PAIRS = [
    *[(x, y) for x in (F32, F16, BF16) for y in (F32, F16, BF16)],
    (F32, I32),
    (I32, F32),
    (I32, I32),
]


@pytest.mark.parametrize(("x", "y"), PAIRS)
def test_conversions_of_every_layout(x: GgmlType, y: GgmlType) -> None:
    ne = (37, 5, 3, 2)
    content = rng.integers(-1000, 1000, ne[::-1]) / (1 if I32 in (x, y) else 7)
    dense = tensor(x, ne, content)
    assert_equal(node(Op.CPY, y, ne, [dense, None]), 3)
    assert_equal(
        node(Op.DUP, y, ne, [tensor(x, ne, content, nb=contiguous_strides(x, (48, 5, 3, 2)))])
    )
    turned = permuted(dense, (1, 0, 2, 3))
    assert_equal(node(Op.CONT, y, turned.ne, [turned]), 1)
    moved = permuted(dense, (0, 2, 1, 3))
    assert_equal(node(Op.CONT, y, moved.ne, [moved]), 3)
    # Another shape with as many elements.
    assert_equal(node(Op.CPY, y, (15, 37, 2), [dense, None]), 3)
    assert_equal(node(Op.CPY, y, (15, 37, 2), [turned, None]), 2)


@pytest.mark.parametrize("type_", [GgmlType.I8, GgmlType.I16, GgmlType.I64, GgmlType.F64])
def test_same_type_of_any_size(type_: GgmlType) -> None:
    t = tensor(type_, (12, 7, 3), rng.integers(-100, 100, (3, 7, 12)))
    assert_equal(node(Op.CONT, type_, (7, 12, 3), [permuted(t, (1, 0, 2, 3))]))
    assert_equal(node(Op.DUP, type_, (12, 7, 3), [t]))


def copied(source, type_: GgmlType, ne, n_threads: int) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[no-untyped-def]
    found = []
    for kernels in (False, True):
        t = node(Op.CPY, type_, ne, [source, None])
        run(t, kernels=kernels, n_threads=n_threads)
        assert guards_intact(t)
        found.append(raw(t))
    return found[0], found[1]


@pytest.mark.parametrize("type_", sorted(CACHE_TYPES))
@pytest.mark.parametrize("source_type", [F32, F16, BF16])
def test_to_blocks_bit_for_bit(type_: GgmlType, source_type: GgmlType) -> None:
    source = tensor(source_type, (96, 5, 2), rng.normal(0, 1, (2, 5, 96)))
    for n_threads in (1, 3):
        for ne in ((96, 5, 2), (480, 2), (32, 30)):
            expected, actual = copied(source, type_, ne, n_threads)
            assert np.array_equal(expected, actual)
    moved = permuted(source, (0, 2, 1, 3))
    expected, actual = copied(moved, type_, moved.ne, 2)
    assert np.array_equal(expected, actual)


@pytest.mark.parametrize("type_", [GgmlType.Q8_0, GgmlType.Q4_0, GgmlType.Q6_K])
def test_from_blocks(type_: GgmlType) -> None:
    """Decoded, and copied as they are."""
    blocks = tensor(type_, (512, 5, 3))
    # Bytes below 60 keep scales finite.
    CONTEXT.memory(blocks.address, blocks.nbytes)[...] = rng.integers(
        0, 60, blocks.nbytes, np.uint8
    )
    assert_equal(node(Op.CPY, F32, (512, 5, 3), [blocks, None]))
    moved = permuted(blocks, (0, 2, 1, 3))
    assert_equal(node(Op.CPY, F32, moved.ne, [moved, None]), 3)
    assert_equal(node(Op.CONT, type_, moved.ne, [moved]), 3)


def test_large_runs_are_shared_among_threads() -> None:
    source = tensor(F32, (20000,), rng.normal(0, 1, 20000))
    for n_threads in (2, 3):
        assert_equal(node(Op.CPY, F16, (20000,), [source, None]), n_threads)
        assert_equal(node(Op.CPY, F32, (100, 200), [source, None]), n_threads)
    square = view(source, (100, 200), (400, 4, 80000, 80000))
    assert_equal(node(Op.CONT, F32, (100, 200), [square]), 3)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    ne=st.tuples(*[st.integers(1, 9)] * 4),
    axes=st.permutations(range(4)),
    to_axes=st.permutations(range(4)),
    n_threads=st.integers(1, 3),
)
def test_any_permutation_to_any_layout(
    ne: tuple[int, int, int, int], axes: list[int], to_axes: list[int], n_threads: int
) -> None:
    content = np.arange(np.prod(ne)).reshape(ne[::-1])
    source = permuted(tensor(F32, ne, content), axes)
    # The destination's strides are those of dimensions in another order of memory.
    shape = source.ne
    nb, size = [0] * 4, 4
    for axis in to_axes:
        nb[axis] = size
        size *= shape[axis]
    t = node(Op.CPY, F32, shape, [source, None], nb=(nb[0], nb[1], nb[2], nb[3]))
    assert_equal(t, n_threads)
