"""Sizes of tensors, and the hash of their bytes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.ggml.hashing import FNV_OFFSET, FNV_PRIME, fnv1a_64
from protocol.ggml.types import (
    TYPE_INFO,
    GgmlType,
    nbytes,
    row_size,
)

small = st.tuples(*[st.integers(1, 4)] * 4)
strides = st.tuples(*[st.integers(0, 64)] * 4)
PLAIN = [t for t, info in TYPE_INFO.items() if info.block_size == 1]
BLOCKED = [t for t, info in TYPE_INFO.items() if info.block_size > 1]


def test_every_type_has_its_layout() -> None:
    assert set(TYPE_INFO) == set(GgmlType)
    assert {t for t, info in TYPE_INFO.items() if info.quantized} == set(BLOCKED)


@given(st.sampled_from(PLAIN), small, strides)
def test_nbytes_of_plain_types(
    type: GgmlType, ne: tuple[int, int, int, int], nb: tuple[int, int, int, int]
) -> None:
    last = max(
        sum(i * stride for i, stride in zip(index, nb, strict=True))
        for index in itertools.product(*map(range, ne))
    )
    assert nbytes(type, ne, nb) == last + TYPE_INFO[type].type_size


@given(st.sampled_from(BLOCKED), small, st.integers(0, 3))
def test_nbytes_of_blocks(type: GgmlType, ne: tuple[int, int, int, int], gap: int) -> None:
    info = TYPE_INFO[type]
    row = ne[0] * info.type_size + gap
    nb = (info.type_size, row, row * ne[1], row * ne[1] * ne[2])
    elements = (ne[0] * info.block_size, *ne[1:])
    blocks = [
        sum(i * stride for i, stride in zip(index, nb, strict=True))
        for index in itertools.product(*map(range, ne))
    ]
    assert nbytes(type, elements, nb) == max(blocks) + info.type_size
    assert row_size(type, elements[0]) == row - gap


@pytest.mark.parametrize("dimension", range(4))
def test_nothing_in_a_dimension_is_nothing_at_all(dimension: int) -> None:
    ne = [5, 5, 5, 5]
    ne[dimension] = 0
    assert nbytes(GgmlType.F32, ne, (4, 20, 100, 500)) == 0


def test_sizes_off_the_wire_do_not_wrap() -> None:
    largest = 2**32 - 1
    size = nbytes(GgmlType.F32, [largest] * 4, [largest] * 4)
    assert size == 4 + 4 * (largest - 1) * largest
    assert size > 2**64


# From the reference vectors of the FNV authors.
@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"", 0xCBF29CE484222325),
        (b"a", 0xAF63DC4C8601EC8C),
        (b"foobar", 0x85944171F73967E8),
        (b"chongo was here!\n", 0x46810940EFF5F915),
    ],
)
def test_fnv_vectors(data: bytes, value: int) -> None:
    assert fnv1a_64(data) == value


@settings(deadline=None)  # the first long one waits for the compiler
@given(st.integers(0, 600), st.integers(0, 600), st.integers(0, 255))
def test_fnv_of_long_data_and_of_parts(first: int, second: int, start: int) -> None:
    # Long data take compiled code; parts may be on either side of that limit.
    data = bytes((start + 7 * i) & 0xFF for i in range(first + second))
    value = FNV_OFFSET
    for byte in data:
        value = (value ^ byte) * FNV_PRIME % 2**64
    assert fnv1a_64(data) == value
    assert fnv1a_64(memoryview(data)[first:], fnv1a_64(data[:first])) == value
