"""Matrix products of every type of weights: MUL_MAT, MUL_MAT_ID, OUT_PROD."""

from __future__ import annotations

from client.builder.nodes import PREC_F32, PREC_UNDEFINED
from client.builder.products import HINT_SRC0_IS_HADAMARD
from conformance.differential.compare import PRODUCT_NMSE, Check
from conformance.differential.sketch import Sketch, family
from conformance.differential.values import ValueKind
from protocol.ggml.ops import Op
from protocol.ggml.types import TYPE_INFO, GgmlType
from protocol.tensor import Tensor

F32, F16, BF16 = GgmlType.F32, GgmlType.F16, GgmlType.BF16
Q8_0, Q8_1, Q8_K = GgmlType.Q8_0, GgmlType.Q8_1, GgmlType.Q8_K

PRODUCT = Check(bound=PRODUCT_NMSE)

# What ggml's CPU backend rounds activations to for each type of weights; they may come so, too.
VEC_DOT_TYPE: dict[GgmlType, GgmlType] = {
    F32: F32,
    F16: F16,
    BF16: BF16,
    GgmlType.Q1_0: Q8_0,
    GgmlType.Q2_0: Q8_0,
    GgmlType.Q4_0: Q8_0,
    GgmlType.Q4_1: Q8_1,
    GgmlType.Q5_0: Q8_0,
    GgmlType.Q5_1: Q8_1,
    GgmlType.Q8_0: Q8_0,
    GgmlType.MXFP4: Q8_0,
    GgmlType.NVFP4: Q8_0,
    GgmlType.IQ4_NL: Q8_0,
    GgmlType.Q2_K: Q8_K,
    GgmlType.Q3_K: Q8_K,
    GgmlType.Q4_K: Q8_K,
    GgmlType.Q5_K: Q8_K,
    GgmlType.Q6_K: Q8_K,
    GgmlType.IQ1_S: Q8_K,
    GgmlType.IQ1_M: Q8_K,
    GgmlType.IQ2_XXS: Q8_K,
    GgmlType.IQ2_XS: Q8_K,
    GgmlType.IQ2_S: Q8_K,
    GgmlType.IQ3_XXS: Q8_K,
    GgmlType.IQ3_S: Q8_K,
    GgmlType.IQ4_XS: Q8_K,
    GgmlType.TQ1_0: Q8_K,
    GgmlType.TQ2_0: Q8_K,
}
WEIGHT_TYPES = tuple(VEC_DOT_TYPE)
QUANTIZED_TYPES = tuple(t for t in WEIGHT_TYPES if TYPE_INFO[t].quantized)

_ID_PAIRS = [(t, F32) for t in WEIGHT_TYPES]
_ID_PAIRS += [(t, x) for t, x in VEC_DOT_TYPE.items() if x is not F32]
# MUL_MAT widens 16-bit activations for F32 weights; MUL_MAT_ID doesn't.
_PAIRS = [*_ID_PAIRS, (F32, F16), (F32, BF16)]

# Multiplications in a product: what a case may cost.
_WORK = 3_000_000


def row_length(s: Sketch, *types: GgmlType, most: int = 1031) -> int:
    """Draw a row of whole blocks of all ``types``; a few thousand elements now and then."""
    block = max(TYPE_INFO[t].block_size for t in types)
    long = s.seldom()
    return s.size(4096 if long else max(most, 2 * block), multiple=block, least=block)


def activations(s: Sketch, type: GgmlType, weights: GgmlType, ne: tuple[int, ...]) -> Tensor:
    """Draw source 1, with dense rows.

    Numbers that aren't finite only where no integer codes are made of it.

    (What code a NaN or an infinity gets depends on the order in which a maximum is found.) Of Q8_K
    upstream reads dense ones only, for 8 columns and more: it means to look, but returns before.
    """
    layout = "dense" if type is Q8_K else "rows"
    if TYPE_INFO[weights].quantized or not s.seldom():
        if s.seldom():
            return s.leaf(type, ne, ValueKind.CONSTANT, 0.0, layout=layout)
        return s.leaf(type, ne, ValueKind.NORMAL, 0.0, s.pick((1.0, 0.01, 30.0)), layout=layout)
    return s.leaf(type, ne, [ValueKind.SPECIAL, ValueKind.INFINITE], layout=layout)


