"""Products by CUDA kernels, in the emulation, against the array references."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest

from client.backend import Backend
from protocol.ggml.ops import Op
from protocol.ggml.types import DECODABLE, TYPE_INFO, GgmlType
from protocol.tensor import Tensor
from rpc_server.devices.cpu.kernels.interface.abi import PARAM_WORD, RECORD_WORDS
from rpc_server.devices.cuda.compile import SOURCES, joined
from rpc_server.devices.cuda.kernels import Unit
from rpc_server.devices.cuda.lower import matmul
from rpc_server.devices.cuda.lower.matmul import (
    RUNS_OF_SPAN,
    TILES,
    TILES_OF_FLOATS,
    at_once,
    products_of,
)
from rpc_server.devices.cuda.planner import Launch
from rpc_server.ops.table import ContractError
from tests.cuda import emulation
from tests.cuda import harness as cuda
from tests.ops.harness import nmse
from tests.ops.tensors import CONTEXT, node, noise, permuted, raw, tensor
from tests.ops.tensors import values as tensor_values
from tests.ops.type_cases import random_content
from tests.parameters import mostly_slow
from tools.serving.ports import free_port
from tools.serving.processes import Process, listens

pytestmark = cuda.needs_compiler

F32, F16, BF16, I32 = GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.I32
QUANTIZED = sorted(t for t in DECODABLE if TYPE_INFO[t].quantized)
WEIGHTS = [F32, F16, BF16, *QUANTIZED]

# As test-backend-ops: the part of the squares that may be wrong.
TOLERANCE = 5e-4
TOLERANCE_OF_FLOATS = 1e-7

# Their activations are rounded as Q8_1.
WITH_SUMS = (GgmlType.Q4_1, GgmlType.Q5_1)


def weights(type_: GgmlType, *ne: int, seed: int = 1) -> Tensor:
    t = tensor(type_, ne)
    content = random_content(type_, t.ne, seed, 100, None)
    CONTEXT.memory(t.address, t.nbytes)[...] = content
    return t


def product(a: Tensor, b: Tensor) -> Tensor:
    return node(Op.MUL_MAT, F32, (a.ne[1], *b.ne[1:]), [a, b])


def kernels(*nodes: Tensor, capability: int = 61) -> list[str]:
    """The names of what is launched for nodes."""
    launches, _ = cuda.plan(nodes, capability)
    return [x.kernel.name if isinstance(x, Launch) else "cuBLAS" for x in launches]


def check_product(a: Tensor, b: Tensor) -> None:
    expected, actual = cuda.by_both(product(a, b))
    assert nmse(expected, actual) < (TOLERANCE if a.quantized else TOLERANCE_OF_FLOATS)


@pytest.mark.parametrize("type_", WEIGHTS, ids=lambda t: t.name)
def test_every_type(type_: GgmlType) -> None:
    """One column and several; rows that end within a block of threads; long rows and short ones."""
    block = max(TYPE_INFO[type_].block_size, 32)
    for m, k, n in (
        (5, block, 1),
        (19, 5 * block, 2),
        (3, 1280 // block * block, 3),
        (9, block, 11),
    ):
        check_product(weights(type_, k, m), noise((k, n)))


@pytest.mark.parametrize("type_", WEIGHTS, ids=lambda t: t.name)
def test_decoded_weights_are_exact(type_: GgmlType) -> None:
    """Ones in turn as columns: codes and scales of each place, to the roundings of a sum."""
    if not TYPE_INFO[type_].quantized:
        pytest.skip("floats are not decoded")
    k = TYPE_INFO[type_].block_size
    a = weights(type_, k, 3)
    columns = np.eye(k, dtype=np.float32)[:: max(k // 64, 1)]
    # Few enough at a time for kernels of our own.
    for at in range(0, len(columns), 16):
        b = tensor(F32, (k, 16), columns[at : at + 16])
        expected, actual = cuda.by_both(node(Op.MUL_MAT, F32, (3, 16), [a, b]))
        # A minimum that undoes a scale times a code leaves the roundings of both; of Q8_1 the sum
        # that a minimum is multiplied with is rounded to half precision.
        bound = 2.0**-10 if type_ in WITH_SUMS else 1e-5
        largest = float(np.abs(expected).max())
        np.testing.assert_allclose(actual, expected, rtol=bound, atol=largest * bound)


def with_gaps(a: Tensor, gap: int) -> Tensor:
    """The same weights, rows so many bytes further apart."""
    row = a.nb[1]
    plane = (row + gap) * a.ne[1]
    t = tensor(a.type, a.ne, nb=(a.nb[0], row + gap, plane, plane))
    memory = CONTEXT.memory(t.address, t.nbytes)
    for i, content in enumerate(raw(a).reshape(a.ne[1], row)):
        memory[i * (row + gap) : i * (row + gap) + row] = content
    return t


@pytest.mark.parametrize(
    ("type_", "gap"),
    [
        (GgmlType.Q4_K, 4),
        (GgmlType.Q4_0, 2),
        (GgmlType.Q8_0, 2),
        (GgmlType.Q8_0, 4),
        (GgmlType.Q6_K, 2),
        (GgmlType.Q4_1, 4),
        (GgmlType.Q5_0, 2),
        (GgmlType.Q5_0, 4),
        (GgmlType.Q5_1, 8),
        (GgmlType.IQ4_NL, 2),
        (GgmlType.IQ4_XS, 4),
        (GgmlType.MXFP4, 1),
        (GgmlType.MXFP4, 2),
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
@pytest.mark.parametrize("n", [1, 3])
def test_rows_that_wide_loads_do_not_fit(type_: GgmlType, gap: int, n: int) -> None:
    """They begin where 16 bytes, or two blocks, can't be read at once."""
    check_product(with_gaps(weights(type_, 768, 6), gap), noise((768, n)))


