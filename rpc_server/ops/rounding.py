"""How activations are rounded for products with quantized weights: as ggml's CPU backend does it.

Models are quantized and judged with this rounding, and where terms cancel it shows in the results.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from protocol.ggml.types import TYPE_INFO, GgmlType, activation_type
from rpc_server.types import from_f32, to_f32


def rounded_activations(x: Any, type: GgmlType, weights: GgmlType, xp: ModuleType) -> Any:
    """Round float32 ``x`` (..., elements of a row), which was of ``type``, for ``weights``.

    Unquantized weights take it as it is; so do others what is quantized already.
    """
    if TYPE_INFO[type].quantized or not TYPE_INFO[weights].quantized or not x.size:
        return x
    blocks = activation_type(weights)
    return to_f32(blocks, from_f32(blocks, x, xp), xp)
