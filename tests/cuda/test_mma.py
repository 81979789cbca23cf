"""Products of small matrices by tensor cores, in the emulation: which lane has which elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rpc_server.devices.cpu.kernels.interface.abi import RECORD_WORDS
from rpc_server.devices.cuda.compile import SOURCES, joined
from tests.cuda import emulation
from tests.cuda.harness import needs_compiler

pytestmark = needs_compiler

_Array = np.ndarray[Any, Any]

TEXT = joined(SOURCES / "mma.cuh")

# Cards that multiply 8 by 8, and 16 by 8, at once; the former know no BF16.
CAPABILITIES = (75, 80)

_KERNELS = """
#define A reinterpret_cast<const int4 *>(r.slot[SRC0].data)
#define B reinterpret_cast<const int4 *>(r.slot[SRC1].data)
#define TO reinterpret_cast<i32 *>(r.slot[DST].data)

// 16 rows times 8 columns: of all 32 of K, of the first half, of the second.
KERNEL(products, 32) {
    const RowWords a = rows_of_lane(A, 2);
    const ColumnWords b = columns_of_lane(B, 2);
    Sums sums[3] = {{{5, 5, 5, 5}}, {{5, 5, 5, 5}}, {{5, 5, 5, 5}}};
    add_whole(sums[0], a, b);
    add_half<0>(sums[1], a, b);
    add_half<1>(sums[2], a, b);
    for (int which = 0; which < 3; which++)
        for (int i = 0; i < 4; i++)
            TO[128 * which + 8 * row_of_sum(i) + column_of_sum(i)] = sums[which].of[i];
}

// Rows and columns are 16 halves.
KERNEL(products_of_halves, 32) {
    FloatSums sums = {{5, 5, 5, 5}};
    add_whole(sums, rows_of_lane(A, 2), columns_of_lane(B, 2));
    float *to = reinterpret_cast<float *>(r.slot[DST].data);
    for (int i = 0; i < 4; i++) to[8 * row_of_sum(i) + column_of_sum(i)] = sums.of[i];
}

#if ARCHITECTURE >= 800
KERNEL(products_of_bfloats, 32) {
    FloatSums sums = {{5, 5, 5, 5}};
    add_whole<BF16>(sums, rows_of_lane(A, 2), columns_of_lane(B, 2));
    float *to = reinterpret_cast<float *>(r.slot[DST].data);
    for (int i = 0; i < 4; i++) to[8 * row_of_sum(i) + column_of_sum(i)] = sums.of[i];
}
#endif

KERNEL(by_some_lanes, 32) {
    Sums sums = {};
    const RowWords a = rows_of_lane(A, 2);
    const ColumnWords b = columns_of_lane(B, 2);
    if (threadIdx.x != 7) add_whole(sums, a, b);
    TO[threadIdx.x] = sums.of[0];
}

