"""Which types ggml's CPU backend can do what with: its tables of conversions, as sets.

A type that lacks a conversion there makes upstream's server call a null pointer, so strategies
must know.
"""

from __future__ import annotations

from protocol.ggml.types import TYPE_INFO, GgmlType

F32, F16, BF16 = GgmlType.F32, GgmlType.F16, GgmlType.BF16
I32, I64 = GgmlType.I32, GgmlType.I64

FLOATS: tuple[GgmlType, ...] = (F32, F16, BF16)
ALL: tuple[GgmlType, ...] = tuple(GgmlType)
QUANTIZED: tuple[GgmlType, ...] = tuple(t for t in ALL if TYPE_INFO[t].quantized)

# What products round activations to; nothing decodes it.
_INTERMEDIATE = (GgmlType.Q8_1, GgmlType.Q8_K)
# Encoded by llama-quantize only: these need an importance matrix or tables that take a start-up.
_QUANTIZE_ONLY = (
    GgmlType.IQ1_S,
    GgmlType.IQ1_M,
    GgmlType.IQ2_XXS,
    GgmlType.IQ2_XS,
    GgmlType.IQ2_S,
    GgmlType.IQ3_XXS,
    GgmlType.IQ3_S,
)

# Quantized types that decode to F32; and that F32 can be encoded to.
DECODABLE: tuple[GgmlType, ...] = tuple(t for t in QUANTIZED if t not in _INTERMEDIATE)
ENCODABLE: tuple[GgmlType, ...] = tuple(t for t in QUANTIZED if t not in _QUANTIZE_ONLY)
