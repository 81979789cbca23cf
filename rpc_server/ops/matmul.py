"""Matrix products: MUL_MAT, MUL_MAT_ID for experts, OUT_PROD.

Weights are decoded in tiles of rows, never whole: they may fill most of the memory there is.
"""

from __future__ import annotations

from typing import Any

from protocol.ggml.ops import Op
from protocol.ggml.types import DECODABLE, FLOATS, GgmlType
from protocol.tensor import Tensor
from rpc_server.ops import checks
from rpc_server.ops.arrays import ArrayContext
from rpc_server.ops.checks import F32_ONLY, I32_ONLY
from rpc_server.ops.rounding import rounded_activations
from rpc_server.ops.rows import checked_indices
from rpc_server.ops.slices import rows_of, tiles
from rpc_server.ops.table import contract, reference, require, source
from rpc_server.types import to_f32

# What clients may have rounded activations to themselves, for products with quantized weights.
_QUANTIZED_ACTIVATIONS = frozenset({GgmlType.Q8_0, GgmlType.Q8_1, GgmlType.Q8_K})


def _require_factors(t: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and activations with rows of one length.

    Activations of 16-bit types go with weights of unquantized types only, 8-bit ones with those of
    quantized types.
    """
    weights = checks.source(t, 0, DECODABLE)
    quantized = F32_ONLY | _QUANTIZED_ACTIVATIONS
    activations = checks.source(t, 1, quantized if weights.quantized else FLOATS)
    checks.result(t, F32_ONLY)
    k = weights.ne[0]
    # A product over nothing would be zeros; it is refused so that no kernel has to write them.
    require(k > 0 or t.empty, "rows of the sources are empty")
    require(k == activations.ne[0], f"rows of {k} and of {activations.ne[0]} elements")
    return weights, activations


@contract(Op.MUL_MAT)
def _mul_mat_contract(t: Tensor) -> None:
    """src0 (K, M, ...) and src1 (K, N, ...) to (M, N, ...): src0 repeats over dimensions 2, 3."""
    weights, activations = _require_factors(t)
    checks.shape(t, (weights.ne[1], *activations.ne[1:]), "the result")
    for dim in (2, 3):
        checks.whole_copies(activations.ne[dim], weights.ne[dim], f"dimension {dim} of source 1")


@reference(Op.MUL_MAT)
def _mul_mat(ctx: ArrayContext, t: Tensor) -> None:
    weights, activations = source(t, 0), source(t, 1)
    k, n = activations.ne[:2]
    repeat2, repeat3 = t.ne[2] // weights.ne[2], t.ne[3] // weights.ne[3]
    target = ctx.view(t)
    for w3, w2 in _matrices(weights):
        for rows in tiles(weights.ne[1], k):
            tile = ctx.f32(rows_of(weights, w3, w2, rows))[0, 0].T
            for i3 in range(w3 * repeat3, (w3 + 1) * repeat3):
                for i2 in range(w2 * repeat2, (w2 + 1) * repeat2):
                    for columns in tiles(n, max(k, len(rows))):
                        x = ctx.f32(rows_of(activations, i3, i2, columns))[0, 0]
                        x = rounded_activations(x, activations.type, weights.type, ctx.xp)
                        at = slice(columns.start, columns.stop), slice(rows.start, rows.stop)
                        target[i3, i2][at] = ctx.xp.matmul(x, tile)


def _matrices(t: Tensor) -> list[tuple[int, int]]:
    """Indices of the matrices of ``t`` in dimensions 3 and 2."""
    return [(i3, i2) for i3 in range(t.ne[3]) for i2 in range(t.ne[2])]


# -- MUL_MAT_ID ------------------------------------------------------------------------------------


@contract(Op.MUL_MAT_ID)
def _mul_mat_id_contract(t: Tensor) -> None:
    """src0 (K, M, experts), src1 (K, used or a divisor of it, tokens), src2 ids (used, tokens)."""
    weights, activations = _require_factors(t)
    ids = checks.source(t, 2, I32_ONLY, dense=False)
    n_used, n_tokens = ids.ne[:2]
    checks.shape(weights, (*weights.ne[:3], 1), "source 0")
    checks.shape(activations, (*activations.ne[:2], n_tokens, 1), "source 1")
    checks.shape(ids, (n_used, n_tokens, 1, 1), "source 2")
    checks.shape(t, (weights.ne[1], n_used, n_tokens, 1), "the result")
    checks.whole_copies(n_used, activations.ne[1], "experts of a token")


@reference(Op.MUL_MAT_ID)
def _mul_mat_id(ctx: ArrayContext, t: Tensor) -> None:
    weights, activations, xp = source(t, 0), source(t, 1), ctx.xp
    ids = checked_indices(ctx, source(t, 2), weights.ne[2])[0, 0]
    inputs, target = ctx.view(activations)[0], ctx.view(t)[0]
    for expert in map(int, xp.unique(ids)):
        token, slot = xp.nonzero(ids == expert)
        for rows in tiles(weights.ne[1], weights.ne[0]):
            tile = ctx.f32(rows_of(weights, 0, expert, rows))[0, 0].T
            for columns in tiles(len(token), max(weights.ne[0], len(rows))):
                ctx.look()
                at = slice(columns.start, columns.stop)
                x = inputs[token[at], slot[at] % activations.ne[1]]
                x = to_f32(activations.type, xp.ascontiguousarray(x).view(xp.uint8), xp)
                x = rounded_activations(x, activations.type, weights.type, xp)
                target[token[at], slot[at], rows.start : rows.stop] = xp.matmul(x, tile)


# -- OUT_PROD --------------------------------------------------------------------------------------


@contract(Op.OUT_PROD)
def _out_prod_contract(t: Tensor) -> None:
    """src0 (M, K, ...) and src1 (N, K, ...) to (M, N, ...): src0 repeats over dimensions 2, 3."""
    a = checks.source(t, 0, DECODABLE)
    b = checks.source(t, 1, F32_ONLY, dense=False)
    checks.result(t, F32_ONLY)
    checks.shape(t, (a.ne[0], b.ne[0], *b.ne[2:]), "the result")
    require(a.ne[1] == b.ne[1], f"{a.ne[1]} rows and {b.ne[1]}")
    checks.distinct(a, "source 0")
    checks.distinct(b, "source 1")
    for dim in (2, 3):
        checks.whole_copies(b.ne[dim], a.ne[dim], f"dimension {dim} of source 1")


@reference(Op.OUT_PROD)
def _out_prod(ctx: ArrayContext, t: Tensor) -> None:
    a, b, xp = source(t, 0), source(t, 1), ctx.xp
    target, columns = ctx.view(t), ctx.f32(b)
    repeat2, repeat3 = t.ne[2] // a.ne[2], t.ne[3] // a.ne[3]
    for i3, i2 in _matrices(t):
        total: Any = xp.zeros((t.ne[1], t.ne[0]), xp.float32)
        for rows in tiles(a.ne[1], max(a.ne[0], b.ne[0])):
            tile = ctx.f32(rows_of(a, i3 // repeat3, i2 // repeat2, rows))[0, 0]
            total += xp.matmul(columns[i3, i2, rows.start : rows.stop].T, tile)
        target[i3, i2] = total
