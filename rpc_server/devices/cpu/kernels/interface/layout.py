"""What lowerings and kernels have to agree on: how rows and scratch are laid out, and their sizes.

Rows of activations come in the forms that products read. A product rounds its activations as ggml's
CPU backend does, so that a model says the same here as it does there: each weight type has a *form*
of activations (ggml's ``vec_dot_type``).

Forms for quantized weights (``Q8_0``, ``Q8_1``, ``Q8_K``) differ in how codes and scales are found
and lie in memory alike: units of 256 elements (the last may be part filled), 384 bytes each.

======  ==========================================================================================
offset  content
======  ==========================================================================================
0       256 signed codes, -127..127
256     8 F32 scales, one for each run of 32 elements
288     8 F32: the sum of a run's codes times its scale
320     16 F32: the same for runs of 16
======  ==========================================================================================

The other forms are dense: F32 values that F16, BF16 or blocks of Q8_0 (``Q8_0_FLOATS``) hold
exactly, or (``F32``) any; or F16 itself (``F16_HALVES``), or BF16 (``BF16_PAIRS``), up to an even
number of them.
"""

from __future__ import annotations

import enum

from protocol.ggml.types import GgmlType, activation_type
from rpc_server.devices.cpu.kernels.interface.isa import Isa

# Elements of a vector in kernels; rows of weights are handled in tiles of so many, a lane each.
LANES = 16
_VECTOR_BYTES = 4 * LANES


# -- rows of activations ---------------------------------------------------------------------------

UNIT = 256
UNIT_BYTES = 384
SCALES_AT = 256
SUMS_AT = 288
HALF_SUMS_AT = 320


class RowForm(enum.IntEnum):
    """See the module. Values are those of the type whose rounding it has, where they can be."""

    F32 = GgmlType.F32
    F16 = GgmlType.F16
    BF16 = GgmlType.BF16
    Q8_0 = GgmlType.Q8_0
    Q8_1 = GgmlType.Q8_1
    Q8_K = GgmlType.Q8_K
    Q8_0_FLOATS = 1000 + GgmlType.Q8_0
    BF16_PAIRS = 1000 + GgmlType.BF16
    F16_HALVES = 1000 + GgmlType.F16


CODED = (RowForm.Q8_0, RowForm.Q8_1, RowForm.Q8_K)


def activation_form(weights: GgmlType) -> RowForm:
    """Return the form of activations for a weight type: that of its activation_type."""
    return RowForm(activation_type(weights))


