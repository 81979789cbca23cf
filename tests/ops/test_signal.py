"""References of ops on pictures and signals against plain loops, and what contracts refuse."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.ops import slices
from rpc_server.ops.signal import Pool, Scale
from rpc_server.ops.table import check
from tests.ops import harness
from tests.ops.harness import refused, run
from tests.ops.tensors import node, noise, params, permuted, tensor, values

F32, F16, BF16, I32 = GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.I32
ALIGN_CORNERS, ANTIALIAS = 1 << 8, 1 << 9
Array = np.ndarray[Any, Any]
Windows = Sequence[tuple[int, int, int]]


def check_values(t: Tensor, expected: Array, tolerance: float = 1e-6) -> None:
    harness.check_values(t, expected, tolerance)


def pool(x: Tensor, kind: int, windows: Windows) -> Tensor:
    ne = list(x.ne)
    for i, (width, stride, padding) in enumerate(windows):
        ne[i] = (x.ne[i] + 2 * padding - width) // max(stride, 1) + 1
    op = Op.POOL_1D if len(windows) == 1 else Op.POOL_2D
    words = [w[part] for part in range(3) for w in windows]
    return node(op, F32, ne, [x], params(kind, *words))


LOWEST = -float(np.finfo(np.float32).max)


def highest(seen: list[float]) -> int:
    """The index of the maximum as ggml finds it, -1 if all are as low as can be."""
    best, at = LOWEST, -1
    for i, value in enumerate(seen):
        if not value <= best:
            best, at = value, i
    return at


def spoiled(x: Tensor) -> Tensor:
    """Not-a-numbers and infinities in all planes but the first."""
    data, random = np.array(values(x)), np.random.default_rng(8)
    places = random.random(data.shape) < 0.3
    places[0, 0] = False
    data[places] = random.choice([np.nan, np.nan, np.inf, -np.inf], int(places.sum()))
    return tensor(x.type, x.ne, data)


def of_pools(*windows: Windows) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test for each kind of pool and type, over these windows, of numbers alone and not."""
    rows: dict[str, Iterable[Any]]
    rows = {"windows": windows, "type_": [F32, F16], "kind": Pool, "numbers": [True, False]}

    def of(test: Callable[..., None]) -> Callable[..., None]:
        for name, among in rows.items():
            test = pytest.mark.parametrize(name, among)(test)
        return test

    return of


@of_pools(
    [(3, 2, 1)],
    [(1, 4, 2)],
    [(2, 1, 0), (3, 2, 1)],
    [(7, 1, 0), (1, 1, 1)],
    [(9, 2, 7), (2, 2, 0)],
)
def test_pools(kind: Pool, type_: GgmlType, windows: Windows, numbers: bool) -> None:
    x = noise((7, 6, 2, 2), type_)
    x = x if numbers else spoiled(x)
    t = pool(x, kind, windows)
    expected = np.zeros(t.ne[::-1])
    for n, c, row, column in np.ndindex(*expected.shape):
        starts = [at * w[1] - w[2] for at, w in zip((column, row), windows, strict=False)]
        columns = [i for i in range(starts[0], starts[0] + windows[0][0]) if 0 <= i < 7]
        rows, area = [row], len(columns)
        if len(windows) == 2:
            rows = [i for i in range(starts[1], starts[1] + windows[1][0]) if 0 <= i < 6]
            area = windows[0][0] * windows[1][0]
        seen = [float(values(x)[n, c, i, j]) for i in rows for j in columns]
        if kind is Pool.MAX:
            expected[n, c, row, column] = [*seen, LOWEST][highest(seen)]
        else:
            expected[n, c, row, column] = sum(seen) / area if seen else 0
    check_values(t, expected)


def test_contract_of_pools() -> None:
    x = noise((7, 6, 2, 2))
    check(pool(x, 0, [(3, 1, 1)]))
    refused(pool(x, 2, [(3, 1, 1)]), "no pooling 2")
    for window in ((0, 1, 0), (-1, 1, 0), (2, 0, 0), (2, -1, 0)):
        refused(pool(x, 0, [window]), "width, stride")
        refused(pool(x, 0, [(2, 2, 0), window]), "width, stride")
    refused(node(Op.POOL_1D, F32, (5, 5, 2, 2), [x], params(0, 3, 1, 0)), "result must be 5x6x2x2")
    refused(node(Op.POOL_2D, F32, (5, 5, 3, 2), [x], params(0, 3, 3, 1, 1)), "must be 5x5x2x2")
    refused(pool(permuted(noise((6, 7, 2, 2)), (1, 0, 2, 3)), 0, [(3, 1, 1)]), "dense rows")
    refused(pool(noise((7, 6, 2, 2), BF16), 0, [(3, 1, 1)]), "source 0 must not be BF16")


