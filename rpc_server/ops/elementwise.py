"""Ops that compute each element of the result from one element of each source.

All compute in float32, whatever the types, and round once at the end, as ggml does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from types import ModuleType
from typing import Any

import numpy as np

from protocol.ggml.ops import GluOp, Op, UnaryOp
from protocol.ggml.types import DECODABLE, FLOATS, GgmlType
from protocol.tensor import Tensor
from rpc_server.ops import checks, gelu
from rpc_server.ops.arrays import ArrayContext
from rpc_server.ops.shards import Propagated, Shards, elementwise_shard
from rpc_server.ops.table import contract, reference, refuse, require, source
from rpc_server.types import ENCODABLE

F32, F16, BF16 = GgmlType.F32, GgmlType.F16, GgmlType.BF16

# -- ADD, SUB, MUL, DIV, ADD1 ----------------------------------------------------------------------

# (source 0, source 1, result)
_BINARY_TYPES = frozenset(
    {(F32, F32, F32)}
    | {(half, half, half) for half in (F16, BF16)}
    | {(half, F32, result) for half in (F16, BF16) for result in (half, F32)}
)
# Sums of a quantized source 0 and F32.
_ENCODED = ENCODABLE | {GgmlType.I32}


def _require_binary_types(
    t: Tensor, a: Tensor, b: Tensor, of_quantized: Collection[GgmlType] = ()
) -> None:
    """``of_quantized`` are the results there may be of a quantized source 0."""
    plain = (a.type, b.type, t.type) in _BINARY_TYPES
    if not plain and not (a.quantized and b.type is F32 and t.type in of_quantized):
        refuse(f"not for {a.type.name} and {b.type.name} to {t.type.name}")


def _binary_contract(t: Tensor) -> None:
    """Source 1 is repeated over source 0; only ADD takes a quantized source 0, unrepeated."""
    a = checks.source(t, 0, DECODABLE)
    b = checks.source(t, 1, FLOATS, dense=False)
    _require_binary_types(t, a, b, _ENCODED if t.op is Op.ADD else ())
    checks.result(t, _ENCODED)
    checks.shape(a, t.ne, "source 0")
    require(b.can_repeat_to(t), "source 1 can't be repeated over source 0")
    if a.quantized:
        checks.shape(b, t.ne, "source 1")
        checks.dense_rows(b, "source 1")


def _repeated(xp: ModuleType, values: Any, ne: tuple[int, ...]) -> Any:
    """``values`` ready to broadcast to dimensions ``ne``: single elements are left alone."""
    sizes = zip(ne[::-1], values.shape, strict=True)
    times = [1 if m in (1, n) else n // m for n, m in sizes]
    return values if max(times) == 1 else xp.tile(values, times)


def _binary(apply: Callable[[Any, Any], Any]) -> Callable[[ArrayContext, Tensor], None]:
    def run(ctx: ArrayContext, t: Tensor) -> None:
        b = _repeated(ctx.xp, ctx.f32(source(t, 1)), t.ne)
        ctx.store(t, apply(ctx.f32(source(t, 0)), b))

    return run


for _op, _apply in (
    (Op.ADD, lambda a, b: a + b),
    (Op.SUB, lambda a, b: a - b),
    (Op.MUL, lambda a, b: a * b),
    (Op.DIV, lambda a, b: a / b),
):
    contract(_op, shard_rule=elementwise_shard)(_binary_contract)
    reference(_op)(_binary(_apply))


@contract(Op.ADD1)
def _add1_contract(t: Tensor) -> None:
    a = checks.source(t, 0, DECODABLE)
    b = checks.source(t, 1, FLOATS)
    _require_binary_types(t, a, b, {a.type})
    checks.result(t, {a.type} & ENCODABLE)
    checks.shape(a, t.ne, "source 0")
    checks.shape(b, (1, 1, 1, 1), "source 1")


reference(Op.ADD1)(_binary(lambda a, b: a + b))


# -- functions of one element ----------------------------------------------------------------------

Function = Callable[[ModuleType, Any], Any]


def _erf(xp: ModuleType, x: Any) -> Any:
    """The error function, from float32 to its precision: numpy has none.

    Kummer's series, whose terms are all of one sign; beyond 4 float32 knows nothing but 1.
    """
    z = xp.clip(x.astype(xp.float64), -4, 4)
    square = 2 * z * z
    term = z * (2 / math.sqrt(math.pi)) * xp.exp(-z * z)
    total = term.copy()
    for n in range(1, 80):
        term = term * square / (2 * n + 1)
        total += term
    return total.astype(xp.float32)


def _gelu_erf(xp: ModuleType, x: Any) -> Any:
    return xp.float32(0.5) * x * (1 + _erf(xp, x * xp.float32(math.sqrt(0.5))))


def _sigmoid(xp: ModuleType, x: Any) -> Any:
    return 1 / (1 + xp.exp(-x))


def _silu(xp: ModuleType, x: Any) -> Any:
    return x / (1 + xp.exp(-x))


def _hard_sigmoid(xp: ModuleType, x: Any) -> Any:
    return xp.fmin(xp.float32(1), xp.fmax(xp.float32(0), (x + 3) / xp.float32(6)))


def _round(xp: ModuleType, x: Any) -> Any:
    # Ties away from zero; adding a half first would round the largest float below 0.5 up.
    whole = xp.trunc(x)
    return xp.where(abs(x - whole) >= 0.5, whole + xp.copysign(xp.float32(1), x), whole)


# XIELU is not here, which has parameters, nor what is looked up in tables (gelu.py).
UNARY: dict[UnaryOp, Function] = {
    UnaryOp.ABS: lambda xp, x: abs(x),
    UnaryOp.SGN: lambda xp, x: xp.where(x > 0, 1, xp.where(x < 0, -1, 0)),
    UnaryOp.NEG: lambda xp, x: -x,
    UnaryOp.STEP: lambda xp, x: xp.where(x > 0, 1, 0),
    UnaryOp.TANH: lambda xp, x: xp.tanh(x),
    UnaryOp.ELU: lambda xp, x: xp.where(x > 0, x, xp.expm1(x)),
    UnaryOp.RELU: lambda xp, x: xp.where(x > 0, x, xp.float32(0)),
    UnaryOp.SIGMOID: _sigmoid,
    UnaryOp.SILU: _silu,
    UnaryOp.HARDSWISH: lambda xp, x: x * _hard_sigmoid(xp, x),
    UnaryOp.HARDSIGMOID: _hard_sigmoid,
    UnaryOp.EXP: lambda xp, x: xp.exp(x),
    UnaryOp.EXPM1: lambda xp, x: xp.exp(x) - 1,
    UnaryOp.SOFTPLUS: lambda xp, x: xp.where(x > 20, x, xp.log(1 + xp.exp(x))),
    UnaryOp.GELU_ERF: _gelu_erf,
    UnaryOp.FLOOR: lambda xp, x: xp.floor(x),
    UnaryOp.CEIL: lambda xp, x: xp.ceil(x),
    UnaryOp.ROUND: _round,
    UnaryOp.TRUNC: lambda xp, x: xp.trunc(x),
}

_FUNCTIONS: dict[Op, Function] = {
    Op.SQR: lambda xp, x: x * x,
    Op.SQRT: lambda xp, x: xp.sqrt(x),
    Op.LOG: lambda xp, x: xp.log(x),
    Op.SIN: lambda xp, x: xp.sin(x),
    Op.COS: lambda xp, x: xp.cos(x),
}


def _function_contract(t: Tensor) -> None:
    """Same shape; the result has the source's type or F32."""
    s = checks.source(t, 0, FLOATS)
    checks.result(t, {s.type, F32})
    checks.shape(s, t.ne, "source 0")