def row_bytes(form: RowForm, n: int) -> int:
    """Return the bytes of a row of ``n`` elements."""
    if form in CODED:
        return -(-n // UNIT) * UNIT_BYTES
    size = 2 if form in (RowForm.BF16_PAIRS, RowForm.F16_HALVES) else 4
    return -(-n * size // 64) * 64


def product_form(weights: GgmlType, isa: Isa) -> RowForm:
    """Return the form that the product kernel of a weight type reads on an instruction set."""
    if in_pairs(weights, isa):
        return RowForm.BF16_PAIRS
    return RowForm.F16_HALVES if in_halves(weights, isa) else activation_form(weights)


# -- products --------------------------------------------------------------------------------------

# Weight types with kernels for products; of the quantized ones, the elements that share a scale.
SCALE_GROUPS: dict[GgmlType, int] = {
    GgmlType.Q4_0: 32,
    GgmlType.Q4_1: 32,
    GgmlType.Q5_0: 32,
    GgmlType.Q5_1: 32,
    GgmlType.Q8_0: 32,
    GgmlType.IQ4_NL: 32,
    GgmlType.MXFP4: 32,
    GgmlType.Q1_0: 32,
    GgmlType.Q2_0: 32,
    GgmlType.NVFP4: 16,
    GgmlType.TQ1_0: 32,
    GgmlType.TQ2_0: 32,
    GgmlType.Q2_K: 16,
    GgmlType.Q3_K: 16,
    GgmlType.Q4_K: 32,
    GgmlType.Q5_K: 32,
    GgmlType.Q6_K: 16,
    GgmlType.IQ4_XS: 32,
    GgmlType.IQ1_S: 32,
    GgmlType.IQ1_M: 16,
    GgmlType.IQ2_XXS: 32,
    GgmlType.IQ2_XS: 16,
    GgmlType.IQ2_S: 16,
    GgmlType.IQ3_XXS: 32,
    GgmlType.IQ3_S: 32,
}
PRODUCT_TYPES = frozenset((*SCALE_GROUPS, GgmlType.F32, GgmlType.F16, GgmlType.BF16))

SUBBLOCK = 32
# Unpacked rows of one unit before they are turned: codes, scales and minima of 16 rows.
STAGE_SCALES = LANES * UNIT
STAGE_MINIMA = STAGE_SCALES + LANES * _VECTOR_BYTES
STAGE_BYTES = STAGE_MINIMA + LANES * _VECTOR_BYTES

# Bytes of activations that are multiplied with a tile before the next tile is unpacked.
_PANEL_BYTES = 768 << 10


def in_pairs(type_: GgmlType, isa: Isa) -> bool:
    """Return whether a product multiplies pairs of BF16."""
    return type_ is GgmlType.BF16 and isa >= Isa.AVX512_BF16


def in_halves(type_: GgmlType, isa: Isa) -> bool:
    """Return whether a product multiplies F16 with F16."""
    return type_ is GgmlType.F16 and isa in (Isa.FP16FML, Isa.I8MM)


def columns_at_once(isa: Isa) -> int:
    """Return the most columns that a tile is multiplied with at once.

    They take one register each, and one more for bytes.
    """
    return 8 if isa >= Isa.AVX512 else 4


def k_chunk(type_: GgmlType) -> int:
    """Return the most elements of a row in a tile, which should stay in the L1 cache."""
    return 2048 if type_ in SCALE_GROUPS else 512


def run_bytes(group: int) -> int:
    """Return the bytes of a tile for each run of 32 elements, of which ``group`` share a scale."""
    return (8 + 2 * (SUBBLOCK // group)) * _VECTOR_BYTES


def tile_bytes(type_: GgmlType) -> int:
    """Return the size of a tile with the stage before it."""
    if type_ in SCALE_GROUPS:
        return STAGE_BYTES + k_chunk(type_) // SUBBLOCK * run_bytes(SCALE_GROUPS[type_])
    return STAGE_BYTES + k_chunk(type_) * _VECTOR_BYTES


def panel_columns(isa: Isa, column_bytes: int) -> int:
    """Return how many columns are done per unpacking of the weights: as the L2 cache holds."""
    at_once = columns_at_once(isa)
    return max(_PANEL_BYTES // max(column_bytes, 1) // at_once, 4) * at_once


def product_scratch(type_: GgmlType, isa: Isa, n_columns: int) -> int:
    """Return a thread's bytes of scratch for products of at most ``n_columns`` columns a matrix."""
    return tile_bytes(type_) + 16 * (n_columns + columns_at_once(isa))


def routing_bytes(n_experts: int, n_columns: int) -> int:
    """Return the size of what the kernel ``route_columns`` writes."""
    return 8 * (n_experts + 1) + 24 * n_columns


# -- attention -------------------------------------------------------------------------------------

# Positions of a block: keys and values of one stay in the first-level cache while rows use them.
BLOCK = 64
# Rows of queries that are multiplied with a block at once.
ROWS_AT_ONCE = 4


def _padded(n: int) -> int:
    """Floats of a row of ``n`` in scratch: whole vectors."""
    return -(-n // LANES) * LANES


def thread_floats(rows: int, dk: int, dv: int) -> int:
    """Return the floats of scratch that a thread needs.

    These are a block of keys and values, of each row queries, scores, sums and the rest, products
    of some rows with the block, and 16 keys on their way to a panel.
    """
    dk, dv = _padded(dk), _padded(dv)
    several = ROWS_AT_ONCE * BLOCK + LANES * dk
    return BLOCK * (dk + dv + 1) + rows * (dk + dv + BLOCK + 3) + several


def partial_floats(rows: int, dv: int) -> int:
    """Return how many floats one thread leaves of one task.

    These are sums, then largest scores, then totals.
    """
    return rows * (_padded(dv) + 2)
