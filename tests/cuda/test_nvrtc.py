"""Every kernel compiles for every card that users have: NVRTC needs no GPU for that."""

from __future__ import annotations

import pytest

from protocol.ggml_types import TYPE_INFO, GgmlType
from rpc_server.devices.cuda.compile import ARCHITECTURES, OPTIONS, SOURCES
from rpc_server.devices.cuda.kernels import (
    ATTENTION_SIZES,
    Unit,
    attention_kernel,
    kernel_of_weights,
)
from rpc_server.types import DECODABLE
from tests.cuda import nvrtc

pytestmark = pytest.mark.skipif(
    nvrtc.library() is None, reason="NVRTC is not installed (pip install nvidia-cuda-nvrtc-cu12)"
)

_FLOATS = (GgmlType.F32, GgmlType.F16, GgmlType.BF16)
# Compiled for each type of weights, and for sizes; all other sources are compiled as they are.
OF_WEIGHTS = ("matvec", "dequantize")
QUANTIZED = sorted(t for t in DECODABLE if TYPE_INFO[t].quantized)


def plain_sources() -> list[str]:
    names = sorted(path.stem for path in SOURCES.glob("*.cu"))
    return [name for name in names if name not in (*OF_WEIGHTS, "attention")]


def compiled(unit: Unit, arch: int) -> dict[str, nvrtc.Usage]:
    if arch not in nvrtc.architectures():
        pytest.skip(f"this NVRTC does not know sm_{arch}")
    found = nvrtc.compile_for(unit.text, unit.label, arch, OPTIONS)
    assert found, "no kernels in the source"
    for name, usage in found.items():
        assert usage.shared <= 48 << 10, f"{name}: more shared memory than every card has"
    return found


# What every model runs is compiled for all cards, the rest for one of each generation.
COMMON = ("columns", "copy", "elementwise", "norm", "rope", "softmax")
GENERATIONS = (60, 75, 86, 120)


PAIRS = [
    (source, arch)
    for source in plain_sources()
    for arch in (ARCHITECTURES if source in COMMON else GENERATIONS)
]


@pytest.mark.parametrize(("source", "arch"), PAIRS)
def test_sources(source: str, arch: int) -> None:
    compiled(Unit(source), arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_products_of_the_commonest_types(arch: int) -> None:
    """What decoding runs: no registers are spilled, and four blocks fit a multiprocessor."""
    for type_ in (GgmlType.Q4_0, GgmlType.Q4_K, GgmlType.F16):
        usage = compiled(kernel_of_weights("matvec", "", type_).unit, arch)["multiply_1"]
        assert not usage.spills
        assert usage.registers * 128 * 4 <= 65536


@pytest.mark.parametrize("type_", QUANTIZED, ids=lambda t: t.name)
def test_every_type_of_weights(type_: GgmlType) -> None:
    """For the oldest card, which has no dot product of bytes, and for one that has."""
    for arch in (60, 86):
        for source in OF_WEIGHTS:
            compiled(kernel_of_weights(source, "", type_).unit, arch)


@pytest.mark.parametrize("arch", [60, 75, 90])
@pytest.mark.parametrize("size", ATTENTION_SIZES)
def test_attention(size: int, arch: int) -> None:
    compiled(attention_kernel(size, "").unit, arch)
