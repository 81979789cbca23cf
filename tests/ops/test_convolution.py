"""References of convolutions against plain loops, and what contracts refuse."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.ops import slices
from rpc_server.ops.sliding import Axis, boxes
from rpc_server.ops.table import check
from tests.ops import harness
from tests.ops.harness import refused, run
from tests.ops.tensors import node, noise, params, permuted, tensor, values

F32, F16, BF16 = GgmlType.F32, GgmlType.F16, GgmlType.BF16
HUGE = (1 << 31) - 1
Array = np.ndarray[Any, Any]


def check_values(t: Tensor, expected: Array, tolerance: float = 1e-5) -> None:
    harness.check_values(t, expected, tolerance)


# -- by plain loops --------------------------------------------------------------------------------


def columns_of(x: Array, taps: Sequence[int], numbers: Sequence[Sequence[int]]) -> Array:
    """(N, *places, C, *taps) of ``x`` (N, C, *samples); outermost dimension first throughout."""
    places = [
        int((n + 2 * p - d * (k - 1) - 1) / s) + 1
        for n, k, (s, p, d) in zip(x.shape[2:], taps, numbers, strict=True)
    ]
    result = np.zeros((x.shape[0], *places, x.shape[1], *taps), np.float32)
    for place in np.ndindex(*places):
        for tap in np.ndindex(*taps):
            at = [o * s + k * d - p for o, k, (s, p, d) in zip(place, tap, numbers, strict=True)]
            if all(0 <= i < n for i, n in zip(at, x.shape[2:], strict=True)):
                result[(slice(None), *place, slice(None), *tap)] = x[(..., *at)]
    return result


def convolved(kernel: Array, x: Array, numbers: Sequence[Sequence[int]]) -> Array:
    """(N, OC, *places) of ``kernel`` (OC, C, *taps)."""
    columns = columns_of(x, kernel.shape[2:], numbers)
    n = kernel.ndim - 1
    product = np.tensordot(columns, kernel, (range(n, 2 * n), range(1, n + 1)))
    return np.moveaxis(product, -1, 1)


def words(numbers: Sequence[Sequence[int]]) -> list[int]:
    """Strides, paddings, dilations as op_params have them: innermost first."""
    return [n for kind in zip(*numbers, strict=True) for n in reversed(kind)]


def by_type(x: Tensor, kernel: Tensor) -> Array:
    """What a convolution with a kernel of F16 makes of its input."""
    return values(x).astype(np.float16 if kernel.type is F16 else np.float32).astype(np.float32)


# (stride, padding, dilation) of height and width.
PICTURES = [
    ((1, 0, 1), (1, 0, 1)),
    ((1, 2, 2), (2, 1, 1)),
    ((3, 1, 1), (1, 0, 2)),
    ((2, -1, 1), (1, -1, 1)),
    ((1, 9, 1), (4, 0, 0)),
    ((1, 0, -1), (2, 3, -2)),
]


# -- windows ---------------------------------------------------------------------------------------


@given(
    st.integers(0, 9), st.integers(1, 5), st.integers(0, 9), st.integers(1, 4),
    st.integers(-9, 9), st.integers(-3, 3),
)  # fmt: skip
def test_taps_inside(n: int, taps: int, places: int, stride: int, padding: int, step: int) -> None:
    axis = Axis(n, taps, places, stride, padding, step)
    inside = set()
    for tap in range(taps):
        expected = [
            (o, at) for o in range(places) if 0 <= (at := o * stride + tap * step - padding) < n
        ]
        seen_at, seen = axis.seen(tap)
        assert list(zip(range(9)[seen_at], range(9)[seen], strict=True)) == expected
        inside |= {tap} if expected else set()
    assert inside <= set(axis.reachable())
    for place in range(places):
        start = place * stride - padding
        assert list(range(9)[axis.under(place)]) == [
            i for i in range(start, start + taps) if 0 <= i < n
        ]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 9))
def test_boxes_are_all_of_an_array(shape: list[int], width: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "_BYTES_AT_ONCE", 4 * 12)
        parts = list(boxes(shape, width))
    covered = [at for box in parts for at in itertools.product(*box)]
    assert sorted(covered) == list(np.ndindex(*shape))
    assert len(covered) == len(set(covered))
    for box in parts:
        assert np.prod([len(part) for part in box]) <= max(12 // max(width, 1), 1)


# -- IM2COL, IM2COL_3D, IM2COL_BACK ----------------------------------------------------------------


@pytest.mark.parametrize("numbers", PICTURES)
@pytest.mark.parametrize("types", [(F32, F32), (F32, F16), (F16, F16)])
def test_columns_of_pictures(numbers: Any, types: tuple[GgmlType, GgmlType]) -> None:
    x = noise((7, 6, 3, 2), types[0])
    expected = columns_of(values(x), (2, 3), numbers)
    rows, columns = expected.shape[1:3]
    t = node(
        Op.IM2COL, types[1], (18, columns, rows, 2), [tensor(BF16, (3, 2, 3, 4)), x],
        params(*words(numbers), 1),
    )  # fmt: skip
    check_values(t, expected.reshape(t.ne[::-1]), 1e-6 if types[1] is F32 else 1e-3)


def test_columns_of_lines() -> None:
    x, kernel = noise((9, 4, 2)), tensor(GgmlType.Q8_0, (32, 4, 5))
    # The kernel's type is none of IM2COL's business.
    t = node(Op.IM2COL, F32, (128, 3, 2), [kernel, x], params(2, 0, 14, 0, 1, 0, 0))
    expected = columns_of(values(x)[0], (32,), [(2, 14, 1)])
    check_values(t, expected.reshape(t.ne[::-1]))


def pictures(x: Tensor, type_: GgmlType = F32, **changed: Any) -> Tensor:
    kernel = changed.pop("kernel", tensor(F16, (3, 2, 3, 4)))
    numbers = changed.pop("numbers", (1, 1, 0, 0, 1, 1))
    return node(Op.IM2COL, type_, (18, 5, 5, 2), [kernel, x], params(*numbers, 1))


def test_contract_of_im2col() -> None:
    x = noise((7, 6, 3, 2))
    check(pictures(x))
    for stride in (0, -1, -HUGE):
        refused(pictures(x, numbers=(stride, 1, 0, 0, 1, 1)), "stride")
        refused(pictures(x, numbers=(1, stride, 0, 0, 1, 1)), "stride")
    for numbers in ((2, 1, 0, 0, 1, 1), (1, 1, HUGE, 0, 1, 1), (1, 1, 0, 0, -HUGE, 1)):
        refused(pictures(x, numbers=numbers), "the result must be")
    refused(pictures(x, kernel=tensor(F16, (3, 2, 4))), "3 channels for a kernel of 4")
    refused(pictures(noise((7, 6, 3, 2), BF16)), "source 1 must not be BF16")
    refused(pictures(x, BF16), "the result must not be BF16")
    refused(pictures(noise((7, 6, 3, 2), F16)), "the result must not be F32")


VOLUMES = [
    ((1, 0, 1), (1, 0, 1), (1, 0, 1)),
    ((2, 1, 1), (1, 2, 2), (3, 0, 2)),
    ((1, 3, 1), (2, -1, 1), (1, 1, 0)),
]


@pytest.mark.parametrize("numbers", VOLUMES)
@pytest.mark.parametrize("type_", [F32, F16])
def test_columns_of_volumes(numbers: Any, type_: GgmlType) -> None:
    # Seven channels are two volumes of three, and one that is left over.
    x = noise((6, 5, 4, 7))
    expected = columns_of(values(x)[:6].reshape(2, 3, 4, 5, 6), (2, 2, 3), numbers)
    depth, height, width = expected.shape[1:4]
    t = node(
        Op.IM2COL_3D, type_, (36, width, height, depth * 2), [tensor(F16, (3, 2, 2, 6)), x],
        params(*words(numbers), 3),
    )  # fmt: skip
    check_values(t, expected.reshape(t.ne[::-1]), 1e-6 if type_ is F32 else 1e-3)


def test_contract_of_im2col_3d() -> None:
    x, kernel = noise((6, 5, 4, 6)), tensor(F16, (3, 2, 2, 6))

    def volumes(numbers: Sequence[int], x: Tensor = x, type_: GgmlType = F32) -> Tensor:
        return node(Op.IM2COL_3D, type_, (36, 4, 4, 6), [kernel, x], params(*numbers))

    plain = (1, 1, 1, 0, 0, 0, 1, 1, 1)
    check(volumes((*plain, 3)))
    for channels in (0, -3, -HUGE):
        refused(volumes((*plain, channels)), "channels")
    for channels in (2, 4, HUGE):
        refused(volumes((*plain, channels)), "the result must be")
    refused(volumes((1, 0, 1, 0, 0, 0, 1, 1, 1, 3)), "stride")
    refused(volumes((1, 1, 1, 0, 0, HUGE, 1, 1, 1, 3)), "the result must be")
    refused(volumes((*plain, 3), noise((6, 5, 4, 6), F16)), "source 1 must not be F16")
    refused(volumes((*plain, 3), type_=BF16), "the result must not be BF16")


@pytest.mark.parametrize("numbers", PICTURES)
def test_gradients_of_pictures(numbers: Any) -> None:
    """The sum of products with gradients is the same before and after: that is what they are."""
    x = np.random.default_rng(1).standard_normal((2, 3, 6, 7)).astype(np.float32)
    columns = columns_of(x, (2, 3), numbers)
    n, rows, width, *patch = columns.shape
    gradients, kernel = noise((int(np.prod(patch)), width, rows, n)), tensor(F16, (3, 2, 3))
    t = node(Op.IM2COL_BACK, F32, (7, 6, 3, 2), [gradients, kernel], params(*words(numbers), 1))
    expected = np.zeros((2, 3, 6, 7))
    for at in np.ndindex(3, 6, 7):
        unit = np.zeros_like(x)
        unit[(slice(None), *at)] = 1
        ones = columns_of(unit, (2, 3), numbers)
        product = ones * values(gradients).reshape(columns.shape)
        expected[(slice(None), *at)] = product.reshape(2, -1).sum(1)
    check_values(t, expected)


def test_gradients_of_lines() -> None:
    gradients, kernel = noise((6, 4, 3)), tensor(F32, (3, 2))
    t = node(Op.IM2COL_BACK, F32, (7, 2, 3), [gradients, kernel], params(2, 0, 1, 0, 1, 0, 0))
    expected = np.zeros((1, 3, 2, 7))
    for n, c, place, tap in np.ndindex(3, 2, 4, 3):
        if 0 <= (at := place * 2 + tap - 1) < 7:
            expected[0, n, c, at] += values(gradients)[0, n, place, c * 3 + tap]
    check_values(t, expected)


def test_contract_of_im2col_back() -> None:
    def back(gradients: Tensor, numbers: Sequence[int], kernel: Tensor) -> Tensor:
        return node(Op.IM2COL_BACK, F32, (7, 6, 3, 2), [gradients, kernel], params(*numbers, 1))

    gradients, kernel = noise((18, 5, 5, 2)), tensor(F16, (3, 2, 3))
    check(back(gradients, (1, 1, 0, 0, 1, 1), kernel))
    check(back(gradients, (HUGE, 1, HUGE, -HUGE - 1, HUGE, 1), kernel))
    refused(back(gradients, (0, 1, 0, 0, 1, 1), kernel), "stride")
    refused(back(gradients, (1, -1, 0, 0, 1, 1), kernel), "stride")
    refused(back(noise((18, 5, 5, 1)), (1, 1, 0, 0, 1, 1), kernel), "source 0 must be")
    refused(back(gradients, (1, 1, 0, 0, 1, 1), tensor(F16, (2, 2))), "source 0 must be 12x5x5x2")
    refused(back(noise((18, 5, 5, 2), F16), (1, 1, 0, 0, 1, 1), kernel), "must not be F16")


# -- COL2IM_1D -------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_", [F32, F16, BF16])
@pytest.mark.parametrize(
    ("taps", "stride", "padding"), [(4, 2, 0), (5, 2, 1), (1, 3, 0), (3, 1, 5)]
)
def test_columns_to_lines(type_: GgmlType, taps: int, stride: int, padding: int) -> None:
    columns = noise((taps * 3, 11), type_)
    samples = 10 * stride + taps
    expected = np.zeros((3, samples))
    for c, place, tap in np.ndindex(3, 11, taps):
        expected[c, place * stride + tap] += values(columns)[0, 0, place, c * taps + tap]
    expected = expected[:, padding : samples - padding]
    t = node(Op.COL2IM_1D, type_, expected.shape[::-1], [columns], params(stride, 3, padding))
    check_values(t, expected[None, None], {F32: 1e-6, F16: 1e-3, BF16: 1e-2}[type_])


def test_contract_of_col2im() -> None:
    def lines(numbers: Sequence[int], columns: Tensor, type_: GgmlType = F32) -> Tensor:
        return node(Op.COL2IM_1D, type_, (23, 3), [columns], params(*numbers))

    columns = noise((9, 11))
    check(lines((2, 3, 0), columns))
    for numbers in ((0, 3, 0), (-2, 3, 0), (2, 0, 0), (2, -3, 0)):
        refused(lines(numbers, columns), "stride")
    refused(lines((2, 4, 0), columns), "9 elements for 4 channels")
    for numbers in ((2, 1, 0), (3, 3, 0), (2, 3, 1), (2, 3, -HUGE), (HUGE, 3, 0)):
        refused(lines(numbers, columns), "the result must be")
    refused(lines((2, 3, 0), noise((9, 11, 2))), "source 0 must be")
    refused(lines((2, 3, 0), columns, F16), "the result must not be F16")
    refused(lines((2, 3, 0), noise((9, 11), GgmlType.F64)), "must not be F64")


# -- CONV_2D, CONV_3D, CONV_2D_DW ------------------------------------------------------------------


def conv_2d(kernel: Tensor, x: Tensor, numbers: Any) -> tuple[Tensor, Array]:
    expected = convolved(values(kernel), by_type(x, kernel), numbers)
    ne = expected.shape[::-1]
    return node(Op.CONV_2D, F32, ne, [kernel, x], params(*words(numbers))), expected


@pytest.mark.parametrize("numbers", PICTURES)
@pytest.mark.parametrize("type_", [F32, F16])
def test_pictures(numbers: Any, type_: GgmlType) -> None:
    check_values(*conv_2d(noise((3, 2, 3, 4), type_), noise((7, 6, 3, 2), seed=1), numbers))


def test_pictures_of_any_strides() -> None:
    kernel = permuted(noise((4, 3, 2, 3), F16), (3, 2, 1, 0))
    x = permuted(noise((3, 7, 6, 2), seed=1), (2, 0, 1, 3))
    check_values(*conv_2d(kernel, x, PICTURES[1]))


@pytest.mark.parametrize("limit", [1, 100, 1000])
def test_pictures_in_parts(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "_BYTES_AT_ONCE", 4 * limit)
    check_values(*conv_2d(noise((3, 2, 3, 4)), noise((7, 6, 3, 2), seed=1), PICTURES[1]))


def test_inputs_meet_half_precision_rounded() -> None:
    x, one = tensor(F32, (1, 1), 1 + 2.0**-12), ((1, 0, 1), (1, 0, 1))
    for type_, expected in ((F16, 1), (F32, 1 + 2.0**-12)):
        t, _ = conv_2d(tensor(type_, (1, 1), 1), x, one)
        run(t, kernels=False)
        assert values(t).item() == expected


def test_wide_windows_take_little_memory() -> None:
    # All columns at once would be 2^28 elements.
    n = 1 << 14
    kernel, x = tensor(F32, (n,), 1), tensor(F32, (1,), 2.5)
    t = node(Op.CONV_2D, F32, (n,), [kernel, x], params(1, 1, n - 1, 0, 1, 1))
    tracemalloc.start()
    try:
        run(t, kernels=False)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (values(t) == 2.5).all()
    assert peak < 64 << 20


def test_contract_of_conv_2d() -> None:
    kernel, x, plain = noise((3, 2, 3, 4)), noise((7, 6, 3, 2)), (1, 1, 0, 0, 1, 1)

    def pictures(
        numbers: Sequence[int] = plain,
        kernel: Tensor = kernel,
        x: Tensor = x,
        ne: tuple[int, ...] = (5, 5, 4, 2),
    ) -> Tensor:
        return node(Op.CONV_2D, F32, ne, [kernel, x], params(*numbers))

    check(pictures())
    # ggml's division leaves a place where the kernel is larger than the picture.
    check(pictures((7, 1, 0, 0, 4, 1), ne=(1, 5, 4, 2)))
    for stride in (0, -1):
        refused(pictures((stride, 1, 0, 0, 1, 1)), "stride")
        refused(pictures((1, stride, 0, 0, 1, 1)), "stride")
    for numbers in ((1, 1, HUGE, 0, 1, 1), (1, 1, 0, 0, HUGE, 1), (HUGE, 1, 0, 0, 1, 1)):
        refused(pictures(numbers), "the result must be")
    refused(pictures(kernel=noise((3, 2, 4, 4))), "3 channels for a kernel of 4")
    refused(pictures(kernel=noise((3, 2, 3, 4), BF16)), "source 0 must not be BF16")
    refused(pictures(x=noise((7, 6, 3, 2), F16)), "source 1 must not be F16")
    refused(pictures(x=tensor(F32, (7, 6, 3, 2), nb=(4, 0, 0, 0))), "source 1 overlap")
    refused(pictures(kernel=tensor(F32, (3, 2, 3, 4), nb=(0, 0, 0, 0))), "source 0 overlap")


@pytest.mark.parametrize("numbers", VOLUMES)
@pytest.mark.parametrize("type_", [F32, F16])
def test_volumes(numbers: Any, type_: GgmlType) -> None:
    kernel, x = noise((3, 2, 2, 12), type_), noise((6, 5, 4, 6), seed=1)
    expected = convolved(
        values(kernel).reshape(4, 3, 2, 2, 3), by_type(x, kernel).reshape(2, 3, 4, 5, 6), numbers
    )
    depth, height, width = expected.shape[2:]
    t = node(
        Op.CONV_3D, F32, (width, height, depth, 8), [kernel, x], params(*words(numbers), 3, 2, 4)
    )
    check_values(t, expected.reshape(t.ne[::-1]))


def test_kernels_without_elements_sum_to_nothing() -> None:
    kernels: list[tuple[int, int, int]] = [(0, 1, 1), (1, 0, 1), (1, 1, 0), (1, HUGE, 0)]
    for taps in kernels:
        numbers = (1, 1, 1, 0, max(taps[1] - 1, 0) // 2, 0, 1, 1, 1, 1, 1, 1)
        ne = (2 - taps[0] + 1, 2 + (taps[1] == 0), 2 - taps[2] + 1, 1)
        t = node(Op.CONV_3D, F32, ne, [tensor(F32, (*taps, 1)), noise((2, 2, 2))], params(*numbers))
        check_values(t, np.zeros(t.ne[::-1]))
    refused(
        node(Op.CONV_2D, F32, (1, 1), [tensor(F32, (1 << 30, 1 << 30, 0)), tensor(F32, (1, 1, 0))]),
        "too many elements",
    )


def test_contract_of_conv_3d() -> None:
    kernel, x = noise((3, 2, 2, 12)), noise((6, 5, 4, 6))

    def volumes(*numbers: int) -> Tensor:
        return node(Op.CONV_3D, F32, (4, 4, 3, 8), [kernel, x], params(*numbers))

    plain = (1, 1, 1, 0, 0, 0, 1, 1, 1)
    check(volumes(*plain, 3, 2, 4))
    refused(volumes(*plain, -3, -2, -4), "channels, volumes, results")
    refused(volumes(*plain, 2, 3, 6), "the result must be 4x4x3x18")
    refused(volumes(*plain, 3, 2, 5), "source 0 must be")
    refused(volumes(*plain, 3, 1, 4), "source 1 must be")
    refused(volumes(1, 1, 0, 0, 0, 0, 1, 1, 1, 3, 2, 4), "stride")
    refused(volumes(1, 1, 1, 0, 0, HUGE, 1, 1, 1, 3, 2, 4), "the result must be")


@pytest.mark.parametrize("numbers", PICTURES)
@pytest.mark.parametrize("type_", [F32, F16])
@pytest.mark.parametrize("channels_innermost", [False, True])
def test_pictures_by_channel(numbers: Any, type_: GgmlType, channels_innermost: bool) -> None:
    if channels_innermost:
        kernel = permuted(noise((5, 3, 2, 1), type_), (3, 0, 1, 2))
        x = permuted(noise((5, 7, 6, 2), seed=1), (2, 0, 1, 3))
    else:
        kernel, x = noise((3, 2, 1, 5), type_), noise((7, 6, 5, 2), seed=1)
    assert (kernel.ne, x.ne) == ((3, 2, 1, 5), (7, 6, 5, 2))
    parts = [
        convolved(values(kernel)[c : c + 1], values(x)[:, c : c + 1], numbers) for c in range(5)
    ]
    expected = np.concatenate(parts, axis=1)
    width, height = expected.shape[:1:-1]
    nb = (20, 20 * width, 4, 20 * width * height) if channels_innermost else None
    t = node(Op.CONV_2D_DW, F32, (width, height, 5, 2), [kernel, x], params(*words(numbers)), nb=nb)
    check_values(t, expected)


def test_contract_of_conv_2d_dw() -> None:
    def by_channel(kernel: Tensor, x: Tensor, numbers: Sequence[int]) -> Tensor:
        return node(Op.CONV_2D_DW, F32, (5, 5, 3, 2), [kernel, x], params(*numbers))

    kernel, x, plain = noise((3, 2, 1, 3)), noise((7, 6, 3, 2)), (1, 1, 0, 0, 1, 1)
    check(by_channel(kernel, x, plain))
    refused(by_channel(kernel, x, (0, 1, 0, 0, 1, 1)), "stride")
    refused(by_channel(kernel, x, (1, 1, 0, HUGE, 1, 1)), "the result must be")
    refused(by_channel(noise((3, 2, 3, 1)), x, plain), "source 0 must be 3x2x1x3")
    refused(by_channel(kernel, noise((7, 6, 3, 1)), plain), "the result must be")
    refused(by_channel(kernel, noise((7, 6, 3, 2), F16), plain), "source 1 must not be F16")
    refused(by_channel(noise((3, 2, 1, 3), BF16), x, plain), "source 0 must not be BF16")


# -- CONV_TRANSPOSE_1D, CONV_TRANSPOSE_2D ----------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2, 5])
@pytest.mark.parametrize("type_", [F32, F16])
def test_transposed_lines(stride: int, type_: GgmlType) -> None:
    kernel, x = noise((3, 4, 5), type_), noise((6, 5), seed=1)
    expected = np.zeros((1, 1, 4, 5 * stride + 3))
    for at, tap in np.ndindex(6, 3):
        expected[0, 0, :, at * stride + tap] += (
            by_type(x, kernel)[0, 0, :, at] @ values(kernel)[0, :, :, tap]
        )
    t = node(Op.CONV_TRANSPOSE_1D, F32, expected.shape[:1:-1], [kernel, x], params(stride, 0, 1))
    check_values(t, expected)


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("type_", [F32, F16])
def test_transposed_pictures(stride: int, type_: GgmlType) -> None:
    kernel, x = noise((3, 2, 4, 5), type_), noise((6, 4, 5, 2), seed=1)
    expected = np.zeros((2, 4, 3 * stride + 2, 5 * stride + 3))
    for row, column, i, j in np.ndindex(4, 6, 2, 3):
        expected[:, :, row * stride + i, column * stride + j] += (
            by_type(x, kernel)[:, :, row, column] @ values(kernel)[:, :, i, j]
        )
    t = node(Op.CONV_TRANSPOSE_2D, F32, expected.shape[::-1], [kernel, x], params(stride))
    check_values(t, expected)


def test_contract_of_transposed_convolutions() -> None:
    def lines(numbers: Sequence[int], kernel: Tensor, x: Tensor) -> Tensor:
        return node(Op.CONV_TRANSPOSE_1D, F32, (13, 4), [kernel, x], params(*numbers))

    kernel, x = noise((3, 4, 5)), noise((6, 5))
    check(lines((2, 0, 1), kernel, x))
    refused(lines((0, 0, 1), kernel, x), "stride")
    refused(lines((-2, 0, 1), kernel, x), "stride")
    refused(lines((HUGE, 0, 1), kernel, x), "the result must be")
    refused(lines((2, 1, 1), kernel, x), r"padding, dilation \(1, 1\)")
    refused(lines((2, 0, 2), kernel, x), r"padding, dilation \(0, 2\)")
    refused(lines((2, 0, 1), noise((3, 4, 6)), x), "source 0 must be 3x4x5x1")
    refused(lines((2, 0, 1), kernel, noise((6, 5, 2))), "source 1 must be 6x5x1x1")
    refused(lines((2, 0, 1), noise((3, 4, 5), BF16), x), "source 0 must not be BF16")
    refused(lines((2, 0, 1), kernel, noise((6, 5), F16)), "source 1 must not be F16")

    def pictures(stride: int, kernel: Tensor, x: Tensor) -> Tensor:
        return node(Op.CONV_TRANSPOSE_2D, F32, (13, 8, 4, 2), [kernel, x], params(stride))

    kernel, x = noise((3, 2, 4, 5)), noise((6, 4, 5, 2))
    check(pictures(2, kernel, x))
    refused(pictures(0, kernel, x), "stride")
    refused(pictures(3, kernel, x), "the result must be")
    refused(pictures(2, noise((3, 2, 4, 6)), x), "source 0 must be 3x2x4x5")
    refused(pictures(2, kernel, noise((6, 4, 5, 1))), "the result must be")
    # A kernel that is one element again and again takes work, and no memory.
    refused(pictures(2, tensor(F32, (3, 2, 4, 5), nb=(0, 0, 0, 0)), x), "source 0 overlap")