@family(Op.MUL_MAT, variants=_PAIRS, examples=14)
def mul_mat(s: Sketch, variant: tuple[GgmlType, GgmlType]) -> None:
    type, x_type = variant
    k = row_length(s, type, x_type)
    n = s.pick((1, 1, 2, 3, s.size(300), s.size(64)))
    m = s.size(max(min(513, _WORK // (k * n)), 1))
    w2, w3, r2, r3 = 1, 1, 1, 1
    if s.flag():
        w2, w3, r2, r3 = s.integer(1, 3), s.integer(1, 2), s.integer(1, 3), s.integer(1, 2)
        m, n = min(m, 64), min(n, 40)
    if s.seldom() and s.seldom():
        # Not k: ggml takes rows of nothing for transposed ones.
        m, n, r2, r3 = s.pick(((0, n, r2, r3), (m, 0, r2, r3), (m, n, 0, r3), (m, n, r2, 0)))
    x = activations(s, x_type, type, (k, n, w2 * r2, w3 * r3))
    # Some share their activations, as queries, keys and values do.
    for i in range(s.pick((1, 1, 1, 2, 3))):
        rows = m if i == 0 else max(m // (i + 1), 1)
        w = s.leaf(type, (k, rows, w2, w3), layout="rows")
        s.output(s.g.mul_mat(w, x, prec=s.pick((PREC_UNDEFINED, PREC_F32))), PRODUCT)


@family("MUL_MAT hadamard", variants=[F32, F16], examples=40)
def mul_mat_hadamard(s: Sketch, type: GgmlType) -> None:
    """With the hint ggml doesn't read the matrix; rotated caches are made so."""
    k = s.pick((1, 2, 4, 8, 16, 32, 64, 128, 256, 512))
    w = s.leaf(F32, (k, k), ValueKind.HADAMARD, layout="dense")
    x = s.leaf(type, (k, s.size(40), s.integer(1, 3), s.integer(1, 2)), layout="rows")
    s.output(s.g.mul_mat(w, x, hint=HINT_SRC0_IS_HADAMARD), PRODUCT)


@family(Op.MUL_MAT_ID, variants=_ID_PAIRS, examples=12)
def mul_mat_id(s: Sketch, variant: tuple[GgmlType, GgmlType]) -> None:
    type, x_type = variant
    k = row_length(s, type, x_type, most=513)
    n_experts = s.pick((1, 2, 3, 4, 8, 16, s.integer(1, 64)))
    n_used = s.integer(1, min(n_experts, 8))
    n_tokens = s.pick((1, 1, 2, s.size(64), s.size(33)))
    m = s.size(max(min(130, _WORK // (k * max(n_used * n_tokens, n_experts))), 1))
    if s.seldom() and s.seldom():
        m, n_tokens = s.pick(((0, n_tokens), (m, 0)))
    distinct = s.flag() and n_tokens > 0
    ids = s.indices(
        (n_used, n_tokens), n_experts, distinct=distinct, layout="dense" if distinct else "any"
    )
    x_rows = s.pick([1, *(d for d in range(1, n_used + 1) if n_used % d == 0)])
    x = activations(s, x_type, type, (k, x_rows, n_tokens))
    for _ in range(s.pick((1, 1, 1, 2))):
        w = s.leaf(type, (k, m, n_experts), layout="rows")
        s.output(s.g.mul_mat_id(w, x, ids), PRODUCT)


_OUT_PROD_TYPES = [t for t in WEIGHT_TYPES if t is not BF16]


@family(Op.OUT_PROD, variants=_OUT_PROD_TYPES, examples=12)
def out_prod(s: Sketch, type: GgmlType) -> None:
    """Source 0 repeats over dimensions 2 and 3 if it is F32 only."""
    m = row_length(s, type, most=300)
    k = s.size(130)
    n = s.size(max(min(65, _WORK // 2 // (m * k)), 1))
    a2, a3 = s.integer(1, 3), s.integer(1, 2)
    r2, r3 = (s.integer(1, 3), s.integer(1, 2)) if type is F32 else (1, 1)
    if s.seldom() and s.seldom():
        # Without rows (k) the sums are zeros.
        k, n = s.pick(((0, n), (k, 0)))
    kinds = [ValueKind.NORMAL] * 5 + [ValueKind.SPECIAL]
    a = s.leaf(type, (m, k, a2, a3), kinds, layout="rows")
    b = s.leaf(F32, (n, k, a2 * r2, a3 * r3), ValueKind.NORMAL)
    s.output(s.g.out_prod(a, b), PRODUCT)