def test_wide_windows_are_quick() -> None:
    """Work grows with samples and places, however wide windows and paddings are."""
    huge = (1 << 31) - 1
    x = noise((4, 3))
    for kind, expected in ((Pool.MAX, values(x).max()), (Pool.AVG, values(x).sum() / huge / huge)):
        t = node(Op.POOL_2D, F32, (2, 2), [x], params(kind, huge, huge, 1, 1, 9, 9))
        check_values(t, np.full((1, 1, 2, 2), expected))
        # Windows that lie beside everything.
        t = node(Op.POOL_2D, F32, (2, 2), [x], params(kind, 2, 2, 1, 1, huge, 0))
        check_values(t, np.full((1, 1, 2, 2), -np.finfo(np.float32).max if kind is Pool.MAX else 0))
        t = node(
            Op.POOL_2D_BACK, F32, (4, 3), [noise((2, 2)), x], params(kind, 2, 2, huge, 1, -9, 0)
        )
        check_values(t, np.zeros((1, 1, 3, 4)))


def pool_back(x: Tensor, gradients: Tensor, kind: int, windows: Windows) -> Tensor:
    words = [w[part] for part in range(3) for w in windows]
    return node(Op.POOL_2D_BACK, x.type, x.ne, [gradients, x], params(kind, *words))


@of_pools(
    [(2, 2, 0), (3, 2, 1)],
    [(3, 1, 1), (2, 1, -1)],
    [(7, 1, 0), (1, 1, 1)],
    [(9, 2, 7), (6, 1, 0)],
    [(1, 3, 0), (2, 5, 9)],
)
def test_gradients_of_pools(kind: Pool, type_: GgmlType, windows: Windows, numbers: bool) -> None:
    # Small integers: that the first of equal maxima takes the gradient shows.
    x = tensor(type_, (7, 6, 2, 2), np.random.default_rng(0).integers(0, 4, (2, 2, 6, 7)))
    x = x if numbers else spoiled(x)
    gradients = noise((*pool(x, kind, windows).ne[:2], 2, 2), seed=1)
    expected = np.zeros((2, 2, 6, 7))
    for at in np.ndindex(*gradients.ne[::-1]):
        start = [place * w[1] - w[2] for place, w in zip(at[:1:-1], windows, strict=True)]
        ranges = [range(i, i + w[0]) for i, w in zip(start, windows, strict=True)]
        inside = [
            (*at[:2], i, j) for i in ranges[1] for j in ranges[0] if 0 <= i < 6 and 0 <= j < 7
        ]
        if kind is Pool.MAX:
            first = highest([float(values(x)[i]) for i in inside])
            if first >= 0:
                expected[inside[first]] += values(gradients)[at]
        elif inside:
            for i in inside:
                expected[i] += values(gradients)[at] / (windows[0][0] * windows[1][0])
    check_values(pool_back(x, gradients, kind, windows), expected, 1e-5 if type_ is F32 else 2e-3)


def test_gradients_of_pools_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, windows = noise((7, 6, 2, 2)), [(3, 1, 1), (2, 1, 1)]
    gradients = noise((*pool(x, 0, windows).ne[:2], 2, 2), seed=1)
    whole, parts = (pool_back(x, gradients, 0, windows) for _ in range(2))
    run(whole, kernels=False)
    monkeypatch.setattr(slices, "_BYTES_AT_ONCE", 4 * 100)
    check_values(parts, values(whole))


def test_contract_of_gradients_of_pools() -> None:
    x, gradients, windows = noise((7, 6, 2, 2)), noise((3, 3, 2, 2)), [(3, 2, 0), (2, 2, 0)]
    check(pool_back(x, gradients, 1, windows))
    refused(pool_back(x, gradients, 2, windows), "no pooling 2")
    refused(pool_back(x, gradients, 0, [(3, 0, 0), (2, 2, 0)]), "width, stride")
    refused(pool_back(x, gradients, 0, [(3, 2, 0), (-2, 2, 0)]), "width, stride")
    refused(pool_back(x, noise((3, 3, 2, 1)), 0, windows), "source 0 must be 3x3x2x2")
    refused(pool_back(x, noise((3, 3, 2, 2), F16), 0, windows), "source 0 must not be F16")
    refused(pool_back(noise((7, 6, 2, 2), BF16), gradients, 0, windows), "must not be BF16")
    t = pool_back(x, gradients, 0, windows)
    t.src = (gradients, noise((7, 6, 2, 2), F16), *t.src[2:])
    refused(t, "source 1 must not be F16")
    t.src = (gradients, noise((7, 6, 2)), *t.src[2:])
    refused(t, "source 1 must be 7x6x2x2")


