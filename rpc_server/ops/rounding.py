"""How activations are rounded for products with quantized weights: as ggml's CPU backend does it.

Models are quantized and judged with this rounding, and where terms cancel it shows in the results.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from protocol.ggml.types import TYPE_INFO, GgmlType
from rpc_server.types import from_f32, to_f32

# Weights with a minimum, and blocks of 32 elements.
_WITH_SUMS = frozenset({GgmlType.Q4_1, GgmlType.Q5_1})


def activation_type(weights: GgmlType) -> GgmlType:
    """The type of blocks that activations are rounded to (vec_dot_type) for quantized weights."""
    if weights in _WITH_SUMS:
        return GgmlType.Q8_1
    return GgmlType.Q8_K if TYPE_INFO[weights].block_size == 256 else GgmlType.Q8_0


def rounded_activations(x: Any, type: GgmlType, weights: GgmlType, xp: ModuleType) -> Any:
    """float32 ``x`` (..., elements of a row), which was of ``type``, rounded for ``weights``.

    Unquantized weights take it as it is; so do others what is quantized already.
    """
    if TYPE_INFO[type].quantized or not TYPE_INFO[weights].quantized or not x.size:
        return x
    blocks = activation_type(weights)
    return to_f32(blocks, from_f32(blocks, x, xp), xp)
