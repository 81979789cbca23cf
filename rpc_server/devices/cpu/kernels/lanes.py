"""Vectors of 16 values as first-class values of numba code: loads, stores, arithmetic, reductions.

LLVM vectorises a scalar loop only where it can prove (or check at run time) that its pointers don't
overlap, which in-place nodes fail, and it may not reorder a float reduction at all. Kernels
therefore say what they mean: ``F32S`` are 16 float32, ``I32S`` 16 int32, ``MASK`` 16 booleans.
They are generic vector IR, which LLVM cuts to the registers of the processor it compiles for.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, models, register_model

LANES = 16

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_F16, _F32 = ir.HalfType(), ir.FloatType()


def _vector(element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, LANES)


class Lanes(types.Type):  # type: ignore[misc]
    """numba's type of a vector of 16 elements."""

    def __init__(self, element: str) -> None:
        self.element = element
        super().__init__(name=f"lanes.{element}x{LANES}")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, fe_type: Lanes) -> None:
        element = {"f32": _F32, "i32": _I32, "mask": _I1}[fe_type.element]
        super().__init__(manager, fe_type, _vector(element))


F32S = Lanes("f32")
I32S = Lanes("i32")
MASK = Lanes("mask")


def _splat(builder: Any, value: Any) -> Any:
    """A vector of ``value`` in every lane."""
    vector = _vector(value.type)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_I32, 0))
    zeros = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)


def _define_operator(
    op: Callable[..., Any], kind: Lanes, scalar: Any, result: Lanes, emit: Callable[..., Any]
) -> None:
    """``op`` on two vectors, and on a vector and a scalar on either side."""
    signatures = [(kind, kind), (kind, scalar), (scalar, kind)]

    class Template(ConcreteTemplate):  # type: ignore[misc]
        cases = tuple(signature(result, *pair) for pair in signatures)

    infer_global(op)(Template)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        a, b = (
            value if isinstance(type_, Lanes) else _splat(builder, value)
            for type_, value in zip(sig.args, args, strict=True)
        )
        return emit(builder, a, b)

    for pair in signatures:
        lower_builtin(op, *pair)(lower)


def _ordered(symbol: str) -> Callable[..., Any]:
    """Return what emits a comparison that is false where an operand is NaN."""
    return lambda builder, x, y: builder.fcmp_ordered(symbol, x, y)


_method = functools.partial(getattr, ir.IRBuilder)
_FLOATS = {"add": "fadd", "sub": "fsub", "mul": "fmul", "truediv": "fdiv"}
_WHOLES = {n: n for n in ("add", "sub", "mul", "and_", "or_")} | {"lshift": "shl", "rshift": "ashr"}
_ORDERS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "=="}
for _kind, _scalar, _result, _emitter, _operators in (
    (F32S, types.float32, F32S, _method, _FLOATS),
    (I32S, types.int32, I32S, _method, _WHOLES),
    (F32S, types.float32, MASK, _ordered, _ORDERS),
):
    for _name, _instruction in _operators.items():
        _operator, _emit = getattr(operator, _name), _emitter(_instruction)
        _define_operator(_operator, _kind, _scalar, _result, _emit)


@infer_global(operator.neg)
class _Negate(ConcreteTemplate):  # type: ignore[misc]
    cases = (signature(F32S, F32S),)


@lower_builtin(operator.neg, F32S)
def _lower_negate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return builder.fneg(args[0])


# -- memory ----------------------------------------------------------------------------------------


def _widen(builder: Any, value: Any, conversion: str | None) -> Any:
    """Elements as they lie in memory to the lanes kernels compute with."""
    if conversion == "f16":
        return builder.fpext(value, _vector(_F32))
    if conversion == "bf16":
        wide = builder.zext(value, _vector(_I32))
        return builder.bitcast(builder.shl(wide, _splat(builder, _I32(16))), _vector(_F32))
    if conversion in ("i32", "i8"):
        return builder.sitofp(value, _vector(_F32))
    return value


def _narrow(builder: Any, value: Any, conversion: str | None) -> Any:
    """Lanes to elements as they lie in memory; rounds to nearest even."""
    if conversion == "f16":
        return builder.fptrunc(value, _vector(_F16))
    if conversion == "bf16":
        bits = builder.bitcast(value, _vector(_I32))
        odd = builder.and_(builder.lshr(bits, _splat(builder, _I32(16))), _splat(builder, _I32(1)))
        rounded = builder.add(bits, builder.add(odd, _splat(builder, _I32(0x7FFF))))
        # A NaN must not round up to an infinity: it becomes quiet instead.
        nan = builder.fcmp_unordered("uno", value, value)
        chosen = builder.select(nan, builder.or_(bits, _splat(builder, _I32(1 << 22))), rounded)
        return builder.trunc(builder.lshr(chosen, _splat(builder, _I32(16))), _vector(_I16))
    if conversion == "i8":
        return builder.trunc(builder.fptosi(value, _vector(_I32)), _vector(_I8))
    return value


