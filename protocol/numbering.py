"""Which numbering of ops a graph was written by, where the protocol's version doesn't tell.

Versions that differ in their patch number only number ops differently. Read by a wrong numbering a
graph has ops that never travel, or ops with too few or too many sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from protocol.dialects import Dialect
from protocol.ggml_ops import OPS_101, VIEWS, Op

_NEVER = frozenset({Op.MAP_CUSTOM1, Op.MAP_CUSTOM2, Op.MAP_CUSTOM3, Op.CUSTOM})

# How many sources the ops have whose numbers differ: those from COL2IM_1D on.
_SOURCES: dict[Op, tuple[int, int]] = {
    Op.CONV_2D: (2, 2),
    Op.CONV_3D: (2, 2),
    Op.CONV_2D_DW: (2, 2),
    Op.CONV_TRANSPOSE_2D: (2, 2),
    Op.POOL_2D_BACK: (2, 2),
    Op.ARANGE: (0, 0),
    Op.FLASH_ATTN_EXT: (3, 5),
    Op.FLASH_ATTN_BACK: (4, 4),
    Op.SSM_CONV: (2, 2),
    Op.SSM_SCAN: (7, 7),
    Op.ADD_REL_POS: (3, 3),
    Op.RWKV_WKV6: (6, 6),
    Op.GATED_LINEAR_ATTN: (5, 5),
    Op.RWKV_WKV7: (7, 7),
    Op.SOLVE_TRI: (2, 2),
    Op.GATED_DELTA_NET: (6, 6),
    Op.LIGHTNING_INDEXER: (4, 4),
    Op.DSV4_HC_COMB: (3, 3),
    Op.DSV4_HC_PRE: (2, 2),
    Op.DSV4_HC_POST: (3, 4),
    Op.CROSS_ENTROPY_LOSS: (2, 2),
    Op.CROSS_ENTROPY_LOSS_BACK: (3, 3),
    Op.OPT_STEP_ADAMW: (5, 5),
    Op.OPT_STEP_SGD: (3, 3),
    Op.GLU: (1, 2),
}
_FIRST_RENUMBERED = OPS_101.index(Op.COL2IM_1D)
_ONE = (1, 1)


def fits(tensors: Any, dialect: Dialect) -> bool:
    """Whether all ``tensors`` (RPC_TENSOR_DTYPE) have ops of ``dialect`` with sources to match."""
    numbers = tensors["op"].tolist()
    counts = np.count_nonzero(tensors["src"], axis=1).tolist()
    for number, count in set(zip(numbers, counts, strict=True)):
        if number >= len(dialect.ops):
            return False
        op = dialect.ops[number]
        if number < _FIRST_RENUMBERED or op in VIEWS:
            continue
        least, most = _SOURCES.get(op, _ONE)
        if op in _NEVER or not least <= count <= most:
            return False
    return True


def likeliest(tensors: Any, dialects: Sequence[Dialect]) -> Dialect:
    """The first of ``dialects`` that the graph's tensors fit, the first one if they fit none."""
    return next((d for d in dialects if fits(tensors, d)), dialects[0])


def tells(tensors: Any) -> bool:
    """Whether the graph has ops whose numbers differ between numberings."""
    return bool((tensors["op"] >= _FIRST_RENUMBERED).any())
