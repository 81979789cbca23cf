"""Rows and their bytes: every one belongs to exactly one part, whatever the proportions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from client.split.partition import (
    ROW_MULTIPLE,
    Rows,
    attention_multiple,
    column_extents,
    partition,
    row_extents,
)

shares = st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=16).filter(
    lambda s: sum(s) > 0
)
# Any cut, also one that no partition would make.
cuts = st.lists(st.integers(0, 7), min_size=1, max_size=5)


def rows_of(lengths: list[int]) -> list[Rows]:
    edges = np.cumsum([0, *lengths]).tolist()
    return [Rows(first, last) for first, last in itertools.pairwise(edges)]


@given(st.integers(0, 100_000), shares, st.sampled_from([1, 32, 256]))
def test_each_row_belongs_to_one_part(n_rows: int, proportions: list[float], multiple: int) -> None:
    parts = partition(n_rows, proportions, multiple)
    assert len(parts) == len(proportions)
    edges = [0, *(p.last for p in parts)]
    assert [p.first for p in parts] == edges[:-1]
    assert edges == sorted(edges)
    assert edges[-1] == n_rows
    # Only the end is no multiple.
    assert all(edge % multiple == 0 or edge == n_rows for edge in edges)


@given(st.integers(0, 100_000), shares)
def test_a_part_gets_its_share(n_rows: int, proportions: list[float]) -> None:
    parts = partition(n_rows, proportions)
    total = sum(proportions)
    for rows, share in zip(parts, proportions, strict=True):
        assert abs(len(rows) - n_rows * share / total) <= ROW_MULTIPLE
        if share == 0:
            assert not len(rows)


@given(st.integers(0, 10_000), shares, st.sampled_from([0.25, 2.0, 1024.0]))
def test_only_the_ratio_counts(n_rows: int, proportions: list[float], factor: float) -> None:
    assume(min((p for p in proportions if p), default=1) > 1e-3)
    assert partition(n_rows, proportions) == partition(n_rows, [p * factor for p in proportions])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"),
    [(32, 8, 128), (9, 3, 64), (15, 5, 64), (64, 8, 128), (32, 32, 80), (40, 40, 128)],
)
@pytest.mark.parametrize("proportions", [[1, 1], [0.45, 0.55], [0.27, 0.47, 0.26], [1, 5]])
def test_attention_is_cut_in_whole_heads(
    heads: int, kv_heads: int, width: int, proportions: list[float]
) -> None:
    queries, keys = (
        [r.last for r in partition(n * width, proportions, attention_multiple(n * width))]
        for n in (heads, kv_heads)
    )
    assert all(end % width == 0 for end in keys)
    assert queries == [heads // kv_heads * end for end in keys]


@pytest.mark.parametrize("proportions", [[], [0.0], [0.0, 0.0], [1.0, -1.0], [float("nan")]])
def test_proportions_that_are_none(proportions: list[float]) -> None:
    with pytest.raises(ValueError, match="no proportions"):
        partition(64, proportions)


@st.composite
def ranges(draw: st.DrawFn, total: int) -> tuple[int, int]:
    offset = draw(st.integers(0, total))
    return offset, draw(st.integers(0, total - offset))


@given(cuts, st.integers(1, 9), st.integers(1, 4), st.data())
def test_a_range_of_bytes_is_found_in_the_parts(
    lengths: list[int], row_bytes: int, experts: int, data: st.DataObject
) -> None:
    n_rows = sum(lengths)
    assume(n_rows)
    parts = rows_of(lengths)
    whole = np.arange(experts * n_rows * row_bytes).reshape(experts, n_rows, row_bytes)
    there = [whole[:, p.first : p.last].reshape(-1) for p in parts]
    offset, size = data.draw(ranges(whole.size))
    found = np.full(size, -1)
    for piece in row_extents(parts, row_bytes, n_rows, offset, size):
        run = slice(piece.start, piece.start + piece.size)
        assert (found[run] == -1).all(), "a byte belongs to two parts"
        assert piece.size > 0
        found[run] = there[piece.part][piece.at : piece.at + piece.size]
    assert np.array_equal(found, np.arange(offset, offset + size))


@given(cuts, st.integers(1, 7), st.data())
def test_a_range_of_bytes_is_found_in_columns(
    lengths: list[int], n_rows: int, data: st.DataObject
) -> None:
    row_bytes = sum(lengths)
    assume(row_bytes)
    edges = rows_of(lengths)
    whole = np.arange(n_rows * row_bytes).reshape(n_rows, row_bytes)
    there = [whole[:, e.first : e.last].reshape(-1) for e in edges]
    offset, size = data.draw(ranges(whole.size))
    found = np.full(size, -1)
    for run in column_extents(edges, row_bytes, offset, size):
        for i in range(run.count):
            start = run.start + i * run.distance
            part = slice(start, start + run.size)
            assert (found[part] == -1).all(), "a byte belongs to two parts"
            at = run.at + i * run.size
            found[part] = there[run.part][at : at + run.size]
    assert np.array_equal(found, np.arange(offset, offset + size))


def test_there_is_nothing_in_a_weight_without_rows() -> None:
    assert row_extents([Rows(0, 0)], 64, 0, 0, 0) == []
