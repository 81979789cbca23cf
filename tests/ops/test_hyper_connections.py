"""DeepSeek V4's hyper connections against plain loops, and what their contracts refuse."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.ops.table import check
from tests.ops.harness import guards_intact, nmse, refused, run
from tests.ops.tensors import node, params, permuted, tensor, values

F32, F16 = GgmlType.F32, GgmlType.F16
LIMIT = 1e-11
SIZE, STREAMS, TOKENS = 6, 3, 5
Array = np.ndarray[Any, Any]


def noise(ne: tuple[int, ...], seed: int = 0, type_: GgmlType = F32) -> Tensor:
    rng = np.random.default_rng(seed)
    return tensor(type_, ne, rng.standard_normal(tensor(F32, ne).ne[::-1]))


def doubles(t: Tensor) -> Array:
    return values(t).astype(np.float64)


def swapped(ne: tuple[int, ...], seed: int) -> Tensor:
    """Noise of shape ``ne`` with dimensions 0 and 1 the other way round in memory."""
    return permuted(noise((ne[1], ne[0], *ne[2:]), seed), (1, 0, 2, 3))


def check_values(t: Tensor, expected: Array) -> None:
    run(t, kernels=False)
    assert nmse(expected, values(t)) < LIMIT
    assert guards_intact(t)


def comb(mixes: Tensor, rounds: int = 3, eps: float = 1e-3, n_scales: int = 3) -> Tensor:
    given = [mixes, noise((n_scales,), 1), noise((24,), 2)]
    return node(Op.DSV4_HC_COMB, F32, (4, 4, TOKENS), given, params(eps, rounds))


@pytest.mark.parametrize("rounds", [1, 2, 20])
@pytest.mark.parametrize("mixes", [noise((24, TOKENS)), swapped((24, TOKENS), 0)])
def test_mixing_matrices(mixes: Tensor, rounds: int) -> None:
    t = comb(mixes, rounds)
    scale, base = (doubles(s)[0, 0, 0] for s in t.src[1:3] if s is not None)
    eps = t.param_f32(0)
    expected = np.zeros((1, TOKENS, 4, 4))
    for token in range(TOKENS):
        matrix = doubles(mixes)[0, 0, token, 8:].reshape(4, 4) * scale[2] + base[8:].reshape(4, 4)
        for row in matrix:
            weights = [math.exp(x) for x in row]
            row[:] = [w / sum(weights) + eps for w in weights]
        for i in range(2 * rounds - 1):
            axis = i % 2
            matrix = matrix / (matrix.sum(axis=axis, keepdims=True) + eps)
        expected[0, token] = matrix
    check_values(t, expected)


def test_contract_of_mixing_matrices() -> None:
    check(comb(noise((24, TOKENS)), n_scales=7))
    refused(comb(noise((24, TOKENS)), n_scales=2), "2 scales")
    for rounds in (0, -1, (1 << 31) - 1):
        refused(comb(noise((24, TOKENS)), rounds), f"{rounds} rounds")
    refused(comb(noise((35, TOKENS))), "source 0 must be 24x5")
    refused(comb(noise((24, TOKENS + 1))), "the result must be")


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_reading_streams(gated: bool, views: bool) -> None:
    make = swapped if views else noise
    x = make((SIZE, STREAMS, TOKENS), 1)
    weights = make((SIZE, STREAMS, TOKENS) if gated else (STREAMS, TOKENS), 2)
    expected = np.zeros((1, 1, TOKENS, SIZE))
    for token, stream, i in np.ndindex(TOKENS, STREAMS, SIZE):
        if gated:
            weight = 1 / (1 + math.exp(-doubles(weights)[0, token, stream, i]))
        else:
            weight = doubles(weights)[0, 0, token, stream]
        expected[0, 0, token, i] += 0.75 * weight * doubles(x)[0, token, stream, i]
    words = params(0.75, int(gated))
    check_values(node(Op.DSV4_HC_PRE, F32, (SIZE, TOKENS), [x, weights], words), expected)


def test_contract_of_reading_streams() -> None:
    def read(x: Tensor, weights: Tensor, gated: int = 0) -> Tensor:
        return node(Op.DSV4_HC_PRE, F32, (SIZE, TOKENS), [x, weights], params(1.0, gated))

    x, weights = noise((SIZE, STREAMS, TOKENS)), noise((STREAMS, TOKENS))
    check(read(x, weights))
    check(read(x, x, 1))
    refused(read(x, weights, 1), "source 1 must be 6x3x5x1")
    refused(read(x, x), "source 1 must be 3x5x1x1")
    refused(read(noise((SIZE, STREAMS, TOKENS, 2)), weights), "source 0 must be")
    endless = tensor(F32, (SIZE, 1 << 40, TOKENS), nb=(4, 0, 24, 120))
    refused(read(endless, weights), "elements of source 0 overlap")
    refused(read(tensor(F32, (SIZE, 0, TOKENS)), tensor(F32, (0, TOKENS))), "there are no streams")


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_writing_streams(mixed: bool, views: bool) -> None:
    make = swapped if views else noise
    x, residual = make((SIZE, TOKENS), 1), make((SIZE, STREAMS, TOKENS), 2)
    post, matrix = make((STREAMS, TOKENS), 3), make((STREAMS, STREAMS, TOKENS), 4)
    expected = np.zeros((1, TOKENS, STREAMS, SIZE))
    for token, to, i in np.ndindex(TOKENS, STREAMS, SIZE):
        total = doubles(x)[0, 0, token, i] * doubles(post)[0, 0, token, to]
        for stream in range(STREAMS):
            share = doubles(matrix)[0, token, stream, to] if mixed else float(stream == to)
            total += doubles(residual)[0, token, stream, i] * share
        expected[0, token, to, i] = total
    given = [x, residual, post, *([matrix] if mixed else [])]
    check_values(node(Op.DSV4_HC_POST, F32, (SIZE, STREAMS, TOKENS), given), expected)


def test_contract_of_writing_streams() -> None:
    good = [
        noise((SIZE, TOKENS)), noise((SIZE, STREAMS, TOKENS)), noise((STREAMS, TOKENS)),
        noise((STREAMS, STREAMS, TOKENS)),
    ]  # fmt: skip
    check(node(Op.DSV4_HC_POST, F32, (SIZE, STREAMS, TOKENS), good))
    for i in range(4):
        for bad in (noise((2, 2, 2, 2)), noise((SIZE, TOKENS), 0, F16)):
            given = [*good[:i], bad, *good[i + 1 :]]
            t = node(Op.DSV4_HC_POST, F32, (SIZE, STREAMS, TOKENS), given)
            refused(t, f"source {i} must")
