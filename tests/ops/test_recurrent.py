"""References of ops with a state against plain loops, and what their contracts refuse."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from protocol.ggml_ops import Op
from protocol.ggml_types import GgmlType
from rpc_server.graph.errors import GraphError
from rpc_server.graph.tensor import Tensor
from rpc_server.ops.table import ContractError, check
from tests.ops.harness import CONTEXT, guards_intact, nmse, node, params, run, tensor, values

F32, F16, I32 = GgmlType.F32, GgmlType.F16, GgmlType.I32
LIMIT = 1e-11
Array = np.ndarray[Any, Any]


def noise(ne: tuple[int, ...], seed: int = 0, type_: GgmlType = F32) -> Tensor:
    rng = np.random.default_rng(seed)
    return tensor(type_, ne, rng.standard_normal(tensor(F32, ne).ne[::-1]))


def ids(*numbers: int) -> Tensor:
    t = tensor(I32, (len(numbers),))
    CONTEXT.view(t)[...] = numbers
    return t


def doubles(t: Tensor) -> Array:
    return values(t).astype(np.float64)


def check_values(t: Tensor, expected: Array) -> None:
    run(t, kernels=False)
    assert nmse(expected.reshape(t.ne[::-1]), values(t)) < LIMIT
    assert guards_intact(t)


def refused(t: Tensor, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        check(t)


def convolution(x: Tensor, weights: Tensor, n_tokens: int = 4) -> Tensor:
    return node(Op.SSM_CONV, F32, (weights.ne[1], n_tokens, x.ne[2]), [x, weights])


@pytest.mark.parametrize("window", [1, 4])
def test_convolution(window: int) -> None:
    x, weights = noise((window + 3, 6, 2)), noise((window, 6), 1)
    expected = np.zeros((2, 4, 6))
    for sequence, token, channel in np.ndindex(2, 4, 6):
        seen = doubles(x)[0, sequence, channel, token : token + window]
        expected[sequence, token, channel] = sum(seen * doubles(weights)[0, 0, channel])
    check_values(convolution(x, weights), expected)


def test_contract_of_the_convolution() -> None:
    check(convolution(noise((7, 6, 2)), noise((4, 6))))
    refused(convolution(noise((8, 6, 2)), noise((4, 6))), "source 0 must be 7x6x2x1")
    refused(convolution(noise((7, 5, 2)), noise((4, 6))), "source 0 must be")
    refused(convolution(noise((7, 6, 2)), noise((4, 6, 2))), "source 1 must be")
    refused(convolution(noise((3, 6, 2)), tensor(F32, (0, 6))), "the window is empty")
    refused(convolution(noise((7, 6, 2), 0, F16), noise((4, 6))), "source 0 must not be F16")


S, D, HEADS, TOKENS, SEQUENCES = 5, 3, 4, 6, 2


def scan_sources(n_decays: int = 1, groups: int = 2) -> list[Tensor]:
    weights = (S, groups, TOKENS, SEQUENCES)
    decays = tensor(F32, (n_decays, HEADS), -abs(doubles(noise((n_decays, HEADS), 4))))
    return [
        noise((S, D, HEADS, 7), 1),
        noise((D, HEADS, TOKENS, SEQUENCES), 2),
        tensor(F32, (HEADS, TOKENS, SEQUENCES), doubles(noise((HEADS, TOKENS, SEQUENCES), 3)) * 9),
        decays,
        noise(weights, 5),
        noise(weights, 6),
        ids(6, 2),
    ]


def scan(sources: list[Tensor], kept: int = 1) -> Tensor:
    states, x = sources[:2]
    size = x.nelements + max(kept, 1) * states.ne[0] * x.ne[0] * x.ne[1] * x.ne[3]
    return node(Op.SSM_SCAN, F32, (size,), sources, params(kept))


def expected_scan(sources: list[Tensor], kept: int) -> Array:
    states, x, dt, decays, b, c = (doubles(s) for s in sources[:6])
    groups = b.shape[2]
    outputs = np.zeros(x.shape)
    snapshots = np.zeros((kept, SEQUENCES, HEADS, D, S))
    for q, h, d in np.ndindex(SEQUENCES, HEADS, D):
        state = states[(6, 2)[q], h, d]
        for token in range(TOKENS):
            g = h // (HEADS // groups)
            step = math.log(1 + math.exp(dt[0, q, token, h]))
            state = (
                state * np.exp(step * decays[0, 0, h]) + step * x[q, token, h, d] * b[q, token, g]
            )
            outputs[q, token, h, d] = sum(state * c[q, token, g])
            if TOKENS - 1 - token < kept:
                snapshots[TOKENS - 1 - token, q, h, d] = state
    return np.concatenate([outputs.reshape(-1), snapshots.reshape(-1)])


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("n_decays", "kept"), [(S, 1), (1, 1), (1, 0), (1, 3), (1, TOKENS)])
def test_scan(groups: int, n_decays: int, kept: int) -> None:
    sources = scan_sources(n_decays, groups)
    check_values(scan(sources, kept), expected_scan(sources, max(kept, 1)))


def test_more_snapshots_than_tokens() -> None:
    sources = scan_sources()
    t = scan(sources, TOKENS + 2)
    run(t, kernels=False)
    expected = expected_scan(sources, TOKENS)
    assert nmse(expected, values(t)[0, 0, 0, : len(expected)]) < LIMIT


@pytest.mark.parametrize("state", [-1, 7, -(1 << 31)])
def test_no_such_state(state: int) -> None:
    with pytest.raises(GraphError, match="out of range"):
        run(scan([*scan_sources()[:6], ids(0, state)]), kernels=False)


def test_contract_of_the_scan() -> None:
    check(scan(scan_sources()))
    for i, ne in (
        (0, (S, D + 1, HEADS, 7)), (0, (S, D, 2, 7)), (2, (HEADS, TOKENS, 1)),
        (2, (HEADS, TOKENS, SEQUENCES, 2)), (3, (1, 3)), (3, (1, HEADS, 2)),
        (4, (S + 1, 2, TOKENS, SEQUENCES)), (4, (S, 2, TOKENS, 1)),
        (5, (S, 1, TOKENS, SEQUENCES)), (5, (S, 2, 1, SEQUENCES)),
    ):  # fmt: skip
        sources = scan_sources()
        sources[i] = noise(ne)
        t = scan(scan_sources())
        t.src = (*sources, *(None,) * 3)
        refused(t, f"source {i} must be|source 5 must be")
    refused(scan(scan_sources(n_decays=2)), "2 decays for 5")
    refused(scan(scan_sources(groups=3)), "4 is not a multiple of 3")
    refused(scan([*scan_sources()[:6], ids(1, 2, 3)]), "source 6 must be")
    refused(scan(scan_sources(S), 2), "2 snapshots")
    refused(scan(scan_sources(), -1), "-1 snapshots")
    t = scan(scan_sources(), 1)
    t.op_params = params(2)
    refused(t, "the result must be")


SIZE, N_TOKENS = 5, 6


def linear(op: Op, n_rows: int, sequences: int = 2, scale: float = 0.5) -> Tensor:
    sources = [noise((SIZE, HEADS, N_TOKENS), i) for i in range(n_rows)]
    if op is Op.RWKV_WKV6:
        sources[3] = noise((SIZE, HEADS), 3)
    sources.append(noise((SIZE * SIZE * HEADS, sequences), 9))
    ne = (SIZE * HEADS, N_TOKENS + SIZE * sequences)
    return node(op, F32, ne, sources, params(scale))


ROWS = {Op.RWKV_WKV6: 5, Op.RWKV_WKV7: 6, Op.GATED_LINEAR_ATTN: 4}


def expected_linear(t: Tensor, sequences: int) -> Array:
    n_rows = ROWS[t.op]
    rows = [doubles(s)[0] for s in t.src[:n_rows] if s is not None]
    states = t.src[n_rows]
    assert states is not None
    last = doubles(states).reshape(sequences, HEADS, SIZE, SIZE).copy()
    outputs = np.zeros((N_TOKENS, HEADS, SIZE))
    for token, h in np.ndindex(N_TOKENS, HEADS):
        state = last[token // (N_TOKENS // sequences), h]
        if t.op is Op.RWKV_WKV6:
            k, v, r, first, decay = (row[0 if i == 3 else token, h] for i, row in enumerate(rows))
            for i, j in np.ndindex(SIZE, SIZE):
                outputs[token, h, j] += (k[i] * v[j] * first[i] + state[i, j]) * r[i]
                state[i, j] = state[i, j] * decay[i] + k[i] * v[j]
        elif t.op is Op.RWKV_WKV7:
            r, w, k, v, a, b = (row[token, h] for row in rows)
            for i in range(SIZE):
                removed = sum(state[i] * a)
                state[i] = state[i] * w + v[i] * k + removed * b
                outputs[token, h, i] = sum(state[i] * r)
        else:
            k, v, q, gate = (row[token, h] for row in rows)
            for i, j in np.ndindex(SIZE, SIZE):
                state[i, j] = state[i, j] * gate[i] + k[i] * v[j]
                outputs[token, h, j] += state[i, j] * q[i] * t.param_f32(0)
    return np.concatenate([outputs.reshape(-1), last.reshape(-1)])


@pytest.mark.parametrize("op", ROWS)
@pytest.mark.parametrize("sequences", [1, 2, 6])
def test_linear_attentions(op: Op, sequences: int) -> None:
    t = linear(op, ROWS[op], sequences)
    check_values(t, expected_linear(t, sequences))


@pytest.mark.parametrize("op", ROWS)
def test_contract_of_linear_attentions(op: Op) -> None:
    n = ROWS[op]
    check(linear(op, n))
    refused(linear(op, n, sequences=4), "6 is not a multiple of 4")
    for i in range(n + 1):
        for bad in (noise((SIZE, HEADS, N_TOKENS + 1)), noise((SIZE, HEADS, N_TOKENS), 0, F16)):
            t = linear(op, n)
            t.src = (*t.src[:i], bad, *t.src[i + 1 :])
            refused(t, f"source {i}|source 1 must be|states of|the result must be")
    t = linear(op, n)
    t.ne = (SIZE * HEADS, N_TOKENS + SIZE, 1, 1)
    refused(t, "the result must be")