@pytest.mark.parametrize("k", [32, 96, 192, 2016])
def test_rows_of_an_odd_number_of_blocks(k: int) -> None:
    """Two or four blocks are read at once, and here some are left: also behind the last row."""
    for type_ in RUNS_OF_SPAN:
        if TYPE_INFO[type_].block_size == 32:
            check_product(weights(type_, k, 4), noise((k, 1)))


@pytest.mark.parametrize(
    "type_",
    [GgmlType.Q5_0, GgmlType.Q6_K, GgmlType.Q8_0, GgmlType.MXFP4],
    ids=lambda t: t.name,
)
@pytest.mark.parametrize("at", [2, 4, 6, 8])
def test_rows_that_begin_between_words(type_: GgmlType, at: int) -> None:
    """Blocks are read by 8 bytes from what lies around them: nothing before or behind a tensor."""
    whole = weights(type_, 512, 4)
    memory = tensor(GgmlType.I8, (whole.nbytes + at,))
    CONTEXT.memory(memory.address + at, whole.nbytes)[...] = raw(whole)
    check_product(replace(whole, id=memory.id, address=memory.address + at), noise((512, 1)))


# Ways to multiply bytes that only some cards take.
_DOTS = """
KERNEL(dots, 256) {
    const i32 *a = reinterpret_cast<const i32 *>(r.slot[SRC0].data), *b = a + r.param[0];
    i32 *to = reinterpret_cast<i32 *>(r.slot[DST].data);
    for (int i = threadIdx.x; i < r.param[0]; i += blockDim.x) {
        to[2 * i] = dot4_by_halves(a[i], b[i], 7);
        to[2 * i + 1] = unsigned_dot4_by_halves(a[i], b[i], 7);
    }
}
"""


def test_products_of_bytes_by_halves_of_words() -> None:
    """What P100 has in place of a dot product of bytes: every byte by every other."""
    pairs = np.indices((256, 256)).reshape(2, -1).astype(np.uint8)
    # Neighbours in a word differ, so that none can be taken for another.
    words = np.stack([np.roll(pairs, 97 * i, axis=1) for i in range(4)], axis=-1).copy()
    sources, result = words.view(np.int32).reshape(2, -1), np.zeros((words.shape[1], 2), np.int32)
    memory = emulation.Memory()
    memory.add(sources.ctypes.data, sources.nbytes, writable=False)
    memory.add(result.ctypes.data, result.nbytes)
    record = np.zeros(RECORD_WORDS, np.int64)
    record[0], record[10], record[PARAM_WORD] = (
        result.ctypes.data,
        sources.ctypes.data,
        words.shape[1],
    )
    text = joined(SOURCES / "columns.cuh") + _DOTS
    emulation.build("dots", text).launch("dots", record, (1,), (256,), memory)
    b = words[1].view(np.int8).astype(np.int32)
    for column, a in enumerate((words[0].view(np.int8), words[0])):
        expected = 7 + (a.astype(np.int32) * b).sum(-1)
        np.testing.assert_array_equal(result[:, column], expected)


def test_runs_that_a_lane_multiplies_at_once() -> None:
    """Lanes of a row are as many as spans are, so the planner knows what spans are."""
    stores = " ".join(f"to[{t}] = Span<{t.name}>::RUNS;" for t in QUANTIZED)
    kernel = "i32 *to = reinterpret_cast<i32 *>(r.slot[DST].data); if (threadIdx.x == 0) "
    text = joined(SOURCES / "spans.cuh") + f"KERNEL(runs, 32) {{ {kernel} {{ {stores} }} }}"
    result = np.zeros(max(QUANTIZED) + 1, np.int32)
    memory = emulation.Memory()
    memory.add(result.ctypes.data, result.nbytes)
    record = np.zeros(RECORD_WORDS, np.int64)
    record[0] = result.ctypes.data
    emulation.build("runs", text).launch("runs", record, (1,), (32,), memory)
    assert {t: result[t] for t in QUANTIZED} == {t: RUNS_OF_SPAN.get(t, 1) for t in QUANTIZED}


