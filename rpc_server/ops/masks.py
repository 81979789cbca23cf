"""What attention adds to its scores, the same in SOFT_MAX and FLASH_ATTN_EXT: masks and sinks."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.ops import checks
from rpc_server.ops.checks import F32_ONLY
from rpc_server.ops.table import require


def require_mask(
    t: Tensor, i: int, types: Collection[GgmlType], scores: tuple[int, int, int, int]
) -> None:
    """Require that source ``i``, if there, masks ``scores``: (positions, tokens, heads, batches).

    It may have more tokens; it repeats over heads and batches. ALiBi (max_bias, op_params[1])
    needs one.
    """
    if t.src[i] is None:
        require(not t.param_f32(1) > 0, "max_bias without a mask")
        return
    mask = checks.source(t, i, types)
    require(mask.ne[0] == scores[0], f"mask of {mask.ne[0]} positions, not {scores[0]}")
    require(mask.ne[1] >= scores[1], f"mask of {mask.ne[1]} tokens for {scores[1]}")
    for dim in (2, 3):
        checks.whole_copies(scores[dim], mask.ne[dim], f"dimension {dim} of the scores")


def require_sinks(t: Tensor, i: int, n_heads: int) -> None:
    """Require that source ``i``, if there, is one score for each head."""
    if t.src[i] is not None:
        checks.shape(checks.source(t, i, F32_ONLY), (n_heads, 1, 1, 1), f"source {i}")


def alibi_slopes(n_heads: int, max_bias: float) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Return the weight of the mask in each head.

    It is 1 without ALiBi, else falling powers of two.

    Heads beyond the largest power of two get the slopes half way between.
    """
    if not max_bias > 0:
        return np.ones(n_heads, np.float32)
    power = 1 << (n_heads.bit_length() - 1)
    heads = np.arange(n_heads)
    exponents = np.where(heads < power, heads + 1, heads - power + 0.5)
    return np.asarray(2.0 ** (-max_bias * exponents / power), np.float32)
