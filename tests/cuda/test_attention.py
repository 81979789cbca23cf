"""FLASH_ATTN_EXT by CUDA kernels, in the emulation, against the array reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from protocol.ggml.ops import Op
from protocol.ggml.types import DECODABLE, TYPE_INFO, GgmlType
from protocol.tensor import Tensor
from rpc_server.devices.cuda.planner import Launch
from tests.cuda import emulation
from tests.cuda import harness as cuda
from tests.cuda.test_matmul import weights
from tests.ops.harness import nmse
from tests.ops.tensors import node, noise, params, permuted, tensor, values, view

pytestmark = cuda.needs_compiler

F32, F16, BF16 = GgmlType.F32, GgmlType.F16, GgmlType.BF16
Q4_0, Q5_1, Q8_0 = GgmlType.Q4_0, GgmlType.Q5_1, GgmlType.Q8_0
TYPES = sorted(DECODABLE)

# As test-backend-ops: the part of the squares that may be wrong. The reference does not round
# queries for keys of half precision, ggml's CPU backend and the kernels do.
TOLERANCE = 5e-4
# Where nothing is rounded in another way.
TOLERANCE_OF_SUMS = 1e-10

Maybe = Tensor | None

FEW, MANY, MATRICES = "attention_few", "attention", "attention_matrices"


def kept(type_: GgmlType, *ne: int, seed: int = 1) -> Tensor:
    """Keys or values of about 1."""
    if TYPE_INFO[type_].quantized:
        return weights(type_, *ne, seed=seed)
    return noise(ne, type_, seed)


def queries(k: Tensor, tokens: int, heads: int, batches: int = 1) -> Tensor:
    """Such that scores are of about 1: of greater ones rounding makes a softmax of anything."""
    size = float(np.sqrt(np.mean(np.square(values(k), dtype=np.float64)))) if not k.empty else 1.0
    q = values(noise((k.ne[0], tokens, heads, batches), seed=5))
    return tensor(F32, (k.ne[0], tokens, heads, batches), q / max(size, 1e-6))


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Maybe = None, sinks: Maybe = None, *words: float
) -> Tensor:
    """``words`` are the greatest bias and the cap, 0 where they aren't given."""
    p = params(k.ne[0] ** -0.5, *words)
    ne = (v.ne[0], q.ne[2], q.ne[1], q.ne[3])
    return node(Op.FLASH_ATTN_EXT, F32, ne, [q, k, v, mask, sinks], p)


def mask_of(positions: int, tokens: int, heads: int = 1, batches: int = 1, seed: int = 7) -> Tensor:
    """Numbers, and minus infinity at a third of the positions, though not at all."""
    rng = np.random.default_rng(seed)
    added = rng.standard_normal((batches, heads, tokens, positions))
    added[added > 0.4] = -np.inf
    added[..., rng.integers(positions)] = 0
    return tensor(F16, (positions, tokens, heads, batches), added)


def names(t: Tensor, capability: int = emulation.CAPABILITY) -> list[str]:
    launches, _ = cuda.plan([t], capability)
    return [launch.kernel.name for launch in launches if isinstance(launch, Launch)]


def check(
    t: Tensor,
    by: str | None = None,
    tolerance: float = TOLERANCE,
    capability: int = emulation.CAPABILITY,
) -> None:
    assert by is None or by in names(t, capability)
    expected, actual = cuda.by_both(t, capability)
    assert np.isfinite(actual).all()
    assert nmse(expected, actual) < tolerance


# -- types -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
def test_every_type(type_: GgmlType) -> None:
    """Of keys and of values; few queries and many."""
    size = max(TYPE_INFO[type_].block_size, 64)
    k, v = kept(type_, size, 37, 1), kept(type_, size, 37, 1, seed=2)
    tolerance = TOLERANCE if type_ in (F16, BF16) else TOLERANCE_OF_SUMS
    check(attention(queries(k, 1, 2), k, v, mask_of(37, 1)), FEW, tolerance)
    check(attention(queries(k, 5, 2), k, v, mask_of(37, 5)), MANY, tolerance)


