"""Every kernel compiles for every card that users have: NVRTC needs no GPU for that."""

from __future__ import annotations

import pytest

from protocol.ggml.types import CACHE_TYPES, DECODABLE, TYPE_INFO, GgmlType
from rpc_server.devices.cuda.compile import ARCHITECTURES, OPTIONS, SOURCES, options_for
from rpc_server.devices.cuda.kernels import (
    ATTENTION_SIZES,
    Unit,
    attention_by_matrices,
    attention_kernel,
    attention_of_few_rows,
    kernel_of_weights,
)
from rpc_server.devices.cuda.lower.attention import BLOCKS, MATRIX_BLOCKS
from rpc_server.devices.cuda.lower.copy import ENCODERS
from tests.cuda import nvrtc
from tests.parameters import mostly_slow

pytestmark = pytest.mark.skipif(
    nvrtc.library() is None, reason="NVRTC is not installed (pip install nvidia-cuda-nvrtc-cu12)"
)

_FLOATS = (GgmlType.F32, GgmlType.F16, GgmlType.BF16)
# Compiled for each type of weights, and for sizes; all other sources are compiled as they are.
OF_WEIGHTS = ("matvec", "tiles", "dequantize")
OF_ATTENTION = ("attention", "attention_few", "attention_matrices")
QUANTIZED = sorted(t for t in DECODABLE if TYPE_INFO[t].quantized)


def plain_sources() -> list[str]:
    names = sorted(path.stem for path in SOURCES.glob("*.cu"))
    return [name for name in names if name not in (*OF_WEIGHTS, *OF_ATTENTION, "encode")]


def compiled(unit: Unit, arch: int) -> dict[str, nvrtc.Usage]:
    if arch not in nvrtc.architectures():
        pytest.skip(f"this NVRTC does not know sm_{arch}")
    found = nvrtc.compile_for(unit.text, unit.label, arch, options_for(arch, unit.source))
    assert found, "no kernels in the source"
    for name, usage in found.items():
        assert usage.shared <= 48 << 10, f"{name}: more shared memory than every card has"
    return found


def test_cards_that_are_told_to_cache() -> None:
    """GTX 10 and P40: the compiler knows the option, and makes other code."""
    if 61 not in nvrtc.architectures():
        pytest.skip("this NVRTC does not know sm_61")
    text = Unit("columns").text
    told = options_for(61, "columns")
    assert len({nvrtc.code_for(text, "columns", 61, options) for options in (OPTIONS, told)}) == 2
    assert options_for(60, "columns") == options_for(75, "columns") == OPTIONS
    # What is read once has no use for it.
    assert options_for(61, "attention_few") == OPTIONS


# What every model runs is compiled for all cards, the rest for one of each generation.
COMMON = ("columns", "copy", "elementwise", "norm", "rope", "softmax")
GENERATIONS = (60, 75, 86, 120)


PAIRS = [
    (source, arch)
    for source in plain_sources()
    for arch in (ARCHITECTURES if source in COMMON else GENERATIONS)
]


