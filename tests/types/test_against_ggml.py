"""Decoders and encoders against those of a built libggml-base, bit for bit."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from protocol.ggml.types import TYPE_INFO, GgmlType
from rpc_server.types import ENCODABLE, from_f32, to_f32
from tools import upstream

pytestmark = pytest.mark.upstream

LIBRARY = upstream.bin_dir() / "libggml-base.so"
# Its encoders are the references, but for the types that it has vector code for.
CPU_LIBRARY = upstream.bin_dir() / "libggml-cpu.so"
VECTORIZED = (GgmlType.Q8_0, GgmlType.Q8_1)

# ggml has no decoder for the activation type Q8_1.
DECODED = sorted(t for t, i in TYPE_INFO.items() if i.quantized and t is not GgmlType.Q8_1)
ENCODED = sorted(t for t in ENCODABLE if t is not GgmlType.F32)
BLOCKS = 257


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    if not LIBRARY.is_file():
        pytest.skip(f"no {LIBRARY}: run python -m tools.upstream")
    return ctypes.CDLL(str(LIBRARY))


def ggml_row(
    ggml: ctypes.CDLL, name: str, source: np.ndarray[Any, Any], result: np.ndarray[Any, Any], n: int
) -> None:
    function = getattr(ggml, name)
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None
    function(source.ctypes.data, result.ctypes.data, n)


def c_name(type_: GgmlType) -> str:
    return {GgmlType.F16: "fp16", GgmlType.BF16: "bf16"}.get(
        type_, type_.name.lower().replace("_k", "_K")
    )


@pytest.mark.parametrize("type_", DECODED, ids=lambda t: t.name)
def test_decodes_any_bytes_as_ggml_does(ggml: ctypes.CDLL, type_: GgmlType) -> None:
    info = TYPE_INFO[type_]
    rows = np.random.default_rng(1).integers(0, 256, (1, BLOCKS * info.type_size), np.uint8)
    n = BLOCKS * info.block_size
    expected = np.empty(n, np.float32)
    ggml_row(ggml, f"dequantize_row_{c_name(type_)}", rows, expected, n)
    actual = to_f32(type_, rows)[0]
    # Random scales include NaNs, whose payload is nobody's business.
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    np.testing.assert_array_equal(actual[~nan].view(np.uint32), expected[~nan].view(np.uint32))


def samples(n: int) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(2)
    normal = rng.standard_normal(n).astype(np.float32)
    magnitudes = np.float32(2.0) ** rng.integers(-14, 10, n // 32).repeat(32)
    grid = rng.integers(-8, 9, n).astype(np.float32)
    # Neighbours of powers of two, where exponents and ties are decided.
    edges = np.nextafter(np.exp2(grid), rng.choice(np.array([0, 1e9], np.float32), n)).astype(
        np.float32
    )
    return {
        "normal": normal,
        "many magnitudes": normal * magnitudes.astype(np.float32),
        "integers": grid,
        "halves": grid / 2,
        "edges": edges * rng.choice(np.array([-1, 1], np.float32), n),
        "positive": np.abs(normal) + 1,
        "sparse": np.where(rng.random(n) < 0.9, np.float32(-0.0), normal),
        "constant": np.full(n, 0.3, np.float32),
        "negative": -np.abs(normal) - 1,
        "zeros": np.zeros(n, np.float32),
        "negative zeros": np.full(n, -0.0, np.float32),
        "one in a block": np.where(np.arange(n) % 256 == 17, np.float32(-3), np.float32(0)),
        "heavy tails": normal**5,
        "ramp": np.linspace(-1, 1, n, dtype=np.float32),
        "subnormal": normal * np.float32(1e-40),
        "as small as zeros": normal * np.float32(3e-16),
        "tiny": normal * np.float32(1e-14),
        "beyond half precision": normal * np.float32(3e4),
        "squares overflow": normal * np.float32(1e15),
        "huge": normal * np.float32(3e37),
        "infinities": np.where(rng.random(n) < 0.01, np.copysign(np.inf, normal), normal),
    }


@pytest.mark.parametrize("type_", ENCODED, ids=lambda t: t.name)
def test_encodes_as_ggml_does(ggml: ctypes.CDLL, type_: GgmlType) -> None:
    info = TYPE_INFO[type_]
    n = BLOCKS * max(info.block_size, 32)
    library, name = ggml, f"ggml_fp32_to_{c_name(type_)}_row"
    if type_ in VECTORIZED:
        library, name = ctypes.CDLL(str(CPU_LIBRARY)), f"quantize_row_{c_name(type_)}"
    elif info.quantized:
        name = f"quantize_row_{c_name(type_)}_ref"
    for label, sample in samples(n).items():
        values = sample.astype(np.float32)
        expected = np.zeros(n // info.block_size * info.type_size, np.uint8)
        ggml_row(library, name, values, expected, n)
        actual = from_f32(type_, values[None])[0]
        if type_ is GgmlType.IQ4_NL:
            # ggml leaves uninitialised codes in blocks that count as zeros.
            zero = (np.abs(values.reshape(-1, 32)) < 1e-15).all(axis=1)
            expected.reshape(-1, info.type_size)[zero, 2:] = 0
        np.testing.assert_array_equal(actual, expected, err_msg=label)
