"""Attention in one op, over caches of any type, and the softmax of attention of several ops."""

from __future__ import annotations

from client.builder.nodes import PREC_F32, PREC_UNDEFINED
from conformance.differential.compare import PRODUCT_NMSE, Check
from conformance.differential.families.matmul import QUANTIZED_TYPES
from conformance.differential.sketch import Sketch, family
from conformance.differential.values import ValueKind
from protocol.ggml.ops import Op
from protocol.ggml.types import TYPE_INFO, GgmlType, row_size
from protocol.tensor import Tensor

F32, F16, BF16 = GgmlType.F32, GgmlType.F16, GgmlType.BF16
Q8_0, Q4_0, Q4_1 = GgmlType.Q8_0, GgmlType.Q4_0, GgmlType.Q4_1

ATTENTION = Check(bound=PRODUCT_NMSE)
SOFT_MAX = Check(bound=1e-6)

_INF = float("inf")

# Types of keys and values.
_CACHES = [(t, t) for t in (F32, F16, BF16, *QUANTIZED_TYPES)]
_CACHES += [(Q8_0, F16), (F16, Q8_0), (Q8_0, Q4_0), (Q4_1, Q8_0), (F32, F16), (F16, F32)]
_CACHES += [(BF16, F16), (Q4_0, F32)]

# Head sizes of keys and values that models have.
_HEADS = (64, 128, 40, 72, 80, 96, 112, 192, 256, 512)
_UNEQUAL = ((192, 128), (576, 512), (320, 256), (128, 64), (256, 512))
_ODD = (1, 2, 3, 8, 16, 17, 33)

# Root mean square of the elements of random blocks, where it is far from 1.
_MAGNITUDES = {
    GgmlType.Q8_0: 3.7,
    GgmlType.IQ4_NL: 3.4,
    GgmlType.MXFP4: 14.0,
    GgmlType.NVFP4: 7.4,
    GgmlType.Q3_K: 2.2,
    GgmlType.Q4_K: 16.0,
    GgmlType.Q5_K: 33.0,
    GgmlType.Q6_K: 68.0,
    GgmlType.IQ2_XXS: 2.7,
    GgmlType.IQ2_XS: 2.8,
    GgmlType.IQ2_S: 2.8,
    GgmlType.IQ3_XXS: 7.1,
    GgmlType.IQ3_S: 7.1,
    GgmlType.IQ4_XS: 62.0,
}

# Multiplications in a case: what it may cost.
_WORK = 4_000_000


def _head_sizes(s: Sketch, k_type: GgmlType, v_type: GgmlType) -> tuple[int, int]:
    k_block, v_block = TYPE_INFO[k_type].block_size, TYPE_INFO[v_type].block_size
    equal = [(n, n) for n in _HEADS]
    choices = [*equal, *equal, *_UNEQUAL, *((n, n) for n in _ODD)]
    return s.pick([(k, v) for k, v in choices if k % k_block == 0 and v % v_block == 0])


def cache(
    s: Sketch, type: GgmlType, head: int, n_kv: int, heads: int, streams: int, scale: float = 1.0
) -> Tensor:
    """Draw keys or values (head size, positions, heads, streams) as they lie in some memory.

    Often as llama.cpp's cache has them: rows of all heads, more positions than are used.
    """
    if s.flag():
        return s.leaf(
            type, (head, n_kv, heads, streams), ValueKind.NORMAL, 0.0, scale, layout="rows"
        )
    size = n_kv + s.pick((0, 1, 32))
    spare = s.pick((0, 0, 1))
    whole = (head * heads, size, streams + spare)
    root = s.leaf(type, whole, ValueKind.NORMAL, 0.0, scale, layout="dense")
    row = root.nb[1]
    view = s.g.view_4d(
        root,
        head,
        heads,
        n_kv,
        streams,
        row_size(type, head),
        row,
        row * size,
        row * size * spare,
    )
    return s.g.permute(view, 0, 2, 1, 3)