KERNEL(as_a_barrier, 32) {
    SHARED_ARRAY(int, values, 32);
    values[threadIdx.x] = threadIdx.x;
    Sums sums = {};
    add_whole(sums, rows_of_lane(A, 2), columns_of_lane(B, 2));
    TO[threadIdx.x] = sums.of[0] + values[threadIdx.x ^ 1];
}
"""


def launch(
    kernel: str, a: _Array, b: _Array, result: _Array, capability: int, text: str, threads: int = 32
) -> None:
    """Run a kernel on rows ``a`` and columns ``b``, each of 32 bytes."""
    memory = emulation.Memory()
    for source in (a, b):
        memory.add(source.ctypes.data, source.nbytes, writable=False)
    memory.add(result.ctypes.data, result.nbytes)
    record = np.zeros(RECORD_WORDS, np.int64)
    record[0], record[10], record[20] = (x.ctypes.data for x in (result, a, b))
    module = emulation.build("mma", text + _KERNELS, capability=capability)
    module.launch(kernel, record, (1,), (threads,), memory)


def of_bytes(
    capability: int, text: str = TEXT, kernel: str = "products", threads: int = 32
) -> tuple[_Array, _Array]:
    """Return (what numpy gives, what the kernel gives), int32 (3, 16, 8) each."""
    both = np.random.default_rng(1).integers(-128, 128, (24, 32)).astype(np.int8)
    a, b = both[:16].copy(), both[16:].copy()
    # Also the largest sums there are.
    a[3], b[5] = -128, -128
    result = np.zeros((3, 16, 8), np.int32)
    launch(kernel, a, b, result, capability, text, threads)
    parts = slice(32), slice(16), slice(16, 32)
    wide, tall = a.astype(np.int32), b.astype(np.int32)
    return np.stack([5 + wide[:, k] @ tall[:, k].T for k in parts]), result


def of_floats(kernel: str, capability: int, text: str) -> tuple[_Array, _Array]:
    """Return (what numpy gives, what the kernel gives), float32 (16, 8) each, both exact."""
    both = np.random.default_rng(1).integers(-64, 64, (24, 16)).astype(np.float32)
    halves = kernel == "products_of_halves"
    # BF16 is the upper half of a float.
    words = both.astype(np.float16) if halves else (both.view(np.uint32) >> 16).astype(np.uint16)
    result = np.zeros((16, 8), np.float32)
    launch(kernel, words[:16].copy(), words[16:].copy(), result, capability, text)
    return 5 + both[:16] @ both[16:].T, result


def of_halves(capability: int, text: str = TEXT) -> tuple[_Array, _Array]:
    return of_floats("products_of_halves", capability, text)


def of_bfloats(capability: int, text: str = TEXT) -> tuple[_Array, _Array]:
    return of_floats("products_of_bfloats", capability, text)


PRODUCTS = [
    *((of, capability) for of in (of_bytes, of_halves) for capability in CAPABILITIES),
    (of_bfloats, CAPABILITIES[-1]),
]


@pytest.mark.parametrize(("of", "capability"), PRODUCTS)
def test_products(of: Callable[[int], tuple[_Array, _Array]], capability: int) -> None:
    expected, actual = of(capability)
    np.testing.assert_array_equal(actual, expected)


# What one may take the layout for, in the place of what it is.
WRONG = {
    "the words of a row together": (
        "{upper[0], lower[0], upper[4], lower[4]}",
        "{upper[0], upper[4], lower[0], lower[4]}",
    ),
    "the second half of a column first": ("{both[0], both[4]}", "{both[4], both[0]}"),
    "words of a row side by side": (
        "{upper[0], lower[0], upper[4], lower[4]}",
        "{upper[0], lower[0], upper[1], lower[1]}",
    ),
    "groups of lanes for places in them": (
        "threadIdx.x % 32 / 4, in_group = threadIdx.x % 4",
        "threadIdx.x % 8, in_group = threadIdx.x % 32 / 8",
    ),
    "columns of sums apart": ("threadIdx.x % 4 * 2 + i % 2", "threadIdx.x % 4 + i % 2 * 4"),
    "rows of sums together": (
        "threadIdx.x % 32 / 4 + i / 2 * 8",
        "threadIdx.x % 32 / 4 * 2 + i / 2",
    ),
}


@pytest.mark.parametrize(("of", "capability"), PRODUCTS)
@pytest.mark.parametrize(("right", "wrong"), WRONG.values(), ids=WRONG)
def test_a_wrong_layout_is_found(
    of: Callable[[int, str], tuple[_Array, _Array]], capability: int, right: str, wrong: str
) -> None:
    assert TEXT.count(right) == 1
    expected, actual = of(capability, TEXT.replace(right, wrong))
    assert (actual != expected).any()


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("kernel", "threads", "fault"),
    [
        ("by_some_lanes", 32, "not all of them come"),
        ("products", 16, "a warp of 16 lanes"),
        ("as_a_barrier", 32, "race in shared memory"),
    ],
)
def test_faults_are_found(capability: int, kernel: str, threads: int, fault: str) -> None:
    """All lanes of a warp have to come; that they did says nothing of what they have written."""
    with pytest.raises(emulation.EmulationError, match=fault):
        of_bytes(capability, TEXT, kernel, threads)