@pytest.mark.parametrize("type_", [F32, F16, BF16, GgmlType.Q4_0], ids=lambda t: t.name)
def test_batches_that_share_weights(type_: GgmlType) -> None:
    check_product(weights(type_, 64, 7, 2, 1), noise((64, 3, 4, 3)))


@pytest.mark.parametrize("type_", [F32, F16], ids=lambda t: t.name)
@pytest.mark.parametrize("k", [1, 3, 31, 70])
def test_rows_of_any_length(type_: GgmlType, k: int) -> None:
    check_product(weights(type_, k, 5), noise((k, 2)))


@pytest.mark.parametrize("type_", [F16, GgmlType.Q8_0], ids=lambda t: t.name)
def test_permuted_sources(type_: GgmlType) -> None:
    """As attention without FLASH_ATTN_EXT has them."""
    a = permuted(weights(type_, 64, 3, 5), (0, 2, 1, 3))
    b = permuted(noise((64, 3, 4)), (0, 2, 1, 3))
    check_product(a, permuted(noise((64, 3, 4)), (0, 2, 1, 3)) if b.ne[2] == a.ne[2] else b)


@pytest.mark.parametrize("type_", [F16, BF16], ids=lambda t: t.name)
def test_activations_of_other_types(type_: GgmlType) -> None:
    check_product(weights(type_, 96, 7), noise((96, 5), type_))


def test_activations_are_prepared_once() -> None:
    """Products that share a source share its codes: q, k and v."""
    x = noise((64, 1))
    nodes = [product(weights(GgmlType.Q4_0, 64, m), x) for m in (3, 5, 7)]
    assert kernels(*nodes).count("quantize_columns") == 1


# Of each kind: one scale for 32, with and without minima; two.
KINDS = [GgmlType.Q8_0, GgmlType.Q4_1, GgmlType.Q6_K, GgmlType.Q2_K]


