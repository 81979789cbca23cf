"""Kernels of ops that treat each element alone: functions of one value, of two, and gated units.

A kernel is made per function and per 'all F32 or not', on first use. Extra words: 0 the number of
rows, 1 the elements of a row, 2 the address of the table that GELU is looked up in. Tensors that
are dense throughout come as one row, whose elements the threads share; others share rows.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from protocol.ggml.ops import GluOp, UnaryOp
from rpc_server.devices.cpu.kernels import functions as f
from rpc_server.devices.cpu.kernels import lanes
from rpc_server.devices.cpu.kernels.interface.codes import Binary, Function
from rpc_server.devices.cpu.kernels.intrinsics import (
    DST,
    SRC0,
    SRC1,
    KernelFunction,
    extra,
    ggml_type,
    inline_helper,
    kernel,
    nb,
    ne,
    param_f32,
    pasted_helper,
    place,
    row_address,
)
from rpc_server.devices.cpu.kernels.lanes import (
    LANES,
    absolute,
    bf16_bits,
    copysign,
    f16_bits,
    fma,
    load_f32s,
    load_f32s_part,
    look_up,
    minimum,
    round_away,
    select,
    splat,
    sqrt,
    store_f32s,
    store_f32s_part,
)
from rpc_server.devices.cpu.kernels.typed import (
    BF16,
    load_lanes,
    load_lanes_part,
    load_scalar,
    share_elements,
    size_of,
    store_lanes,
    store_lanes_part,
    store_scalar,
)

# Elements that one thread does faster than two can agree on.
_GRAIN = 2048


_SCALE = int(Function.SCALE)
_CLAMP = int(Function.CLAMP)
_SQR = int(Function.SQR)
_SQRT = int(Function.SQRT)
_LOG = int(Function.LOG)
_LEAKY_RELU = int(Function.LEAKY_RELU)
_SIN = int(Function.SIN)
_COS = int(Function.COS)
# Functions of lanes alone.
_ALONE = {
    int(UnaryOp[name.upper()]): getattr(where, name)
    for where, names in (
        (f, "silu gelu_erf relu sigmoid tanh exp softplus hardsigmoid"),
        (lanes, "floor ceil trunc"),
    )
    for name in names.split()
}
# The others have a line each in the kernel.
_OTHERS = "GELU GELU_QUICK EXPM1 ELU XIELU HARDSWISH NEG ABS SGN STEP ROUND"
_GELU, _GELU_QUICK, _EXPM1, _ELU, _XIELU, _HARDSWISH, _NEG, _ABS, _SGN, _STEP, _ROUND = (
    int(UnaryOp[name]) for name in _OTHERS.split()
)


@inline_helper
def _sign(x):  # type: ignore[no-untyped-def]
    one = copysign(splat(np.float32(1.0)), x)
    return select(absolute(x) > np.float32(0.0), one, splat(np.float32(0.0)))


@inline_helper
def _step(x):  # type: ignore[no-untyped-def]
    return select(x > np.float32(0.0), splat(np.float32(1.0)), splat(np.float32(0.0)))


@inline_helper
def _elu(x):  # type: ignore[no-untyped-def]
    return select(x > np.float32(0.0), x, f.expm1(x))


@inline_helper
def _xielu(x, alpha_n, alpha_p, beta, eps):  # type: ignore[no-untyped-def]
    above = x * x * alpha_p + x * beta
    below = (f.expm1(minimum(x, splat(eps))) - x) * alpha_n + x * beta
    return select(x > np.float32(0.0), above, below)


@inline_helper
def _clamp(x, low, high):  # type: ignore[no-untyped-def]
    """As C's MIN and MAX do it: a NaN becomes ``high``."""
    x = select(x < high, x, splat(high))
    return select(x > low, x, splat(low))


@inline_helper
def _at_most(x, limit):  # type: ignore[no-untyped-def]
    return select(x > limit, splat(limit), x)


@inline_helper
def _within(x, limit):  # type: ignore[no-untyped-def]
    """From -limit to limit; NaN stays NaN."""
    return select(x < -limit, splat(-limit), _at_most(x, limit))


@inline_helper
def _leaky_relu(x, slope):  # type: ignore[no-untyped-def]
    return f.relu(x) + select(x < np.float32(0.0), x, splat(np.float32(0.0))) * slope


@inline_helper
def _table_index(type, x):  # type: ignore[no-untyped-def]
    """Return where a table for 16-bit arguments has ``x``.

    BF16 has its own, others round to F16.
    """
    if type == BF16:
        return bf16_bits(x)
    return f16_bits(x)


@functools.cache
def _access(f32: bool) -> tuple[Any, Any, Any]:
    """Return size(type), load(type, at, n) and store(type, at, n, lanes): 16 elements of ``n``.

    The type is not looked at for ``f32``.
    """

    # The choice is a constant for numba: only its branch is compiled.
    @pasted_helper
    def size(type_):  # type: ignore[no-untyped-def]
        if f32:
            return 4
        return size_of(type_)

    @pasted_helper
    def load(type_, at, n):  # type: ignore[no-untyped-def]
        if f32:
            return load_f32s(at) if n >= LANES else load_f32s_part(at, n)
        return load_lanes(type_, at) if n >= LANES else load_lanes_part(type_, at, n)

    @pasted_helper
    def store(type_, at, n, value):  # type: ignore[no-untyped-def]
        if f32:
            if n >= LANES:
                store_f32s(at, value)
            else:
                store_f32s_part(at, value, n)
        elif n >= LANES:
            store_lanes(type_, at, value)
        else:
            store_lanes_part(type_, at, value, n)

    return size, load, store