@pytest.mark.parametrize("pads", [(0, 0), (2, 1), (6, 6), (0, 5)])
def test_mirrored_ends(pads: tuple[int, int]) -> None:
    x = permuted(noise((7, 2, 3, 2)), (0, 2, 1, 3))
    t = node(Op.PAD_REFLECT_1D, F32, (7 + sum(pads), *x.ne[1:]), [x], params(*pads))
    check_values(t, np.pad(values(x), ((0, 0),) * 3 + (pads,), "reflect"), 0)


def test_contract_of_mirrored_ends() -> None:
    line = noise((7, 3))

    def mirrored(*pads: int, x: Tensor = line) -> Tensor:
        return node(Op.PAD_REFLECT_1D, F32, (10, 3), [x], params(*pads))

    check(mirrored(2, 1))
    for pads in ((7, -4), (-4, 7), (0, 7), (1 << 30, 0)):
        refused(mirrored(*pads), "pads of")
    refused(mirrored(2, 2), "the result must be 11x3")
    refused(mirrored(2, 1, x=noise((7, 3), F16)), "source 0 must not be F16")
    refused(mirrored(0, 0, x=tensor(F32, (0, 3))), "pads of")


def resized(x: Tensor, ne: tuple[int, ...], mode: int) -> Tensor:
    return node(Op.UPSCALE, F32, ne, [x], params(mode))


def test_nearest() -> None:
    x = permuted(noise((4, 3, 2, 2)), (1, 0, 2, 3))
    expected = values(x).repeat(2, axis=3).repeat(3, axis=2).repeat(2, axis=1)
    check_values(resized(x, (6, 12, 4, 2), Scale.NEAREST), expected)
    check_values(resized(x, (3, 2, 2, 1), Scale.NEAREST), values(x)[:1, :, ::2])


def bilinear_weight(d: float) -> float:
    return max(1 - abs(d), 0.0)


def bicubic_weight(d: float) -> float:
    d = abs(d)
    if d <= 1:
        return 1.25 * d**3 - 2.25 * d**2 + 1
    return -0.75 * d**3 + 3.75 * d**2 - 6 * d + 3 if d < 2 else 0.0


@pytest.mark.parametrize("mode", [Scale.BILINEAR, Scale.BICUBIC])
@pytest.mark.parametrize("corners", [0, ALIGN_CORNERS])
@pytest.mark.parametrize("ne", [(11, 9), (5, 6), (3, 14), (6, 5)])
def test_interpolation(mode: int, corners: int, ne: tuple[int, int]) -> None:
    x = noise((6, 5, 1, 1))
    weight = bilinear_weight if mode == Scale.BILINEAR else bicubic_weight
    at = [
        [i * (n - 1) / (m - 1) if corners else (i + 0.5) * n / m - 0.5 for i in range(m)]
        for n, m in zip((6, 5), ne, strict=True)
    ]
    expected = np.zeros((1, 1, ne[1], ne[0]))
    for row, column in np.ndindex(ne[1], ne[0]):
        # Elements beyond the edges are those at the edges.
        for i, j in np.ndindex(12, 12):
            value = values(x)[0, 0, min(max(i - 3, 0), 4), min(max(j - 3, 0), 5)]
            factor = weight(at[1][row] - (i - 3)) * weight(at[0][column] - (j - 3))
            expected[0, 0, row, column] += value * factor
    check_values(resized(x, ne, mode | corners), expected, 1e-5)


def test_antialiased() -> None:
    # Twice as small: each element is the triangle 1 3 3 1 of those around it.
    x = np.random.default_rng(0).standard_normal(8)
    t = resized(tensor(F32, (8,), x), (4, 1), Scale.BILINEAR | ANTIALIAS)
    expected = [np.dot(x[2 * i - 1 : 2 * i + 3], [0.125, 0.375, 0.375, 0.125]) for i in (1, 2)]
    run(t, kernels=False)
    np.testing.assert_allclose(values(t)[0, 0, 0, 1:3], expected, rtol=1e-5)
    # At the edges the weights that are left are scaled up to 1.
    edge = np.dot(x[:3], [0.375, 0.375, 0.125]) / 0.875
    np.testing.assert_allclose(values(t)[0, 0, 0, 0], edge, rtol=1e-5)


