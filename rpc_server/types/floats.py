"""Conversions of the floating-point types; written against any array module."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from protocol.ggml.types import GgmlType

Convert = Callable[[Any, ModuleType], Any]


def bf16_to_f32(bits: Any, xp: ModuleType) -> Any:
    """Convert uint16 bit patterns to float32: bfloat16 is the upper half of a float32."""
    return (bits.astype(xp.uint32) << 16).view(xp.float32)


def f32_to_bf16(values: Any, xp: ModuleType) -> Any:
    """Convert float32 to uint16 bit patterns, rounded to nearest even; NaN stays a (quiet) NaN."""
    bits = values.view(xp.uint32)
    rounded = bits + (xp.uint32(0x7FFF) + ((bits >> 16) & 1))
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return (xp.where(is_nan, bits | 0x400000, rounded) >> 16).astype(xp.uint16)


def _decode_f32(rows: Any, xp: ModuleType) -> Any:
    return xp.ascontiguousarray(rows).view(xp.float32)


def _decode_f16(rows: Any, xp: ModuleType) -> Any:
    return xp.ascontiguousarray(rows).view(xp.float16).astype(xp.float32)


def _decode_bf16(rows: Any, xp: ModuleType) -> Any:
    return bf16_to_f32(xp.ascontiguousarray(rows).view(xp.uint16), xp)


def _encode_f32(values: Any, xp: ModuleType) -> Any:
    return xp.ascontiguousarray(values, xp.float32).view(xp.uint8)


def _encode_f16(values: Any, xp: ModuleType) -> Any:
    return xp.ascontiguousarray(values).astype(xp.float16).view(xp.uint8)


def _encode_bf16(values: Any, xp: ModuleType) -> Any:
    return f32_to_bf16(xp.ascontiguousarray(values, xp.float32), xp).view(xp.uint8)


DECODERS: dict[GgmlType, Convert] = {
    GgmlType.F32: _decode_f32,
    GgmlType.F16: _decode_f16,
    GgmlType.BF16: _decode_bf16,
}
ENCODERS: dict[GgmlType, Convert] = {
    GgmlType.F32: _encode_f32,
    GgmlType.F16: _encode_f16,
    GgmlType.BF16: _encode_bf16,
}
