"""Matrix products: kernels of every weight type against products of the decoded values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from conformance.differential.blocks import F16_SCALES
from protocol.ggml.ops import Op
from protocol.ggml.types import FLOATS, TYPE_INFO, GgmlType
from protocol.tensor import Tensor
from rpc_server.devices.cpu.catalog import product_of
from rpc_server.devices.cpu.instruction_sets import chosen_isa, host_isas
from rpc_server.devices.cpu.kernels import matmul
from rpc_server.devices.cpu.kernels.dots import tile_columns_from
from rpc_server.devices.cpu.kernels.interface.isa import Isa
from rpc_server.devices.cpu.kernels.interface.layout import PRODUCT_TYPES, SCALE_GROUPS
from rpc_server.devices.cpu.planner import LOWERINGS, Planner
from rpc_server.devices.cpu.scratch import ScratchArena
from rpc_server.graph.errors import GraphError
from rpc_server.native.source import features_left_out
from tests.ops.harness import guards_intact, nmse, rounded, run
from tests.ops.tensors import CONTEXT, GUARD_BYTE, node, permuted, raw, tensor, values, view
from tests.parameters import mostly_slow

# Against activations rounded as ggml rounds them (it allows itself 5e-4 where they aren't). Codes
# differ by a step here and there: ggml's reference encoder rounds halves away from zero, its x86
# code and these kernels to even.
NMSE_LIMIT = 1e-6
NMSE_LIMIT_FLOAT = 1e-10

# Types whose scales are no F16 in one piece.
OTHER_SCALES = (GgmlType.IQ1_M, GgmlType.MXFP4, GgmlType.NVFP4)


def weights(type_: GgmlType, ne: Sequence[int], seed: int = 0) -> Tensor:
    """Random weights: any codes, scales of both signs."""
    rng = np.random.default_rng([seed, int(type_), *ne])
    t = tensor(type_, ne)
    if type_ not in SCALE_GROUPS:
        CONTEXT.store(t, rng.standard_normal(t.ne[::-1], np.float32))
        return t
    blocks = CONTEXT.memory(t.address, t.nbytes).reshape(-1, t.type_size)
    blocks[...] = rng.integers(0, 256, blocks.shape, np.uint8)
    for at in F16_SCALES.get(type_, ()):
        scales = rng.uniform(-0.1, 0.1, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8)
    if type_ is GgmlType.MXFP4:
        blocks[:, 0] = rng.integers(120, 130, len(blocks), np.uint8)
    if type_ is GgmlType.IQ1_M:
        # A quarter of an F16 in each of four words: none that isn't finite.
        blocks[:, 55] = blocks[:, 55] & 0x8F | 0x20
    return t


def activations(ne: Sequence[int], type_: GgmlType = GgmlType.F32) -> Tensor:
    rng = np.random.default_rng([99, *ne])
    t = tensor(type_, ne)
    CONTEXT.store(t, rng.standard_normal(t.ne[::-1], np.float32))
    return t


def product(a: Tensor, b: Tensor) -> np.ndarray[Any, Any]:
    """MUL_MAT of rounded activations in float64, shape (ne3, ne2, ne1, ne0)."""
    x, w = rounded(values(b), a.type).astype(np.float64), values(a).astype(np.float64)
    w = w.repeat(b.ne[2] // a.ne[2], axis=1).repeat(b.ne[3] // a.ne[3], axis=0)
    product: np.ndarray[Any, Any] = np.matmul(x, w.swapaxes(-1, -2))
    return product


def check_product(a: Tensor, b: Tensor, n_threads: int = 2) -> None:
    expected = product(a, b)
    t = node(Op.MUL_MAT, GgmlType.F32, (a.ne[1], *b.ne[1:]), [a, b])
    run(t, kernels=True, n_threads=n_threads)
    limit = NMSE_LIMIT if a.type in SCALE_GROUPS else NMSE_LIMIT_FLOAT
    assert nmse(expected, values(t)) < limit
    assert guards_intact(t)


@pytest.mark.parametrize(
    "type_", mostly_slow(sorted(PRODUCT_TYPES), quick=14), ids=lambda t: t.name
)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 33])
def test_every_type(type_: GgmlType, n: int) -> None:
    block = max(TYPE_INFO[type_].block_size, 32)
    assert type_ in F16_SCALES or type_ in OTHER_SCALES or type_ in FLOATS
    # Rows that are no multiple of a tile; an odd number of blocks; more than one chunk of k.
    for rows, k in ((37, block), (16, 9 * block), (5, 11 * 256)):
        for n_threads in (1, 2, 3):
            check_product(weights(type_, (k, rows)), activations((k, n)), n_threads)


# Codes below and above 128, looked-up ones, groups of 16: what an instruction set does differently.
ISA_TYPES = (
    GgmlType.Q4_1,
    GgmlType.Q8_0,
    GgmlType.IQ4_XS,
    GgmlType.MXFP4,
    GgmlType.Q6_K,
    GgmlType.IQ2_XS,
)


@pytest.mark.parametrize("isa", host_isas(), ids=lambda i: i.name)
@pytest.mark.parametrize("type_", ISA_TYPES, ids=lambda t: t.name)
def test_every_instruction_set(type_: GgmlType, isa: Isa, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of bytes are exact, so instruction sets differ by the rounding of float sums alone."""
    a, b = weights(type_, (512, 17)), activations((512, 9))
    results = []
    for name in (Isa.GENERIC.name, isa.name):
        monkeypatch.setenv("GGML_RPC_ISA", name)
        for columns in (b, view(b, (512, 1), b.nb)):
            t = node(Op.MUL_MAT, GgmlType.F32, (17, columns.ne[1]), [a, columns])
            run(t, kernels=True)
            results.append(values(t))
    assert nmse(product(a, b), results[2]) < NMSE_LIMIT
    assert nmse(results[0], results[2]) < 1e-11
    assert nmse(results[1], results[3]) < 1e-11