def _make_load(element: ir.Type, conversion: str | None, result: Lanes) -> tuple[Any, Any]:
    def load(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], _vector(element).as_pointer())
            return _widen(builder, builder.load(pointer, align=1), conversion)

        return result(types.int64), codegen

    def load_part(typingctx: Any, address: Any, n: Any) -> Any:
        """The first ``n`` of 16 elements; the other lanes are zero."""

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            vector = _vector(element)
            slot = cgutils.alloca_once(builder, vector)
            builder.store(ir.Constant(vector, None), slot)
            to = builder.ptrtoint(slot, _I64)
            _copy_elements(builder, element, to, args[0], args[1])
            return _widen(builder, builder.load(slot), conversion)

        return result(types.int64, types.int64), codegen

    return intrinsic(load), intrinsic(load_part)


def _make_store(element: ir.Type, conversion: str | None, kind: Lanes) -> tuple[Any, Any]:
    def store(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], _vector(element).as_pointer())
            builder.store(_narrow(builder, args[1], conversion), pointer, align=1)
            return context.get_dummy_value()

        return types.void(types.int64, kind), codegen

    def store_part(typingctx: Any, address: Any, value: Any, n: Any) -> Any:
        """Store the first ``n`` of 16 lanes."""

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            slot = cgutils.alloca_once(builder, _vector(element))
            builder.store(_narrow(builder, args[1], conversion), slot)
            source = builder.ptrtoint(slot, _I64)
            _copy_elements(builder, element, args[0], source, args[2])
            return context.get_dummy_value()

        return types.void(types.int64, kind, types.int64), codegen

    return intrinsic(store), intrinsic(store_part)


def _copy_elements(builder: Any, element: ir.Type, to: Any, source: Any, n: Any) -> None:
    bytes_each = {_F32: 4, _F16: 2, _I32: 4, _I16: 2, _I8: 1}[element]
    with cgutils.for_range(builder, n) as loop:
        offset = builder.mul(loop.index, _I64(bytes_each))
        pointer = element.as_pointer()
        value = builder.load(builder.inttoptr(builder.add(source, offset), pointer), align=1)
        builder.store(value, builder.inttoptr(builder.add(to, offset), pointer), align=1)


load_f32s, load_f32s_part = _make_load(_F32, None, F32S)
load_f16s, load_f16s_part = _make_load(_F16, "f16", F32S)
load_bf16s, load_bf16s_part = _make_load(_I16, "bf16", F32S)
load_i32s_as_f32, load_i32s_as_f32_part = _make_load(_I32, "i32", F32S)
load_i8s_as_f32, load_i8s_as_f32_part = _make_load(_I8, "i8", F32S)