@pytest.mark.parametrize(
    ("k_type", "v_type"),
    [(Q8_0, F16), (F16, Q8_0), (F32, Q4_0), (Q5_1, GgmlType.Q6_K), (GgmlType.MXFP4, BF16)],
    ids=lambda t: t.name,
)
def test_keys_of_one_type_and_values_of_another(k_type: GgmlType, v_type: GgmlType) -> None:
    k, v = kept(k_type, 64, 40, 1), kept(v_type, 256, 40, 1)
    check(attention(queries(k, 1, 2), k, v), FEW)
    check(attention(queries(k, 5, 2), k, v), MANY)


# -- shapes ----------------------------------------------------------------------------------------

SIZES = [
    *((n, n) for n in (8, 64, 80, 112, 128, 256)),
    (40, 72),
    (64, 128),
    (192, 128),
    (128, 512),
    (320, 256),
]
ODD_SIZES = [(1, 1), (3, 2), (33, 17), (64, 20), (100, 96)]
# Keys that queries fit shared memory with, and such that they don't; values in several pieces.
LARGE_SIZES = [(576, 512), (704, 40), (64, 600), (1000, 1100)]


@pytest.mark.parametrize(("dk", "dv"), SIZES)
def test_sizes_of_heads(dk: int, dv: int) -> None:
    k, v = kept(F16, dk, 40, 2), kept(F16, dv, 40, 2)
    check(attention(queries(k, 1, 4), k, v, mask_of(40, 1)), FEW)
    check(attention(queries(k, 9, 4), k, v, mask_of(40, 9)), MANY)


@pytest.mark.parametrize("type_", [F32, F16], ids=lambda t: t.name)
@pytest.mark.parametrize(("dk", "dv"), ODD_SIZES)
def test_odd_sizes_of_heads(type_: GgmlType, dk: int, dv: int) -> None:
    """What can't be loaded eight elements at a time is loaded one by one."""
    k, v = kept(type_, dk, 40, 2), kept(type_, dv, 40, 2)
    check(attention(queries(k, 1, 4), k, v, mask_of(40, 1)), MANY)