@functools.cache
def unary_kernel(code: int, f32: bool) -> KernelFunction:
    """Return the kernel of a function of one element: a UnaryOp or a :class:`Function`.

    ``f32``: source and result are F32; otherwise each may be F32, F16 or BF16.
    """

    size, load, store = _access(f32)
    is_alone, alone = code in _ALONE, _ALONE.get(code, f.relu)

    # The choice is an integer that numba takes for a constant, as is ``f32``.
    @kernel
    def unary(rec, ith, nth):  # type: ignore[no-untyped-def]
        rows, width = extra(rec, 0), extra(rec, 1)
        type_d, type_s = ggml_type(rec, DST), ggml_type(rec, SRC0)
        size_d, size_s = size(type_d), size(type_s)
        row, row_end, begin, end = share_elements(rows, width, ith, nth, _GRAIN, LANES)
        p0, p1, p2 = param_f32(rec, 0), param_f32(rec, 1), param_f32(rec, 2)
        p3, p4 = param_f32(rec, 3), param_f32(rec, 4)
        table = extra(rec, 2)
        while row < row_end:
            to, source = row_address(rec, DST, row), row_address(rec, SRC0, row)
            row += 1
            i = begin
            while i < end:
                n = end - i
                x = load(type_s, source + i * size_s, n)
                if is_alone:
                    y = alone(x)
                elif code == _GELU:
                    if f32:  # noqa: SIM108  (only a statement's other branch is not compiled)
                        y = f.gelu_of_f32(x, table)
                    else:
                        y = look_up(table, _table_index(type_s, x))
                elif code == _GELU_QUICK:
                    y = look_up(table, _table_index(type_s, x))
                elif code == _EXPM1:
                    y = f.exp(x) - np.float32(1.0)
                elif code == _ELU:
                    y = _elu(x)
                elif code == _XIELU:
                    y = _xielu(x, p1, p2, p3, p4)
                elif code == _HARDSWISH:
                    y = x * f.hardsigmoid(x)
                elif code == _NEG:
                    y = -x
                elif code == _ABS:
                    y = absolute(x)
                elif code == _SGN:
                    y = _sign(x)
                elif code == _STEP:
                    y = _step(x)
                elif code == _ROUND:
                    y = round_away(x)
                elif code == _SCALE:
                    # Adding a bias of 0 would turn -0 into 0.
                    y = x * p0 if p1 == np.float32(0.0) else fma(x, splat(p0), splat(p1))
                elif code == _CLAMP:
                    y = _clamp(x, p0, p1)
                elif code == _SQR:
                    y = x * x
                elif code == _SQRT:
                    y = sqrt(x)
                elif code == _LOG:
                    y = f.log(x)
                else:
                    y = _leaky_relu(x, p0)
                store(type_d, to + i * size_d, n, y)
                i += LANES
        return 0

    return unary


@functools.cache
def trigonometric_kernel(code: int) -> KernelFunction:
    """Return the kernel of SIN or COS.

    It uses the C library, whose argument reduction is always good.
    """

    @kernel
    def trigonometric(rec, ith, nth):  # type: ignore[no-untyped-def]
        rows, width = extra(rec, 0), extra(rec, 1)
        type_d, type_s = ggml_type(rec, DST), ggml_type(rec, SRC0)
        size_d, size_s = size_of(type_d), size_of(type_s)
        row, row_end, begin, end = share_elements(rows, width, ith, nth, 256, LANES)
        while row < row_end:
            to, source = row_address(rec, DST, row), row_address(rec, SRC0, row)
            row += 1
            for i in range(begin, end):
                x = load_scalar(type_s, source + i * size_s)
                y = math.sin(x) if code == _SIN else math.cos(x)
                store_scalar(type_d, to + i * size_d, y)
        return 0

    return trigonometric


_ADD, _SUB, _MUL, _DIV = (int(code) for code in Binary)


@inline_helper
def _combine(code, x, y):  # type: ignore[no-untyped-def]
    """On lanes or scalars; ``code`` is a constant where it is called."""
    if code == _ADD:
        return x + y
    if code == _SUB:
        return x - y
    if code == _MUL:
        return x * y
    return x / y


