"""Numbers that choose what a kernel computes: it is made with them, or finds them in its record."""

from __future__ import annotations

import enum

from protocol.ggml.ops import Op

# -- elements --------------------------------------------------------------------------------------


class Function(enum.IntEnum):
    """Functions of one element that are ops of their own, behind those of UNARY."""

    SCALE = 100
    CLAMP = 101
    SQR = 102
    SQRT = 103
    LOG = 104
    LEAKY_RELU = 105
    SIN = 106
    COS = 107


class Binary(enum.IntEnum):
    """Functions of two elements."""

    ADD = 0
    SUB = 1
    MUL = 2
    DIV = 3


BINARY_CODES = {
    Op.ADD: Binary.ADD,
    Op.SUB: Binary.SUB,
    Op.MUL: Binary.MUL,
    Op.DIV: Binary.DIV,
    Op.ADD1: Binary.ADD,
}

# -- rows ------------------------------------------------------------------------------------------


class Norm(enum.IntEnum):
    """The norm that a row is divided by."""

    RMS_NORM = 0
    NORM = 1
    L2_NORM = 2


# Up to so many largest are kept in order while a row is read; more are sorted.
TOP_K_INSERT = 64

# -- rotary positions: op_params of ROPE (GGML_ROPE_TYPE_*) ----------------------------------------

MODE_NORMAL, MODE_NEOX, MODE_MROPE, MODE_VISION, MODE_IMROPE = 0, 2, 8, 24, 40
