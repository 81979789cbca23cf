"""ggml's ops by name, and how clients number them.

``enum ggml_op`` is renumbered whenever an op is inserted, and so are the functions of UNARY and
GLU. Everywhere else in this project an op is its name; numbers exist on the wire only, and a
:class:`Numbering` says which. Numberings are written as what each lacks of the next newer one.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property


class Op(enum.StrEnum):
    """``enum ggml_op`` as of protocol 7.0, in its order, with how many sources each op has.

    A number behind the name is the number of sources, two are the least and the most; without one
    it is 1. Views may have any: they compute nothing.
    """

    _value_: str
    min_sources: int
    max_sources: int

    def __new__(cls, name: str, least: int = 1, most: int | None = None) -> Op:
        """Make the op that is called ``name``."""
        self = str.__new__(cls, name)
        self._value_ = name
        self.min_sources = least
        self.max_sources = least if most is None else most
        return self

    NONE = "NONE", 0, 10
    DUP = "DUP"
    ADD = "ADD", 2
    ADD_ID = "ADD_ID", 3
    ADD1 = "ADD1", 2
    ACC = "ACC", 2
    SUB = "SUB", 2
    MUL = "MUL", 2
    DIV = "DIV", 2
    SQR = "SQR"
    SQRT = "SQRT"
    LOG = "LOG"
    SIN = "SIN"
    COS = "COS"
    SUM = "SUM"
    SUM_ROWS = "SUM_ROWS"
    CUMSUM = "CUMSUM"
    MEAN = "MEAN"
    ARGMAX = "ARGMAX"
    COUNT_EQUAL = "COUNT_EQUAL", 2
    REPEAT = "REPEAT"
    REPEAT_BACK = "REPEAT_BACK"
    CONCAT = "CONCAT", 2
    SILU_BACK = "SILU_BACK", 2
    NORM = "NORM"
    RMS_NORM = "RMS_NORM"
    RMS_NORM_BACK = "RMS_NORM_BACK", 2
    GROUP_NORM = "GROUP_NORM"
    L2_NORM = "L2_NORM"
    MUL_MAT = "MUL_MAT", 2
    MUL_MAT_ID = "MUL_MAT_ID", 3
    OUT_PROD = "OUT_PROD", 2
    SCALE = "SCALE"
    SET = "SET", 2
    CPY = "CPY", 1, 2
    CONT = "CONT"
    RESHAPE = "RESHAPE", 0, 10
    VIEW = "VIEW", 0, 10
    PERMUTE = "PERMUTE", 0, 10
    TRANSPOSE = "TRANSPOSE", 0, 10
    GET_ROWS = "GET_ROWS", 2
    GET_ROWS_BACK = "GET_ROWS_BACK", 2
    SET_ROWS = "SET_ROWS", 2, 3
    DIAG = "DIAG"
    DIAG_MASK_INF = "DIAG_MASK_INF"
    DIAG_MASK_ZERO = "DIAG_MASK_ZERO"
    SOFT_MAX = "SOFT_MAX", 1, 3
    SOFT_MAX_BACK = "SOFT_MAX_BACK", 2
    ROPE = "ROPE", 2, 3
    ROPE_BACK = "ROPE_BACK", 2, 3
    CLAMP = "CLAMP"
    CONV_TRANSPOSE_1D = "CONV_TRANSPOSE_1D", 2
    IM2COL = "IM2COL", 2
    IM2COL_BACK = "IM2COL_BACK", 2
    IM2COL_3D = "IM2COL_3D", 2
    COL2IM_1D = "COL2IM_1D"
    CONV_2D = "CONV_2D", 2
    CONV_3D = "CONV_3D", 2
    CONV_2D_DW = "CONV_2D_DW", 2
    CONV_TRANSPOSE_2D = "CONV_TRANSPOSE_2D", 2
    POOL_1D = "POOL_1D"
    POOL_2D = "POOL_2D"
    POOL_2D_BACK = "POOL_2D_BACK", 2
    UPSCALE = "UPSCALE"
    PAD = "PAD"
    PAD_REFLECT_1D = "PAD_REFLECT_1D"
    ROLL = "ROLL"
    ARANGE = "ARANGE", 0
    TIMESTEP_EMBEDDING = "TIMESTEP_EMBEDDING"
    ARGSORT = "ARGSORT"
    TOP_K = "TOP_K"
    LEAKY_RELU = "LEAKY_RELU"
    TRI = "TRI"
    FILL = "FILL"
    FLASH_ATTN_EXT = "FLASH_ATTN_EXT", 3, 5
    FLASH_ATTN_BACK = "FLASH_ATTN_BACK", 4
    SSM_CONV = "SSM_CONV", 2
    SSM_SCAN = "SSM_SCAN", 7
    WIN_PART = "WIN_PART"
    WIN_UNPART = "WIN_UNPART"
    GET_REL_POS = "GET_REL_POS"
    ADD_REL_POS = "ADD_REL_POS", 3
    RWKV_WKV6 = "RWKV_WKV6", 6
    GATED_LINEAR_ATTN = "GATED_LINEAR_ATTN", 5
    RWKV_WKV7 = "RWKV_WKV7", 7
    SOLVE_TRI = "SOLVE_TRI", 2
    GATED_DELTA_NET = "GATED_DELTA_NET", 6
    LIGHTNING_INDEXER = "LIGHTNING_INDEXER", 4
    DSV4_HC_COMB = "DSV4_HC_COMB", 3
    DSV4_HC_PRE = "DSV4_HC_PRE", 2
    DSV4_HC_POST = "DSV4_HC_POST", 3, 4
    UNARY = "UNARY"
    MAP_CUSTOM1 = "MAP_CUSTOM1", 0, 10
    MAP_CUSTOM2 = "MAP_CUSTOM2", 0, 10
    MAP_CUSTOM3 = "MAP_CUSTOM3", 0, 10
    CUSTOM = "CUSTOM", 0, 10
    CROSS_ENTROPY_LOSS = "CROSS_ENTROPY_LOSS", 2
    CROSS_ENTROPY_LOSS_BACK = "CROSS_ENTROPY_LOSS_BACK", 3
    OPT_STEP_ADAMW = "OPT_STEP_ADAMW", 5
    OPT_STEP_SGD = "OPT_STEP_SGD", 3
    GLU = "GLU", 1, 2


# Ops that only describe memory: nothing is computed or written.
VIEWS = frozenset({Op.NONE, Op.RESHAPE, Op.VIEW, Op.PERMUTE, Op.TRANSPOSE})


@dataclass(frozen=True, eq=False)
class Numbering:
    """The numbers of ops in a release line of ggml, and where its ``op_params`` differ.

    ``ops[n]`` is the op with number ``n``; ``functions[op][n]`` is the function that ``n`` in
    op_params[0] of UNARY or GLU stands for, as the number it has in :class:`UnaryOp` or
    :class:`GluOp`. ``pads_behind``: PAD has no op_params and pads behind, by the difference of the
    shapes.
    """

    ops: tuple[Op, ...]
    functions: Mapping[Op, tuple[int, ...]]
    pads_behind: bool = False

    @cached_property
    def numbers(self) -> dict[Op, int]:
        """The number of each op."""
        return {op: number for number, op in enumerate(self.ops)}

    @cached_property
    def function_numbers(self) -> dict[Op, dict[int, int]]:
        """By op: the number on the wire of each function of UNARY or GLU."""
        return {
            op: {known: number for number, known in enumerate(functions)}
            for op, functions in self.functions.items()
        }

    def __repr__(self) -> str:
        return f"<{len(self.ops)} ops>"


class UnaryOp(enum.IntEnum):
    """``enum ggml_unary_op``: op_params[0] of UNARY."""

    ABS = 0
    SGN = 1
    NEG = 2
    STEP = 3
    TANH = 4
    ELU = 5
    RELU = 6
    SIGMOID = 7
    GELU = 8
    GELU_QUICK = 9
    SILU = 10
    HARDSWISH = 11
    HARDSIGMOID = 12
    EXP = 13
    EXPM1 = 14
    SOFTPLUS = 15
    GELU_ERF = 16
    XIELU = 17
    FLOOR = 18
    CEIL = 19
    ROUND = 20
    TRUNC = 21


class GluOp(enum.IntEnum):
    """``enum ggml_glu_op``: op_params[0] of GLU."""

    REGLU = 0
    GEGLU = 1
    SWIGLU = 2
    SWIGLU_OAI = 3
    GEGLU_ERF = 4
    GEGLU_QUICK = 5
    SWIGLU_CLAMP = 6


class TensorFlag(enum.IntFlag):
    """``enum ggml_tensor_flag``."""

    INPUT = 1
    OUTPUT = 2
    PARAM = 4
    LOSS = 8
    COMPUTE = 16


def _without(ops: tuple[Op, ...], *lacking: Op) -> tuple[Op, ...]:
    return tuple(op for op in ops if op not in lacking)


OPS_101: tuple[Op, ...] = tuple(Op)
OPS_98 = _without(OPS_101, Op.DSV4_HC_COMB, Op.DSV4_HC_PRE, Op.DSV4_HC_POST)
OPS_97 = _without(OPS_98, Op.LIGHTNING_INDEXER)
OPS_96 = _without(OPS_97, Op.COL2IM_1D)
OPS_95 = _without(OPS_96, Op.GATED_DELTA_NET)
OPS_90 = _without(OPS_95, Op.CUMSUM, Op.TOP_K, Op.TRI, Op.FILL, Op.SOLVE_TRI)
OPS_88 = _without(OPS_90, Op.IM2COL_3D, Op.CONV_3D)
OPS_86 = _without(OPS_88, Op.ADD_ID, Op.OPT_STEP_SGD)
OPS_82 = _without(OPS_86, Op.SET_ROWS, Op.CONV_2D, Op.ROLL, Op.GLU)

_UNARY = tuple(UnaryOp)
# EXPM1 and SOFTPLUS were inserted together with CUMSUM and TRI. The functions behind GELU_ERF came
# one after the other, in this order: releases that lack the last ones never send their numbers.
_UNARY_90 = tuple(u for u in UnaryOp if u not in (UnaryOp.EXPM1, UnaryOp.SOFTPLUS))
_GLU = tuple(GluOp)
# SWIGLU_OAI was inserted together with ADD_ID.
_GLU_86 = tuple(g for g in GluOp if g not in (GluOp.SWIGLU_OAI, GluOp.SWIGLU_CLAMP))

_FUNCTIONS: Mapping[Op, tuple[int, ...]] = {Op.UNARY: _UNARY, Op.GLU: _GLU}
_FUNCTIONS_90: Mapping[Op, tuple[int, ...]] = {Op.UNARY: _UNARY_90, Op.GLU: _GLU}
_FUNCTIONS_86: Mapping[Op, tuple[int, ...]] = {Op.UNARY: _UNARY_90, Op.GLU: _GLU_86}

# Named by how many ops they have.
NUMBERING_101 = Numbering(OPS_101, _FUNCTIONS)
NUMBERING_98 = Numbering(OPS_98, _FUNCTIONS)
NUMBERING_97 = Numbering(OPS_97, _FUNCTIONS)
NUMBERING_96 = Numbering(OPS_96, _FUNCTIONS)
NUMBERING_95 = Numbering(OPS_95, _FUNCTIONS)
NUMBERING_90 = Numbering(OPS_90, _FUNCTIONS_90)
NUMBERING_88 = Numbering(OPS_88, _FUNCTIONS_90, pads_behind=True)
NUMBERING_86 = Numbering(OPS_86, _FUNCTIONS_86, pads_behind=True)
NUMBERING_82 = Numbering(OPS_82, _FUNCTIONS_86, pads_behind=True)
