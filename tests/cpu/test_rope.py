"""Kernels of ROPE against the array reference."""

from __future__ import annotations

import numpy as np
import pytest

from protocol.dialects import DIALECTS
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor, contiguous_strides
from rpc_server.graph.parse import LinkedGraph
from rpc_server.ops.rope import Mode
from tests.ops.harness import builder, by_both, guards_intact, nmse, run
from tests.ops.tensors import node, params, permuted, tensor, values

F32, F16, I32 = GgmlType.F32, GgmlType.F16, GgmlType.I32
# Of F16 results, squared: a rounding decided the other way here and there.
BOUND = {F32: 1e-11, F16: 1e-7}

rng = np.random.default_rng(20261124)


def rope_params(
    n_dims: int,
    mode: int,
    *,
    scale: float = 1.0,
    ext_factor: float = 0.0,
    sections: tuple[int, ...] = (0, 0, 0, 0),
    first: int = 0,
) -> tuple[int, ...]:
    return params(
        0, n_dims, mode, 0, 2048, 10000.0, scale, ext_factor, 1.1, 32.0, 1.0, *sections, first
    )


def rows(type_: GgmlType, ne: tuple[int, int, int, int]) -> Tensor:
    nb = contiguous_strides(type_, (ne[0] + 8, *ne[1:]))
    return tensor(type_, ne, rng.normal(0, 1, ne[::-1]), nb=nb)


def positions(n: int, times: int = 1) -> Tensor:
    return tensor(I32, (n * times,), rng.integers(0, 3000, n * times))


def assert_close(t: Tensor, n_threads: int = 2) -> None:
    expected, actual = by_both(t, n_threads)
    assert nmse(expected, actual) < BOUND[t.type]


@pytest.mark.parametrize("op", [Op.ROPE, Op.ROPE_BACK])
@pytest.mark.parametrize("type_", [F32, F16])
@pytest.mark.parametrize("mode", [Mode.NORMAL, Mode.NEOX])
def test_widths_and_unturned_elements(op: Op, type_: GgmlType, mode: Mode) -> None:
    for width, n_dims, first in ((64, 64, 0), (80, 64, 0), (64, 36, 12), (6, 4, 2), (128, 128, 0)):
        x = rows(type_, (width, 3, 5, 2))
        words = rope_params(n_dims, mode, first=first)
        assert_close(node(op, type_, x.ne, [x, positions(5)], words), 3)
        assert_close(node(op, type_, x.ne, [x, positions(5)], words, inplace=x), 1)


@pytest.mark.parametrize("mode", [Mode.NORMAL, Mode.NEOX])
@pytest.mark.parametrize("ext_factor", [0.0, 1.0])
def test_yarn_and_frequency_factors(mode: Mode, ext_factor: float) -> None:
    x = rows(F32, (64, 3, 5, 1))
    words = rope_params(64, mode, scale=0.25, ext_factor=ext_factor)
    assert_close(node(Op.ROPE, F32, x.ne, [x, positions(5)], words))
    factors = tensor(F32, (40,), rng.uniform(1, 8, 40))
    assert_close(node(Op.ROPE, F32, x.ne, [x, positions(5), factors], words))


@pytest.mark.parametrize("mode", [Mode.MROPE, Mode.IMROPE, Mode.VISION])
@pytest.mark.parametrize(
    "sections", [(8, 12, 12, 0), (11, 11, 10, 0), (6, 5, 4, 3), (16, 16, 0, 0)]
)
def test_four_positions(mode: Mode, sections: tuple[int, ...]) -> None:
    n_dims = 32 if mode is Mode.VISION else 64
    x = rows(F32, (64, 3, 5, 1))
    words = rope_params(n_dims, mode, sections=sections)
    assert_close(node(Op.ROPE, F32, x.ne, [x, positions(5, 4)], words), 3)


def test_permuted_heads() -> None:
    x = permuted(rows(F32, (64, 5, 3, 1)), (0, 2, 1, 3))
    assert_close(node(Op.ROPE, F32, x.ne, [x, positions(5)], rope_params(64, Mode.NEOX)))


def test_large_positions() -> None:
    x = rows(F32, (64, 2, 4, 1))
    at = tensor(I32, (4,), [0, 1, 131071, -7])
    expected, actual = by_both(node(Op.ROPE, F32, x.ne, [x, at], rope_params(64, Mode.NORMAL)))
    assert nmse(expected, actual) < 1e-9


def test_one_table_of_angles_for_a_graph() -> None:
    """Nodes with the same positions share one; it is made anew when the positions are changed."""
    at = tensor(I32, (5,), [3, 1, 4, 1, 5])
    other = tensor(I32, (5,), [9, 2, 6, 5, 3])
    words = rope_params(64, Mode.NEOX)
    sources = [rows(F32, (64, n, 5, 1)) for n in (9, 3, 9)]
    before = node(Op.ROPE, F32, sources[0].ne, [sources[0], at], words)
    same = node(Op.ROPE, F32, sources[1].ne, [sources[1], at], words)
    change = node(Op.CPY, I32, (5,), [other, at], inplace=at)
    after = node(Op.ROPE, F32, sources[2].ne, [sources[2], at], words)
    results = []
    for kernels in (False, True):
        at_values = np.array([3, 1, 4, 1, 5])
        run(node(Op.CPY, I32, (5,), [tensor(I32, (5,), at_values), at], inplace=at), kernels=False)
        run([before, same, change, after], kernels=kernels)
        results.append([values(t) for t in (before, same, after)])
    for expected, actual in zip(*results, strict=True):
        assert nmse(expected, actual) < 1e-11
    assert all(guards_intact(t) for t in (before, same, after))
    plan = builder(2, True).build(LinkedGraph([before, same, change, after], DIALECTS[0]))
    assert not plan.interpreted