@pytest.mark.parametrize("type_", [F16, Q8_0], ids=lambda t: t.name)
@pytest.mark.parametrize(("dk", "dv"), LARGE_SIZES)
def test_large_sizes_of_heads(type_: GgmlType, dk: int, dv: int) -> None:
    if TYPE_INFO[type_].quantized:
        dk, dv = (-(-n // 32) * 32 for n in (dk, dv))
    k, v = kept(type_, dk, 40, 1), kept(type_, dv, 40, 1)
    sinks = noise((2,))
    t = attention(queries(k, 1, 2), k, v, mask_of(40, 1), sinks)
    assert names(t) == [FEW if dk <= 512 else MANY] * -(-dv // 512)
    check(t)
    # Parts of positions, and pieces of values.
    k, v = kept(type_, dk, 256, 1), kept(type_, dv, 256, 1)
    by = FEW if dk <= 512 else "attention_join"
    check(attention(queries(k, 1, 2), k, v, mask_of(256, 1), sinks), by)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("group", [1, 3])
def test_rows_that_blocks_have_and_have_not(tokens: int, group: int) -> None:
    """1 to 18 rows: blocks of 1, 2, 4, 8 and 16, whole and not."""
    k, v = kept(F16, 64, 40, 2, 2), kept(F16, 64, 40, 2, 2)
    q = queries(k, tokens, 2 * group, 2)
    mask = mask_of(40, tokens + 1, 2 * group, 2)
    check(attention(q, k, v, mask), FEW if tokens * group <= 8 else MANY)


@pytest.mark.parametrize(("of_keys", "of_values"), [(4, 1), (1, 4), (4, 6), (2, 12), (12, 3)])
@pytest.mark.parametrize("tokens", [1, 9])
def test_heads_of_keys_and_of_values(of_keys: int, of_values: int, tokens: int) -> None:
    """They need not be equally many; batches may be shared, too."""
    k, v = kept(F16, 64, 40, of_keys, 2), kept(F16, 64, 40, of_values, 1)
    check(attention(queries(k, tokens, 12, 2), k, v, mask_of(40, tokens, 12)))


@pytest.mark.parametrize("positions", [1, 31, 33, 128, 255, 256, 400, 1000])
@pytest.mark.parametrize("tokens", [1, 5])
def test_positions(positions: int, tokens: int) -> None:
    """From two times 128 on blocks share the positions of a row."""
    k, v = kept(F16, 64, positions, 1), kept(F16, 64, positions, 1)
    t = attention(queries(k, tokens, 3), k, v, mask_of(positions, tokens))
    launches, _ = cuda.plan([t])
    first = launches[0]
    assert isinstance(first, Launch)
    assert (first.grid[1] > 1) == (positions >= 256)
    # The kernel of few rows puts parts together itself.
    assert ("attention_join" in names(t)) == (positions >= 256 and tokens > 1)
    check(t, FEW if tokens == 1 else MANY)


def test_no_positions() -> None:
    """Of nothing the sum is zeros, whatever the types, and with a sink too."""
    for type_ in (F16, Q8_0, GgmlType.Q5_K):
        k, v = tensor(type_, (256, 0, 1)), tensor(type_, (256, 0, 1))
        for tokens in (1, 9):
            t = attention(queries(k, tokens, 1), k, v, sinks=noise((1,)))
            expected, actual = cuda.by_both(t)
            assert not expected.any()
            assert not actual.any()


# -- memory ----------------------------------------------------------------------------------------


def test_the_cache_as_clients_keep_it() -> None:
    """Rows of all heads, more positions than are used; queries are permuted."""
    for type_, size in ((F16, 64), (Q8_0, 96), (Q4_0, 128)):
        k, v = (permuted(kept(type_, size, 3, 60, seed=n), (0, 2, 1, 3)) for n in (1, 2))
        k, v = (view(s, (size, 50, 3), s.nb) for s in (k, v))
        for tokens in (1, 7):
            q = permuted(noise((size, 6, tokens), seed=3), (0, 2, 1, 3))
            check(attention(q, k, v, mask_of(50, tokens)), FEW if tokens == 1 else MANY)


def misplaced(type_: GgmlType, ne: tuple[int, ...], offset: int, pad: int) -> Tensor:
    """Rows with ``pad`` elements between them, from element ``offset`` on."""
    size = TYPE_INFO[type_].type_size
    whole = noise((ne[0] + pad + offset, *ne[1:]), type_, 4)
    return view(whole, ne, whole.nb, offset * size)


@pytest.mark.parametrize("type_", [F32, F16, BF16], ids=lambda t: t.name)
@pytest.mark.parametrize(("offset", "pad"), [(0, 8), (8, 0), (0, 1), (1, 7), (4, 12)])
def test_rows_at_any_address(type_: GgmlType, offset: int, pad: int) -> None:
    """Loads of 16 bytes where all rows begin at a multiple of 16, otherwise element by element."""
    size = TYPE_INFO[type_].type_size
    aligned = offset * size % 16 == 0 and (offset + pad) * size % 16 == 0
    good = kept(type_, 64, 45, 2)
    bad = misplaced(type_, (64, 45, 2), offset, pad)
    for k, v in ((good, bad), (bad, good)):
        check(attention(queries(k, 1, 2), k, v, mask_of(45, 1)), FEW if aligned else MANY)
        check(attention(queries(k, 9, 2), k, v, mask_of(45, 9)), MANY)


@pytest.mark.parametrize("type_", [Q4_0, Q5_1, Q8_0], ids=lambda t: t.name)
def test_blocks_at_any_address(type_: GgmlType) -> None:
    """A view that begins with another block than the first, of rows with a block between them."""
    whole = kept(type_, 128, 45, 2)
    k = view(whole, (64, 45, 2), whole.nb, TYPE_INFO[type_].type_size)
    check(attention(queries(k, 1, 2), k, k, mask_of(45, 1)), FEW)
    check(attention(queries(k, 9, 2), k, k, mask_of(45, 9)), MANY)


# -- what positions count --------------------------------------------------------------------------


def spoiled(type_: GgmlType, positions: int, where: Any, seed: int) -> Tensor:
    """Keys or values, NaN and infinities where ``where`` is set."""
    content = values(noise((64, positions), seed=seed))
    content[..., where, :32], content[..., where, 32:] = np.nan, np.inf
    return tensor(type_, (64, positions), content)


@pytest.mark.parametrize("type_", [F32, F16, Q8_0], ids=lambda t: t.name)
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_positions_that_nobody_attends_to_may_be_anything(type_: GgmlType, tokens: int) -> None:
    """Single ones, and whole tiles; in parts of positions that are all masked, too."""
    positions = 300
    rng = np.random.default_rng(3)
    masked = rng.random(positions) < 0.5
    masked[64:224] = True
    masked[-1] = False
    added = np.where(masked, -np.inf, rng.standard_normal((1, 1, tokens, positions)))
    k, v = (spoiled(type_, positions, masked, seed) for seed in (1, 2))
    q = noise((64, tokens, 1), seed=3)
    check(attention(q, k, v, tensor(F16, (positions, tokens), added)))


@pytest.mark.parametrize("tokens", [2, 20])
def test_rows_that_attend_to_nothing(tokens: int) -> None:
    """Zeros, beside rows that attend to something; a sink of minus infinity takes no share."""
    for positions in (40, 300):
        added = np.zeros((1, 1, tokens, positions))
        added[..., 1, :] = -np.inf
        k, v = kept(F16, 64, positions, 1), kept(F16, 64, positions, 1)
        mask = tensor(F16, (positions, tokens), added)
        for sinks in (None, noise((2,)), tensor(F32, (2,), np.array([-np.inf, 3]))):
            t = attention(queries(k, tokens, 2), k, v, mask, sinks)
            check(t)
            assert not values(t)[0, 1].any()


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("positions", [40, 300])
@pytest.mark.parametrize(("max_bias", "softcap"), [(8.0, 0.0), (0.0, 10.0), (1.5, 2.0)])
def test_biases_caps_and_sinks(
    tokens: int, positions: int, max_bias: float, softcap: float
) -> None:
    """Six heads: their number is no power of two, which ALiBi minds."""
    k, v = kept(F32, 64, positions, 2), kept(F32, 64, positions, 2)
    mask = mask_of(positions, tokens, 2)
    t = attention(queries(k, tokens, 6), k, v, mask, noise((6,)), max_bias, softcap)
    check(t, tolerance=TOLERANCE_OF_SUMS)


# -- by tensor cores -------------------------------------------------------------------------------

# The two whose instructions differ.
WITH_TENSOR_CORES = (75, 80)


def check_matrices(t: Tensor, capability: int = WITH_TENSOR_CORES[-1]) -> None:
    check(t, MATRICES, capability=capability)


@pytest.mark.parametrize(
    "type_",
    [F16, Q4_0, GgmlType.Q4_1, GgmlType.Q5_0, Q5_1, Q8_0, GgmlType.IQ4_NL],
    ids=lambda t: t.name,
)
def test_types_by_tensor_cores(type_: GgmlType) -> None:
    k, v = kept(type_, 64, 75, 1), kept(type_, 96, 75, 1, seed=2)
    check_matrices(attention(queries(k, 9, 2), k, v, mask_of(75, 9)))


@pytest.mark.parametrize("capability", WITH_TENSOR_CORES)
@pytest.mark.parametrize(
    ("dk", "dv"), [(8, 8), (64, 64), (80, 80), (192, 128), (256, 256), (320, 40), (576, 512)]
)
def test_sizes_by_tensor_cores(dk: int, dv: int, capability: int) -> None:
    """Queries that fit shared memory and such that don't; values in two pieces."""
    k, v = kept(F16, dk, 40, 2), kept(F16, dv, 40, 2)
    t = attention(queries(k, 9, 4), k, v, mask_of(40, 9))
    assert names(t, capability) == [MATRICES] * -(-dv // 256)
    check_matrices(t, capability)


@pytest.mark.parametrize(("tokens", "group"), [(16, 1), (21, 3), (64, 1), (65, 1), (33, 4)])
def test_rows_by_tensor_cores(tokens: int, group: int) -> None:
    """Blocks of 64 that are full, and such that hardly begin."""
    k, v = kept(F16, 64, 40, 2, 2), kept(F16, 64, 40, 2, 2)
    q = queries(k, tokens, 2 * group, 2)
    check_matrices(attention(q, k, v, mask_of(40, tokens, 2 * group, 2)))


def test_who_has_what_by_tensor_cores() -> None:
    """Heads and batches that share keys, or values; the cache as clients keep it."""
    k, v = kept(F16, 64, 40, 4, 2), kept(F16, 64, 40, 6, 1)
    check_matrices(attention(queries(k, 9, 24, 2), k, v, mask_of(40, 9, 24)))
    k, v = (permuted(kept(Q8_0, 96, 3, 60, seed=n), (0, 2, 1, 3)) for n in (1, 2))
    k, v = (view(s, (96, 50, 3), s.nb) for s in (k, v))
    q = permuted(noise((96, 6, 17), seed=3), (0, 2, 1, 3))
    check_matrices(attention(q, k, v, mask_of(50, 17)))


@pytest.mark.parametrize("positions", [1, 31, 33, 400])
def test_positions_by_tensor_cores(positions: int) -> None:
    k, v = kept(F16, 64, positions, 1), kept(F16, 64, positions, 1)
    t = attention(queries(k, 17, 1), k, v, mask_of(positions, 17))
    assert ("attention_join" in names(t, 80)) == (positions >= 256)
    check_matrices(t)


def test_masked_positions_by_tensor_cores() -> None:
    """They may be anything; rows that attend to nothing are zeros; a row may have one position."""
    positions, tokens = 300, 40
    rng = np.random.default_rng(3)
    masked = rng.random(positions) < 0.5
    masked[64:224] = True
    masked[-1] = False
    added = np.where(masked, -np.inf, rng.standard_normal((1, 1, tokens, positions)))
    added[..., 1, :] = -np.inf
    added[..., 20, :-1] = -np.inf
    k, v = (spoiled(F16, positions, masked, seed) for seed in (1, 2))
    mask = tensor(F16, (positions, tokens), added)
    for sinks in (None, noise((1,)), tensor(F32, (1,), np.array([-np.inf]))):
        t = attention(noise((64, tokens, 1), seed=3), k, v, mask, sinks)
        check_matrices(t)
        assert not values(t)[0, 1].any()


@pytest.mark.parametrize(("max_bias", "softcap"), [(8.0, 0.0), (0.0, 10.0), (1.5, 2.0)])
def test_biases_by_tensor_cores(max_bias: float, softcap: float) -> None:
    k, v = kept(F16, 64, 300, 2), kept(F16, 64, 300, 2)
    sinks = noise((6,))
    t = attention(queries(k, 9, 6), k, v, mask_of(300, 9, 2), sinks, max_bias, softcap)
    check_matrices(t)


def test_what_is_not_for_tensor_cores() -> None:
    """Few rows, what half precision may not hold, and rows that can't be loaded in units."""

    def way(k: Tensor, v: Tensor, tokens: int, capability: int = 80) -> str:
        return names(attention(queries(k, tokens, 1), k, v), capability)[-1]

    half, wide = kept(F16, 64, 40, 1), kept(BF16, 64, 40, 1)
    odd = misplaced(F16, (64, 40, 1), 0, 1)
    assert way(half, half, 16) == MATRICES
    assert way(half, half, 8) == FEW
    assert {way(half, half, 15), way(half, half, 16, 70)} == {MANY}
    assert {way(half, wide, 16), way(wide, half, 16), way(half, odd, 16)} == {MANY}