@pytest.mark.parametrize("isa", host_isas(), ids=lambda i: i.name)
@pytest.mark.parametrize("type_", [*ISA_TYPES, *FLOATS], ids=lambda t: t.name)
def test_a_column_is_the_same_beside_any_others(
    type_: GgmlType, isa: Isa, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few columns are multiplied one, two or three at a time, many by groups and half of one."""
    monkeypatch.setenv("GGML_RPC_ISA", isa.name)
    # Rows and runs of a row that are no whole ones, and for floats more than a tile's length.
    k = 1024 if TYPE_INFO[type_].block_size == 256 else 3 * 256 + 64
    a, b = weights(type_, (k, 37)), activations((k, 21))
    from_ = tile_columns_from(type_)
    for least, most in ((1, from_), (from_, 22)):
        results = []
        for n in range(least, most):
            t = node(Op.MUL_MAT, GgmlType.F32, (37, n), [a, view(b, (b.ne[0], n), b.nb)])
            run(t, kernels=True)
            results.append(values(t)[0, 0])
        for some in results:
            np.testing.assert_array_equal(some, results[-1][: len(some)])


@pytest.mark.parametrize("isa", host_isas(), ids=lambda i: i.name)
@pytest.mark.parametrize("k", [2, 31, 96, 1029])
def test_bf16_on_every_instruction_set(isa: Isa, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some multiply pairs, and a row may end within one; activations may be of any float type."""
    monkeypatch.setenv("GGML_RPC_ISA", isa.name)
    for n in (1, 9):
        check_product(weights(GgmlType.BF16, (k, 19)), activations((k, n)))
        b = tensor(GgmlType.F16, (k, n), values(activations((k, n))))
        check_product(weights(GgmlType.BF16, (k, 19)), b)


# Of Q8_0 0x80 is -128, the largest of all codes: one more than what has its sign changed has.
@pytest.mark.parametrize("code", [0, 0x7F, 0x80, 0xFF], ids=hex)
@pytest.mark.parametrize("isa", host_isas(), ids=lambda i: i.name)
@pytest.mark.parametrize("n", [1, 8])
def test_sums_of_bytes_do_not_saturate(
    code: int, isa: Isa, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest products of all types, in each lane."""
    monkeypatch.setenv("GGML_RPC_ISA", isa.name)
    for type_ in (GgmlType.Q8_0, GgmlType.Q6_K):
        a = weights(type_, (256, 16))
        blocks = CONTEXT.memory(a.address, a.nbytes).reshape(-1, a.type_size)
        (at,) = F16_SCALES[type_]
        scales = blocks[:, at : at + 2].copy()
        blocks[...] = code
        blocks[:, at : at + 2] = scales
        b = tensor(GgmlType.F32, (256, n), np.ones((n, 256)))
        expected, t = product(a, b), node(Op.MUL_MAT, GgmlType.F32, (16, n), [a, b])
        run(t, kernels=True)
        np.testing.assert_allclose(values(t), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("isa", Isa, ids=lambda i: i.name)
def test_what_a_kernel_for_older_processors_is_compiled_without(isa: Isa) -> None:
    """It is the code that they run, wherever it is compiled."""
    without = features_left_out(matmul.product_kernel(GgmlType.Q4_0, isa))
    assert ("avx512" in without) == (isa in (Isa.AVX2, Isa.AVX_VNNI))


def test_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGML_RPC_ISA", "mmx")
    with pytest.raises(ValueError, match="GGML_RPC_ISA=mmx"):
        chosen_isa()


@pytest.mark.parametrize("type_", FLOATS, ids=lambda t: t.name)
@pytest.mark.parametrize("k", [1, 5, 16, 31, 64, 515])
@pytest.mark.parametrize("n", [1, 9])
def test_any_length_of_float_rows(type_: GgmlType, k: int, n: int) -> None:
    check_product(weights(type_, (k, 19)), activations((k, n)))


@pytest.mark.parametrize("type_", [GgmlType.F16, GgmlType.F32, GgmlType.Q4_1, GgmlType.Q6_K])
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_weights_are_repeated_over_heads(type_: GgmlType, n: int, n_threads: int) -> None:
    check_product(weights(type_, (256, 21, 2, 3)), activations((256, n, 6, 6)), n_threads)


@pytest.mark.parametrize("n", [1, 2, 40])
@pytest.mark.parametrize("type_", FLOATS, ids=lambda t: t.name)
def test_attention_without_flash(type_: GgmlType, n: int) -> None:
    """K and V as views of a cache with room for more tokens, queries permuted."""
    head, n_kv, room, kv_heads, heads = 32, 50, 64, 2, 6
    cache = weights(type_, (head * kv_heads, room))
    size = cache.nb[0]
    k = permuted(
        view(cache, (head, kv_heads, n_kv), (size, head * size, cache.nb[1], cache.nb[1] * n_kv)),
        (0, 2, 1, 3),
    )
    q = permuted(activations((head, heads, n)), (0, 2, 1, 3))
    check_product(k, q)
    transposed = weights(type_, (room, head * kv_heads))
    row = transposed.nb[1]
    v = view(transposed, (n_kv, head, kv_heads), (size, row, row * head, row * head * kv_heads))
    check_product(v, activations((n_kv, n, heads)))


@pytest.mark.parametrize("type_", [GgmlType.F16, GgmlType.BF16, GgmlType.F32])
@pytest.mark.parametrize("of", [GgmlType.F16, GgmlType.BF16])
def test_activations_of_half_precision(type_: GgmlType, of: GgmlType) -> None:
    check_product(weights(type_, (70, 18)), activations((70, 5, 2), of))


def test_strided_rows() -> None:
    a = weights(GgmlType.Q4_0, (128, 9))
    a = view(a, (64, 9), (a.nb[0], *a.nb[1:]))
    b = activations((160, 4, 2))
    b = view(b, (64, 4, 2), b.nb, 32 * 4)
    t_nb = (4, 16 * 4, 4 * 16 * 4, 8 * 16 * 4)
    t = node(Op.MUL_MAT, GgmlType.F32, (9, 4, 2), [a, b], nb=t_nb)
    run(t, kernels=True)
    assert nmse(product(a, b), values(t)) < NMSE_LIMIT


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("n", [1, 4])
def test_what_is_not_finite_spreads(bad: float, n: int) -> None:
    b = activations((64, n))
    CONTEXT.view(b)[0, 0, 0, 40] = bad
    for type_ in (GgmlType.Q8_0, GgmlType.F32):
        t = node(Op.MUL_MAT, GgmlType.F32, (3, n), [weights(type_, (64, 3)), b])
        run(t, kernels=True)
        assert not np.isfinite(values(t)[0, 0, 0]).any()
        assert np.isfinite(values(t)[0, 0, 1:]).all()


def _scaled_product(type_: GgmlType, scale: float) -> tuple[Any, Any]:
    """(expected, actual) of a product of activations of about this size."""
    k = max(TYPE_INFO[type_].block_size, 64)
    a, b = weights(type_, (k, 5)), activations((k, 4))
    CONTEXT.view(b)[...] *= np.float32(scale)
    t = node(Op.MUL_MAT, GgmlType.F32, (5, 4), [a, b])
    run(t, kernels=True)
    with np.errstate(all="ignore"):
        return product(a, b), values(t)


@pytest.mark.parametrize("scale", [1e-3, 1e3, 1e30])
@pytest.mark.parametrize("type_", [GgmlType.Q8_0, GgmlType.Q4_K], ids=lambda t: t.name)
def test_large_and_small_activations(type_: GgmlType, scale: float) -> None:
    expected, actual = _scaled_product(type_, scale)
    if type_ is GgmlType.Q8_0 and scale == 1e30:
        # block_q8_0 has an F16 scale, in ggml too.
        assert not np.isfinite(actual).any()
    else:
        assert nmse(expected / scale, actual / scale) < NMSE_LIMIT


@pytest.mark.parametrize("scale", [0.0, 1e-41, 1e-30])
@pytest.mark.parametrize("type_", [GgmlType.Q8_0, GgmlType.Q4_K], ids=lambda t: t.name)
def test_activations_of_almost_nothing(type_: GgmlType, scale: float) -> None:
    _, actual = _scaled_product(type_, scale)
    assert np.isfinite(actual).all()
    assert (np.abs(actual) <= scale * 1e4).all()


@pytest.mark.parametrize("n", [1, 40])
@pytest.mark.parametrize("type_", [GgmlType.Q8_0, GgmlType.Q4_0], ids=lambda t: t.name)
def test_activations_are_those_of_ggmls_x86_code(type_: GgmlType, n: int) -> None:
    """Codes rounded to even by the inverse of the exact scale, and then an F16 scale.

    Without its rounding the scale alone would make an error of 5e-8.
    """
    a, b = weights(type_, (512, 16)), activations((512, n))
    t = node(Op.MUL_MAT, GgmlType.F32, (16, n), [a, b])
    run(t, kernels=True)
    blocks = values(b).reshape(-1, 32)
    largest = np.abs(blocks).max(1, keepdims=True)
    codes = np.rint(blocks * (np.float32(127) / largest)).astype(np.float64)
    scales = (largest / np.float32(127)).astype(np.float16).astype(np.float64)
    expected = (codes * scales).reshape(n, 512) @ values(a)[0, 0].astype(np.float64).T
    assert nmse(expected, values(t)[0, 0]) < 1e-12


# -- MUL_MAT_ID ------------------------------------------------------------------------------------


def routed_product(a: Tensor, b: Tensor, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """MUL_MAT_ID in float64, shape (1, tokens, used, rows)."""
    w, x = values(a)[0].astype(np.float64), rounded(values(b), a.type)[0].astype(np.float64)
    inputs = x[:, np.arange(ids.shape[1]) % b.ne[1]]
    products: np.ndarray[Any, Any] = np.einsum("turk,tuk->tur", w[ids], inputs)[None]
    return products


@pytest.mark.parametrize("type_", sorted(PRODUCT_TYPES), ids=lambda t: t.name)
@pytest.mark.parametrize(("n_tokens", "n_inputs"), [(1, 1), (1, 2), (40, 1), (17, 4)])
def test_experts(type_: GgmlType, n_tokens: int, n_inputs: int) -> None:
    k, n_used, n_experts = max(TYPE_INFO[type_].block_size, 32), 4, 7
    rng = np.random.default_rng(5)
    a, b = weights(type_, (k, 19, n_experts)), activations((k, n_inputs, n_tokens))
    # One expert gets nothing; the list is a view of a wider one, as ggml's top-k makes it.
    wide = tensor(GgmlType.I32, (n_experts, n_tokens))
    CONTEXT.view(wide)[0, 0] = rng.permuted(np.tile(np.arange(7), (n_tokens, 1)), axis=1) % 6
    ids = view(wide, (n_used, n_tokens), wide.nb)
    expected = routed_product(a, b, CONTEXT.view(ids)[0, 0])
    limit = NMSE_LIMIT if type_ in SCALE_GROUPS else NMSE_LIMIT_FLOAT
    for n_threads in (1, 2, 3):
        t = node(Op.MUL_MAT_ID, GgmlType.F32, (19, n_used, n_tokens), [a, b, ids])
        run(t, kernels=True, n_threads=n_threads)
        assert nmse(expected, values(t)) < limit
        assert guards_intact(t)


@pytest.mark.parametrize("bad", [-1, 4, 1 << 30, -(1 << 31)])
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_an_expert_that_is_not_there_is_refused(bad: int, n_threads: int) -> None:
    a, b = weights(GgmlType.Q4_1, (32, 4, 4)), activations((32, 1, 3))
    ids = tensor(GgmlType.I32, (2, 3), np.zeros((3, 2)))
    CONTEXT.view(ids)[0, 0, 2, 1] = bad
    t = node(Op.MUL_MAT_ID, GgmlType.F32, (4, 2, 3), [a, b, ids])
    with pytest.raises(GraphError, match="index"):
        run(t, kernels=True, n_threads=n_threads)
    assert (raw(t) == GUARD_BYTE).all()


# -- plans -----------------------------------------------------------------------------------------


def test_products_share_quantized_rows_until_they_are_overwritten() -> None:
    a, b = weights(GgmlType.Q8_0, (64, 64)), activations((64, 2))
    first = node(Op.MUL_MAT, GgmlType.F32, (64, 2), [a, b])
    second = node(Op.MUL_MAT, GgmlType.F32, (64, 2), [a, view(b, b.ne, b.nb)])
    onto_b = node(Op.MUL_MAT, GgmlType.F32, (64, 2), [a, first], inplace=b)
    third = node(Op.MUL_MAT, GgmlType.F32, (64, 2), [a, b])
    planner = Planner(2, ScratchArena())
    names = []
    for t in (first, second, onto_b, third):
        planner.begin(t)
        assert LOWERINGS[Op.MUL_MAT](t, planner)
        planner.finish(t)
        names.append([r.kernel.label for r in planner.records])
        planner.records = []
    product_ = product_of(GgmlType.Q8_0, chosen_isa()).label
    quantize = "activations.quantize_rows"
    assert names == [[quantize, product_], [product_], [quantize, product_], [quantize, product_]]
    run([first, second, onto_b, third], kernels=True)
    assert nmse(values(first), values(second)) == 0
    assert nmse(product(a, b), values(third)) < NMSE_LIMIT