@functools.cache
def binary_kernel(code: int, f32: bool) -> KernelFunction:
    """Return the kernel of dst = src0 op src1, src1 repeated along every dimension.

    Rows of src0 and dst are dense.

    Extra word 2: 0 if src1's rows are dense and as long as dst's, 1 if they are one element, 2 if
    they repeat within a row or have a stride of their own.
    """

    size, load, store = _access(f32)

    @kernel
    def binary(rec, ith, nth):  # type: ignore[no-untyped-def]
        rows, width, form = extra(rec, 0), extra(rec, 1), extra(rec, 2)
        type_d, type_x, type_y = ggml_type(rec, DST), ggml_type(rec, SRC0), ggml_type(rec, SRC1)
        size_d, size_x, size_y = size(type_d), size(type_x), size(type_y)
        row, row_end, begin, end = share_elements(rows, width, ith, nth, _GRAIN, LANES)
        ne1, ne2 = ne(rec, DST, 1), ne(rec, DST, 2)
        while row < row_end:
            i1, rest = row % ne1, row // ne1
            i2, i3 = rest % ne2, rest // ne2
            row += 1
            to, x_row = place(rec, DST, i1, i2, i3), place(rec, SRC0, i1, i2, i3)
            # One division after the other: all three at once take more registers than there are.
            y_row = place(rec, SRC1, i1 % ne(rec, SRC1, 1), 0, 0)
            y_row += i2 % ne(rec, SRC1, 2) * nb(rec, SRC1, 2)
            y_row += i3 % ne(rec, SRC1, 3) * nb(rec, SRC1, 3)
            if form == 2:
                for i in range(begin, end):
                    at = y_row + i % ne(rec, SRC1, 0) * nb(rec, SRC1, 0)
                    value = _combine(
                        code, load_scalar(type_x, x_row + i * size_x), load_scalar(type_y, at)
                    )
                    store_scalar(type_d, to + i * size_d, value)
                continue
            y = splat(load_scalar(type_y, y_row))
            i = begin
            # The last vector is apart: in one loop with the others it takes their registers.
            while i + LANES <= end:
                x = load(type_x, x_row + i * size_x, LANES)
                if form == 0:
                    y = load(type_y, y_row + i * size_y, LANES)
                store(type_d, to + i * size_d, LANES, _combine(code, x, y))
                i += LANES
            if i < end:
                x = load(type_x, x_row + i * size_x, end - i)
                if form == 0:
                    y = load(type_y, y_row + i * size_y, end - i)
                store(type_d, to + i * size_d, end - i, _combine(code, x, y))
        return 0

    return binary


(
    _REGLU,
    _GEGLU,
    _SWIGLU,
    _SWIGLU_OAI,
    _GEGLU_ERF,
    _GEGLU_QUICK,
    _SWIGLU_CLAMP,
) = (int(code) for code in GluOp)


@inline_helper
def _swiglu_oai(x, g, alpha, limit):  # type: ignore[no-untyped-def]
    x, g = _at_most(x, limit), _within(g, limit)
    return x / (f.exp(x * -alpha) + np.float32(1.0)) * (g + np.float32(1.0))


@inline_helper
def _swiglu_clamp(x, g, limit):  # type: ignore[no-untyped-def]
    return f.silu(_at_most(x, limit)) * _within(g, limit)


@functools.cache
def glu_kernel(code: int, f32: bool) -> KernelFunction:
    """Return the kernel of dst = activation(x) * g for a GluOp.

    Slots 1 and 2 hold x and g with the shape of dst (a halved tensor gives two views).
    """

    size, load, store = _access(f32)

    @kernel
    def glu(rec, ith, nth):  # type: ignore[no-untyped-def]
        rows, width = extra(rec, 0), extra(rec, 1)
        type_d, type_x, type_g = ggml_type(rec, DST), ggml_type(rec, SRC0), ggml_type(rec, SRC1)
        size_d, size_x, size_g = size(type_d), size(type_x), size(type_g)
        # The exponential makes smaller shares worth while.
        row, row_end, begin, end = share_elements(rows, width, ith, nth, 512, LANES)
        alpha, limit = param_f32(rec, 2), param_f32(rec, 3)
        table = extra(rec, 2)
        while row < row_end:
            to = row_address(rec, DST, row)
            x_row, g_row = row_address(rec, SRC0, row), row_address(rec, SRC1, row)
            row += 1
            i = begin
            while i < end:
                n = end - i
                x, g = load(type_x, x_row + i * size_x, n), load(type_g, g_row + i * size_g, n)
                if code == _SWIGLU:
                    y = f.silu(x) * g
                elif code == _GEGLU:
                    if f32:
                        # ggml doesn't look at g there: what it is, NaN or infinite, is lost.
                        zero = splat(np.float32(0.0))
                        y = select(x <= np.float32(-10.0), zero, f.gelu_of_f32(x, table) * g)
                    else:
                        y = look_up(table, _table_index(type_x, x)) * g
                elif code == _REGLU:
                    y = select(x > np.float32(0.0), x * g, splat(np.float32(0.0)))
                elif code == _GEGLU_ERF:
                    y = f.gelu_erf(x) * g
                elif code == _GEGLU_QUICK:
                    y = look_up(table, _table_index(type_x, x)) * g
                elif code == _SWIGLU_OAI:
                    y = _swiglu_oai(x, g, alpha, limit)
                else:
                    y = _swiglu_clamp(x, g, limit)
                store(type_d, to + i * size_d, n, y)
                i += LANES
        return 0

    return glu
