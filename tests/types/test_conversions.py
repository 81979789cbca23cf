"""Type conversions by themselves: hand-made blocks, errors of a round trip, shapes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rpc_server.types
from protocol.ggml.types import DECODABLE, TYPE_INFO, GgmlType, row_size
from rpc_server.types import (
    ENCODABLE,
    from_f32,
    to_f32,
)

QUANTIZED = sorted(t for t in ENCODABLE if TYPE_INFO[t].quantized)


def half(x: float) -> list[int]:
    return list(np.float16(x).tobytes())


def decoded(type_: GgmlType, block: list[int]) -> list[float]:
    values: list[float] = to_f32(type_, np.array(block, np.uint8)).tolist()
    return values


# -- blocks made by hand ---------------------------------------------------------------------------


def test_q4_0_block() -> None:
    values = decoded(GgmlType.Q4_0, half(0.5) + [0x80] + [0x9F] * 15)
    assert values == [-4.0] + [3.5] * 15 + [0.0] + [0.5] * 15


def test_q5_1_block() -> None:
    # The fifth bits of elements 1 and 31 are set.
    block = half(2) + half(-1) + [2, 0, 0, 0x80] + [0x21] * 16
    assert decoded(GgmlType.Q5_1, block) == [1.0, 33.0] + [1.0] * 14 + [3.0] * 15 + [35.0]


def test_q8_1_block_ignores_its_sum() -> None:
    assert decoded(GgmlType.Q8_1, half(0.25) + half(99) + [4, 252] * 16) == [1.0, -1.0] * 16


def test_q8_k_block() -> None:
    block = list(np.float32(0.5).tobytes()) + [2, 254] * 128 + [7] * 32
    assert decoded(GgmlType.Q8_K, block) == [1.0, -1.0] * 128


def test_q1_0_block() -> None:
    assert decoded(GgmlType.Q1_0, half(3) + [0b101] + [0] * 15) == [3.0, -3.0, 3.0] + [-3.0] * 125


def test_q2_0_block() -> None:
    assert decoded(GgmlType.Q2_0, half(2) + [0b11_10_01_00] * 16) == [-2.0, 0.0, 2.0, 4.0] * 16


def test_nvfp4_block() -> None:
    # Scales 1, 2 (next exponent), the smallest subnormal and NaN, which counts as 0; codes 0.5, -6.
    block = [0x38, 0x40, 0x01, 0x7F] + [0xF1] * 32
    values = decoded(GgmlType.NVFP4, block)
    for group, scale in enumerate((1, 2, 2**-9, 0)):
        assert values[16 * group : 16 * group + 16] == [0.5 * scale] * 8 + [-6.0 * scale] * 8


def test_bf16_rounds_to_even_and_keeps_nan() -> None:
    one, tie_down, tie_up = 1.0, 1 + 2**-8, 1 + 3 * 2**-8
    # A NaN whose payload lies in the bits that are cut off.
    hidden_nan = np.array([0x7F800001], np.uint32).view(np.float32)[0]
    values = np.array([one, tie_down, tie_up, -np.inf, hidden_nan], np.float32)
    result = to_f32(GgmlType.BF16, from_f32(GgmlType.BF16, values))
    assert result[:4].tolist() == [1.0, 1.0, 1 + 2**-6, -np.inf]
    assert np.isnan(result[4])


# -- encoders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_", sorted(ENCODABLE), ids=lambda t: t.name)
def test_zeros_stay_zeros(type_: GgmlType) -> None:
    n = TYPE_INFO[type_].block_size * 2
    for zero in (0.0, -0.0):
        assert not to_f32(type_, from_f32(type_, np.full((2, n), zero, np.float32))).any()


# The largest error of an element, in parts of the block's largest magnitude.
STEPS = {
    GgmlType.Q4_0: 1 / 8,
    GgmlType.Q5_0: 1 / 16,
    GgmlType.Q4_1: 1 / 15,
    GgmlType.Q5_1: 1 / 31,
    **dict.fromkeys((GgmlType.Q8_0, GgmlType.Q8_1, GgmlType.Q8_K), 0.5 / 127),
    **dict.fromkeys((GgmlType.Q2_0, GgmlType.TQ1_0, GgmlType.TQ2_0), 1 / 2),
    GgmlType.MXFP4: 1 / 3,
    GgmlType.NVFP4: 1 / 4,
    GgmlType.F32: 0,
    GgmlType.F16: 2**-11,
    GgmlType.BF16: 2**-8,
}


@pytest.mark.parametrize("type_", STEPS, ids=lambda t: t.name)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(0, 6))
def test_round_trip_is_as_near_as_the_type_allows(
    type_: GgmlType, seed: int, exponent: int
) -> None:
    n = TYPE_INFO[type_].block_size
    x = np.random.default_rng(seed).standard_normal((3, n)).astype(np.float32)
    x *= np.float32(2.0) ** exponent
    y = to_f32(type_, from_f32(type_, x))
    largest = np.abs(x).max(axis=-1, keepdims=True)
    # Scales are rounded to half precision on top of the step, and that has subnormals.
    step = STEPS[type_] + (2**-10 if n > 1 else 0)
    assert (np.abs(x - y) <= largest * step + (2**-25 if step else 0)).all()


# Squares left over of normally distributed values, in parts of all: about a quarter for each bit.
LEFT_OVER = {
    GgmlType.Q2_K: 0.1,
    GgmlType.Q3_K: 0.03,
    GgmlType.Q4_K: 0.007,
    GgmlType.Q5_K: 0.0017,
    GgmlType.Q6_K: 0.0005,
    GgmlType.IQ4_NL: 0.008,
    GgmlType.IQ4_XS: 0.008,
}


@pytest.mark.parametrize("type_", LEFT_OVER, ids=lambda t: t.name)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-3, 3), mean=st.integers(-1, 1))
def test_searched_scales_leave_little_over(
    type_: GgmlType, seed: int, exponent: int, mean: int
) -> None:
    # So many that chance moves their sum by less than a hundredth.
    x = np.random.default_rng(seed).normal(mean, 1, (32, 256)).astype(np.float32)
    x *= np.float32(2.0) ** exponent
    y = to_f32(type_, from_f32(type_, x))
    assert ((x - y) ** 2).sum() < LEFT_OVER[type_] * (x**2).sum()


@pytest.mark.parametrize("type_", [GgmlType.Q8_0, GgmlType.Q4_0, GgmlType.Q5_0, GgmlType.IQ4_NL])
def test_encoding_again_changes_nothing(type_: GgmlType) -> None:
    # Values that the block can hold exactly, its extreme code among them.
    codes = np.resize(to_f32(type_, _every_code(type_)), 32)
    blocks = from_f32(type_, codes)
    np.testing.assert_array_equal(from_f32(type_, to_f32(type_, blocks)), blocks)


def _every_code(type_: GgmlType) -> np.ndarray[Any, Any]:
    payload = TYPE_INFO[type_].type_size - 2
    return np.array(half(0.5) + [(17 * i) & 0x7F for i in range(payload)], np.uint8)


def test_q8_1_carries_the_sum_of_its_codes() -> None:
    x = np.linspace(-1, 2, 32, dtype=np.float32)
    block = from_f32(GgmlType.Q8_1, x)
    d, s = block[:4].view(np.float16).astype(np.float64)
    assert s == pytest.approx(d * block[4:].view(np.int8).sum(dtype=np.int64), rel=2e-3)


def test_q8_k_carries_sums_of_sixteen() -> None:
    x = np.random.default_rng(1).standard_normal(256).astype(np.float32)
    block = from_f32(GgmlType.Q8_K, x)
    sums = block[4:260].view(np.int8).reshape(16, 16).sum(axis=1, dtype=np.int64)
    np.testing.assert_array_equal(block[260:].view(np.int16), sums)


# -- shapes and refusals ---------------------------------------------------------------------------


@pytest.mark.parametrize("type_", sorted(DECODABLE), ids=lambda t: t.name)
def test_shapes(type_: GgmlType) -> None:
    n = 2 * TYPE_INFO[type_].block_size
    size = row_size(type_, n)
    rows = np.zeros((2, 3, 0, size), np.uint8)
    assert to_f32(type_, rows).shape == (2, 3, 0, n)
    # Every other row, as in a view with larger strides.
    rows = np.random.default_rng(2).integers(0, 60, (4, 5, size), np.uint8)
    values = to_f32(type_, rows[::2])
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, to_f32(type_, rows)[::2])
    if type_ in ENCODABLE:
        encoded = from_f32(type_, values[:, ::2])
        assert encoded.shape == (2, 3, size)
        assert encoded.dtype == np.uint8


@pytest.mark.parametrize("type_", [GgmlType.Q4_0, GgmlType.Q4_K])
def test_chunks_join_seamlessly(type_: GgmlType, monkeypatch: pytest.MonkeyPatch) -> None:
    info = TYPE_INFO[type_]
    rows = np.random.default_rng(3).integers(0, 60, (7, info.type_size), np.uint8)
    whole = to_f32(type_, rows)
    monkeypatch.setattr(rpc_server.types, "_CHUNK", 2 * info.block_size)
    np.testing.assert_array_equal(to_f32(type_, rows), whole)
    if type_ in ENCODABLE:
        np.testing.assert_array_equal(to_f32(type_, from_f32(type_, whole)).shape, whole.shape)


@pytest.mark.parametrize("type_", sorted(set(GgmlType) - ENCODABLE), ids=lambda t: t.name)
def test_types_without_an_encoder_say_so(type_: GgmlType) -> None:
    with pytest.raises(NotImplementedError, match=type_.name):
        from_f32(type_, np.zeros(256, np.float32))


@pytest.mark.parametrize("type_", sorted(set(GgmlType) - DECODABLE), ids=lambda t: t.name)
def test_types_without_a_decoder_say_so(type_: GgmlType) -> None:
    with pytest.raises(NotImplementedError, match=type_.name):
        to_f32(type_, np.zeros(256, np.uint8))


def test_another_array_module_gets_its_own_arrays_back() -> None:
    class Device:
        """An array that is only to be read through asnumpy."""

        def __init__(self, host: np.ndarray[Any, Any]) -> None:
            self.host = host

    xp: Any = SimpleNamespace(asnumpy=lambda a: a.host, asarray=Device)
    x = np.arange(64, dtype=np.float32)
    encoded = from_f32(GgmlType.Q8_0, Device(x), xp)
    assert isinstance(encoded, Device)
    values = to_f32(GgmlType.Q8_0, encoded, xp)
    np.testing.assert_array_equal(values.host, to_f32(GgmlType.Q8_0, from_f32(GgmlType.Q8_0, x)))
