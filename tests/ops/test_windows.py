"""References of windows and relative positions against plain loops, and what contracts refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.ops.table import check
from tests.ops.harness import guards_intact, refused, run
from tests.ops.tensors import CONTEXT, node, params, permuted, raw, tensor, values

F32, F16, BF16 = GgmlType.F32, GgmlType.F16, GgmlType.BF16
Array = np.ndarray[Any, Any]


def noise(ne: tuple[int, ...], seed: int = 0, type_: GgmlType = F32) -> Tensor:
    rng = np.random.default_rng(seed)
    return tensor(type_, ne, rng.standard_normal(tensor(F32, ne).ne[::-1]))


def windows_of(image: Tensor, width: int) -> Tensor:
    across, down = (-(-n // width) for n in image.ne[1:3])
    ne = (image.ne[0], width, width, across * down)
    return node(Op.WIN_PART, F32, ne, [image], params(across, down, width))


def image_of(windows: Tensor, w: int, h: int) -> Tensor:
    return node(Op.WIN_UNPART, F32, (windows.ne[0], w, h), [windows], params(windows.ne[1]))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.integers(1, 6))
def test_windows_of_an_image_and_back(channels: int, w: int, h: int, width: int) -> None:
    image = noise((channels, w, h))
    t = windows_of(image, width)
    run(t, kernels=False)
    pixels, cut = values(image)[0], values(t)
    across = -(-w // width)
    for at in np.ndindex(cut.shape[:3]):
        number, y, x = at
        y, x = y + number // across * width, x + number % across * width
        expected = pixels[y, x] if y < h and x < w else np.zeros(channels)
        np.testing.assert_array_equal(cut[at], expected)
    back = image_of(t, w, h)
    run(back, kernels=False)
    np.testing.assert_array_equal(raw(back), raw(image))
    assert guards_intact(t)
    assert guards_intact(back)


def test_windows_of_a_view() -> None:
    image = permuted(noise((6, 3, 5)), (1, 0, 2, 3))
    dense = tensor(F32, image.ne, values(image))
    # Columns across memory are refused, any order of rows is read as it is.
    refused(windows_of(image, 2), "source 0 must have dense rows")
    rows = permuted(noise((3, 5, 6)), (0, 2, 1, 3))
    t, expected = windows_of(rows, 4), windows_of(tensor(F32, rows.ne, values(rows)), 4)
    run([t, expected], kernels=False)
    np.testing.assert_array_equal(raw(t), raw(expected))
    check(windows_of(dense, 2))


def test_contracts_of_windows() -> None:
    image = noise((3, 4, 5))
    for words in ((2, 3, 0), (2, 3, -2), (3, 3, 2), (2, 2, 2), (-2, -3, 2)):
        refused(node(Op.WIN_PART, F32, (3, 2, 2, 6), [image], params(*words)), "window")
    refused(node(Op.WIN_PART, F32, (3, 2, 2, 5), [image], params(2, 3, 2)), "the result must be")
    refused(windows_of(noise((3, 4, 5, 2)), 2), "source 0 must be 3x4x5x1")
    refused(windows_of(noise((3, 4, 5), 0, F16), 2), "source 0 must not be F16")
    windows = noise((3, 2, 2, 6))
    check(image_of(windows, 4, 5))
    refused(image_of(windows, 5, 5), "6 windows, it takes 9")
    refused(node(Op.WIN_UNPART, F32, (3, 4, 5), [windows], params(0)), "windows of width 0")
    refused(node(Op.WIN_UNPART, F32, (3, 4, 5), [windows], params(3)), "source 0 must be")
    flat = tensor(F32, (3, 2, 2, 6), nb=(4, 12, 24, 0))
    refused(image_of(flat, 4, 5), "elements of source 0 overlap")


@pytest.mark.parametrize("type_", [F16, BF16])
def test_relative_positions(type_: GgmlType) -> None:
    table = noise((3, 9), 0, type_)
    t = node(Op.GET_REL_POS, F16, (3, 5, 5), [table])
    run(t, kernels=False)
    bits, expected = CONTEXT.view(t)[0].view(np.uint16), CONTEXT.view(table)[0, 0].view(np.uint16)
    for query, key in np.ndindex(5, 5):
        np.testing.assert_array_equal(bits[query, key], expected[query - key + 4])
    assert guards_intact(t)


def added(a: Tensor, width: Tensor, height: Tensor, inplace: bool = False) -> Tensor:
    target = a if inplace else None
    words = params(int(inplace))
    return node(Op.ADD_REL_POS, F32, a.ne, [a, width, height], words, inplace=target)


@pytest.mark.parametrize("inplace", [False, True])
def test_adding_relative_positions(inplace: bool) -> None:
    a, width, height = noise((9, 4, 2)), noise((3, 2, 2, 2), 1), noise((3, 2, 2, 2), 2)
    expected = values(a)[0].reshape(2, 4, 3, 3).astype(np.float64)
    for batch, row, y, x in np.ndindex(2, 4, 3, 3):
        expected[batch, row, y, x] += values(height).reshape(2, 4, 3)[batch, row, y]
        expected[batch, row, y, x] += values(width).reshape(2, 4, 3)[batch, row, x]
    before = raw(a)
    t = added(a, width, height, inplace)
    run(t, kernels=False)
    np.testing.assert_allclose(values(t)[0].reshape(expected.shape), expected, atol=1e-6)
    if not inplace:
        np.testing.assert_array_equal(raw(a), before)
        assert guards_intact(t)


def test_contracts_of_relative_positions() -> None:
    refused(node(Op.GET_REL_POS, F16, (3, 5, 5), [noise((3, 8), 0, F16)]), "source 0 must be 3x9")
    refused(node(Op.GET_REL_POS, F16, (3, 5, 4), [noise((3, 9), 0, F16)]), "the result must be")
    refused(node(Op.GET_REL_POS, F32, (3, 5, 5), [noise((3, 9), 0, F16)]), "must not be F32")
    refused(node(Op.GET_REL_POS, F16, (3, 5, 5), [noise((3, 9))]), "source 0 must not be F32")
    none = tensor(F16, (3, 9, 0))
    refused(node(Op.GET_REL_POS, F16, (3, 5, 5), [none]), "source 0 has no table")
    a, good = noise((9, 4, 2)), noise((3, 2, 2, 2))
    for bad in (noise((3, 2, 2, 1)), noise((3, 2, 3, 2)), noise((2, 2, 2, 2))):
        refused(added(a, bad, bad), "source 0 must be")
        refused(added(a, good, bad), "source 2 must be")
    refused(added(a, permuted(good, (0, 2, 1, 3)), good), "source 1 must be contiguous")
