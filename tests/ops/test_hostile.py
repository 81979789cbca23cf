"""What any client may send: nodes made valid and then damaged are refused, or run harmlessly.

Each case takes a valid node and changes types, sizes, strides or parameters of the node and its
sources at random. A contract that lets such a node through promises that its reference reads and
writes nothing but the tensors' own memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.ggml.ops import Op
from protocol.ggml.types import TYPE_INFO, GgmlType, nbytes
from protocol.tensor import Tensor, contiguous_strides
from rpc_server.graph.errors import GraphError
from rpc_server.ops.table import OPS, check
from tests.ops import harness
from tests.ops.tensors import CONTEXT, node, params, raw, tensor
from tests.parameters import mostly_slow

F32, F16, I32, I64, Q8_0 = (
    GgmlType.F32, GgmlType.F16, GgmlType.I32, GgmlType.I64, GgmlType.Q8_0,
)  # fmt: skip

# Of each node; more find more: HOSTILE_EXAMPLES=2000 takes half an hour.
EXAMPLES = int(os.environ.get("HOSTILE_EXAMPLES", "20"))

Spec = tuple[GgmlType, tuple[int, ...]]
# Strides, paddings and dilations of a kernel that slides over pictures.
_SLID = (1, 1, 1, 0, 1, 1)
# op: result, sources, parameters
VALID: dict[str, tuple[Op, Spec, Sequence[Spec], tuple[int, ...]]] = {
    "cpy": (Op.CPY, (F32, (8, 6)), [(F16, (6, 8)), (F32, (8, 6))], params()),
    "cpy to blocks": (Op.CPY, (Q8_0, (32, 2)), [(F32, (32, 2))], params()),
    "cont": (Op.CONT, (F32, (4, 3, 2)), [(F32, (4, 3, 2))], params()),
    "set": (Op.SET, (F32, (6, 4)), [(F32, (6, 4)), (F32, (2, 3))], params(24, 96, 96, 8)),
    "acc": (Op.ACC, (F32, (6, 4)), [(F32, (6, 4)), (F32, (2, 3))], params(24, 96, 96, 8)),
    "concat": (Op.CONCAT, (F32, (4, 5)), [(F32, (4, 2)), (F32, (4, 3))], params(1)),
    "repeat": (Op.REPEAT, (F32, (4, 6)), [(F32, (2, 3))], params()),
    "repeat back": (Op.REPEAT_BACK, (F32, (2, 3)), [(F32, (4, 6))], params()),
    "get rows": (Op.GET_ROWS, (F32, (32, 2)), [(Q8_0, (32, 3)), (I32, (2,))], params()),
    "set rows": (Op.SET_ROWS, (F16, (4, 5, 2)), [(F32, (4, 2, 2)), (I64, (2,))], params()),
    "get rows back": (Op.GET_ROWS_BACK, (F32, (4, 5)), [(F32, (4, 2)), (I32, (2,))], params()),
    "add id": (Op.ADD_ID, (F32, (4, 2)), [(F32, (4, 2)), (F32, (4, 3)), (I32, (2,))], params()),
    "pad": (Op.PAD, (F32, (6, 3)), [(F32, (4, 2))], params(1, 1, 0, 1)),
    "pad around": (Op.PAD, (F32, (6, 3)), [(F32, (4, 2))], params(1, 1, 0, 1, 0, 0, 0, 0, 1)),
    "roll": (Op.ROLL, (F32, (4, 3)), [(F32, (4, 3))], params(1, -2)),
    "fill": (Op.FILL, (F32, (4, 3)), [(F32, (4, 3))], params(1.5)),
    "arange": (Op.ARANGE, (F32, (4,)), [], params(0.0, 4.0, 1.0)),
    "diag": (Op.DIAG, (F32, (4, 4)), [(F32, (4, 1))], params()),
    "tri": (Op.TRI, (F32, (4, 4)), [(F32, (4, 4))], params(2)),
    "mask": (Op.DIAG_MASK_INF, (F32, (4, 4)), [(F32, (4, 4))], params(1)),
    "mask of zeros": (Op.DIAG_MASK_ZERO, (F32, (4, 4)), [(F32, (4, 4))], params(1)),
    "add": (Op.ADD, (F32, (4, 3)), [(F32, (4, 3)), (F32, (2, 1))], params()),
    "add to blocks": (Op.ADD, (Q8_0, (32, 3)), [(Q8_0, (32, 3)), (F32, (32, 3))], params()),
    **{
        op.lower(): (op, (F32, (4, 3)), [(F32, (4, 3)), (F32, (2, 1))], params())
        for op in (Op.SUB, Op.MUL, Op.DIV)
    },
    "add1": (Op.ADD1, (F32, (4, 3)), [(F32, (4, 3)), (F32, (1,))], params()),
    **{
        op.lower(): (op, (F32, (4, 3)), [(F32, (4, 3))], params())
        for op in (Op.SQR, Op.SQRT, Op.LOG, Op.SIN, Op.COS, Op.DUP)
    },
    "clamp": (Op.CLAMP, (F32, (4, 3)), [(F32, (4, 3))], params(-1.0, 1.0)),
    "leaky relu": (Op.LEAKY_RELU, (F32, (4, 3)), [(F32, (4, 3))], params(0.1)),
    "unary": (Op.UNARY, (F16, (4, 3)), [(F16, (4, 3))], params(10)),
    "scale": (Op.SCALE, (F32, (4, 3)), [(F32, (4, 3))], params(2.0, 1.0)),
    "silu back": (Op.SILU_BACK, (F32, (4, 3)), [(F32, (4, 3)), (F32, (4, 3))], params()),
    "glu": (Op.GLU, (F32, (4, 3)), [(F32, (4, 3)), (F32, (4, 3))], params(2)),
    "glu of halves": (Op.GLU, (F32, (2, 3)), [(F32, (4, 3))], params(3, 1, 1.0, 1.0)),
    "sum": (Op.SUM, (F32, (1,)), [(F32, (4, 3))], params()),
    "sum of rows": (Op.SUM_ROWS, (F32, (1, 3)), [(F32, (4, 3))], params()),
    "mean": (Op.MEAN, (F32, (1, 3)), [(F32, (4, 3))], params()),
    "cumsum": (Op.CUMSUM, (F32, (4, 3)), [(F32, (4, 3))], params()),
    "argmax": (Op.ARGMAX, (I32, (3,)), [(F32, (4, 3))], params()),
    "argsort": (Op.ARGSORT, (I32, (4, 3)), [(F32, (4, 3))], params(1)),
    "top k": (Op.TOP_K, (I32, (2, 3)), [(F32, (4, 3))], params()),
    "count equal": (Op.COUNT_EQUAL, (I64, (1,)), [(I32, (4, 3)), (I32, (4, 3))], params()),
    "product": (Op.MUL_MAT, (F32, (3, 5, 4)), [(F32, (32, 3, 2)), (F32, (32, 5, 4))], params()),
    "product of blocks": (Op.MUL_MAT, (F32, (3, 5)), [(Q8_0, (32, 3)), (F32, (32, 5))], params()),
    "experts": (
        Op.MUL_MAT_ID,
        (F32, (3, 2, 5)),
        [(Q8_0, (32, 3, 4)), (F32, (32, 2, 5)), (I32, (2, 5))],
        params(),
    ),
    "outer product": (Op.OUT_PROD, (F32, (4, 3, 2)), [(F32, (4, 5)), (F32, (3, 5, 2))], params()),
    "norm": (Op.NORM, (F32, (4, 3)), [(F32, (4, 3))], params(1e-5)),
    "rms norm": (Op.RMS_NORM, (F32, (4, 3)), [(F32, (4, 3))], params(1e-5)),
    "l2 norm": (Op.L2_NORM, (F32, (4, 3)), [(F32, (4, 3))], params(1e-5)),
    "group norm": (Op.GROUP_NORM, (F32, (4, 3, 5)), [(F32, (4, 3, 5))], params(2, 1e-5)),
    "rms norm back": (Op.RMS_NORM_BACK, (F32, (4, 3)), [(F32, (4, 3))] * 2, params(1e-5)),
    "soft max": (
        Op.SOFT_MAX,
        (F32, (8, 3, 4, 2)),
        [(F32, (8, 3, 4, 2)), (F16, (8, 3, 2)), (F32, (4,))],
        params(0.5, 8.0),
    ),
    "soft max back": (Op.SOFT_MAX_BACK, (F32, (4, 3)), [(F32, (4, 3))] * 2, params(0.5, 0.0)),
    "rope": (
        Op.ROPE,
        (F32, (8, 3, 4)),
        [(F32, (8, 3, 4)), (I32, (4,)), (F32, (3,))],
        params(0, 6, 2, 0, 64, 1e4, 0.5, 1.0, 1.0, 32.0, 1.0, 0, 0, 0, 0, 2),
    ),
    "rope of pictures": (
        Op.ROPE,
        (F16, (8, 3, 1)),
        [(F16, (8, 3, 1)), (I32, (4,))],
        params(0, 6, 40, 0, 64, 1e4, 0.5, 1.0, 1.0, 32.0, 1.0, 1, 1, 1, 0),
    ),
    "rope of vision": (
        Op.ROPE_BACK,
        (F32, (8, 3, 1)),
        [(F32, (8, 3, 1)), (I32, (4,)), (F32, (4,))],
        params(0, 4, 24, 0, 64, 1e4, 0.5, 0.0, 1.0, 32.0, 1.0, 2, 2, 0, 0),
    ),
    "convolution": (Op.SSM_CONV, (F32, (4, 3, 2)), [(F32, (4, 4, 2)), (F32, (2, 4))], params()),
    "scan": (
        Op.SSM_SCAN,
        (F32, (144,)),
        [
            (F32, (2, 3, 4, 2)),
            (F32, (3, 4, 2, 3)),
            (F32, (4, 2, 3)),
            (F32, (2, 4)),
            (F32, (2, 2, 2, 3)),
            (F32, (2, 2, 2, 3)),
            (I32, (3,)),
        ],
        params(1),
    ),
    "wkv6": (
        Op.RWKV_WKV6,
        (F32, (8, 12)),
        [(F32, (4, 2, 4))] * 3 + [(F32, (4, 2)), (F32, (4, 2, 4)), (F32, (32, 2))],
        params(),
    ),
    "wkv7": (
        Op.RWKV_WKV7,
        (F32, (8, 12)),
        [(F32, (4, 2, 4))] * 6 + [(F32, (32, 2))],
        params(),
    ),
    "linear attention": (
        Op.GATED_LINEAR_ATTN,
        (F32, (8, 12)),
        [(F32, (4, 2, 4))] * 4 + [(F32, (32, 2))],
        params(0.5),
    ),
    "im2col": (
        Op.IM2COL,
        (F16, (12, 5, 4, 2)),
        [(F16, (2, 2, 3)), (F32, (4, 5, 3, 2))],
        params(1, 1, 1, 0, 1, 1, 1),
    ),
    "im2col of lines": (
        Op.IM2COL,
        (F32, (6, 5, 2)),
        [(F16, (2, 3)), (F32, (4, 3, 2))],
        params(1, 0, 1, 0, 1, 0, 0),
    ),
    "im2col of volumes": (
        Op.IM2COL_3D,
        (F32, (16, 3, 3, 8)),
        [(F16, (2, 2, 2, 2)), (F32, (4, 4, 3, 4))],
        params(1, 1, 1, 0, 0, 1, 1, 1, 1, 2),
    ),
    "im2col back": (
        Op.IM2COL_BACK,
        (F32, (4, 5, 3, 2)),
        [(F32, (12, 5, 4, 2)), (F16, (2, 2, 3))],
        params(1, 1, 1, 0, 1, 1, 1),
    ),
    "col2im": (Op.COL2IM_1D, (F16, (7, 2)), [(F16, (6, 4))], params(2, 2, 1)),
    **{
        name: (op, (F32, (5, 4, n, 2)), [(F16, kernel), (F32, (4, 5, 3, 2))], params(*_SLID))
        for name, op, n, kernel in (
            ("convolution of pictures", Op.CONV_2D, 2, (2, 2, 3, 2)),
            ("convolution by channel", Op.CONV_2D_DW, 3, (2, 2, 1, 3)),
        )
    },
    "convolution of volumes": (
        Op.CONV_3D,
        (F32, (3, 3, 4, 6)),
        [(F32, (2, 2, 2, 6)), (F32, (4, 4, 3, 4))],
        params(1, 1, 1, 0, 0, 1, 1, 1, 1, 2, 2, 3),
    ),
    "transposed convolution of lines": (
        Op.CONV_TRANSPOSE_1D,
        (F32, (9, 2)),
        [(F16, (3, 2, 4)), (F32, (4, 4))],
        params(2, 0, 1),
    ),
    "transposed convolution": (
        Op.CONV_TRANSPOSE_2D,
        (F32, (9, 6, 2, 3)),
        [(F32, (3, 2, 2, 4)), (F32, (4, 3, 4, 3))],
        params(2),
    ),
    "pool of lines": (Op.POOL_1D, (F32, (3, 4)), [(F32, (4, 4))], params(0, 2, 2, 1)),
    "pool": (Op.POOL_2D, (F32, (3, 3)), [(F32, (4, 4))], params(1, 2, 2, 2, 2, 1, 1)),
    "pool back": (
        Op.POOL_2D_BACK,
        (F32, (4, 4)),
        [(F32, (3, 3)), (F32, (4, 4))],
        params(0, 2, 2, 2, 2, 1, 1),
    ),
    "pool back of means": (
        Op.POOL_2D_BACK,
        (F16, (4, 4)),
        [(F32, (3, 3)), (F16, (4, 4))],
        params(1, 2, 2, 2, 2, 1, 1),
    ),
    "mirrored ends": (Op.PAD_REFLECT_1D, (F32, (9, 3)), [(F32, (4, 3))], params(3, 2)),
    "upscale": (Op.UPSCALE, (F32, (8, 5, 4)), [(F32, (4, 5, 2))], params(1)),
    "upscale smoothly": (Op.UPSCALE, (F32, (3, 8)), [(F32, (4, 5))], params(0x201)),
    "time steps": (Op.TIMESTEP_EMBEDDING, (F32, (4, 3)), [(F32, (3,))], params(4, 1000)),
    "windows": (Op.WIN_PART, (F32, (3, 2, 2, 6)), [(F32, (3, 4, 5))], params(2, 3, 2)),
    "no windows": (Op.WIN_UNPART, (F32, (3, 4, 5)), [(F32, (3, 2, 2, 6))], params(2)),
    "relative positions": (Op.GET_REL_POS, (F16, (4, 3, 3)), [(F16, (4, 5))], params()),
    "add relative positions": (
        Op.ADD_REL_POS,
        (F32, (4, 6, 5)),
        [(F32, (4, 6, 5)), (F32, (2, 3, 2, 5)), (F32, (2, 3, 2, 5))],
        params(),
    ),
    "triangular system": (
        Op.SOLVE_TRI,
        (F32, (3, 4, 2)),
        [(F32, (4, 4, 2)), (F32, (3, 4, 2))],
        params(),
    ),
    "delta net": (
        Op.GATED_DELTA_NET,
        (F32, (8, 32)),
        [
            *((F32, (4, 1, 4, 1)), (F32, (4, 2, 4, 2)), (F32, (4, 2, 4, 2))),
            *((F32, (4, 2, 4, 2)), (F32, (1, 2, 4, 2)), (F32, (4, 4, 2, 2))),
        ],
        params(3),
    ),
    "indexer": (
        Op.LIGHTNING_INDEXER,
        (F32, (5, 3, 1, 4)),
        [(F32, (32, 2, 3, 4)), (Q8_0, (32, 1, 5, 4)), (F32, (2, 3, 1, 4)), (F16, (5, 3, 1, 2))],
        params(),
    ),
    "mixing matrix": (
        Op.DSV4_HC_COMB,
        (F32, (4, 4, 3)),
        [(F32, (24, 3)), (F32, (3,)), (F32, (24,))],
        params(1e-6, 3),
    ),
    "streams read": (
        Op.DSV4_HC_PRE,
        (F32, (8, 3)),
        [(F32, (8, 2, 3)), (F32, (2, 3))],
        params(1.0, 0),
    ),
    "streams gated": (Op.DSV4_HC_PRE, (F32, (8, 3)), [(F32, (8, 2, 3))] * 2, params(1.0, 1)),
    "streams written": (
        Op.DSV4_HC_POST,
        (F32, (8, 2, 3)),
        [(F32, (8, 3)), (F32, (8, 2, 3)), (F32, (2, 3)), (F32, (2, 2, 3))],
        params(),
    ),
    "loss": (Op.CROSS_ENTROPY_LOSS, (F32, (1,)), [(F32, (4, 3))] * 2, params()),
    "loss back": (
        Op.CROSS_ENTROPY_LOSS_BACK,
        (F32, (4, 3)),
        [(F32, (1,)), (F32, (4, 3)), (F32, (4, 3))],
        params(),
    ),
    "attention back": (
        Op.FLASH_ATTN_BACK,
        (F32, (128,)),
        [(F32, (4, 3, 4)), (F32, (4, 5, 2)), (F32, (5, 4, 2)), (F32, (4, 3, 4))],
        params(1),
    ),
    "attention": (
        Op.FLASH_ATTN_EXT,
        (F32, (32, 4, 3)),
        [(F32, (32, 3, 4)), (F16, (32, 5, 2)), (Q8_0, (32, 5, 2)), (F16, (5, 3)), (F32, (4,))],
        params(0.2, 8.0, 2.0),
    ),
}
# Ops whose result is their source 0 itself.
IN_PLACE: dict[str, tuple[Op, Spec, Sequence[Spec], tuple[int, ...]]] = {
    "adamw": (Op.OPT_STEP_ADAMW, (F32, (4, 3)), [(F32, (4, 3))] * 4 + [(F32, (7,))], params()),
    "sgd": (Op.OPT_STEP_SGD, (F32, (4, 3)), [(F32, (4, 3))] * 2 + [(F32, (2,))], params()),
}
NODES = {**VALID, **IN_PLACE}
# These have no node that is valid: their parameters are functions of the client's.
CUSTOM = {Op.MAP_CUSTOM1, Op.MAP_CUSTOM2, Op.MAP_CUSTOM3, Op.CUSTOM}

# Of 32 bits, as the wire has them.
_LARGE = [1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]
SIZES = st.sampled_from([0, 1, 2, 3, 4, 5, 32, 64, 256, *_LARGE])
STRIDES = st.sampled_from(
    [0, 1, 2, 3, 4, 8, 12, 16, 24, 34, 36, 48, 128, 1000, *_LARGE, (1 << 32) - 4]
)
_FLOATS = [math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45, -0.0, 0.5, -1.0, 1e10]
WORDS = st.one_of(
    st.sampled_from([-(1 << 31), -4, -1, 0, 1, 2, 3, 4, 7, 23, 24, 96, 255, 1 << 16, 1 << 30]),
    st.just((1 << 31) - 1),
    st.sampled_from([params(number)[0] for number in _FLOATS]),
)
# What sources hold: bytes all alike, or 32-bit words, which indices are.
FILLS = st.one_of(
    st.sampled_from([0, 1, 2, 0x7F, 0x80, 255]),
    st.lists(st.sampled_from([-(1 << 31), -1, 0, 1, 2, 3, 4, 5, (1 << 31) - 1]), min_size=4),
)
# The parser refuses what doesn't lie in a buffer; this is how large one is here.
BUFFER = 1 << 20


class UnlikelyTensorError(Exception):
    """The parser would not let such a tensor through."""


def damaged(t: Tensor, data: st.DataObject) -> Tensor:
    """A tensor like ``t`` with one thing about it changed.

    Raises UnlikelyTensorError for what no contract ever sees.
    """
    ne, nb, type_ = list(t.ne), list(t.nb), t.type
    dim = data.draw(st.integers(0, 3))
    what = data.draw(st.sampled_from(["ne", "dense", "nb", "type", "many"]))
    if what == "nb":
        nb[dim] = data.draw(STRIDES)
    elif what == "type":
        type_ = data.draw(st.sampled_from(GgmlType))
    elif what == "many":
        # Any number of elements in the memory of few.
        ne = [data.draw(SIZES) for _ in ne]
        nb = [data.draw(st.sampled_from([0, stride])) for stride in nb]
    else:
        ne[dim] = data.draw(SIZES)
    if ne[0] % TYPE_INFO[type_].block_size:
        ne[0] = TYPE_INFO[type_].block_size
    if what in ("dense", "type"):
        nb = list(contiguous_strides(type_, ne))
    return like_parsed(type_, ne, nb)


def like_parsed(type_: GgmlType, ne: Sequence[int], nb: Sequence[int]) -> Tensor:
    """A tensor with memory, if the parser could have made it."""
    info, size = TYPE_INFO[type_], nbytes(type_, ne, nb)
    strides = [stride for stride, n in zip(nb, ne, strict=True) if n > 1]
    odd = not info.quantized and any(stride % info.type_size for stride in strides)
    if odd or size > BUFFER or max(nb) >= 1 << 32:
        raise UnlikelyTensorError
    return tensor(type_, ne, nb=(nb[0], nb[1], nb[2], nb[3]))


def fill(s: Tensor, what: int | list[int]) -> None:
    memory = CONTEXT.memory(s.address, s.nbytes)
    if isinstance(what, int):
        memory[...] = what
    elif len(memory):
        words = np.array(what, np.int32).view(np.uint8)
        memory[...] = np.resize(words, len(memory))


def damaged_node(name: str, data: st.DataObject) -> tuple[Tensor, list[Tensor]]:
    """A node that is valid but for a few things about it, and its sources.

    Raises UnlikelyTensorError.
    """
    op, (type_, ne), specs, words = NODES[name]
    tensors = [tensor(type_, ne), *(tensor(t, dims) for t, dims in specs)]
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(tensors) - 1))
        tensors[at] = damaged(tensors[at], data)
    t, sources = tensors[0], tensors[1:]
    if name in IN_PLACE:
        t.address, t.view_src = sources[0].address, sources[0]
    for s in sources:
        fill(s, data.draw(FILLS))
    changed = list(words)
    for _ in range(data.draw(st.integers(0, 3))):
        changed[data.draw(st.integers(0, 15))] = data.draw(WORDS)
    linked: list[Tensor | None] = [*sources]
    if sources and data.draw(st.integers(0, 5)) == 0:
        at = data.draw(st.integers(0, len(sources) - 1))
        # One that is missing, or another one in its place, or one too many.
        linked[at] = data.draw(st.sampled_from([None, *sources]))
        if data.draw(st.booleans()):
            linked.append(sources[at])
    t.op, t.op_params = op, tuple(changed)
    t.src = (*linked, *(None,) * (10 - len(linked)))
    return t, sources


def test_all_ops_are_here() -> None:
    ops = {op for op, spec in OPS.items() if not spec.is_view}
    assert {node[0] for node in NODES.values()} == ops - CUSTOM


@pytest.mark.parametrize("op", sorted(CUSTOM))
def test_functions_of_the_client_are_refused(op: Op) -> None:
    t = node(op, F32, (4, 3), [tensor(F32, (4, 3), 0)], params(1, 2, 3))
    harness.refused(t, "a function pointer")


@pytest.mark.parametrize("name", NODES)
def test_valid_nodes_pass(name: str) -> None:
    op, (type_, ne), specs, words = NODES[name]
    sources = [tensor(t, dims, 0) for t, dims in specs]
    inplace = sources[0] if name in IN_PLACE else None
    t = node(op, type_, ne, sources, words, inplace=inplace)
    check(t)
    harness.run(t, kernels=False)
    assert all(map(harness.guards_intact, sources if inplace else [t]))


def is_refused(t: Tensor, *, kernels: bool) -> bool:
    """Whether a node is refused, before it runs or (for what data says) while it runs.

    No other exception is right.
    """
    try:
        harness.run(t, kernels=kernels)
    except GraphError:
        return True
    return False


@pytest.mark.parametrize("kernels", mostly_slow([True, False]), ids=["kernels", "reference"])
@pytest.mark.parametrize("name", NODES)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(data=st.data())
def test_damaged_nodes_are_refused_or_harmless(
    name: str, kernels: bool, data: st.DataObject
) -> None:
    try:
        t, sources = damaged_node(name, data)
    except UnlikelyTensorError:
        return
    before = [raw(s) for s in sources]
    is_refused(t, kernels=kernels)
    written = set(OPS[t.op].writes) | ({0} if name in IN_PLACE else set())
    written_places = {s.address for i, s in enumerate(t.src) if s is not None and i in written}
    for s, content in zip(sources, before, strict=True):
        assert harness.guards_intact(s)
        if s.address not in written_places:
            assert np.array_equal(raw(s), content), "a source changed"
    if name not in IN_PLACE:
        assert harness.guards_intact(t)


@pytest.mark.parametrize("name", VALID)
@settings(max_examples=EXAMPLES // 2, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_result_may_lie_over_its_sources(name: str, data: st.DataObject) -> None:
    """At any distance: what it gives is nobody's business, but it stays in the memory they have."""
    op, (type_, ne), specs, words = VALID[name]
    tensors = [tensor(type_, ne), *(tensor(t, dims) for t, dims in specs)]
    t, sources = tensors[0], tensors[1:]
    if not sources:
        return
    size = t.nbytes + sum(s.nbytes for s in sources)
    arena = tensor(GgmlType.I8, (size,))
    fill(arena, data.draw(FILLS))
    for part in tensors:
        align = 1 if part.quantized else part.type_size
        part.address = (
            arena.address + data.draw(st.integers(0, (size - part.nbytes) // align)) * align
        )
    t.op, t.op_params = op, words
    t.src = (*sources, *(None,) * (10 - len(sources)))
    is_refused(t, kernels=data.draw(st.booleans()))
    assert harness.guards_intact(arena)
