"""How many instructions products take: what a kernel costs is seen before a card has run it.

In decoding a warp and 1024 weights are a loop of one run of 32 a lane; the loops of spans
(spans.cuh) do more.
"""

from __future__ import annotations

import pytest

from protocol.ggml.types import GgmlType
from rpc_server.devices.cuda.compile import options_for
from rpc_server.devices.cuda.kernels import (
    Unit,
    attention_by_matrices,
    attention_of_few_rows,
    kernel_of_weights,
)
from rpc_server.devices.cuda.lower.matmul import RUNS_OF_SPAN
from tests.cuda import nvrtc, sass
from tests.parameters import mostly_slow

pytestmark = [
    pytest.mark.skipif(
        nvrtc.library() is None, reason="NVRTC is not installed (pip install '.[nvrtc]')"
    ),
    pytest.mark.skipif(
        not sass.programs(), reason="nvdisasm is not installed (pip install '.[nvrtc]')"
    ),
]


def counted(unit: Unit, kernel: str, arch: int) -> list[sass.Loop]:
    """Return a kernel's loops; skip the test where nothing here compiles for, or prints, a card."""
    if arch not in nvrtc.architectures():
        pytest.skip(f"this NVRTC does not know sm_{arch}")
    found = sass.loops(unit, kernel, arch)
    if found is None:
        pytest.skip(f"no nvdisasm here knows sm_{arch} (of CUDA 13: 75 and newer)")
    return found


# Type, architecture, and of 1024 weights at most so many instructions and loads.
BUDGETS = [
    (GgmlType.Q4_0, 60, 110, 8.0),
    (GgmlType.Q4_0, 75, 45, 8.0),
    (GgmlType.Q4_0, 86, 45, 8.0),
    (GgmlType.Q4_0, 90, 45, 8.0),
    (GgmlType.Q4_K, 60, 120, 5.0),
    (GgmlType.Q4_K, 75, 60, 5.0),
    (GgmlType.Q4_K, 86, 60, 5.0),
    (GgmlType.Q4_K, 90, 60, 5.0),
    (GgmlType.Q5_K, 86, 85, 6.0),
    (GgmlType.Q6_K, 60, 145, 8.0),
    (GgmlType.Q6_K, 75, 85, 8.0),
    (GgmlType.Q6_K, 86, 85, 8.0),
    (GgmlType.Q6_K, 90, 85, 8.0),
    (GgmlType.Q8_0, 86, 35, 8.0),
    (GgmlType.Q4_1, 86, 45, 6.0),
    (GgmlType.Q5_0, 86, 75, 6.0),
    (GgmlType.Q5_1, 86, 77, 5.0),
    (GgmlType.IQ4_NL, 86, 115, 8.0),
    (GgmlType.IQ4_XS, 86, 110, 6.0),
    (GgmlType.MXFP4, 86, 115, 8.0),
]
# What each row costs before its first weight. Cards of 6.x multiply 32 bits by many instructions.
_BEFORE = {60: 85, 75: 60, 86: 60, 90: 60}


@pytest.mark.parametrize(
    ("type_", "arch", "instructions", "loads"),
    mostly_slow(BUDGETS, quick=2),
    ids=[f"{b[0].name}-{b[1]}" for b in BUDGETS],
)
def test_a_row_of_weights_by_one_column(
    type_: GgmlType, arch: int, instructions: float, loads: float
) -> None:
    unit = kernel_of_weights("matvec", "", type_).unit
    found = counted(unit, "multiply_1", arch)
    # The loop of spans has most products; of rows that don't fit one run is done at a time.
    span = max(found, key=lambda loop: loop.products)
    assert span.products
    assert span.instructions / RUNS_OF_SPAN[type_] <= instructions, found
    assert span.loads / RUNS_OF_SPAN[type_] <= loads, found
    assert span.before <= _BEFORE[arch], found
    usages = nvrtc.compile_for(unit.text, unit.label, arch, options_for(arch, unit.source))
    assert not {name for name, usage in usages.items() if usage.spills}


