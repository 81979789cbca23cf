"""Elementary functions on 16 lanes of float32: the exponential and what is made of it.

Errors are a few units in the last place; NaN stays NaN and infinities give the limits.
"""

from __future__ import annotations

import numpy as np

from rpc_server.devices.cpu.kernels.intrinsics import inline_helper
from rpc_server.devices.cpu.kernels.lanes import (
    absolute,
    bits_of,
    copysign,
    f16_bits,
    fma,
    from_bits,
    look_up,
    select,
    splat,
    to_float,
)

# Adding it moves a float's integer part into its low mantissa bits (round to nearest even).
_TO_INTEGER = np.float32(12582912.0)
_TO_INTEGER_BITS = np.int32(0x4B400000)
_LOG2_E = np.float32(1.4426950408889634)
# ln 2 in two parts: the first has so few bits that products with small integers are exact.
_LN2_HIGH = np.float32(0.693145751953125)
_LN2_LOW = np.float32(1.428606765330187e-06)
# Beyond these the result is 0 or infinite whatever follows.
_EXP_LOWEST = np.float32(-104.0)
_EXP_HIGHEST = np.float32(89.0)


@inline_helper
def exp(x):  # type: ignore[no-untyped-def]
    """Return e to the x: 2 to the integer part of x / ln 2, times a polynomial of the rest."""
    x = select(x < _EXP_LOWEST, splat(_EXP_LOWEST), x)
    x = select(x > _EXP_HIGHEST, splat(_EXP_HIGHEST), x)
    shifted = fma(x, splat(_LOG2_E), splat(_TO_INTEGER))
    n = shifted - _TO_INTEGER
    power = bits_of(shifted) - _TO_INTEGER_BITS
    r = fma(n, splat(-_LN2_HIGH), x)
    r = fma(n, splat(-_LN2_LOW), r)
    p = fma(r, splat(np.float32(1.0 / 720.0)), splat(np.float32(1.0 / 120.0)))
    p = fma(p, r, splat(np.float32(1.0 / 24.0)))
    p = fma(p, r, splat(np.float32(1.0 / 6.0)))
    p = fma(p, r, splat(np.float32(0.5)))
    p = fma(p, r, splat(np.float32(1.0)))
    p = fma(p, r, splat(np.float32(1.0)))
    # In two steps: neither factor leaves the normal numbers where the result may.
    half = power >> np.int32(1)
    rest = power - half
    p = p * from_bits((half + np.int32(127)) << np.int32(23))
    return p * from_bits((rest + np.int32(127)) << np.int32(23))


@inline_helper
def log(x):  # type: ignore[no-untyped-def]
    """Return the natural logarithm; -inf at 0, NaN below."""
    tiny = x < np.float32(1.1754944e-38)
    scaled = select(tiny, x * np.float32(8388608.0), x)
    bits = bits_of(scaled)
    # The mantissa taken from [sqrt(1/2), sqrt(2)), so that its logarithm is small.
    power = (bits - np.int32(0x3F3504F3)) >> np.int32(23)
    m = from_bits(bits - (power << np.int32(23)))
    e = to_float(power)
    e = select(tiny, e - np.float32(23.0), e)
    f = m - np.float32(1.0)
    s = f / (f + np.float32(2.0))
    z = s * s
    p = fma(z, splat(np.float32(2.0 / 11.0)), splat(np.float32(2.0 / 9.0)))
    p = fma(p, z, splat(np.float32(2.0 / 7.0)))
    p = fma(p, z, splat(np.float32(2.0 / 5.0)))
    p = fma(p, z, splat(np.float32(2.0 / 3.0)))
    p = fma(p * z, s, s + s)
    y = fma(e, splat(_LN2_HIGH), fma(e, splat(_LN2_LOW), p))
    infinity = np.float32(np.inf)
    y = select(x == infinity, x, y)
    y = select(x == np.float32(0.0), splat(-infinity), y)
    y = select(x < np.float32(0.0), splat(np.float32(np.nan)), y)
    return select(x == x, y, x)


