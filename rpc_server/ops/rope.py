"""ROPE: pairs of elements of each row turned by angles that grow with the row's position.

Which elements make a pair, and which of four positions turns a pair, depends on the mode.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.ops import checks
from rpc_server.ops.arrays import ArrayContext
from rpc_server.ops.checks import F32_ONLY, I32_ONLY
from rpc_server.ops.shards import Propagated, Shards, shard_by_rows
from rpc_server.ops.table import contract, reference, require, source


class Mode(enum.IntEnum):
    """op_params[2]. NORMAL turns neighbours; the others element i with one half a width on."""

    NORMAL = 0
    NEOX = 2
    MROPE = 8
    VISION = 24
    IMROPE = 40


_MODES = frozenset(int(mode) for mode in Mode)
# These have four positions a token: time, height, width and an extra one.
_MULTIPLE = frozenset({Mode.MROPE, Mode.VISION, Mode.IMROPE})


@dataclass(frozen=True, slots=True)
class Geometry:
    """The places of a row's pairs: pair i is elements first + i * step and ``distance`` behind."""

    first: int
    pairs: int
    step: int
    distance: int

    @classmethod
    def of(cls, t: Tensor) -> Geometry:
        n_dims, mode = t.param_i32(1), t.param_i32(2)
        if mode == Mode.VISION:
            return cls(0, n_dims, 1, n_dims)
        neighbours = mode == Mode.NORMAL
        pairs = n_dims // 2
        return cls(t.param_i32(15), pairs, 2 if neighbours else 1, 1 if neighbours else pairs)


def _rope_shard(node: Tensor, shards: Shards) -> Propagated | None:
    # Dimension 2 counts positions.
    return shard_by_rows(node, shards) if shards[0] is not None and shards[0].dim == 1 else None


@contract(Op.ROPE, Op.ROPE_BACK, shard_rule=_rope_shard)
def _rope_contract(t: Tensor) -> None:
    """src1: positions, of all tokens (dimension 2); src2: a divisor for each pair's angle."""
    n_dims, mode, first, width = t.param_i32(1), t.param_i32(2), t.param_i32(15), t.ne[0]
    checks.result(t, {GgmlType.F32, GgmlType.F16})
    checks.shape(checks.source(t, 0, {t.type}), t.ne, "source 0")
    require(mode in _MODES, f"no mode {mode}")
    require(n_dims >= 2 and n_dims % 2 == 0, f"can't turn {n_dims} elements")
    require(first >= 0 and first % 2 == 0, f"can't turn from element {first} on")
    require(first + n_dims <= width, f"no elements {first} to {first + n_dims} in {width}")
    if mode == Mode.VISION:
        require(first == 0 and width == 2 * n_dims, f"turning {n_dims} of {width} elements")
    if mode in _MULTIPLE:
        sections = t.op_params[11:15]
        require(min(sections) >= 0 and max(sections[:3]) > 0, f"sections {sections}")
        require(sum(sections) <= width, f"sections {sections} of {width} elements")
    n_positions = t.ne[2] * (4 if mode in _MULTIPLE else 1)
    checks.shape(checks.source(t, 1, I32_ONLY), (n_positions, 1, 1, 1), "source 1")
    if t.src[2] is not None:
        factors = checks.source(t, 2, F32_ONLY)
        checks.shape(factors, (factors.ne[0], 1, 1, 1), "source 2")
        pairs = Geometry.of(t).pairs
        require(factors.ne[0] >= pairs, f"{factors.ne[0]} factors for {pairs} pairs")
    _require_scaling(t)


def _require_scaling(t: Tensor) -> None:
    """Require values that can be divided by, or have a logarithm."""
    require(t.param_f32(5) > 0, f"base of frequencies is {t.param_f32(5)}")
    if t.param_f32(7) != 0:
        require(t.param_f32(6) > 0, f"scale of frequencies is {t.param_f32(6)}")
        betas = t.param_f32(9), t.param_f32(10)
        require(all(beta > 0 for beta in betas), f"correction range {betas}")


