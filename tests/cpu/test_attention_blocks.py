"""Products of attention with a block: right, and the same numbers for one row as for several."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest

from rpc_server.devices.cpu.kernels.attention_blocks import (
    PANELS,
    add_values,
    panel_of_rows,
    score_rows,
)
from rpc_server.devices.cpu.kernels.interface.layout import BLOCK, LANES, ROWS_AT_ONCE

WIDTH = 80


@numba.njit
def panels(keys, to):  # type: ignore[no-untyped-def]
    for p in range(0, BLOCK, LANES):
        panel_of_rows(keys + p * WIDTH * 4, WIDTH * 4, WIDTH, to + p * WIDTH * 4)


@numba.njit
def scores(several, queries, keys, to):  # type: ignore[no-untyped-def]
    for p in range(0, BLOCK, LANES * PANELS):
        k, at = keys + p * WIDTH * 4, to + p * 4
        if several:
            score_rows(ROWS_AT_ONCE, PANELS, queries, WIDTH * 4, k, WIDTH, at, BLOCK * 4)
        else:
            for r in range(ROWS_AT_ONCE):
                q, row = queries + r * WIDTH * 4, at + r * BLOCK * 4
                score_rows(1, PANELS, q, WIDTH * 4, k, WIDTH, row, BLOCK * 4)


@numba.njit
def weighted(several, weights, count, values, sums):  # type: ignore[no-untyped-def]
    if several:
        add_values(ROWS_AT_ONCE, weights, BLOCK * 4, count, values, sums, WIDTH)
    else:
        for r in range(ROWS_AT_ONCE):
            row = weights + r * BLOCK * 4
            add_values(1, row, BLOCK * 4, count, values, sums + r * WIDTH * 4, WIDTH)


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray[Any, Any]:
    return rng.standard_normal(shape, np.float32)


def test_scores_of_rows_with_panels(rng: np.random.Generator) -> None:
    keys, queries = normal(rng, BLOCK, WIDTH), normal(rng, ROWS_AT_ONCE, WIDTH)
    turned = np.empty((BLOCK // LANES, WIDTH, LANES), np.float32)
    panels(keys.ctypes.data, turned.ctypes.data)
    np.testing.assert_array_equal(turned.swapaxes(1, 2).reshape(BLOCK, WIDTH), keys)
    found = np.zeros((2, ROWS_AT_ONCE, BLOCK), np.float32)
    for several in (False, True):
        to = found[int(several)]
        scores(several, queries.ctypes.data, turned.ctypes.data, to.ctypes.data)
    np.testing.assert_array_equal(found[0], found[1])
    expected = queries.astype(np.float64) @ keys.astype(np.float64).T
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 37, BLOCK])
def test_sums_of_values_by_weights(rng: np.random.Generator, count: int) -> None:
    weights, values = normal(rng, ROWS_AT_ONCE, BLOCK), normal(rng, BLOCK, WIDTH)
    before = normal(rng, ROWS_AT_ONCE, WIDTH)
    found = [before.copy(), before.copy()]
    for several, sums in enumerate(found):
        weighted(bool(several), weights.ctypes.data, count, values.ctypes.data, sums.ctypes.data)
    np.testing.assert_array_equal(found[0], found[1])
    part = weights[:, :count].astype(np.float64) @ values[:count].astype(np.float64)
    np.testing.assert_allclose(found[0], before + part, rtol=1e-4, atol=1e-4)