@pytest.mark.parametrize(("source", "arch"), mostly_slow(PAIRS, quick=3))
def test_sources(source: str, arch: int) -> None:
    compiled(Unit(source), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_products_of_the_commonest_types(arch: int) -> None:
    """What decoding runs: no registers are spilled, and four blocks fit a multiprocessor."""
    for type_ in (GgmlType.Q4_0, GgmlType.Q4_K, GgmlType.F16):
        usage = compiled(kernel_of_weights("matvec", "", type_).unit, arch)["multiply_1"]
        assert not usage.spills
        assert usage.registers * 128 * 4 <= 65536


# Tiles, and how many blocks of them are to fit a multiprocessor.
TILE_BLOCKS = {"tiles_16": 5, "tiles_32": 4, "tiles_64": 3, "tiles_128": 3}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tiles_of_the_commonest_types(arch: int) -> None:
    """What reading a prompt runs: nothing is spilled, and several blocks fit a multiprocessor."""
    for type_ in (GgmlType.Q4_0, GgmlType.Q6_K):
        for name, usage in compiled(kernel_of_weights("tiles", "", type_).unit, arch).items():
            blocks = 2 if arch == 60 else TILE_BLOCKS[name]
            assert not usage.spills, name
            assert usage.registers * 128 * blocks <= 65536, name
            assert usage.shared * blocks <= 96 << 10, name


# What has tensor cores that multiply bytes, and floats but for BF16 on the first. Every type is
# compiled for two of them, by night for all.
TENSOR_CORES = (75, 80, 86, 89, 90)
TILES_FOR = [
    pytest.param(
        type_,
        arch,
        marks=pytest.mark.slow if arch in (75, 86) else pytest.mark.nightly,
        id=f"{type_.name}-{arch}",
    )
    for type_ in (*QUANTIZED, GgmlType.F16, GgmlType.BF16)
    for arch in TENSOR_CORES
    if type_ is not GgmlType.BF16 or arch >= 80
]


@pytest.mark.parametrize(("type_", "arch"), TILES_FOR)
def test_tiles_by_tensor_cores(type_: GgmlType, arch: int) -> None:
    """Nothing is spilled, and as many blocks have registers as have room in shared memory."""
    for name, usage in compiled(kernel_of_weights("tiles", "", type_).unit, arch).items():
        assert not usage.spills, name
        assert usage.registers * 128 * TILE_BLOCKS[name] <= 65536, name


@pytest.mark.slow
@pytest.mark.parametrize("type_", QUANTIZED, ids=lambda t: t.name)
def test_every_type_of_weights(type_: GgmlType) -> None:
    """For the oldest card, which has no dot product of bytes, and for ones that have."""
    for arch in (60, 86):
        for source in OF_WEIGHTS:
            if source != "tiles":
                compiled(kernel_of_weights(source, "", type_).unit, arch)
    # These take the compiler long for the oldest; by tensor cores they have tests of their own.
    compiled(kernel_of_weights("tiles", "", type_).unit, 61)


# Every encoder for the oldest card, the largest for all.
ENCODERS_FOR = [
    (type_, arch)
    for type_, encoder in ENCODERS.items()
    for arch in (ARCHITECTURES if type_ is GgmlType.Q4_K else ARCHITECTURES[:1])
    if encoder.copy.unit.source == "encode"
]


@pytest.mark.slow
@pytest.mark.parametrize(("type_", "arch"), ENCODERS_FOR)
def test_encoders(type_: GgmlType, arch: int) -> None:
    """None keeps the floats that it searches with in memory."""
    encoder = ENCODERS[type_]
    found = compiled(encoder.copy.unit, arch)
    for kernel in (encoder.copy, encoder.rows):
        assert found[kernel.name].stack <= 16, kernel.label


# Heads of 128 elements for all cards.
SIZES = [(n, arch) for n in ATTENTION_SIZES for arch in (ARCHITECTURES if n == 4 else (61, 86))]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "arch"), SIZES)
def test_attention(size: int, arch: int) -> None:
    """Nothing is spilled, and several blocks fit a multiprocessor."""
    (usage,) = compiled(attention_kernel(size).unit, arch).values()
    assert not usage.spills
    assert not usage.stack
    assert usage.registers * 128 * (4 if size <= 8 else 3) <= 65536


@pytest.mark.slow
@pytest.mark.parametrize("arch", TENSOR_CORES)
@pytest.mark.parametrize(("size", "blocks"), MATRIX_BLOCKS.items())
def test_attention_by_tensor_cores(size: int, blocks: int, arch: int) -> None:
    (usage,) = compiled(attention_by_matrices(size).unit, arch).values()
    assert not usage.spills
    assert not usage.stack
    assert usage.registers * 128 * blocks <= 65536


def check_few_rows(type_: GgmlType, units: int, rows: int, arch: int) -> None:
    (usage,) = compiled(attention_of_few_rows(type_, type_, units, rows).unit, arch).values()
    assert not usage.spills
    assert not usage.stack
    assert usage.registers * 128 * BLOCKS[units * rows] <= 65536


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_attention_of_few_rows(arch: int) -> None:
    """What decoding runs, the same; four heads share keys and values in most models."""
    check_few_rows(GgmlType.F16, 1, 4, arch)


@pytest.mark.slow
@pytest.mark.parametrize("type_", [*sorted(CACHE_TYPES), *_FLOATS], ids=lambda t: t.name)
def test_attention_of_few_rows_of_every_type(type_: GgmlType) -> None:
    check_few_rows(type_, 1, 1, 86)
    check_few_rows(type_, 1, 4, 86)


@pytest.mark.slow
@pytest.mark.parametrize(("units", "rows"), [(1, 2), (1, 8), (2, 1), (2, 2), (2, 4)])
def test_attention_of_other_rows(units: int, rows: int) -> None:
    for arch in (61, 86):
        check_few_rows(GgmlType.F16, units, rows, arch)
