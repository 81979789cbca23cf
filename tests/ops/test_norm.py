"""References of normalisations against formulas in float64, and what their contracts refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.ops.table import check
from tests.ops.harness import guards_intact, refused, run
from tests.ops.tensors import node, params, permuted, tensor, values

F32, F16 = GgmlType.F32, GgmlType.F16
EPS = 1e-2
NE = (13, 5, 3, 2)
Array = np.ndarray[Any, Any]


def noise(ne: tuple[int, ...] = NE, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    # Off centre, so that a mean that is not subtracted, or is, shows.
    return tensor(F32, ne, rng.standard_normal(tensor(F32, ne).ne[::-1]) * 3 + 1)


def one_norm(row: Array) -> Array:
    mean = sum(row) / len(row)
    variance = sum((x - mean) ** 2 for x in row) / len(row)
    return np.array([(x - mean) / math.sqrt(variance + EPS) for x in row])


def one_rms_norm(row: Array) -> Array:
    return row / math.sqrt(sum(x * x for x in row) / len(row) + EPS)


def one_l2_norm(row: Array) -> Array:
    return row / max(math.sqrt(sum(x * x for x in row)), EPS)


ROWS: dict[Op, Callable[[Array], Array]] = {
    Op.NORM: one_norm,
    Op.RMS_NORM: one_rms_norm,
    Op.L2_NORM: one_l2_norm,
}


def check_values(t: Tensor, expected: Array) -> None:
    run(t, kernels=False)
    np.testing.assert_allclose(values(t), expected, rtol=2e-6, atol=2e-6)
    assert guards_intact(t)


@pytest.mark.parametrize("op", ROWS)
def test_rows(op: Op) -> None:
    x = noise()
    expected = np.apply_along_axis(ROWS[op], 3, values(x).astype(np.float64))
    check_values(node(op, F32, NE, [x], params(EPS)), expected)


@pytest.mark.parametrize("op", ROWS)
def test_in_place_and_permuted(op: Op) -> None:
    x = noise()
    expected = np.apply_along_axis(ROWS[op], 3, values(x).astype(np.float64))
    moved = permuted(x, (0, 2, 1, 3))
    check_values(node(op, F32, moved.ne, [moved], params(EPS)), expected.swapaxes(1, 2))
    run(node(op, F32, NE, [x], params(EPS), inplace=x), kernels=False)
    np.testing.assert_allclose(values(x), expected, rtol=2e-6, atol=2e-6)
    assert guards_intact(x)


@pytest.mark.parametrize("op", [Op.NORM, Op.L2_NORM])
def test_columns(op: Op) -> None:
    x = permuted(noise(), (1, 0, 2, 3))
    expected = np.apply_along_axis(ROWS[op], 3, values(x).astype(np.float64))
    check_values(node(op, F32, x.ne, [x], params(EPS)), expected)


def test_short_rows_are_not_blown_up() -> None:
    x = tensor(F32, (4, 2), [[[[1e-4, 0, 0, 0], [0, 0, 0, 0]]]])
    check_values(node(Op.L2_NORM, F32, x.ne, [x], params(EPS)), values(x) / EPS)


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 7, 100])
def test_groups_of_channels(groups: int) -> None:
    x = noise((5, 4, 7, 2))
    expected = values(x).astype(np.float64)
    size = math.ceil(7 / groups)
    for batch in range(2):
        for first in range(0, 7, size):
            group = expected[batch, first : first + size]
            group[...] = one_norm(group.reshape(-1)).reshape(group.shape)
    check_values(node(Op.GROUP_NORM, F32, x.ne, [x], params(groups, EPS)), expected)
    run(node(Op.GROUP_NORM, F32, x.ne, [x], params(groups, EPS), inplace=x), kernels=False)
    np.testing.assert_allclose(values(x), expected, rtol=2e-6, atol=2e-6)


def test_gradient() -> None:
    gradient, x = noise(seed=1), noise(seed=2)
    rows, flow = values(x).astype(np.float64), values(gradient).astype(np.float64)
    # The gradient is what a small change of each source element changes sum(result * flow) by.
    expected, step = np.zeros_like(rows), 1e-5
    for i in range(NE[0]):
        changes = []
        for change in (step, -step):
            moved = rows.copy()
            moved[..., i] += change
            result = np.apply_along_axis(one_rms_norm, 3, moved)
            changes.append((result * flow).sum(axis=3))
        expected[..., i] = (changes[0] - changes[1]) / (2 * step)
    check_values(node(Op.RMS_NORM_BACK, F32, NE, [gradient, x], params(EPS)), expected)


@pytest.mark.parametrize("op", [*ROWS, Op.GROUP_NORM, Op.RMS_NORM_BACK])
def test_contract(op: Op) -> None:
    words = (1, EPS) if op is Op.GROUP_NORM else (EPS,)
    n_sources = 2 if op is Op.RMS_NORM_BACK else 1
    sources = [noise() for _ in range(n_sources)]
    check(node(op, F32, NE, sources, params(*words)))
    for eps in (-1e-3, math.nan):
        refused(node(op, F32, NE, sources, params(*words[:-1], eps)), "eps is")
    refused(node(op, F16, NE, sources, params(*words)), "the result must not be F16")
    refused(node(op, F32, (13, 5, 3, 1), sources, params(*words)), "source 0 must be 13x5x3x1")
    for i in range(n_sources):
        for bad, message in (
            (tensor(F16, NE, 0), "must not be F16"),
            (noise((12, 5, 3, 2)), "must be 13x5x3x2"),
        ):
            changed = [*sources[:i], bad, *sources[i + 1 :]]
            refused(node(op, F32, NE, changed, params(*words)), f"source {i} {message}")
    if op not in (Op.NORM, Op.L2_NORM):
        columns = permuted(noise(), (1, 0, 2, 3))
        t = node(op, F32, columns.ne, [columns] * n_sources, params(*words))
        refused(t, "source 0 must have dense rows")


@pytest.mark.parametrize("groups", [0, -1, -(1 << 31)])
def test_no_groups(groups: int) -> None:
    refused(node(Op.GROUP_NORM, F32, NE, [noise()], params(groups, EPS)), f"{groups} groups")