# Type, architecture, and of 16 rows by 8 columns by 32 of K at most so many instructions of a warp:
# 3 (with minima 4) for each of a lane's four elements, what loads codes and factors, and the
# product itself, which is four on cards of 7.5, and two where halves have scales of their own.
TILES = [
    (GgmlType.Q8_0, 75, 23),
    (GgmlType.Q8_0, 86, 20),
    (GgmlType.Q4_K, 75, 27),
    (GgmlType.Q4_K, 86, 24),
    (GgmlType.Q4_K, 90, 26),
    (GgmlType.Q6_K, 75, 31),
    (GgmlType.Q6_K, 86, 29),
    (GgmlType.Q2_K, 86, 41),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("type_", "arch", "instructions"), TILES, ids=[f"{t[0].name}-{t[1]}" for t in TILES]
)
def test_a_tile_by_tensor_cores(type_: GgmlType, arch: int, instructions: float) -> None:
    found = counted(kernel_of_weights("tiles", "", type_).unit, "tiles_64", arch)
    # The innermost that multiplies: a run of 32 by 32 rows and columns of a warp.
    run = min((loop for loop in found if loop.products), key=lambda loop: loop.instructions)
    halves = type_ in (GgmlType.Q6_K, GgmlType.Q2_K)
    assert run.products == 8 * (4 if arch == 75 else 2 if halves else 1)
    assert run.instructions / 8 <= instructions, found


# Of floats 16 rows by 8 columns by 16 of K: two products on cards of 7.5. Type, architecture, tile,
# and at most so many instructions for it.
TILES_OF_FLOATS = [
    (GgmlType.F16, 75, "tiles_64", 5.0),
    (GgmlType.F16, 75, "tiles_128", 4.0),
    (GgmlType.F16, 86, "tiles_64", 4.0),
    (GgmlType.F16, 86, "tiles_128", 3.0),
    (GgmlType.BF16, 86, "tiles_128", 3.0),
    (GgmlType.BF16, 90, "tiles_128", 3.2),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("type_", "arch", "tile", "instructions"),
    TILES_OF_FLOATS,
    ids=[f"{t[0].name}-{t[1]}-{t[2]}" for t in TILES_OF_FLOATS],
)
def test_a_tile_of_floats(type_: GgmlType, arch: int, tile: str, instructions: float) -> None:
    found = counted(kernel_of_weights("tiles", "", type_).unit, tile, arch)
    # 16 of K by 32 rows and half of the columns: a warp's part.
    run = min((loop for loop in found if loop.products), key=lambda loop: loop.instructions)
    elements = 2 * int(tile.removeprefix("tiles_")) // 16
    assert run.products == elements * (2 if arch == 75 else 1)
    assert run.instructions / elements <= instructions, found


# Rows of values of so many times 32 elements, architecture, and at most so many instructions: of a
# warp for scores of 16 queries and 32 positions by 64 elements of keys, what loads these elements
# of queries included; and all that there are in the loop over tiles of 32 positions.
ATTENTION = [
    (2, 86, 310, 3100),
    (4, 75, 340, 3650),
    (4, 86, 310, 3500),
    (4, 90, 335, 3600),
    (8, 86, 310, 4200),
]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "arch", "scores", "whole"), ATTENTION)
def test_attention_by_tensor_cores(size: int, arch: int, scores: int, whole: int) -> None:
    found = counted(attention_by_matrices(size).unit, "attention_matrices", arch)
    once = 2 if arch == 75 else 1
    chunk = min((loop for loop in found if loop.products), key=lambda loop: loop.instructions)
    assert chunk.products == 16 * once
    assert chunk.instructions <= scores, found
    tile = max(found, key=lambda loop: (loop.products, loop.instructions))
    # Scores of a chunk, and weights by values.
    assert tile.products == (16 + 8 * size) * once
    assert tile.instructions <= whole, found


# Queries that share keys and values, architecture, and at most so many instructions of a warp for
# 512 bytes of keys, and of values, in F16.
FEW_ROWS = [(1, 86, 50, 37), (4, 86, 100, 64), (4, 90, 105, 68)]


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "arch", "keys", "values"), FEW_ROWS)
def test_attention_of_few_rows(rows: int, arch: int, keys: int, values: int) -> None:
    unit = attention_of_few_rows(GgmlType.F16, GgmlType.F16, 1, rows).unit
    found = counted(unit, "attention_few", arch)
    # Each loads 16 bytes a lane of four positions, or of four pairs of them, at a time. What puts
    # parts together loads as often, at the end, with few instructions.
    *joining, least, most = sorted(loop.instructions / 4 for loop in found if loop.loads == 4)
    assert all(n < least / 2 for n in joining)
    assert least <= values, found
    assert most <= keys, found