def _function(function: Function) -> Callable[[ArrayContext, Tensor], None]:
    return lambda ctx, t: ctx.store(t, function(ctx.xp, ctx.f32(source(t, 0))))


for _op, _f in _FUNCTIONS.items():
    contract(_op, shard_rule=elementwise_shard)(_function_contract)
    reference(_op)(_function(_f))


@contract(Op.UNARY, shard_rule=elementwise_shard)
def _unary_contract(t: Tensor) -> None:
    require(t.param_i32(0) in set(UnaryOp), f"no unary op {t.param_i32(0)}")
    _function_contract(t)


@reference(Op.UNARY)
def _unary(ctx: ArrayContext, t: Tensor) -> None:
    kind, x = UnaryOp(t.param_i32(0)), ctx.f32(source(t, 0))
    if kind is UnaryOp.XIELU:
        y = _xielu(ctx.xp, x, t)
    elif kind in UNARY:
        y = UNARY[kind](ctx.xp, x)
    else:
        y = gelu.look_up(ctx.xp, x, source(t, 0).type, quick=kind is UnaryOp.GELU_QUICK)
    ctx.store(t, y)


def _xielu(xp: ModuleType, x: Any, t: Tensor) -> Any:
    alpha_n, alpha_p, beta, eps = (xp.float32(t.param_f32(i)) for i in range(1, 5))
    negative = (xp.expm1(xp.fmin(x, eps)) - x) * alpha_n + beta * x
    return xp.where(x > 0, alpha_p * x * x + beta * x, negative)


# -- functions with parameters ---------------------------------------------------------------------


@contract(Op.SCALE, Op.CLAMP, Op.LEAKY_RELU, shard_rule=elementwise_shard)
def _same_type_contract(t: Tensor) -> None:
    checks.result(t, FLOATS)
    checks.shape(checks.source(t, 0, {t.type}), t.ne, "source 0")


@reference(Op.SCALE)
def _scale(ctx: ArrayContext, t: Tensor) -> None:
    scale, bias = np.float32(t.param_f32(0)), np.float32(t.param_f32(1))
    scaled = ctx.f32(source(t, 0)) * scale
    # Adding 0 would turn -0 into 0.
    ctx.store(t, scaled + bias if bias else scaled)