@pytest.mark.parametrize("corners", [0, ALIGN_CORNERS])
@pytest.mark.parametrize(("n", "m"), [(400, 1), (1000, 7), (300, 17), (307, 18), (41, 33)])
def test_antialiased_windows_wider_than_the_result(n: int, m: int, corners: int) -> None:
    """They are gone over as a whole: an element of a row of millions at a time takes hours."""
    x = np.random.default_rng(0).standard_normal(n)
    t = resized(tensor(F32, (n,), x), (m, 1), Scale.BILINEAR | ANTIALIAS | corners)
    run(t, kernels=False)
    ratio = (m - 1) / (n - 1) if corners and m > 1 else m / n
    half, support = 0.0 if corners else 0.5, max(1.0, 1 / ratio)
    for i in range(m):
        centre = (i + half) / ratio
        at = np.arange(max(int(centre - support + half), 0), min(int(centre + support + half), n))
        weights = np.maximum(1 - abs(at - centre + half) / support, 0)
        expected = weights @ x[at] / weights.sum()
        assert values(t)[0, 0, 0, i] == pytest.approx(expected, abs=1e-4)


def test_a_long_row_is_resized_to_one_element() -> None:
    n = 1 << 20
    t = resized(tensor(F32, (n,), 2.5), (1, 1), Scale.BILINEAR | ANTIALIAS)
    run(t, kernels=False)
    assert values(t).item() == pytest.approx(2.5, rel=1e-4)


def test_both_orders_of_passes_are_small() -> None:
    # A column to a row: between the passes lies one element, or a matrix larger than memory.
    n = 1 << 17
    for ne in ((1, n), (n, 1)):
        x = tensor(F32, ne, 2.5)
        t = resized(x, ne[::-1], Scale.BILINEAR)
        run(t, kernels=False)
        assert (values(t) == 2.5).all()


def test_contract_of_upscale() -> None:
    x = noise((4, 3))
    check(resized(x, (8, 6), Scale.BILINEAR | ANTIALIAS | ALIGN_CORNERS))
    refused(resized(x, (8, 6), 3), "no mode 3")
    refused(resized(x, (8, 6), 1 << 10), "no flags 0x400")
    refused(resized(x, (8, 6), Scale.BICUBIC | ANTIALIAS), "no antialiasing in mode 2")
    refused(resized(tensor(F32, (0, 3)), (8, 6), 0), "source 0 is empty")
    refused(resized(noise((4, 3), F16), (8, 6), 0), "source 0 must not be F16")
    refused(resized(tensor(F32, (4, 1 << 40), nb=(4, 0, 0, 0)), (8, 6), 0), "overlap")


@pytest.mark.parametrize(("dim", "width"), [(8, 8), (9, 9), (9, 10), (1, 1)])
def test_time_steps(dim: int, width: int) -> None:
    steps = tensor(F32, (3,), [0, 1.5, 40])
    expected = np.zeros((1, 1, 3, width))
    for i, step in enumerate((0, 1.5, 40)):
        for j in range(dim // 2):
            angle = step * math.exp(-math.log(1000) * j / (dim // 2))
            expected[0, 0, i, j], expected[0, 0, i, dim // 2 + j] = math.cos(angle), math.sin(angle)
    t = node(Op.TIMESTEP_EMBEDDING, F32, (width, 3), [steps], params(dim, 1000))
    check_values(t, expected, 1e-5)


def test_contract_of_time_steps() -> None:
    def embedding(ne: tuple[int, ...], dim: int, period: int, steps: Tensor) -> Tensor:
        return node(Op.TIMESTEP_EMBEDDING, F32, ne, [steps], params(dim, period))

    steps = tensor(F32, (3,), 0)
    check(embedding((8, 3), 8, 10, steps))
    refused(embedding((8, 3), 9, 10, steps), "8 elements for 9")
    refused(embedding((9, 3), 8, 10, steps), "9 elements for 8")
    refused(embedding((8, 3), -8, 10, steps), "8 elements for -8")
    refused(embedding((8, 3), 8, 0, steps), "periods up to 0")
    refused(embedding((8, 4), 8, 10, steps), "the result must be")
    refused(embedding((8, 3), 8, 10, tensor(I32, (3,))), "source 0 must not be I32")
