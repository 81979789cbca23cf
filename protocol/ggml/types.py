"""ggml's data types: numbers, block layouts in bytes, and the sizes that follow from them.

The numbers are those of ``enum ggml_type``; they have never been reused, so one table serves every
protocol version.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TypeInfo:
    """``block_size`` elements take ``type_size`` bytes; ``quantized`` as ggml_is_quantized."""

    block_size: int
    type_size: int
    quantized: bool

    @property
    def alignment(self) -> int:
        """Bytes that the address of an element or a block, and strides, are multiples of.

        Elements are aligned to their size. Blocks follow one another without gaps from a tensor's
        start, which ggml aligns to the buffer's alignment, so they are aligned to any power of two
        that their size is a multiple of; no field of a block is of more than 4 bytes.
        """
        if not self.quantized:
            return self.type_size
        return min(self.type_size & -self.type_size, 4)


def _plain(size: int) -> TypeInfo:
    return TypeInfo(1, size, False)


def _blocks(elements: int, size: int) -> TypeInfo:
    return TypeInfo(elements, size, True)


class GgmlType(enum.IntEnum):
    """``enum ggml_type``; gaps are types that ggml has removed."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41
    Q2_0 = 42


# Sizes are those that ggml-common.h asserts of its block structs.
TYPE_INFO: dict[GgmlType, TypeInfo] = {
    GgmlType.F32: _plain(4),
    GgmlType.F16: _plain(2),
    GgmlType.BF16: _plain(2),
    GgmlType.F64: _plain(8),
    GgmlType.I8: _plain(1),
    GgmlType.I16: _plain(2),
    GgmlType.I32: _plain(4),
    GgmlType.I64: _plain(8),
    GgmlType.Q4_0: _blocks(32, 18),
    GgmlType.Q4_1: _blocks(32, 20),
    GgmlType.Q5_0: _blocks(32, 22),
    GgmlType.Q5_1: _blocks(32, 24),
    GgmlType.Q8_0: _blocks(32, 34),
    GgmlType.Q8_1: _blocks(32, 36),
    GgmlType.Q2_K: _blocks(256, 84),
    GgmlType.Q3_K: _blocks(256, 110),
    GgmlType.Q4_K: _blocks(256, 144),
    GgmlType.Q5_K: _blocks(256, 176),
    GgmlType.Q6_K: _blocks(256, 210),
    GgmlType.Q8_K: _blocks(256, 292),
    GgmlType.IQ1_S: _blocks(256, 50),
    GgmlType.IQ1_M: _blocks(256, 56),
    GgmlType.IQ2_XXS: _blocks(256, 66),
    GgmlType.IQ2_XS: _blocks(256, 74),
    GgmlType.IQ2_S: _blocks(256, 82),
    GgmlType.IQ3_XXS: _blocks(256, 98),
    GgmlType.IQ3_S: _blocks(256, 110),
    GgmlType.IQ4_NL: _blocks(32, 18),
    GgmlType.IQ4_XS: _blocks(256, 136),
    GgmlType.TQ1_0: _blocks(256, 54),
    GgmlType.TQ2_0: _blocks(256, 66),
    GgmlType.MXFP4: _blocks(32, 17),
    GgmlType.NVFP4: _blocks(64, 36),
    GgmlType.Q1_0: _blocks(128, 18),
    GgmlType.Q2_0: _blocks(64, 18),
}

FLOATS = frozenset({GgmlType.F32, GgmlType.F16, GgmlType.BF16})
# Types whose rows can be turned to float32.
DECODABLE = FLOATS | {type for type, info in TYPE_INFO.items() if info.quantized}
# Quantized types that keys and values are kept in: rows are written to them while a graph runs.
CACHE_TYPES = (
    GgmlType.Q4_0,
    GgmlType.Q4_1,
    GgmlType.Q5_0,
    GgmlType.Q5_1,
    GgmlType.Q8_0,
    GgmlType.IQ4_NL,
)

# Quantized weights with a minimum, and blocks of 32 elements.
_WITH_SUMS = frozenset({GgmlType.Q4_1, GgmlType.Q5_1})


def activation_type(weights: GgmlType) -> GgmlType:
    """Return the type that a product rounds its activations to: vec_dot_type of ggml's CPU backend.

    Weights that are not quantized take activations of their own type.
    """
    info = TYPE_INFO[weights]
    if not info.quantized:
        return weights
    if weights in _WITH_SUMS:
        return GgmlType.Q8_1
    return GgmlType.Q8_K if info.block_size == 256 else GgmlType.Q8_0


def row_size(type: GgmlType, n: int) -> int:
    """Return the bytes of ``n`` dense elements (ggml_row_size).

    ``n`` is a whole number of blocks.
    """
    info = TYPE_INFO[type]
    return info.type_size * n // info.block_size


def nbytes(type: GgmlType, ne: Sequence[int], nb: Sequence[int]) -> int:
    """Return the bytes from element 0 to behind the last one (ggml_nbytes); 0 if a dimension is 0.

    ``ne`` are 4 element counts and ``nb`` 4 byte strides, innermost first. Python integers: sizes
    off the wire cannot wrap.
    """
    if 0 in ne:
        return 0
    info = TYPE_INFO[type]
    if info.block_size == 1:
        size = info.type_size + (ne[0] - 1) * nb[0]
    else:
        size = ne[0] * nb[0] // info.block_size
    return size + (ne[1] - 1) * nb[1] + (ne[2] - 1) * nb[2] + (ne[3] - 1) * nb[3]


def has_contiguous_rows(type: GgmlType, ne: Sequence[int], nb: Sequence[int]) -> bool:
    """Return whether the elements of a row are dense (ggml_is_contiguous_rows)."""
    info = TYPE_INFO[type]
    return ne[0] == info.block_size or nb[0] == info.type_size


def is_contiguous(type: GgmlType, ne: Sequence[int], nb: Sequence[int], above: int = 0) -> bool:
    """Return ggml_is_contiguous_<above>.

    That is dense in order; dimensions 1 to ``above`` may have any stride.

    Strides of dimensions of one element don't matter where they aren't counted on from.
    """
    if not has_contiguous_rows(type, ne, nb):
        return False
    info = TYPE_INFO[type]
    expected = info.type_size * (ne[0] // info.block_size)
    for dim in range(1, 4):
        if dim <= above:
            expected = ne[dim] * nb[dim]
            continue
        if ne[dim] != 1 and nb[dim] != expected:
            return False
        expected *= ne[dim]
    return True