def _sections(t: Tensor, pairs: int) -> tuple[list[int], list[int]]:
    """Return which position turns each pair, and how many steps down the pair's angle is."""
    mode, sizes = t.param_i32(2), t.op_params[11:15]
    if mode not in _MULTIPLE:
        return [0] * pairs, list(range(pairs))
    ends = [sum(sizes[: i + 1]) for i in range(4)]
    sections, steps = [], []
    taken = [0] * 4
    for pair in range(pairs):
        sector = pair % ends[3]
        if mode == Mode.IMROPE:
            # Time, height, width in turn, each up to its share.
            turn = sector % 3
            section = turn if sector < 3 * sizes[turn] else 3
        else:
            section = next(i for i in range(4) if sector < ends[i])
        if mode == Mode.VISION and sector in (0, *ends[:3]):
            # Sections are independent: each counts its angles from its own start.
            taken[(0, *ends[:3]).index(sector)] = 0
        sections.append(section)
        steps.append(taken[section])
        taken = [n + 1 for n in taken]
    return sections, steps


def _angles(ctx: ArrayContext, t: Tensor, pairs: int) -> Any:
    """float32 (tokens, pairs), before any scaling.

    The ratio is multiplied up step by step in float32: rounding included, these are the angles
    that models run with everywhere.
    """
    xp, count = ctx.xp, t.ne[2]
    ratio = np.float32(t.param_f32(5)) ** np.float32(-2.0 / t.param_i32(1))
    positions = ctx.view(source(t, 1))[0, 0, 0].reshape(-1, count)
    powers = xp.full((*positions.shape, pairs), ratio, xp.float32)
    powers[..., 0] = positions
    powers = xp.moveaxis(ctx.accumulate(xp.multiply, powers), -1, 0)
    sections, steps = _sections(t, pairs)
    return powers[xp.asarray(steps), xp.asarray(sections)].T


def correction_range(t: Tensor) -> tuple[np.float32, np.float32]:
    """Return pairs between which YaRN goes over from extrapolated to interpolated angles."""
    n_dims, n_ctx, base = t.param_i32(1), t.param_i32(4), np.float32(t.param_f32(5))

    def pair_of(rotations: float) -> np.float32:
        wavelength = np.float32(n_ctx / (rotations * 2 * np.pi))
        return np.float32(n_dims * np.log(wavelength) / (2 * np.log(base)))

    low, high = np.floor(pair_of(t.param_f32(9))), np.ceil(pair_of(t.param_f32(10)))
    return np.maximum(low, np.float32(0)), np.minimum(high, np.float32(n_dims - 1))


def _scaled(xp: ModuleType, t: Tensor, angles: Any) -> tuple[Any, np.float32]:
    """Angles to turn by, and the magnitude to multiply with."""
    scale, ext_factor = np.float32(t.param_f32(6)), np.float32(t.param_f32(7))
    magnitude = np.float32(t.param_f32(8))
    if not ext_factor:
        return scale * angles, magnitude
    low, high = correction_range(t)
    pairs = xp.arange(angles.shape[1], dtype=xp.float32)
    ramp = (pairs - low) / np.maximum(np.float32(0.001), high - low)
    mix = (1 - xp.clip(ramp, 0, 1)) * ext_factor
    magnitude *= 1 + np.float32(0.1) * np.log(1 / scale)
    # Rounded once less, as ggml is compiled: far from position 0 it shows.
    interpolated = (scale * angles).astype(xp.float64) * (1 - mix)
    return (interpolated + angles * mix).astype(xp.float32), magnitude


@reference(Op.ROPE, Op.ROPE_BACK)
def _rope(ctx: ArrayContext, t: Tensor) -> None:
    xp, g = ctx.xp, Geometry.of(t)
    angles = _angles(ctx, t, g.pairs)
    if t.src[2] is not None:
        angles = angles / ctx.f32(t.src[2])[0, 0, 0, : g.pairs]
    angles, magnitude = _scaled(xp, t, angles)
    angles = angles.astype(xp.float64)[:, None]
    cosines = xp.cos(angles).astype(xp.float32) * magnitude
    sines = xp.sin(angles).astype(xp.float32) * magnitude
    if t.op is Op.ROPE_BACK:
        sines = -sines
    x = ctx.f32(source(t, 0))
    y = xp.array(x)
    last = g.first + g.pairs * g.step
    one = slice(g.first, last, g.step)
    other = slice(g.first + g.distance, last + g.distance, g.step)
    a, b = x[..., one], x[..., other]
    y[..., one], y[..., other] = a * cosines - b * sines, a * sines + b * cosines
    ctx.store(t, y)
