"""Elementwise ops against Python's own arithmetic, element by element."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.ggml.ops import GluOp, Op, UnaryOp
from protocol.ggml.types import TYPE_INFO, GgmlType
from rpc_server.types import ENCODABLE, from_f32, to_f32
from tests.ops import harness
from tests.ops.harness import ran, refused
from tests.ops.tensors import CONTEXT, four, node, params, permuted, tensor, values, view

F32, F16, BF16, I32 = GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.I32
FLOATS = (F32, F16, BF16)
# Half a unit in the last place, relative, and room for a libm that isn't exact.
PRECISION = {F32: 4e-7, F16: 2**-11 * 1.01, BF16: 2**-8 * 1.01}
RNG = np.random.default_rng(3)


def random(*ne: int) -> np.ndarray[Any, Any]:
    """Float32 values for a tensor of dimensions ``ne``; exact in every float type, none 0."""
    x = RNG.integers(1, 65, four(ne)[::-1]) / 16
    signed: np.ndarray[Any, Any] = (x * RNG.choice([-1, 1], x.shape)).astype(np.float32)
    return signed


def close(actual: np.ndarray[Any, Any], expected: Any, type_: GgmlType) -> None:
    if type_ is F16:
        expected = np.where(np.abs(expected) >= 65520, np.copysign(np.inf, expected), expected)
    np.testing.assert_allclose(actual, expected, rtol=PRECISION[type_], atol=PRECISION[F32])


def close_to_looked_up(actual: np.ndarray[Any, Any], expected: Any, type_: GgmlType) -> None:
    """Of what ggml has tables for: argument and result of F32 and F16 are halves there.

    Far below 0 only few bits are left of 1 + tanh.
    """
    rtol = PRECISION[BF16] if type_ is BF16 else 4 * PRECISION[F16]
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=2e-6)


def each(function: Callable[..., float], *arrays: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """``function`` of Python floats, over arrays broadcast against each other."""
    of_arrays = np.vectorize(lambda *args: function(*map(float, args)), otypes=[np.float64])
    found: np.ndarray[Any, Any] = of_arrays(*arrays)
    return found


# -- ADD, SUB, MUL, DIV, ADD1 ----------------------------------------------------------------------

BINARY: dict[Op, Callable[[float, float], float]] = {
    Op.ADD: lambda a, b: a + b,
    Op.SUB: lambda a, b: a - b,
    Op.MUL: lambda a, b: a * b,
    Op.DIV: lambda a, b: a / b,
}
BINARY_TYPES = [
    (F32, F32, F32),
    *(types for x in (F16, BF16) for types in ((x, x, x), (x, F32, x), (x, F32, F32))),
]


@pytest.mark.parametrize("types", BINARY_TYPES, ids=lambda types: "-".join(t.name for t in types))
@pytest.mark.parametrize("op", BINARY)
def test_binary_types(op: Op, types: tuple[GgmlType, GgmlType, GgmlType]) -> None:
    x, y = random(6, 3, 2), random(6, 1, 2)
    t = node(
        op, types[2], (6, 3, 2), [tensor(types[0], (6, 3, 2), x), tensor(types[1], (6, 1, 2), y)]
    )
    close(ran(t), each(BINARY[op], x, y), types[2])


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(BINARY)),
    st.tuples(*[st.integers(1, 3)] * 4),
    st.tuples(*[st.integers(1, 3)] * 4),
    st.permutations(range(4)),
    st.booleans(),
)
def test_binary_repeats_source_1(
    op: Op, ne: tuple[int, ...], times: tuple[int, ...], axes: list[int], inplace: bool
) -> None:
    large = tuple(n * k for n, k in zip(ne, times, strict=True))
    x, y = random(*large), random(*ne)
    # Source 1 as a permuted view of memory that has another order.
    order = tuple(3 - axis for axis in axes[::-1])
    b = permuted(tensor(F32, [ne[axis] for axis in axes], y.transpose(order)), axes)
    assert b.ne == ne
    np.testing.assert_array_equal(values(b), y)
    a = tensor(F32, large, x)
    result = ran(node(op, F32, large, [a, b], inplace=a if inplace else None))
    for index in np.ndindex(result.shape):
        expected = BINARY[op](float(x[index]), float(y[tuple(np.mod(index, y.shape))]))
        assert result[index] == np.float32(expected)


def test_source_1_in_place() -> None:
    x, y = random(5, 2), random(5, 2)
    b = tensor(F32, (5, 2), y)
    t = node(Op.SUB, F32, (5, 2), [tensor(F32, (5, 2), x), b], inplace=b)
    np.testing.assert_array_equal(ran(t), x - y)


@pytest.mark.parametrize(
    "type_", sorted(t for t in ENCODABLE if TYPE_INFO[t].quantized), ids=lambda t: t.name
)
@pytest.mark.parametrize("op", [Op.ADD, Op.ADD1])
def test_adding_to_quantized(op: Op, type_: GgmlType) -> None:
    n = max(TYPE_INFO[type_].block_size, 64)
    x, y = random(n, 2), random(n, 2) if op is Op.ADD else random(1)
    a, b = tensor(type_, (n, 2), x), tensor(F32, y.shape[::-1], y)
    total = to_f32(type_, from_f32(type_, x)) + y
    t = node(op, type_, (n, 2), [a, b])
    np.testing.assert_array_equal(ran(t), to_f32(type_, from_f32(type_, total)))


def test_adding_to_quantized_gives_what_is_asked_for() -> None:
    x = from_f32(GgmlType.Q8_0, random(32, 2))
    a = tensor(GgmlType.Q8_0, (32, 2))
    CONTEXT.view(a)[...] = x
    y = random(32, 2)
    total = to_f32(GgmlType.Q8_0, x) + y
    t = node(Op.ADD, F32, (32, 2), [a, tensor(F32, (32, 2), y)])
    np.testing.assert_array_equal(ran(t), total)
    t = node(Op.ADD, GgmlType.Q4_0, (32, 2), [a, tensor(F32, (32, 2), y)])
    np.testing.assert_array_equal(ran(t), to_f32(GgmlType.Q4_0, from_f32(GgmlType.Q4_0, total)))
    t = node(Op.ADD, I32, (32, 2), [a, tensor(F32, (32, 2), y)])
    np.testing.assert_array_equal(ran(t), np.trunc(total))


def test_add1() -> None:
    x = random(4, 2)
    for a, b, result in ((F32, F32, F32), (F16, F16, F16), (F16, F32, F16), (BF16, F32, BF16)):
        t = node(Op.ADD1, result, (4, 2), [tensor(a, (4, 2), x), tensor(b, (1,), 0.5)])
        close(ran(t), x + 0.5, result)
    refused(
        node(Op.ADD1, F32, (4,), [tensor(F32, (4,)), tensor(F32, (2,))]), "source 1 must be 1x1"
    )
    refused(node(Op.ADD1, F32, (4,), [tensor(F16, (4,)), tensor(F32, (1,))]), "result must not be")


@pytest.mark.parametrize("op", BINARY)
def test_binary_contracts(op: Op) -> None:
    a = tensor(F32, (4, 3))
    refused(node(op, F32, (4, 3), [a, tensor(F32, (4, 2))]), "can't be repeated")
    refused(node(op, F32, (4, 3), [a, tensor(F32, (4, 0))]), "can't be repeated")
    refused(node(op, F32, (4, 4), [a, tensor(F32, (4, 1))]), "source 0 must be 4x4")
    refused(node(op, F32, (4, 3), [a, None]), "source 1 is missing")
    refused(node(op, F32, (4, 3), [a, a, a]), "takes 2")
    refused(node(op, F16, (4, 3), [a, a]), "not for F32 and F32 to F16")
    refused(node(op, F32, (4, 3), [a, tensor(F16, (4, 3))]), "not for F32 and F16 to F32")
    refused(node(op, I32, (4, 3), [tensor(I32, (4, 3))] * 2), "source 0 must not be I32")
    columns = permuted(tensor(F32, (3, 4)), (1, 0, 2, 3))
    refused(node(op, F32, (4, 3), [columns, a]), "source 0 must have dense rows")
    refused(node(op, F32, (4, 3), [a, a], nb=(8, 32, 96, 96)), "result must have dense rows")
    refused(node(op, F32, (4, 3), [a, a], nb=(4, 0, 16, 16)), "overlap")


def test_quantized_only_adds() -> None:
    q, k = tensor(GgmlType.Q8_0, (32, 2)), tensor(GgmlType.IQ3_S, (256,))
    row = tensor(F32, (32,))
    refused(node(Op.MUL, GgmlType.Q8_0, (32, 2), [q, tensor(F32, (32, 2))]), "not for Q8_0")
    refused(node(Op.ADD, GgmlType.Q8_0, (32, 2), [q, row]), "source 1 must be 32x2")
    refused(node(Op.ADD, GgmlType.IQ3_S, (256,), [k, tensor(F32, (256,))]), "not for IQ3_S")
    refused(node(Op.ADD, GgmlType.I64, (32, 2), [q, tensor(F32, (32, 2))]), "to I64")
    refused(node(Op.ADD1, GgmlType.Q4_0, (32, 2), [q, tensor(F32, (1,))]), "to Q4_0")


# -- functions of one element ----------------------------------------------------------------------


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def hard_sigmoid(x: float) -> float:
    return min(1.0, max(0.0, (x + 3) / 6))


UNARY: dict[UnaryOp, Callable[[float], float]] = {
    UnaryOp.ABS: abs,
    UnaryOp.SGN: lambda x: float((x > 0) - (x < 0)),
    UnaryOp.NEG: lambda x: -x,
    UnaryOp.STEP: lambda x: float(x > 0),
    UnaryOp.TANH: math.tanh,
    UnaryOp.ELU: lambda x: x if x > 0 else math.expm1(x),
    UnaryOp.RELU: lambda x: max(x, 0.0),
    UnaryOp.SIGMOID: sigmoid,
    UnaryOp.GELU: gelu,
    UnaryOp.GELU_QUICK: lambda x: x * sigmoid(1.702 * x),
    UnaryOp.SILU: lambda x: x * sigmoid(x),
    UnaryOp.HARDSWISH: lambda x: x * hard_sigmoid(x),
    UnaryOp.HARDSIGMOID: hard_sigmoid,
    UnaryOp.EXP: math.exp,
    UnaryOp.EXPM1: math.expm1,
    UnaryOp.SOFTPLUS: lambda x: math.log1p(math.exp(x)),
    UnaryOp.GELU_ERF: gelu_erf,
    UnaryOp.XIELU: lambda x: (
        0.75 * x * x + 0.5 * x if x > 0 else (math.expm1(min(x, -1e-6)) - x) * 1.25 + 0.5 * x
    ),
    UnaryOp.FLOOR: math.floor,
    UnaryOp.CEIL: math.ceil,
    UnaryOp.ROUND: lambda x: math.copysign(math.floor(abs(x) + 0.5), x),
    UnaryOp.TRUNC: math.trunc,
}
SAMPLES = np.concatenate(
    [np.arange(-5, 5.25, 0.25), [-20, -12, 12, 20, 25, -0.0078125, 0.0078125]]
).astype(np.float32)


@pytest.mark.parametrize("of", FLOATS)
@pytest.mark.parametrize("kind", UnaryOp)
def test_unary(kind: UnaryOp, of: GgmlType) -> None:
    n = len(SAMPLES)
    words = params(int(kind), 1.25, 0.75, 0.5, -1e-6)
    expected = each(UNARY[kind], SAMPLES)
    check = close_to_looked_up if kind in (UnaryOp.GELU, UnaryOp.GELU_QUICK) else close
    for to in {of, F32}:
        t = node(Op.UNARY, to, (n,), [tensor(of, (n,), SAMPLES)], words)
        check(ran(t).ravel(), expected, to)


def test_unary_round_has_no_false_ties() -> None:
    x = np.nextafter(np.float32(0.5), np.float32(0))
    t = node(
        Op.UNARY, F32, (4,), [tensor(F32, (4,), [[[[x, -x, 0.5, -0.5]]]])], params(UnaryOp.ROUND)
    )
    assert ran(t).ravel().tolist() == [0, 0, 1, -1]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (UnaryOp.GELU, [0, math.inf]),
        (UnaryOp.TANH, [-1, 1]),
        (UnaryOp.SIGMOID, [0, 1]),
        (UnaryOp.RELU, [0, math.inf]),
        (UnaryOp.EXP, [0, math.inf]),
        (UnaryOp.SOFTPLUS, [0, math.inf]),
        (UnaryOp.HARDSIGMOID, [0, 1]),
    ],
)
def test_unary_of_infinities(kind: UnaryOp, expected: list[float]) -> None:
    x = tensor(F32, (2,), [[[[-math.inf, math.inf]]]])
    assert ran(node(Op.UNARY, F32, (2,), [x], params(kind))).ravel().tolist() == expected


@pytest.mark.parametrize("kind", UnaryOp)
def test_unary_in_place_on_a_view(kind: UnaryOp) -> None:
    whole = tensor(F32, (6, 3), random(6, 3))
    part = view(whole, (4, 3), (4, 24, 72, 72), offset=4)
    expected = values(whole)
    words = params(int(kind), 1.25, 0.75, 0.5, -1e-6)
    expected[..., 1:5] = ran(
        node(Op.UNARY, F32, (4, 3), [tensor(F32, (4, 3), values(part))], words)
    )
    harness.run(node(Op.UNARY, F32, (4, 3), [part], words, inplace=part), kernels=False)
    np.testing.assert_array_equal(values(whole), expected)


@pytest.mark.parametrize(
    ("op", "function"),
    [
        (Op.SQR, lambda x: x * x),
        (Op.SQRT, math.sqrt),
        (Op.LOG, math.log),
        (Op.SIN, math.sin),
        (Op.COS, math.cos),
    ],
)
@pytest.mark.parametrize("type_", FLOATS)
def test_functions(op: Op, function: Callable[[float], float], type_: GgmlType) -> None:
    x = abs(random(7, 3))
    t = node(op, type_, (7, 3), [tensor(type_, (7, 3), x)])
    close(ran(t), each(function, x), type_)


def test_function_contracts() -> None:
    a = tensor(F32, (4, 3))
    for op in (Op.UNARY, Op.SQR, Op.SCALE, Op.CLAMP, Op.LEAKY_RELU):
        refused(node(op, F32, (4, 2), [a]), "source 0 must be 4x2")
        refused(node(op, F16, (4, 3), [a]), "F16|F32")
        refused(node(op, I32, (4, 3), [tensor(I32, (4, 3))]), "I32")
        refused(node(op, F32, (4, 3), [permuted(tensor(F32, (3, 4)), (1, 0, 2, 3))]), "dense rows")
    refused(node(Op.UNARY, F32, (4, 3), [a], params(22)), "no unary op 22")
    refused(node(Op.UNARY, F32, (4, 3), [a], params(-1)), "no unary op -1")


# -- functions with parameters ---------------------------------------------------------------------


def test_scale() -> None:
    x = random(5, 2)
    close(
        ran(node(Op.SCALE, F32, (5, 2), [tensor(F32, (5, 2), x)], params(3.0, 0.5))),
        x * 3 + 0.5,
        F32,
    )
    close(ran(node(Op.SCALE, BF16, (5, 2), [tensor(BF16, (5, 2), x)], params(3.0))), x * 3, BF16)
    zero = ran(node(Op.SCALE, F32, (1,), [tensor(F32, (1,), -0.0)], params(2.0, 0.0)))
    assert np.signbit(zero).all()


def test_clamp_replaces_nan() -> None:
    x = tensor(F32, (5,), [[[[-3, -1, 0.5, 9, math.nan]]]])
    t = node(Op.CLAMP, F32, (5,), [x], params(-1.0, 2.0))
    assert ran(t).ravel().tolist() == [-1, -1, 0.5, 2, 2]


def test_leaky_relu() -> None:
    t = node(Op.LEAKY_RELU, F16, (3,), [tensor(F16, (3,), [[[[-4, 0, 3]]]])], params(0.25))
    assert ran(t).ravel().tolist() == [-1, 0, 3]


@pytest.mark.parametrize("type_", [F32, F16])
def test_silu_back_is_the_derivative(type_: GgmlType) -> None:
    x, gradient = random(6, 2), random(6, 2)
    t = node(Op.SILU_BACK, type_, (6, 2), [tensor(type_, (6, 2), g) for g in (gradient, x)])
    h = 1e-5

    def derivative(x: float) -> float:
        return ((x + h) * sigmoid(x + h) - (x - h) * sigmoid(x - h)) / (2 * h)

    expected = gradient * each(derivative, x)
    np.testing.assert_allclose(ran(t), expected, rtol=max(PRECISION[type_], 1e-5), atol=1e-6)
    a, b = tensor(F32, (4,)), tensor(F32, (3,))
    refused(node(Op.SILU_BACK, F32, (4,), [a, b]), "source 1 must be 4x1")


# -- GLU -------------------------------------------------------------------------------------------

LIMIT, ALPHA = 1.5, 1.75


def clamp(x: float) -> float:
    return max(-LIMIT, min(x, LIMIT))


GLU: dict[GluOp, Callable[[float, float], float]] = {
    GluOp.REGLU: lambda x, g: max(x, 0.0) * g,
    GluOp.GEGLU: lambda x, g: gelu(x) * g,
    GluOp.SWIGLU: lambda x, g: x * sigmoid(x) * g,
    GluOp.SWIGLU_OAI: lambda x, g: min(x, LIMIT) * sigmoid(ALPHA * min(x, LIMIT)) * (clamp(g) + 1),
    GluOp.GEGLU_ERF: lambda x, g: gelu_erf(x) * g,
    GluOp.GEGLU_QUICK: lambda x, g: x * sigmoid(1.702 * x) * g,
    GluOp.SWIGLU_CLAMP: lambda x, g: min(x, LIMIT) * sigmoid(min(x, LIMIT)) * clamp(g),
}


@pytest.mark.parametrize("type_", FLOATS)
@pytest.mark.parametrize("kind", GluOp)
def test_glu(kind: GluOp, type_: GgmlType) -> None:
    x, g = random(6, 3, 2), random(6, 3, 2)
    expected = each(GLU[kind], x, g)
    words = params(int(kind), 0, ALPHA, LIMIT)
    sources = [tensor(type_, (6, 3, 2), v) for v in (x, g)]
    check = close_to_looked_up if kind in (GluOp.GEGLU, GluOp.GEGLU_QUICK) else close
    check(ran(node(Op.GLU, type_, (6, 3, 2), sources, words)), expected, type_)
    for swapped, halves in ((0, (x, g)), (1, (g, x))):
        both = tensor(type_, (12, 3, 2), np.concatenate(halves, axis=-1))
        words = params(int(kind), swapped, ALPHA, LIMIT)
        check(ran(node(Op.GLU, type_, (6, 3, 2), [both], words)), expected, type_)


def test_glu_in_place_of_either_source() -> None:
    x, g = random(6, 3), random(6, 3)
    expected = each(GLU[GluOp.SWIGLU], x, g)
    for target in (0, 1):
        sources = [tensor(F32, (6, 3), v) for v in (x, g)]
        t = node(Op.GLU, F32, (6, 3), sources, params(int(GluOp.SWIGLU)), inplace=sources[target])
        close(ran(t), expected, F32)


def test_glu_contracts() -> None:
    a = tensor(F32, (6, 3))
    refused(node(Op.GLU, F32, (6, 3), [a, a], params(7)), "no gated unit 7")
    refused(node(Op.GLU, F32, (6, 3), [a], params(0)), "result must be 3x3")
    refused(node(Op.GLU, F32, (3, 3), [tensor(F32, (5, 3))], params(0)), "result must be 2x3")
    refused(node(Op.GLU, F32, (6, 3), [a, tensor(F32, (6, 2))], params(0)), "source 1 must be 6x3")
    refused(node(Op.GLU, F32, (6, 3), [a, tensor(F16, (6, 3))], params(0)), "source 1 must not be")
    refused(node(Op.GLU, I32, (6, 3), [tensor(I32, (6, 3))] * 2, params(0)), "I32")
    planes = permuted(tensor(F32, (6, 2, 3)), (0, 2, 1, 3))
    refused(node(Op.GLU, F32, (6, 3, 2), [planes, planes], params(0)), "follow one another")


@pytest.mark.parametrize("kind", [GluOp.SWIGLU, GluOp.GEGLU])
def test_glu_leaves_out_the_last_of_an_odd_number_of_columns(kind: GluOp) -> None:
    x, g = random(2, 3), random(2, 3)
    for swapped, halves in ((0, (x, g)), (1, (g, x))):
        rows = np.concatenate([*halves, np.full_like(x[..., :1], np.nan)], axis=-1)
        t = node(Op.GLU, F32, (2, 3), [tensor(F32, (5, 3), rows)], params(int(kind), swapped))
        close_to_looked_up(ran(t), each(GLU[kind], x, g), F32)


def test_geglu_far_below_zero_does_not_look_at_the_gate() -> None:
    x, g = np.full((1, 1, 1, 3), -11.0), np.array([[[[np.nan, np.inf, 1.0]]]])
    sources = [tensor(F32, (3,), v) for v in (x, g)]
    assert ran(node(Op.GLU, F32, (3,), sources, params(int(GluOp.GEGLU)))).ravel().tolist() == [
        0,
        0,
        0,
    ]


@pytest.mark.parametrize("type_", [F16, BF16])
def test_gelu_of_minus_infinity_has_no_limit_in_short_types(type_: GgmlType) -> None:
    x = tensor(type_, (2,), [[[[-math.inf, math.inf]]]])
    y = ran(node(Op.UNARY, type_, (2,), [x], params(UnaryOp.GELU))).ravel()
    assert np.isnan(y[0])
    assert y[1] == np.inf