@pytest.mark.parametrize("type_", QUANTIZED, ids=lambda t: t.name)
def test_tiles_of_every_type(type_: GgmlType) -> None:
    """Rows of two tiles, the second hardly begun, and columns that don't fill one."""
    block = TYPE_INFO[type_].block_size
    a = weights(type_, max(160 // block, 1) * block, 66)
    b = noise((a.ne[0], 11))
    assert kernels(product(a, b))[-1] == "tiles_16"
    check_product(a, b)


@pytest.fixture(params=TILES)
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Columns of all tiles, whatever would be best."""
    monkeypatch.setattr(matmul, "TILES", (request.param,))
    return int(request.param)


@pytest.mark.parametrize("type_", KINDS, ids=lambda t: t.name)
@pytest.mark.parametrize(("m", "n"), [(66, 18), (7, 64), (3, 69)])
def test_tiles_of_every_width(type_: GgmlType, tile: int, m: int, n: int) -> None:
    """Full and not; K longer than what is in shared memory at once."""
    a = weights(type_, 256 if type_.name[-1] == "K" else 160, m)
    b = noise((a.ne[0], n))
    assert kernels(product(a, b))[-1] == f"tiles_{tile}"
    check_product(a, b)


@pytest.mark.parametrize("type_", KINDS, ids=lambda t: t.name)
def test_many_columns_are_what_few_are(type_: GgmlType) -> None:
    """A prompt gives what its tokens give one by one: the same codes, but for roundings of sums."""
    a, values = weights(type_, 512, 7), noise_values(12, 512)
    tiles = product(a, tensor(F32, (512, 12), values))
    cuda.run(tiles)
    few = product(a, tensor(F32, (512, 2), values[5:7]))
    cuda.run(few)
    assert nmse(tensor_values(few)[0, 0], tensor_values(tiles)[0, 0, 5:7]) < 1e-12


# Of a card without tensor cores for bytes, and of two whose instructions differ.
CAPABILITIES = (61, 75, 80)


def run_for(t: Tensor, capability: int, edit: tuple[str, str] = ("", "")) -> np.ndarray:
    """Values of a node by kernels compiled for a card, with ``edit`` replaced in their text."""

    def unit(of: Unit, capability: int) -> emulation.Module:
        assert edit[0] in of.text or "columns" in of.label
        text = of.text.replace(*edit) if edit[0] else of.text
        return emulation.build(of.label, text, capability=capability)

    with mock.patch.object(cuda, "unit", unit):
        cuda.run(t, capability=capability)
    return np.array(tensor_values(t))


@pytest.mark.parametrize("capability", CAPABILITIES[1:])
@pytest.mark.parametrize("type_", KINDS, ids=lambda t: t.name)
@pytest.mark.parametrize(("m", "n"), [(66, 18), (7, 64)])
def test_tensor_cores_give_the_same_numbers(
    type_: GgmlType, tile: int, m: int, n: int, capability: int
) -> None:
    """To the last bit: whole sums are the same, and are scaled and added up in the same order."""
    a = weights(type_, 256 if type_.name[-1] == "K" else 160, m)
    t = product(a, noise((a.ne[0], n)))
    assert kernels(t)[-1] == f"tiles_{tile}"
    np.testing.assert_array_equal(run_for(t, capability), run_for(t, CAPABILITIES[0]))


@pytest.mark.slow
@pytest.mark.parametrize("type_", [t for t in QUANTIZED if t not in KINDS], ids=lambda t: t.name)
def test_tensor_cores_for_every_type(type_: GgmlType) -> None:
    a = weights(type_, TYPE_INFO[type_].block_size, 18)
    t = product(a, noise((a.ne[0], 9)))
    np.testing.assert_array_equal(run_for(t, 80), run_for(t, CAPABILITIES[0]))


@pytest.mark.parametrize("capability", CAPABILITIES[1:])
def test_tensor_cores_for_experts(capability: int) -> None:
    """Blocks of threads without work leave as a whole: no lane of a warp is missing."""
    t = routed(GgmlType.Q4_0, 1, ids_of_tokens(20))
    np.testing.assert_array_equal(run_for(t, capability), run_for(t, CAPABILITIES[0]))


@pytest.mark.parametrize(
    "edit",
    [
        ("{upper[0], lower[0], upper[4], lower[4]}", "{upper[0], upper[4], lower[0], lower[4]}"),
        ("column_of_sum(c % 2)", "column_of_sum(c % 2 * 2)"),
        ("row_of_sum(i % 2 * 2)", "row_of_sum(i % 2)"),
    ],
    ids=["words", "columns", "rows"],
)
def test_a_wrong_layout_of_tiles_is_found(edit: tuple[str, str]) -> None:
    t = product(weights(GgmlType.Q8_0, 64, 66), noise((64, 18)))
    expected = run_for(t, CAPABILITIES[0])
    assert not np.array_equal(run_for(t, 80, edit), expected)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_largest_sums_are_exact(capability: int) -> None:
    """Thirty-two products of -128 and -128, in the tiles' trick with floats."""
    block = np.frombuffer(np.float16(1).tobytes() + b"\x80" * 32, np.uint8)
    a, b = tensor(GgmlType.Q8_0, (64, 3)), tensor(GgmlType.Q8_0, (64, 9))
    for t in (a, b):
        memory = CONTEXT.memory(t.address, t.nbytes)
        memory[...] = np.resize(block, len(memory))
    t = product(a, b)
    assert kernels(t) == ["take_columns", "tiles_16"]
    assert (run_for(t, capability) == 64 * 128 * 128).all()


@pytest.mark.parametrize("type_", [GgmlType.Q4_0, GgmlType.Q6_K], ids=lambda t: t.name)
def test_tiles_of_batches_and_permuted_sources(type_: GgmlType) -> None:
    """Weights that several matrices of columns share; rows of both that are not neighbours."""
    a = permuted(weights(type_, 256, 2, 9), (0, 2, 1, 3))
    b = permuted(noise((256, 4, 17, 2)), (0, 2, 1, 3))
    assert kernels(product(a, b))[-1].startswith("tiles_")
    check_product(a, b)


def test_tiles_of_results_with_gaps_between_rows() -> None:
    a, b = weights(GgmlType.Q4_K, 256, 5), noise((256, 10, 2))
    t = node(Op.MUL_MAT, F32, (5, 10, 2), [a, b], nb=(4, 24, 280, 560))
    expected, actual = cuda.by_both(t)
    assert nmse(expected, actual) < TOLERANCE


def test_columns_that_a_block_of_threads_multiplies() -> None:
    """The fewest passes over the weights that leave neither a tile nor the card empty by half."""
    codes, floats = weights(GgmlType.Q4_0, 32, 640), weights(F16, 32, 640)

    def chosen(a: Tensor, multiprocessors: int, *columns: int, capability: int = 61) -> list[int]:
        return [at_once(n, a, 1, multiprocessors, capability) for n in columns]

    assert chosen(codes, 1, 1, 2, 3, 5, 8, 9, 16) == [1, 2, 4, 8, 8, 16, 16]
    assert chosen(codes, 1, 17, 32, 33, 64, 96, 100, 4096) == [32, 32, 64, 64, 32, 64, 64]
    # Ten tiles of rows for so many multiprocessors.
    assert chosen(codes, 20, 17, 32, 33, 64, 96, 4096) == [16, 16, 32, 32, 64, 64]
    assert chosen(floats, 1, 1, 8, 9, 4096) == [1, 8, 8, 8]
    assert chosen(floats, 1, 1, 8, 9, 17, 64, 65, 4096, capability=75) == [
        *(1, 8, 16, 32, 64, 128, 128),
    ]
    assert chosen(floats, 20, 9, 17, 64, 65, 512, capability=75) == [16, 16, 32, 64, 128]


# Capability, and the columns from which cuBLAS multiplies.
LIBRARY_FROM = {
    60: 24, 70: 160, 72: 160, 80: 320, 90: 128, 100: 64,
}  # fmt: skip


@pytest.mark.parametrize(("capability", "many"), LIBRARY_FROM.items())
def test_cards_that_multiply_floats_faster(capability: int, many: int) -> None:
    """By tensor cores that do far more for floats, or without a dot product of bytes."""
    a = weights(GgmlType.Q4_0, 32, 1)
    for n, name in ((8, "multiply_8"), (9, "tiles_16"), (many - 1, "tiles_")):
        assert kernels(product(a, noise((32, n))), capability=capability)[-1].startswith(name)
    names = kernels(product(a, noise((32, many))), capability=capability)
    assert names == ["largest_of_rows", "halve_columns", "dequantize", "cuBLAS"]


@pytest.mark.parametrize("capability", [61, 62, 75, 86, 87, 89, 120, 121])
def test_cards_that_do_not(capability: int) -> None:
    names = kernels(
        product(weights(GgmlType.Q4_0, 32, 1), noise((32, 4096))), capability=capability
    )
    assert names == ["quantize_columns", "tiles_64"]


# Weights of floats, capability, and the columns from which cuBLAS multiplies.
LIBRARY_FROM_OF_FLOATS = [
    (F32, 61, 24), (F32, 90, 24), (F16, 60, 24), (F16, 61, 24), (F16, 72, 24), (F16, 80, 129),
    (F16, 90, 129), (F16, 100, 65), (BF16, 75, 24), (BF16, 80, 129),
]  # fmt: skip


@pytest.mark.parametrize(("type_", "capability", "many"), LIBRARY_FROM_OF_FLOATS)
def test_many_columns_of_floats(type_: GgmlType, capability: int, many: int) -> None:
    name = "multiply_8" if many == 24 else "tiles_"
    for n, expected in ((8, "multiply_8"), (many - 1, name), (many, "cuBLAS")):
        t = product(weights(type_, 32, 1), noise((32, n)))
        assert kernels(t, capability=capability)[-1].startswith(expected)


@pytest.mark.parametrize(
    ("type_", "capability"), [(F16, 75), (F16, 86), (F16, 121), (BF16, 89), (BF16, 120)]
)
def test_floats_that_are_never_left_to_cublas(type_: GgmlType, capability: int) -> None:
    t = product(weights(type_, 32, 1), noise((32, 4096)))
    assert kernels(t, capability=capability) == ["shorten_columns", "tiles_128"]


# -- floats by tensor cores ------------------------------------------------------------------------

# Of two cards whose instructions differ; the first knows no BF16.
FLOATS_BY_TENSOR_CORES = [(F16, 75), (F16, 80), (BF16, 80)]


def shortened(b: Tensor, type_: GgmlType) -> np.ndarray:
    """Columns as tensor cores are given them, F64; a power of two has each fit half precision."""
    values = tensor_values(b).astype(np.float64)
    if type_ is BF16:
        return np.asarray(tensor_values(tensor(BF16, b.ne, values)), np.float64)
    scale = 2.0 ** (14 - np.floor(np.log2(np.abs(values).max(-1, keepdims=True))))
    return np.asarray((values * scale).astype(np.float16).astype(np.float64) / scale)


def check_floats(
    a: Tensor, b: Tensor, capability: int, name: str, edit: tuple[str, str] = ("", "")
) -> None:
    """Hold a product against one of the same numbers, and within the bound of upstream's tests."""
    t = product(a, b)
    assert kernels(t, capability=capability)[-2:] == ["shorten_columns", name]
    actual = run_for(t, capability, edit)
    left = tensor_values(a).astype(np.float64)
    left = left.repeat(b.ne[2] // a.ne[2], 1).repeat(b.ne[3] // a.ne[3], 0)
    for columns, bound in ((shortened(b, a.type), 1e-11), (tensor_values(b), TOLERANCE)):
        assert nmse(columns.astype(np.float64) @ left.swapaxes(-1, -2), actual) < bound


@pytest.fixture(params=TILES_OF_FLOATS)
def tile_of_floats(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Columns of all tiles, whatever would be best."""
    monkeypatch.setattr(matmul, "TILES_OF_FLOATS", (request.param,))
    return int(request.param)


@pytest.mark.parametrize(("type_", "capability"), FLOATS_BY_TENSOR_CORES)
@pytest.mark.parametrize(("k", "m", "n"), [(200, 66, 18), (8, 7, 64), (64, 3, 70)])
def test_floats_by_tensor_cores(
    type_: GgmlType, capability: int, tile_of_floats: int, k: int, m: int, n: int
) -> None:
    """Tiles that are full and not; K that ends in the middle of a product and of what is loaded."""
    check_floats(weights(type_, k, m), noise((k, n)), capability, f"tiles_{tile_of_floats}")


def test_the_widest_tiles_of_floats() -> None:
    check_floats(weights(F16, 72, 70), noise((72, 300)), 75, "tiles_128")


@pytest.mark.parametrize(("type_", "capability"), FLOATS_BY_TENSOR_CORES)
def test_floats_of_batches_and_permuted_sources(type_: GgmlType, capability: int) -> None:
    """As attention without FLASH_ATTN_EXT has them: heads that share keys."""
    a = permuted(weights(type_, 64, 2, 9, 1), (0, 2, 1, 3))
    b = permuted(noise((64, 4, 17, 3)), (0, 2, 1, 3))
    check_floats(a, b, capability, "tiles_32")


@pytest.mark.parametrize(("type_", "capability"), FLOATS_BY_TENSOR_CORES[:1])
@pytest.mark.parametrize("columns", [F16, BF16], ids=lambda t: t.name)
def test_columns_of_other_types_by_tensor_cores(
    type_: GgmlType, capability: int, columns: GgmlType
) -> None:
    check_floats(weights(type_, 96, 7), noise((96, 12), columns), capability, "tiles_16")


@pytest.mark.parametrize(("type_", "capability"), FLOATS_BY_TENSOR_CORES)
@pytest.mark.parametrize("inputs", [1, 2])
def test_experts_of_floats_by_tensor_cores(type_: GgmlType, capability: int, inputs: int) -> None:
    t = routed(type_, inputs, ids_of_tokens(20))
    names = ["shorten_columns", "route_columns", "tiles_16"]
    assert kernels(t, capability=capability) == names
    expected, _ = cuda.by_both(t)
    assert nmse(expected, run_for(t, capability)) < TOLERANCE


@pytest.mark.parametrize(("type_", "capability"), FLOATS_BY_TENSOR_CORES)
def test_columns_of_any_size_by_tensor_cores(type_: GgmlType, capability: int) -> None:
    """Neither what half precision can't hold nor what it loses: each column to its own bound."""
    largest = [1e-37, 1e-20, 1e-6, 1.0, 60000.0, 65505.0, 1e6, 1e20, 1e36, 1.0]
    rng = np.random.default_rng(1)
    left, right = rng.standard_normal((7, 256)), rng.standard_normal((len(largest), 256))
    right *= np.array(largest)[:, None] / np.abs(right).max(-1, keepdims=True)
    # What is far below the largest of a column counts for little, and what is all zero for nothing.
    right[0, :3] = 0
    right[-1] = 0
    a, b = tensor(type_, (256, 7), left), tensor(F32, (256, len(largest)), right)
    actual = run_for(product(a, b), capability)[0, 0].astype(np.float64)
    expected = tensor_values(b)[0, 0].astype(np.float64) @ tensor_values(a)[0, 0].T.astype(
        np.float64
    )
    assert not actual[-1].any()
    errors = ((actual - expected)[:-1] ** 2).sum(-1)
    assert (errors < TOLERANCE * (expected[:-1] ** 2).sum(-1)).all()


@pytest.mark.parametrize(("type_", "capability"), FLOATS_BY_TENSOR_CORES)
def test_infinities_and_nan_stay_in_their_columns(type_: GgmlType, capability: int) -> None:
    values = noise_values(9, 64)
    values[2, 5], values[4, 40] = np.inf, np.nan
    a = tensor(type_, (64, 3), np.abs(noise_values(3, 64)) + 1)
    actual = run_for(product(a, tensor(F32, (64, 9), values)), capability)[0, 0]
    assert np.isposinf(actual[2]).all()
    assert np.isnan(actual[4]).all()
    assert np.isfinite(np.delete(actual, (2, 4), 0)).all()


def test_what_sums_beyond_half_precision() -> None:
    """Sums are F32: of 256 products of numbers near the largest, too, which are exact here."""
    large = 3 * 2.0**14
    a, b = (tensor(F16, (256, n), np.full((n, 256), large)) for n in (3, 9))
    for capability in (75, 80):
        assert (run_for(product(a, b), capability) == 256 * large**2).all()


def test_floats_that_are_not_for_tensor_cores() -> None:
    """Rows that can't be loaded by 16 bytes, and types that cards have no tensor cores for."""
    b = noise((64, 12))
    for a, capability in (
        (weights(F32, 64, 3), 86),
        (weights(BF16, 64, 3), 75),
        (weights(F16, 64, 3), 72),
        (with_gaps(weights(F16, 64, 3), 2), 86),
    ):
        assert kernels(product(a, b), capability=capability)[-1] == "multiply_8"
    t = product(weights(F16, 60, 3), noise((60, 12)))
    assert kernels(t, capability=86) == ["widen_columns", "multiply_8"]


def test_what_is_compiled_while_weights_are_uploaded() -> None:
    def units(type_: GgmlType, capability: int) -> list[str]:
        return [x.unit.source for x in products_of(type_, capability)]

    for type_, capability in (*FLOATS_BY_TENSOR_CORES, (GgmlType.Q4_0, 60)):
        assert units(type_, capability) == ["matvec", "tiles"]
    for type_, capability in ((F32, 90), (F16, 70), (BF16, 75)):
        assert units(type_, capability) == ["matvec"]


# What the tiles of floats may do wrong, in the place of what they do.
WRONG = {
    "words": (
        "{upper[0], lower[0], upper[4], lower[4]}",
        "{upper[0], upper[4], lower[0], lower[4]}",
    ),
    "rows": ("i / 2 * 16 + row_of_sum(i % 2 * 2)", "i / 2 * 16 + row_of_sum(i % 2)"),
    "columns": ("c / 2 * 8 + column_of_sum(c % 2)", "c / 2 * 8 + column_of_sum(c % 2 * 2)"),
    "halves": ("{both[0], both[4]}", "{both[4], both[0]}"),
    "behind the end": ("number < units ?", "number < 2 * units ?"),
    "factor": ("mine.at(i, c) * factor", "mine.at(i, c)"),
    "barrier": ("rows, columns, number);\n        __syncthreads();", "rows, columns, number);"),
}


@pytest.mark.parametrize("name", mostly_slow(list(WRONG), quick=2))
def test_a_wrong_tile_of_floats_is_found(name: str) -> None:
    a, b = weights(F16, 200, 66), noise((200, 18))
    assert Unit("tiles").text.count(WRONG[name][0]) == 1
    check_floats(a, b, 80, "tiles_16")
    with pytest.raises((AssertionError, emulation.EmulationError)):
        check_floats(a, b, 80, "tiles_16", WRONG[name])


# -- activations that a client has rounded ---------------------------------------------------------

ROUNDED = [
    (GgmlType.Q4_0, GgmlType.Q8_0),
    (GgmlType.Q4_1, GgmlType.Q8_1),
    (GgmlType.Q2_K, GgmlType.Q8_K),
]


@pytest.mark.parametrize(("type_", "rounded"), ROUNDED, ids=lambda t: t.name)
@pytest.mark.parametrize("n", [1, 10])
def test_rounded_activations(type_: GgmlType, rounded: GgmlType, n: int) -> None:
    """They are multiplied as they are: nothing is rounded again."""
    values = noise_values(2, 3, n, 512)
    x = permuted(tensor(rounded, (512, n, 3, 2), values), (0, 1, 3, 2))
    a = weights(type_, 512, 6)
    expected, actual = cuda.by_both(product(a, x))
    assert nmse(expected, actual) < 1e-10
    assert kernels(product(a, x))[0] == "take_columns"


@pytest.mark.parametrize(("type_", "rounded"), ROUNDED, ids=lambda t: t.name)
def test_rounded_activations_for_cublas(type_: GgmlType, rounded: GgmlType) -> None:
    t = product(weights(type_, 256, 6), tensor(rounded, (256, 130)))
    halved = ["dequantize", "largest_of_rows", "halve_columns"]
    assert kernels(t, capability=100) == [*halved, "dequantize", "cuBLAS"]


# -- experts ---------------------------------------------------------------------------------------


def routed(type_: GgmlType, inputs: int, ids: list[list[int]], k: int = 0) -> Tensor:
    used = len(ids[0])
    k = k or max(TYPE_INFO[type_].block_size, 64)
    a = weights(type_, k, 9, 4)
    b = noise((k, inputs, len(ids)))
    chosen = tensor(I32, (used, len(ids)), np.array(ids))
    return node(Op.MUL_MAT_ID, F32, (9, used, len(ids)), [a, b, chosen])


@pytest.mark.parametrize("type_", [GgmlType.Q4_0, F16], ids=lambda t: t.name)
@pytest.mark.parametrize("inputs", [1, 2])
def test_experts(type_: GgmlType, inputs: int) -> None:
    expected, actual = cuda.by_both(routed(type_, inputs, [[0, 3], [2, 2], [1, 0]]))
    assert nmse(expected, actual) < (TOLERANCE if type_ is not F16 else TOLERANCE_OF_FLOATS)


@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1])
def test_an_expert_that_does_not_exist(bad: int) -> None:
    """The graph fails, and nothing beside the weights is read."""
    with pytest.raises(ContractError):
        cuda.run(routed(GgmlType.Q4_0, 1, [[0, bad]]))


@pytest.mark.parametrize("type_", [GgmlType.Q4_0, F16], ids=lambda t: t.name)
def test_experts_of_many_tokens(type_: GgmlType) -> None:
    """Pairs are sorted by expert: one with more than a group of columns, one with none."""
    t = routed(type_, 1, ids_of_tokens(10))
    assert kernels(t)[-1] == "multiply_grouped"
    expected, actual = cuda.by_both(t)
    assert nmse(expected, actual) < (TOLERANCE if type_ is not F16 else TOLERANCE_OF_FLOATS)


def ids_of_tokens(n: int) -> list[list[int]]:
    """Expert 0 for each token and one of two others: the fourth is never asked."""
    return [[0, 1 + int(e)] for e in np.random.default_rng(1).integers(0, 2, n)]


@pytest.mark.parametrize(("tokens", "inputs"), [(20, 1), (70, 2)])
def test_tiles_of_experts(tile: int, tokens: int, inputs: int) -> None:
    """Expert 0 has columns for more than one tile, or for less, the last not full."""
    t = routed(GgmlType.Q4_K if tile == 16 else GgmlType.Q4_0, inputs, ids_of_tokens(tokens))
    assert kernels(t)[-2:] == ["route_columns", f"tiles_{tile}"]
    expected, actual = cuda.by_both(t)
    assert nmse(expected, actual) < TOLERANCE


@pytest.mark.parametrize(("type_", "rounded"), ROUNDED, ids=lambda t: t.name)
@pytest.mark.parametrize("tokens", [2, 10, 20])
def test_rounded_activations_of_experts(type_: GgmlType, rounded: GgmlType, tokens: int) -> None:
    t = routed(type_, 2, ids_of_tokens(tokens), k=256)
    values = noise_values(tokens, 2, 256)
    t.src = (t.src[0], tensor(rounded, (256, 2, tokens), values), *t.src[2:])
    expected, actual = cuda.by_both(t)
    assert nmse(expected, actual) < 1e-10


@pytest.mark.parametrize("tokens", [9, 20])
def test_an_expert_that_does_not_exist_among_many(tokens: int) -> None:
    with pytest.raises(ContractError):
        cuda.run(routed(GgmlType.Q4_0, 1, [[0, 1]] * tokens + [[4, 1]]))


# -- cuBLAS ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def card_with_tensor_cores() -> Iterator[int]:
    """The port of a server with a card that leaves 130 columns to cuBLAS: to numpy, here."""
    port = free_port()
    command = [sys.executable, "-m", "tests.cuda.serve", "--port", str(port)]
    with Process(command, env={**os.environ, "EMULATED_CAPABILITY": "10.0"}) as server:
        server.wait_until(lambda: listens(port), 60, "its port")
        yield port


@pytest.mark.parametrize(
    ("type_", "columns"),
    [(GgmlType.Q4_0, F32), (GgmlType.Q4_K, F32), (GgmlType.Q4_0, GgmlType.Q8_0), (BF16, F32)],
    ids=lambda t: t.name,
)
async def test_many_columns_by_cublas(
    card_with_tensor_cores: int, type_: GgmlType, columns: GgmlType
) -> None:
    """Weights decoded to half precision, and two matrices of columns for each of theirs."""
    a, b = weights(type_, 256, 7, 2), tensor(columns, (256, 130, 4), noise_values(4, 130, 256))
    expected = tensor_values(a)[0].repeat(2, 0) @ tensor_values(b)[0].swapaxes(1, 2)
    async with Backend.connect("127.0.0.1", card_with_tensor_cores) as backend:
        sources = [await backend.tensor(t.type, t.ne, raw(t).tobytes()) for t in (a, b)]
        actual = np.asarray(await backend.compute(backend.graph.mul_mat(*sources)))
    assert nmse(expected, actual.reshape(4, 130, 7).swapaxes(1, 2)) < TOLERANCE


@pytest.mark.parametrize(
    ("type_", "columns"), [(GgmlType.Q4_0, F32), (F16, F32), (F16, BF16)], ids=lambda t: t.name
)
@pytest.mark.parametrize("largest", [60000.0, 65505.0, 1e6, 3e38])
async def test_activations_beyond_half_precision(
    card_with_tensor_cores: int, type_: GgmlType, columns: GgmlType, largest: float
) -> None:
    """A prompt gives what single tokens give: activations of some models are that large."""
    values = noise_values(130, 256)
    values *= largest / np.abs(values).max()
    a, b = weights(type_, 256, 7), tensor(columns, (256, 130), values)
    left, right = (tensor_values(t)[0, 0].astype(np.float64) for t in (a, b))
    expected = left @ right.T
    async with Backend.connect("127.0.0.1", card_with_tensor_cores) as backend:
        sources = [await backend.tensor(t.type, t.ne, raw(t).tobytes()) for t in (a, b)]
        actual = np.asarray(await backend.compute(backend.graph.mul_mat(*sources)))
    held = np.abs(expected.T) < np.finfo(np.float32).max
    difference = (actual.reshape(130, 7) - expected.T)[held]
    assert np.mean(difference**2) < TOLERANCE * np.mean(expected.T[held] ** 2)


def noise_values(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape)
