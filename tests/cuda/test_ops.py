"""Ops with a thread or a warp for each element, by CUDA kernels in the emulation.

A few nodes of each family against the array references; the differential tester draws many more.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.ops.table import ContractError
from tests.cuda import harness as cuda
from tests.cuda.test_matmul import weights
from tests.ops.harness import nmse
from tests.ops.tensors import node, noise, params, permuted, tensor

pytestmark = cuda.needs_compiler

F32, F16, I32, I64 = GgmlType.F32, GgmlType.F16, GgmlType.I32, GgmlType.I64
Q4_0, Q8_0 = GgmlType.Q4_0, GgmlType.Q8_0


def indices(*values: int) -> Tensor:
    return tensor(I32, (len(values),), np.array(values, np.int32))


def positive(ne: tuple[int, ...], seed: int = 0) -> Tensor:
    """Values between 0.1 and 1.1, for what decays."""
    rng = np.random.default_rng(seed)
    return tensor(F32, ne, 0.1 + rng.random((*(1,) * (4 - len(ne)), *ne[::-1])).astype(np.float32))


def of(op: Op, ne: tuple[int, ...], *sources: Tensor, p: tuple[int | float, ...] = ()) -> Tensor:
    """A node of F32."""
    return node(op, F32, ne, list(sources), params(*p))


def recurrent(op: Op, rows: int, **shared: int) -> Tensor:
    """Two sequences of three tokens, two heads of 8 elements."""
    size, heads, tokens, sequences = 8, 2, 6, 2
    sources = [
        positive((size, heads, 1 if i == shared.get("first") else tokens), i) for i in range(rows)
    ]
    states = noise((size * size * heads, sequences))
    return of(op, (size * heads, tokens + size * sequences), *sources, states, p=(0.5,))


def scan(kept: int) -> Tensor:
    """Two sequences of three tokens, four heads of five elements in two groups, 40 a state."""
    size, dim, heads, tokens, sequences, groups = 40, 5, 4, 3, 2, 2
    return of(
        Op.SSM_SCAN,
        (dim * heads * tokens * sequences + kept * size * dim * heads * sequences,),
        noise((size, dim, heads, 3)),
        noise((dim, heads, tokens, sequences)),
        noise((heads, tokens, sequences)),
        tensor(F32, (1, heads), -0.5),
        noise((size, groups, tokens, sequences)),
        noise((size, groups, tokens, sequences), seed=1),
        indices(2, 0),
        p=(kept,),
    )


def delta_net(kept: int) -> Tensor:
    size, heads, tokens, sequences = 40, 2, 3, 2
    return of(
        Op.GATED_DELTA_NET,
        (size * heads, tokens * sequences + kept * size * sequences),
        noise((size, 1, tokens, 1)),
        noise((size, 2, tokens, sequences), seed=1),
        noise((size, heads, tokens, sequences), seed=2),
        tensor(F32, (size, heads, tokens, sequences), -0.5),
        positive((1, heads, tokens, sequences)),
        noise((size * size * heads * sequences,), seed=3),
        p=(kept,),
    )


# What has no reduction is equal; sums may be made in another order.
MOVES: dict[str, Callable[[], Tensor]] = {
    "concat": lambda: of(Op.CONCAT, (3, 5, 4), noise((3, 2, 4)), noise((3, 3, 4)), p=(1,)),
    "concat of a permuted source": lambda: of(
        Op.CONCAT, (5, 4), permuted(noise((4, 3)), (1, 0, 2, 3)), noise((2, 4)), p=(0,)
    ),
    "concat of blocks": lambda: node(
        Op.CONCAT, Q8_0, (96, 2), [weights(Q8_0, 32, 2), weights(Q8_0, 64, 2)], params(0)
    ),
    "repeat": lambda: node(Op.REPEAT, F16, (6, 4, 3), [noise((3, 2, 1), F16)]),
    "pad": lambda: of(Op.PAD, (7, 4), noise((4, 3)), p=(2, 1, 0, 1)),
    "pad around": lambda: of(Op.PAD, (11, 3), noise((4, 3)), p=(5, 2, 0, 0, 0, 0, 0, 0, 1)),
    "reflect": lambda: of(Op.PAD_REFLECT_1D, (9, 2), noise((4, 2)), p=(3, 2)),
    "roll": lambda: of(Op.ROLL, (5, 4), noise((5, 4)), p=(-2, 3)),
    "set": lambda: of(Op.SET, (6, 4), noise((6, 4)), noise((3, 2)), p=(24, 96, 96, 32)),
    "acc": lambda: of(Op.ACC, (6, 4), noise((6, 4)), noise((3, 2)), p=(24, 96, 96, 32)),
    "add_id": lambda: of(
        Op.ADD_ID,
        (5, 2, 3),
        noise((5, 2, 3)),
        noise((5, 4)),
        tensor(I32, (2, 3), np.array([[0, 3], [2, 2], [1, 0]])),
    ),
    "windows": lambda: of(Op.WIN_PART, (3, 2, 2, 6), noise((3, 5, 3)), p=(3, 2, 2)),
    "windows back": lambda: of(Op.WIN_UNPART, (3, 5, 3), noise((3, 2, 2, 6)), p=(2,)),
    "relative positions": lambda: node(Op.GET_REL_POS, F16, (4, 3, 3), [noise((4, 5), F16)]),
    "fill": lambda: node(Op.FILL, F16, (5, 2), [noise((5, 2), F16)], params(1.5)),
    "arange": lambda: of(Op.ARANGE, (7,), p=(1.0, 4.5, 0.5)),
    "diag": lambda: of(Op.DIAG, (4, 4, 2), noise((4, 1, 2))),
    "triangle": lambda: of(Op.TRI, (4, 4, 2), noise((4, 4, 2)), p=(2,)),
    "mask": lambda: of(Op.DIAG_MASK_INF, (6, 3, 2), noise((6, 3, 2)), p=(2,)),
    "count": lambda: node(Op.COUNT_EQUAL, I64, (1,), [indices(*range(70)), indices(*[3] * 70)]),
    "nearest": lambda: of(Op.UPSCALE, (6, 9, 2), noise((3, 3, 1)), p=(0,)),
    "columns": lambda: of(
        Op.IM2COL, (18, 4, 3, 2), noise((3, 3, 2, 4)), noise((6, 5, 2, 2)), p=(2, 2, 2, 1, 1, 1, 1)
    ),
    "columns of lines": lambda: node(
        Op.IM2COL, F16, (6, 5, 2), [noise((3, 2, 4)), noise((5, 2, 2))], params(1, 0, 1, 0, 1, 0, 0)
    ),
    "largest": lambda: of(Op.POOL_2D, (3, 2, 2), noise((5, 4, 2)), p=(0, 3, 3, 2, 2, 1, 0)),
}
SUMS: dict[str, Callable[[], Tensor]] = {
    "sum": lambda: of(Op.SUM, (1,), permuted(noise((70, 3, 5)), (0, 2, 1, 3))),
    "cumsum": lambda: of(Op.CUMSUM, (300, 3), noise((300, 3))),
    "timesteps": lambda: of(Op.TIMESTEP_EMBEDDING, (9, 3), noise((3,)), p=(9, 10000)),
    "added positions": lambda: of(
        Op.ADD_REL_POS, (9, 6, 2), noise((9, 6, 2)), noise((3, 2, 3, 2)), noise((3, 2, 3, 2))
    ),
    "bilinear": lambda: of(Op.UPSCALE, (7, 5, 2), noise((3, 4, 2)), p=(1,)),
    "antialiased": lambda: of(Op.UPSCALE, (3, 2), noise((11, 7)), p=(1 | 1 << 9,)),
    "bicubic": lambda: of(Op.UPSCALE, (7, 5), noise((3, 4)), p=(2 | 1 << 8,)),
    "conv_2d": lambda: of(
        Op.CONV_2D,
        (4, 3, 4, 2),
        noise((3, 3, 2, 4), F16),
        noise((6, 5, 2, 2)),
        p=(2, 2, 2, 1, 1, 1),
    ),
    "conv_2d_dw": lambda: of(
        Op.CONV_2D_DW, (6, 5, 2, 2), noise((3, 3, 1, 2)), noise((6, 5, 2, 2)), p=(1, 1, 1, 1, 1, 1)
    ),
    "conv_transpose_1d": lambda: of(
        Op.CONV_TRANSPOSE_1D, (11, 4), noise((3, 4, 2)), noise((5, 2)), p=(2, 0, 1)
    ),
    "conv_transpose_2d": lambda: of(
        Op.CONV_TRANSPOSE_2D, (7, 7, 4, 2), noise((3, 3, 4, 2)), noise((3, 3, 2, 2)), p=(2,)
    ),
    "mean": lambda: of(Op.POOL_1D, (3, 4), noise((5, 4)), p=(1, 3, 2, 1)),
    "pool back": lambda: of(
        Op.POOL_2D_BACK,
        (5, 4, 2),
        noise((3, 2, 2)),
        noise((5, 4, 2), seed=1),
        p=(0, 3, 3, 2, 2, 1, 0),
    ),
    "ssm_conv": lambda: of(Op.SSM_CONV, (5, 3, 2), noise((6, 5, 2)), noise((4, 5))),
    "ssm_scan": lambda: scan(1),
    "ssm_scan with snapshots": lambda: scan(2),
    "wkv6": lambda: recurrent(Op.RWKV_WKV6, 5, first=3),
    "wkv7": lambda: recurrent(Op.RWKV_WKV7, 6),
    "gated_linear_attn": lambda: recurrent(Op.GATED_LINEAR_ATTN, 4),
    "gated_delta_net": lambda: delta_net(1),
    "gated_delta_net with snapshots": lambda: delta_net(3),
    "solve_tri": lambda: of(Op.SOLVE_TRI, (3, 5, 2), positive((5, 5, 2)), noise((3, 5, 2))),
    "indexer": lambda: of(
        Op.LIGHTNING_INDEXER,
        (5, 3, 1, 2),
        noise((32, 2, 3, 2)),
        weights(Q4_0, 32, 1, 5, 2),
        noise((2, 3, 1, 2)),
        noise((5, 3), F16),
    ),
    "streams combined": lambda: of(
        Op.DSV4_HC_COMB, (4, 4, 3), noise((24, 3)), noise((3,)), noise((24,)), p=(1e-6, 4)
    ),
    "streams to one": lambda: of(
        Op.DSV4_HC_PRE, (6, 3), noise((6, 4, 3)), noise((4, 3)), p=(0.5, 0)
    ),
    "one to streams": lambda: of(
        Op.DSV4_HC_POST,
        (6, 4, 3),
        noise((6, 3)),
        noise((6, 4, 3)),
        noise((4, 3)),
        noise((4, 4, 3)),
    ),
    "silu back": lambda: of(Op.SILU_BACK, (5, 2), noise((5, 2)), noise((5, 2), seed=1)),
    "repeat back": lambda: of(Op.REPEAT_BACK, (3, 2), noise((6, 4, 3))),
    "get_rows back": lambda: of(Op.GET_ROWS_BACK, (5, 4), noise((5, 6)), indices(3, 0, 0, 1, 3, 3)),
    "out_prod": lambda: of(Op.OUT_PROD, (32, 4, 2), weights(Q8_0, 32, 3), noise((4, 3, 2))),
    "rms_norm back": lambda: of(
        Op.RMS_NORM_BACK, (70, 3), noise((70, 3)), noise((70, 3), seed=1), p=(1e-5,)
    ),
    "soft_max back": lambda: of(
        Op.SOFT_MAX_BACK, (70, 3), noise((70, 3)), positive((70, 3)), p=(0.5,)
    ),
    "loss": lambda: of(Op.CROSS_ENTROPY_LOSS, (1,), noise((70, 3)), positive((70, 3))),
    "loss back": lambda: of(
        Op.CROSS_ENTROPY_LOSS_BACK, (70, 3), noise((1,)), noise((70, 3)), positive((70, 3))
    ),
    "attention back": lambda: of(
        Op.FLASH_ATTN_BACK,
        (8 * 3 * 4 + 2 * 8 * 5 * 2,),
        noise((8, 3, 4)),
        noise((8, 5, 2), seed=1),
        noise((5, 8, 2), seed=2),
        noise((8, 3, 4), seed=3),
        p=(1,),
    ),
    "blocks and floats": lambda: of(Op.ADD, (64, 3), weights(Q4_0, 64, 3), noise((64, 3))),
    "floats into blocks": lambda: node(
        Op.ADD, Q8_0, (64, 3), [weights(Q8_0, 64, 3), noise((64, 3))]
    ),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves(name: str) -> None:
    """Elements are copied, or chosen: to the bit."""
    expected, actual = cuda.by_both(MOVES[name]())
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("name", SUMS)
def test_sums(name: str) -> None:
    """The tolerance is test-backend-ops'."""
    expected, actual = cuda.by_both(SUMS[name]())
    assert nmse(expected, actual) < 1e-7


OUT_OF_RANGE: dict[str, Callable[[int], Tensor]] = {
    "add_id": lambda bad: of(
        Op.ADD_ID,
        (5, 1, 2),
        noise((5, 1, 2)),
        noise((5, 4)),
        tensor(I32, (1, 2), np.array([[0], [bad]])),
    ),
    "get_rows back": lambda bad: of(Op.GET_ROWS_BACK, (5, 4), noise((5, 2)), indices(0, bad)),
    "ssm_scan": lambda bad: of(
        Op.SSM_SCAN,
        (2 + 2 * 3 * 1 * 1 * 1,),
        noise((3, 1, 1, 4)),
        noise((1, 1, 1, 2)),
        noise((1, 1, 2)),
        noise((1, 1)),
        noise((3, 1, 1, 2)),
        noise((3, 1, 1, 2)),
        indices(0, bad),
        p=(1,),
    ),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1])
def test_indices_out_of_range(name: str, bad: int) -> None:
    """The graph fails, and nothing beside the source is read."""
    with pytest.raises(ContractError):
        cuda.run(OUT_OF_RANGE[name](bad))