@reference(Op.CLAMP)
def _clamp(ctx: ArrayContext, t: Tensor) -> None:
    low, high = np.float32(t.param_f32(0)), np.float32(t.param_f32(1))
    x, xp = ctx.f32(source(t, 0)), ctx.xp
    # C's MIN and MAX: they replace NaN, which xp.clip would keep.
    x = xp.where(x < high, x, high)
    ctx.store(t, xp.where(x > low, x, low))


@reference(Op.LEAKY_RELU)
def _leaky_relu(ctx: ArrayContext, t: Tensor) -> None:
    slope = np.float32(t.param_f32(0))
    x, xp = ctx.f32(source(t, 0)), ctx.xp
    ctx.store(t, xp.where(x > 0, x, 0) + slope * xp.where(x < 0, x, 0))


@contract(Op.SILU_BACK)
def _silu_back_contract(t: Tensor) -> None:
    checks.result(t, FLOATS)
    for i in (0, 1):
        checks.shape(checks.source(t, i, {t.type}), t.ne, f"source {i}")


@reference(Op.SILU_BACK)
def _silu_back(ctx: ArrayContext, t: Tensor) -> None:
    gradient, x = (ctx.f32(source(t, i)) for i in (0, 1))
    s = _sigmoid(ctx.xp, x)
    ctx.store(t, gradient * s * (1 + x * (1 - s)))


# -- GLU -------------------------------------------------------------------------------------------

# (xp, gated, gate, node)
Glu = Callable[[ModuleType, Any, Any, Tensor], Any]


def _gated(function: Function) -> Glu:
    return lambda xp, x, g, t: function(xp, x) * g


def _geglu(xp: ModuleType, x: Any, g: Any, t: Tensor) -> Any:
    y = gelu.look_up(xp, x, t.type, quick=False) * g
    # Far below 0 ggml doesn't look at g of F32: what it is, NaN or infinite, is lost.
    return xp.where(x <= -gelu.FAR, xp.float32(0), y) if t.type is F32 else y


def _geglu_quick(xp: ModuleType, x: Any, g: Any, t: Tensor) -> Any:
    return gelu.look_up(xp, x, t.type, quick=True) * g


def _swiglu_oai(xp: ModuleType, x: Any, g: Any, t: Tensor) -> Any:
    alpha, limit = xp.float32(t.param_f32(2)), xp.float32(t.param_f32(3))
    x = xp.minimum(x, limit)
    return x / (1 + xp.exp(-alpha * x)) * (xp.clip(g, -limit, limit) + 1)


def _swiglu_clamp(xp: ModuleType, x: Any, g: Any, t: Tensor) -> Any:
    limit = xp.float32(t.param_f32(3))
    return _silu(xp, xp.minimum(x, limit)) * xp.clip(g, -limit, limit)


GLU: dict[GluOp, Glu] = {
    GluOp.REGLU: lambda xp, x, g, t: xp.where(x > 0, x * g, xp.float32(0)),
    GluOp.GEGLU: _geglu,
    GluOp.SWIGLU: _gated(_silu),
    GluOp.SWIGLU_OAI: _swiglu_oai,
    GluOp.GEGLU_ERF: _gated(_gelu_erf),
    GluOp.GEGLU_QUICK: _geglu_quick,
    GluOp.SWIGLU_CLAMP: _swiglu_clamp,
}


def _glu_shard(node: Tensor, shards: Shards) -> Propagated | None:
    # Without a second source both halves lie in one row, which a cut along rows doesn't respect.
    if node.src[1] is None and shards[0] is not None and shards[0].dim == 0:
        return None
    return elementwise_shard(node, shards)


@contract(Op.GLU, shard_rule=_glu_shard)
def _glu_contract(t: Tensor) -> None:
    """Gated and gate are sources 0 and 1, or the halves of source 0's rows."""
    require(t.param_i32(0) in set(GluOp), f"no gated unit {t.param_i32(0)}")
    checks.result(t, FLOATS)
    a = checks.source(t, 0, {t.type})
    ne0 = a.ne[0]
    if t.src[1] is None:
        # The last column of an odd number takes no part.
        ne0 //= 2
    else:
        b = checks.source(t, 1, {t.type})
        checks.shape(b, a.ne, "source 1")
        require(b.contiguous_above(1), "rows of source 1 must follow one another")
    checks.shape(t, (ne0, *a.ne[1:]), "the result")
    require(a.contiguous_above(1), "rows of source 0 must follow one another")
    require(t.contiguous_above(1), "rows of the result must follow one another")


@reference(Op.GLU)
def _glu(ctx: ArrayContext, t: Tensor) -> None:
    x = ctx.f32(source(t, 0))
    if t.src[1] is not None:
        gate = ctx.f32(t.src[1])
    else:
        halves = x[..., : t.ne[0]], x[..., t.ne[0] : 2 * t.ne[0]]
        x, gate = reversed(halves) if t.param_i32(1) else halves
    ctx.store(t, GLU[GluOp(t.param_i32(0))](ctx.xp, x, gate, t))