store_f32s, store_f32s_part = _make_store(_F32, None, F32S)
store_f16s, store_f16s_part = _make_store(_F16, "f16", F32S)
store_bf16s, store_bf16s_part = _make_store(_I16, "bf16", F32S)
# Whole numbers that fit.
store_f32s_as_i8, store_f32s_as_i8_part = _make_store(_I8, "i8", F32S)


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line at ``address``, which may be any number."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer_type = _I8.as_pointer()
        signature = ir.FunctionType(ir.VoidType(), [pointer_type, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
        # To read, into all levels, data.
        words = [_I32(0), _I32(3), _I32(1)]
        builder.call(function, [builder.inttoptr(args[0], pointer_type), *words])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


# -- functions of lanes ----------------------------------------------------------------------------


@intrinsic
def splat(typingctx: Any, value: Any) -> Any:
    """Return a float32 in every lane."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _splat(builder, args[0])

    return F32S(types.float32), codegen


@intrinsic
def iota(typingctx: Any) -> Any:
    """Return 0.0, 1.0, ... 15.0."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return ir.Constant(_vector(_F32), [float(i) for i in range(LANES)])

    return F32S(), codegen


def _make_cast(instruction: str, to: ir.Type, result: Lanes, value: Lanes) -> Any:
    def cast(typingctx: Any, lanes: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return getattr(builder, instruction)(args[0], _vector(to))

        return result(value), codegen

    return intrinsic(cast)


# The bit patterns of float lanes, float lanes of bit patterns, and integer lanes as floats.
bits_of = _make_cast("bitcast", _I32, I32S, F32S)
from_bits = _make_cast("bitcast", _F32, F32S, I32S)
to_float = _make_cast("sitofp", _F32, F32S, I32S)


def _make_bits(conversion: str) -> Any:
    def bits(typingctx: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            narrow = builder.bitcast(_narrow(builder, args[0], conversion), _vector(_I16))
            return builder.zext(narrow, _vector(_I32))

        return I32S(F32S), codegen

    return intrinsic(bits)


# The bit patterns, 0 to 65535, of float lanes rounded to a type of 16 bits.
f16_bits = _make_bits("f16")
bf16_bits = _make_bits("bf16")


@intrinsic
def look_up(typingctx: Any, table: Any, indices: Any) -> Any:
    """Return the float32s of ``table``, an address, at these places."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        table, indices = args
        pointer = builder.inttoptr(table, _F32.as_pointer())
        lanes = ir.Constant(_vector(_F32), None)
        for i in range(LANES):
            lane = _I32(i)
            at = builder.zext(builder.extract_element(indices, lane), _I64)
            value = builder.load(builder.gep(pointer, [at]), align=4)
            lanes = builder.insert_element(lanes, value, lane)
        return lanes

    return F32S(types.int64, I32S), codegen


@intrinsic
def select(typingctx: Any, mask: Any, yes: Any, no: Any) -> Any:
    """Return lanes of ``yes`` where ``mask`` is set, else of ``no``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(*args)

    return F32S(MASK, F32S, F32S), codegen


def _make_function(name: str, n_args: int) -> Any:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = _vector(_F32)
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(vector, [vector] * n_args),
            f"llvm.{name}.v{LANES}f32",
        )
        return builder.call(function, args)

    if n_args == 1:

        def function1(typingctx: Any, a: Any) -> Any:
            return F32S(F32S), emit

        return intrinsic(function1)
    if n_args == 2:

        def function2(typingctx: Any, a: Any, b: Any) -> Any:
            return F32S(F32S, F32S), emit

        return intrinsic(function2)

    def function3(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
        return F32S(F32S, F32S, F32S), emit

    return intrinsic(function3)


fma = _make_function("fma", 3)
sqrt = _make_function("sqrt", 1)
absolute = _make_function("fabs", 1)
copysign = _make_function("copysign", 2)
floor, ceil, trunc = (_make_function(name, 1) for name in ("floor", "ceil", "trunc"))
# Halves to even numbers.
round_even = _make_function("rint", 1)
# Halves to even numbers.
round_even = _make_function("rint", 1)
# Halves away from zero, as C's roundf.
round_away = _make_function("round", 1)
# Of a number and a NaN: the number.
maximum = _make_function("maxnum", 2)
minimum = _make_function("minnum", 2)


def _make_shuffle(order: list[int]) -> Any:
    def shuffle(typingctx: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.shuffle_vector(*args, ir.Constant(ir.VectorType(_I32, LANES), order))

        return F32S(F32S, F32S), codegen

    return intrinsic(shuffle)


# Of 32 values in two vectors: those at even places, and those at odd ones ...
even_lanes = _make_shuffle(list(range(0, 2 * LANES, 2)))
odd_lanes = _make_shuffle(list(range(1, 2 * LANES, 2)))
# ... and back: a0 b0 a1 b1 ...
interleave_low = _make_shuffle([i // 2 + LANES * (i % 2) for i in range(LANES)])
interleave_high = _make_shuffle([i // 2 + LANES * (i % 2) + LANES // 2 for i in range(LANES)])


def _halves(builder: Any, value: Any, combine: Callable[..., Any]) -> Any:
    """Fold 16 lanes to one by a tree, whose order is the same on every processor."""
    width = LANES
    while width > 1:
        width //= 2
        half = ir.VectorType(_I32, width)
        undefined = ir.Constant(value.type, ir.Undefined)
        low = builder.shuffle_vector(value, undefined, ir.Constant(half, list(range(width))))
        high = builder.shuffle_vector(
            value, undefined, ir.Constant(half, list(range(width, 2 * width)))
        )
        value = combine(builder, low, high)
    return builder.extract_element(value, ir.Constant(_I32, 0))


@intrinsic
def sum_lanes(typingctx: Any, value: Any) -> Any:
    """Return the sum of the lanes, float32."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _halves(builder, args[0], lambda b, x, y: b.fadd(x, y))

    return types.float32(F32S), codegen


@intrinsic
def max_lanes(typingctx: Any, value: Any) -> Any:
    """Return the largest lane; NaNs don't count."""

    def larger(builder: Any, x: Any, y: Any) -> Any:
        lanes = x.type.count
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(x.type, [x.type, x.type]), f"llvm.maxnum.v{lanes}f32"
        )
        return builder.call(function, [x, y])

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _halves(builder, args[0], larger)

    return types.float32(F32S), codegen
