"""References of ops with a state against plain loops, and what their contracts refuse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.graph.errors import GraphError
from rpc_server.ops.table import check
from tests.ops.harness import guards_intact, nmse, refused, run
from tests.ops.tensors import CONTEXT, integers, node, noise, params, permuted, tensor, values

F32, F16, I32 = GgmlType.F32, GgmlType.F16, GgmlType.I32
LIMIT = 1e-11
Array = np.ndarray[Any, Any]


def doubles(t: Tensor) -> Array:
    return values(t).astype(np.float64)


def check_values(t: Tensor, expected: Array) -> None:
    run(t, kernels=False)
    assert nmse(expected.reshape(t.ne[::-1]), values(t)) < LIMIT
    assert guards_intact(t)


def convolution(x: Tensor, weights: Tensor, n_tokens: int = 4) -> Tensor:
    return node(Op.SSM_CONV, F32, (weights.ne[1], n_tokens, x.ne[2]), [x, weights])


@pytest.mark.parametrize("window", [1, 4])
def test_convolution(window: int) -> None:
    x, weights = noise((window + 3, 6, 2)), noise((window, 6), seed=1)
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
    refused(convolution(noise((7, 6, 2), F16), noise((4, 6))), "source 0 must not be F16")


S, D, HEADS, TOKENS, SEQUENCES = 5, 3, 4, 6, 2


def scan_sources(n_decays: int = 1, groups: int = 2) -> list[Tensor]:
    weights, steps = (S, groups, TOKENS, SEQUENCES), (HEADS, TOKENS, SEQUENCES)
    decays = tensor(F32, (n_decays, HEADS), -abs(doubles(noise((n_decays, HEADS), seed=4))))
    return [
        noise((S, D, HEADS, 7), seed=1),
        noise((D, HEADS, TOKENS, SEQUENCES), seed=2),
        tensor(F32, steps, doubles(noise(steps, seed=3)) * 9),
        decays,
        noise(weights, seed=5),
        noise(weights, seed=6),
        integers(6, 2),
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
        run(scan([*scan_sources()[:6], integers(0, state)]), kernels=False)


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
    refused(scan([*scan_sources()[:6], integers(1, 2, 3)]), "source 6 must be")
    refused(scan(scan_sources(S), 2), "2 snapshots")
    refused(scan(scan_sources(), -1), "-1 snapshots")
    t = scan(scan_sources(), 1)
    t.op_params = params(2)
    refused(t, "the result must be")


SIZE, N_TOKENS = 5, 6


def linear(op: Op, n_rows: int, sequences: int = 2, scale: float = 0.5) -> Tensor:
    sources = [noise((SIZE, HEADS, N_TOKENS), seed=i) for i in range(n_rows)]
    if op is Op.RWKV_WKV6:
        sources[3] = noise((SIZE, HEADS), seed=3)
    sources.append(noise((SIZE * SIZE * HEADS, sequences), seed=9))
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
        for bad in (noise((SIZE, HEADS, N_TOKENS + 1)), noise((SIZE, HEADS, N_TOKENS), F16)):
            t = linear(op, n)
            t.src = (*t.src[:i], bad, *t.src[i + 1 :])
            refused(t, f"source {i}|source 1 must be|states of|the result must be")
    t = linear(op, n)
    t.ne = (SIZE * HEADS, N_TOKENS + SIZE, 1, 1)
    refused(t, "the result must be")


@dataclass(frozen=True)
class DeltaNet:
    """Sizes of a GATED_DELTA_NET; of keys the heads and the sequences."""

    keys: tuple[int, int] = (2, 2)
    n_gates: int = 1
    kept: int = 1
    tokens: int = 5
    heads: ClassVar[int] = 4

    def sources(self) -> list[Tensor]:
        v = (SIZE, self.heads, self.tokens, 2)
        keys = (SIZE, self.keys[0], self.tokens, self.keys[1])
        gates = (self.n_gates, *v[1:])
        return [
            noise(keys, seed=1), noise(keys, seed=2), noise(v, seed=3),
            tensor(F32, gates, -abs(doubles(noise(gates, seed=4)))),
            tensor(F32, (1, *v[1:]), abs(doubles(noise((1, *v[1:]), seed=5)))),
            noise((SIZE, SIZE, self.heads, 2), seed=6),
        ]  # fmt: skip

    def node(self, sources: list[Tensor]) -> Tensor:
        ne = (SIZE * self.heads, 2 * self.tokens + 2 * SIZE * self.kept)
        return node(Op.GATED_DELTA_NET, F32, ne, sources, params(self.kept))

    def expected(self, sources: list[Tensor]) -> Array:
        q, k, v, gates, rates, states = map(doubles, sources)
        state = states.copy()
        outputs = np.zeros(v.shape)
        kept = np.zeros((self.kept, *state.shape))
        for token, s, h in np.ndindex(self.tokens, 2, self.heads):
            at = s // (2 // self.keys[1]), token, h % self.keys[0]
            matrix = state[s, h]
            matrix *= np.exp(gates[s, token, h])
            difference = rates[s, token, h] * (v[s, token, h] - matrix @ k[at])
            matrix += np.outer(difference, k[at])
            outputs[s, token, h] = matrix @ q[at] / math.sqrt(SIZE)
            if self.tokens - 1 - token < self.kept:
                kept[self.tokens - 1 - token, s, h] = matrix
        return np.concatenate([outputs.ravel(), kept.ravel()])


NETS = (
    DeltaNet(),
    DeltaNet(n_gates=SIZE),
    DeltaNet(keys=(3, 2)),
    DeltaNet(keys=(7, 2)),
    DeltaNet(keys=(2, 1)),
    DeltaNet(kept=3),
    DeltaNet(kept=5, n_gates=SIZE),
)


@pytest.mark.parametrize("net", NETS, ids=str)
def test_delta_net(net: DeltaNet) -> None:
    sources = net.sources()
    check_values(net.node(sources), net.expected(sources))


def test_delta_net_of_views() -> None:
    net = DeltaNet()
    sources = net.sources()
    expected = net.expected(sources)
    for i in range(3):
        dense = sources[i]
        turned = tensor(F32, (SIZE, dense.ne[2], dense.ne[1], dense.ne[3]))
        sources[i] = permuted(turned, (0, 2, 1, 3))
        CONTEXT.store(sources[i], values(dense))
    check_values(net.node(sources), expected)


def test_delta_net_leaves_older_snapshots_alone() -> None:
    net = DeltaNet(kept=4, tokens=2)
    sources = net.sources()
    t = net.node(sources)
    CONTEXT.store(t, 7)
    run(t, kernels=False)
    size = 2 * net.heads * SIZE
    written = (2 + 2 * SIZE) * size
    got = values(t).ravel()
    assert nmse(net.expected(sources)[:written], got[:written]) < LIMIT
    assert (got[written:] == 7).all()


def test_delta_net_without_tokens_keeps_the_state() -> None:
    net = DeltaNet(tokens=0)
    sources = net.sources()
    t = net.node(sources)
    run(t, kernels=False)
    np.testing.assert_array_equal(values(t).ravel(), values(sources[5]).ravel())


def test_delta_net_of_clients_that_know_no_snapshots() -> None:
    net = DeltaNet()
    sources = net.sources()
    t = net.node(sources)
    t.op_params = params(0)
    check_values(t, net.expected(sources))


def test_contract_of_delta_net() -> None:
    net = DeltaNet()
    check(net.node(net.sources()))
    refused(DeltaNet(kept=-1).node(net.sources()), "-1 snapshots")
    refused(net.node(DeltaNet(n_gates=2).sources()), "2 gates for 5 elements")
    refused(net.node(DeltaNet(keys=(0, 2)).sources()), "source 0 has no heads")
    for i in range(6):
        for bad in (noise((SIZE, 4, 6, 2)), noise((SIZE, 4, 5, 2), F16)):
            sources = net.sources()
            sources[i] = bad
            # All others are measured by the values, source 2.
            refused(net.node(sources), "source [0-5] must|gates for|states of|is not a multiple")
    three = net.sources()
    three[0] = noise((SIZE, 2, 5, 3))
    refused(net.node(three), "sequences over source 0: 2 is not a multiple of 3")
    t = net.node(net.sources())
    t.op_params = params(2)
    refused(t, "the result must be")