def mask(s: Sketch, type: GgmlType, n_kv: int, n_tokens: int, heads: int, batch: int) -> Tensor:
    """Draw a mask.

    It is for all heads and streams or for each; there may be more rows than tokens, and whole rows
    may be masked.
    """
    rows = s.pick((n_tokens, -(-n_tokens // 32) * 32, n_tokens + 3))
    ne = (n_kv, rows, s.pick((1, 1, heads)), s.pick((1, batch)))
    if s.seldom():
        return s.leaf(type, ne, ValueKind.CONSTANT, -_INF, layout="dense")
    return s.leaf(type, ne, [ValueKind.MASK, ValueKind.MASK, ValueKind.NORMAL], layout="dense")


@family(Op.FLASH_ATTN_EXT, variants=_CACHES, examples=20)
def flash_attn_ext(s: Sketch, variant: tuple[GgmlType, GgmlType]) -> None:
    """No NaN in keys and values: whether masked ones are read depends on the way of working."""
    k_type, v_type = variant
    dk, dv = _head_sizes(s, k_type, v_type)
    n_kv = s.pick((1, 32, 256, s.size(256), s.size(600), s.pick((512, 700, 1024, 2048))))
    if s.seldom() and s.seldom():
        # Of no positions the sum is zeros.
        n_kv = 0
    k_heads = s.integer(1, 4)
    # Values may have fewer heads than keys.
    v_heads = s.pick((k_heads, k_heads, 1))
    heads = k_heads * s.pick((1, 1, 2, 3, 4, 8))
    batch = s.pick((1, 1, 1, 2, 3))
    most = max(_WORK // (heads * batch * max(n_kv, 1) * (dk + dv)), 1)
    n_tokens = min(s.pick((1, 1, 2, 7, s.size(64), s.pick((64, 65, 80, 128)))), most)
    # Logits of about 1: of greater ones rounding makes a softmax of anything.
    amplitude = 1.0 / _MAGNITUDES.get(k_type, 1.0)
    q_ne = (dk, n_tokens, heads, batch)
    if s.flag():
        q = s.leaf(F32, q_ne, ValueKind.NORMAL, 0.0, amplitude, layout="rows")
    else:
        # Elements dense even in rows of one, which upstream asserts.
        q = s.leaf(
            F32, (dk, heads, n_tokens, batch), ValueKind.NORMAL, 0.0, amplitude, layout="rows"
        )
        q = s.g.permute(q, 0, 2, 1, 3)
    k = cache(s, k_type, dk, n_kv, k_heads, batch)
    v = cache(s, v_type, dv, n_kv, v_heads, batch)
    max_bias = s.pick((0.0, 0.0, 0.0, 8.0, 1.5))
    masked = None
    if max_bias or s.integer(0, 3):
        masked = mask(s, F16, n_kv, n_tokens, heads, batch)
    sinks = s.leaf(F32, (heads,), layout="dense") if s.integer(0, 2) == 0 else None
    out = s.g.flash_attn_ext(
        q,
        k,
        v,
        masked,
        s.pick((1.0, 1.0, 0.5, 2.0)) / dk**0.5,
        max_bias,
        s.pick((0.0, 0.0, 30.0, 2.0)),
        sinks=sinks,
        prec=s.pick((PREC_UNDEFINED, PREC_F32)),
    )
    s.output(out, ATTENTION)


@family(Op.SOFT_MAX, variants=["none", "f32", "f16"], examples=150)
def soft_max(s: Sketch, mask_type: str) -> None:
    """A row with an infinity or NaN in it is NaN."""
    ne = s.shape(s.pick((256, 4096, 20_000)))
    kinds = [ValueKind.NORMAL] * 6 + [ValueKind.INFINITE, ValueKind.SPECIAL]
    low, high = s.pick(((0.0, 1.0), (0.0, 30.0), (100.0, 1.0)))
    a = s.leaf(F32, ne, kinds, low, high, layout="dense")
    max_bias, masked = 0.0, None
    if mask_type != "none" and 0 not in ne:
        max_bias = s.pick((0.0, 0.0, 8.0, 1.5))
        masked = mask(s, GgmlType[mask_type.upper()], *ne)
    sinks = s.leaf(F32, (ne[2],), layout="dense") if s.integer(0, 2) == 0 else None
    scale = s.pick((1.0, 0.125, 0.3, 0.0, -1.0))
    out = s.g.soft_max_ext(a, masked, scale, max_bias, sinks=sinks, inplace=s.flag())
    s.output(out, SOFT_MAX)


@family(Op.SOFT_MAX_BACK, examples=250)
def soft_max_back(s: Sketch, _: str) -> None:
    ne = s.shape()
    gradient = s.leaf(F32, ne, [ValueKind.NORMAL, ValueKind.UNIFORM], layout="dense")
    y = s.leaf(F32, ne, [ValueKind.UNIFORM, ValueKind.NORMAL], layout="dense")
    out = s.g.soft_max_ext_back(gradient, y, s.pick((1.0, 0.125, 3.0)), 0.0, inplace=s.flag())
    s.output(out)