@inline_helper
def expm1(x):  # type: ignore[no-untyped-def]
    """Return exp(x) - 1 without cancellation near 0."""
    p = fma(x, splat(np.float32(1.0 / 40320.0)), splat(np.float32(1.0 / 5040.0)))
    p = fma(p, x, splat(np.float32(1.0 / 720.0)))
    p = fma(p, x, splat(np.float32(1.0 / 120.0)))
    p = fma(p, x, splat(np.float32(1.0 / 24.0)))
    p = fma(p, x, splat(np.float32(1.0 / 6.0)))
    p = fma(p, x, splat(np.float32(0.5)))
    near = fma(p * x, x, x)
    return select(absolute(x) < np.float32(0.5), near, exp(x) - np.float32(1.0))


@inline_helper
def sigmoid(x):  # type: ignore[no-untyped-def]
    return np.float32(1.0) / (exp(-x) + np.float32(1.0))


@inline_helper
def tanh(x):  # type: ignore[no-untyped-def]
    a = absolute(x)
    e = exp(a * np.float32(-2.0))
    far = (np.float32(1.0) - e) / (e + np.float32(1.0))
    z = x * x
    p = fma(z, splat(np.float32(62.0 / 2835.0)), splat(np.float32(-17.0 / 315.0)))
    p = fma(p, z, splat(np.float32(2.0 / 15.0)))
    p = fma(p, z, splat(np.float32(-1.0 / 3.0)))
    near = fma(p * z, a, a)
    return copysign(select(a < np.float32(0.25), near, far), x)


@inline_helper
def silu(x):  # type: ignore[no-untyped-def]
    return x / (exp(-x) + np.float32(1.0))


@inline_helper
def gelu_of_f32(x, table):  # type: ignore[no-untyped-def]
    """Return GELU by a table for half precision, with its limits beyond 10 on either side."""
    y = look_up(table, f16_bits(x))
    y = select(x >= np.float32(10.0), x, y)
    return select(x <= np.float32(-10.0), splat(np.float32(0.0)), y)


@inline_helper
def gelu_erf(x):  # type: ignore[no-untyped-def]
    """Return 0.5 x (1 + erf(x / sqrt 2)).

    1 - erf(z) is exp(-z z) times t exp(P(t)), t = 2 / (2 + z), by a fit of Chebyshev's whose
    relative error is 1.2e-7. As in ggml, erf is rounded before 1 is added: to exactly -1 at last.
    """
    z = absolute(x) * np.float32(0.7071067811865476)
    t = np.float32(1.0) / fma(z, splat(np.float32(0.5)), splat(np.float32(1.0)))
    p = fma(t, splat(np.float32(0.17087277)), splat(np.float32(-0.82215223)))
    p = fma(p, t, splat(np.float32(1.48851587)))
    p = fma(p, t, splat(np.float32(-1.13520398)))
    p = fma(p, t, splat(np.float32(0.27886807)))
    p = fma(p, t, splat(np.float32(-0.18628806)))
    p = fma(p, t, splat(np.float32(0.09678418)))
    p = fma(p, t, splat(np.float32(0.37409196)))
    p = fma(p, t, splat(np.float32(1.00002368)))
    p = fma(p, t, splat(np.float32(-1.26551223)))
    erf = np.float32(1.0) - t * exp(p) * exp(-(z * z))
    return x * np.float32(0.5) * (copysign(erf, x) + np.float32(1.0))


@inline_helper
def softplus(x):  # type: ignore[no-untyped-def]
    return select(x > np.float32(20.0), x, log(exp(x) + np.float32(1.0)))


@inline_helper
def relu(x):  # type: ignore[no-untyped-def]
    return select(x > np.float32(0.0), x, splat(np.float32(0.0)))


@inline_helper
def hardsigmoid(x):  # type: ignore[no-untyped-def]
    y = (x + np.float32(3.0)) / np.float32(6.0)
    y = select(y > np.float32(0.0), y, splat(np.float32(0.0)))
    return select(y < np.float32(1.0), y, splat(np.float32(1.0)))
