"""References of training's ops against plain double-precision code, and what contracts refuse."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.graph.errors import GraphError
from rpc_server.ops import slices
from rpc_server.ops.table import ContractError, check
from tests.ops.harness import guards_intact, nmse, refused, run
from tests.ops.tensors import CONTEXT, node, params, permuted, raw, tensor, values, view
from tests.ops.test_hostile import UnlikelyTensorError, damaged

F32, F16 = GgmlType.F32, GgmlType.F16
LIMIT = 1e-11
SHAPE = (7, 3, 2, 2)
Array = np.ndarray[Any, Any]


def noise(ne: tuple[int, ...], seed: int = 0, scale: float = 1, type_: GgmlType = F32) -> Tensor:
    rng = np.random.default_rng(seed)
    return tensor(type_, ne, rng.standard_normal(tensor(F32, ne).ne[::-1]) * scale)


def doubles(t: Tensor) -> Array:
    return values(t).astype(np.float64)


def rows_apart(t: Tensor) -> Tensor:
    """The same values where rows have gaps between them."""
    wide = tensor(t.type, (t.ne[0] + 3, *t.ne[1:]), 9)
    part = view(wide, t.ne, wide.nb)
    CONTEXT.store(part, values(t))
    return part


# -- losses


def labels(ne: tuple[int, ...] = SHAPE, seed: int = 5) -> Tensor:
    weights = np.exp(doubles(noise(ne, seed)))
    return tensor(F32, ne, weights / weights.sum(axis=3, keepdims=True))


def log_softmax(x: Array) -> Array:
    shifted = x - x.max(axis=3, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=3, keepdims=True)))


def loss(logits: Tensor, wanted: Tensor) -> Tensor:
    return node(Op.CROSS_ENTROPY_LOSS, F32, (1,), [logits, wanted])


@pytest.mark.parametrize("scale", [1, 300])
@pytest.mark.parametrize("apart", [False, True])
def test_loss(scale: float, apart: bool) -> None:
    logits, wanted = noise(SHAPE, 0, scale), labels()
    expected = -(log_softmax(doubles(logits)) * doubles(wanted)).sum() / 12
    t = loss(*(map(rows_apart, (logits, wanted)) if apart else (logits, wanted)))
    run(t, kernels=False)
    assert values(t).item() == pytest.approx(expected, rel=1e-6)
    assert guards_intact(t)


def test_gradient_of_the_loss() -> None:
    logits, wanted, gradient = noise(SHAPE), labels(), noise((1,), 3)
    share = doubles(gradient).item() / 12
    expected = (np.exp(log_softmax(doubles(logits))) - doubles(wanted)) * share
    t = node(Op.CROSS_ENTROPY_LOSS_BACK, F32, SHAPE, [gradient, logits, wanted])
    run(t, kernels=False)
    assert nmse(expected, values(t)) < LIMIT
    assert guards_intact(t)


@pytest.mark.parametrize(("ne", "expected"), [((0, 3), 0.0), ((4, 0), np.nan), ((0, 0), np.nan)])
def test_loss_of_nothing(ne: tuple[int, ...], expected: float) -> None:
    nothing = tensor(F32, ne)
    t = loss(nothing, nothing)
    run(t, kernels=False)
    np.testing.assert_array_equal(values(t).item(), expected)
    run(node(Op.CROSS_ENTROPY_LOSS_BACK, F32, ne, [noise((1,)), nothing, nothing]), kernels=False)


def test_contracts_of_losses() -> None:
    a, b, one = noise(SHAPE), labels(), noise((1,))
    refused(loss(a, labels((7, 3, 2))), "source 1 must be 7x3x2x2")
    refused(loss(noise(SHAPE, 0, 1, F16), b), "source 0 must not be F16")
    refused(node(Op.CROSS_ENTROPY_LOSS, F32, (2,), [a, b]), "the result must be 1x1x1x1")
    flat = tensor(F32, (7, 1 << 40), nb=(4, 0, 0, 0))
    refused(loss(flat, flat), "elements of source 0 overlap")

    def back(*given: Tensor) -> Tensor:
        return node(Op.CROSS_ENTROPY_LOSS_BACK, F32, SHAPE, given)

    check(back(one, a, b))
    refused(back(noise((2,)), a, b), "source 0 must be 1x1x1x1")
    refused(back(one, a, labels((7, 3, 2))), "source 2 must be")
    refused(back(one, noise((7, 3)), labels((7, 3))), "the result must be")


# -- optimizers

ADAMW = (0.01, 0.9, 0.99, 1e-8, 0.1, 1.5, 2.5)
SGD = (0.05, 0.3)


def adamw(*given: Tensor, settings_: tuple[float, ...] = ADAMW) -> Tensor:
    made = tensor(F32, (len(settings_),), settings_)
    return node(Op.OPT_STEP_ADAMW, F32, given[0].ne, [*given, made], inplace=given[0])


def sgd(*given: Tensor, settings_: tuple[float, ...] = SGD) -> Tensor:
    made = tensor(F32, (len(settings_),), settings_)
    return node(Op.OPT_STEP_SGD, F32, given[0].ne, [*given, made], inplace=given[0])


def optimized(n: int) -> list[Tensor]:
    """Weights, gradient, mean, and squares, which are positive."""
    made = [noise(SHAPE, i) for i in range(n)]
    if n == 4:
        made[3] = tensor(F32, SHAPE, abs(values(made[3])))
    return made


@pytest.mark.parametrize("apart", [False, True])
def test_adamw(apart: bool) -> None:
    given = optimized(4)
    weights, gradient, mean, square = map(doubles, given)
    if apart:
        given = [rows_apart(s) for s in given]
    run(adamw(*given), kernels=False)
    alpha, beta1, beta2, eps, decay, correct1, correct2 = ADAMW
    mean = mean * beta1 + gradient * (1 - beta1)
    square = square * beta2 + gradient**2 * (1 - beta2)
    step = alpha * mean * correct1 / (np.sqrt(square * correct2) + eps)
    expected = [weights * (1 - alpha * decay) - step, gradient, mean, square]
    for s, content in zip(given, expected, strict=True):
        assert nmse(content, values(s)) < LIMIT


@pytest.mark.parametrize("apart", [False, True])
def test_sgd(apart: bool) -> None:
    given = optimized(2)
    weights, gradient = map(doubles, given)
    if apart:
        given = [rows_apart(s) for s in given]
    run(sgd(*given), kernels=False)
    assert nmse(weights * (1 - SGD[0] * SGD[1]) - SGD[0] * gradient, values(given[0])) < LIMIT
    assert nmse(gradient, values(given[1])) == 0


@pytest.mark.parametrize(("step", "n"), [(adamw, 4), (sgd, 2)])
def test_contracts_of_optimizers(step: Any, n: int) -> None:
    good = optimized(n)
    check(step(*good))
    for i in range(1, n):
        for bad in (noise((7, 3, 2)), noise(SHAPE, 0, 1, F16)):
            refused(step(*good[:i], bad, *good[i + 1 :]), f"source {i} must")
    refused(step(*good, settings_=(1.0, 2.0, 3.0)), "3 parameters, not")
    t = step(*good)
    t.address = noise(SHAPE).address
    refused(t, "the result must be source 0")
    turned = [permuted(s, (1, 0, 2, 3)) for s in good]
    refused(step(*turned), "must have dense rows")
    if n == 4:
        flat = tensor(F32, SHAPE, nb=(4, 0, 0, 0))
        refused(step(*good[:3], flat), "elements of source 3 overlap")


@pytest.mark.parametrize(
    ("op", "n", "n_params"), [(Op.OPT_STEP_ADAMW, 4, 7), (Op.OPT_STEP_SGD, 2, 2)]
)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_steps_are_refused_or_harmless(
    op: Op, n: int, n_params: int, data: st.DataObject
) -> None:
    tensors = [*optimized(n), noise((n_params,))]
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, n))
        try:
            tensors[at] = damaged(tensors[at], data)
        except UnlikelyTensorError:
            return
    t = node(op, F32, tensors[0].ne, tensors, inplace=tensors[0])
    if data.draw(st.booleans()):
        t.address = tensors[data.draw(st.integers(0, n))].address
    # Neither the gradient nor the parameters are the step's to change.
    unchanged = [(tensors[i], raw(tensors[i])) for i in (1, n)]
    try:
        check(t)
    except ContractError:
        return
    with contextlib.suppress(GraphError):
        run(t, kernels=False)
    for s in tensors:
        assert guards_intact(s)
    for s, content in unchanged:
        np.testing.assert_array_equal(raw(s), content)


# -- gradients of attention


def attention_back(
    n_tokens: int, n_kv: int, heads: int, kv_heads: int, batches: int, causal: int
) -> Tensor:
    size = 5
    given = [
        noise((size, n_tokens, heads, batches), 1), noise((size, n_kv, kv_heads, batches), 2),
        noise((n_kv, size, kv_heads, batches), 3), noise((size, n_tokens, heads, batches), 4),
    ]  # fmt: skip
    end = sum(-(-s.nelements // 4) * 4 for s in given[:3])
    return node(Op.FLASH_ATTN_BACK, F32, (end,), given, params(causal))


def attention_loss(t: Tensor, q: Array, k: Array, v: Array) -> float:
    """Sum over the outputs of attention times their gradients: its gradients are the node's."""
    assert t.src[3] is not None
    d = doubles(t.src[3])
    n_tokens, n_kv, total = q.shape[2], k.shape[2], 0.0
    for batch, head, token in np.ndindex(q.shape[:3]):
        seen = n_kv - n_tokens + token + 1 if t.param_i32(0) else n_kv
        shared = head % k.shape[1]
        scores = k[batch, shared, :seen] @ q[batch, head, token] / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        output = v[batch, shared, :, :seen] @ (weights / weights.sum())
        total += output @ d[batch, head, token]
    return float(total)


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("shape", [(3, 3, 1, 1, 1), (2, 4, 4, 2, 1), (3, 5, 2, 2, 2)])
@pytest.mark.parametrize("small", [False, True])
def test_gradients_of_attention(
    shape: tuple[int, int, int, int, int],
    causal: int,
    small: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if small:
        monkeypatch.setattr(slices, "_BYTES_AT_ONCE", 4)
    t = attention_back(*shape, causal)
    run(t, kernels=False)
    assert guards_intact(t)
    sources = [doubles(s) for s in t.src[:3] if s is not None]
    got, start, h = values(t)[0, 0, 0], 0, 1e-5
    for source in sources:
        expected = np.zeros(source.shape)
        for at in np.ndindex(source.shape):
            kept = source[at]
            source[at] = kept + h
            above = attention_loss(t, *sources)
            source[at] = kept - h
            expected[at] = (above - attention_loss(t, *sources)) / (2 * h)
            source[at] = kept
        assert nmse(expected.ravel(), got[start : start + source.size]) < 1e-9
        padded = -(-source.size // 4) * 4
        assert not got[start + source.size : start + padded].any()
        start += padded


def test_contract_of_gradients_of_attention() -> None:
    check(attention_back(2, 4, 4, 2, 1, 1))
    refused(attention_back(2, 4, 4, 2, 1, 2), r"op_params\[0\] is 2")
    refused(attention_back(4, 2, 4, 2, 1, 1), "4 tokens among 2 positions")
    refused(attention_back(2, 4, 4, 3, 1, 1), "4 is not a multiple of 3")
    refused(attention_back(2, 4, 4, 2, 2, 1), "no layout for batches of shared keys")
    for i, ne in ((1, (4, 4, 2, 1)), (2, (5, 4, 2, 1)), (3, (5, 3, 4, 1))):
        t = attention_back(2, 4, 4, 2, 1, 1)
        t.src = (*t.src[:i], noise(ne), *t.src[i + 1 :])
        refused(t, f"source {i} must be")
    t = attention_back(2, 4, 4, 2, 1, 1)
    t.ne = (t.ne[0] - 4, 1, 1, 1)
    refused(t, "the result must be")


# -- what only the client could run


@pytest.mark.parametrize("op", [Op.MAP_CUSTOM1, Op.MAP_CUSTOM2, Op.MAP_CUSTOM3, Op.CUSTOM])
def test_functions_of_the_client_are_refused(op: Op) -> None:
    t = node(op, F32, SHAPE, [noise(SHAPE)], params(0x1234, 0x5678))
    refused(t, f"{op} .*function pointer of the client's process")
