"""Lowering of ROPE and ROPE_BACK."""

from __future__ import annotations

import struct

import numpy as np

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.devices.cpu.catalog import rope_kernel, rope_table
from rpc_server.devices.cpu.kernels.interface.codes import (
    MODE_IMROPE,
    MODE_MROPE,
    MODE_NEOX,
    MODE_NORMAL,
    MODE_VISION,
)
from rpc_server.devices.cpu.planner import Planner, lowers


def float_word(value: float | np.float32) -> int:
    """Return a float32 as an extra word."""
    word: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return word


def _correction_range(t: Tensor) -> tuple[float, float]:
    """Pairs between which YaRN blends from extrapolated to interpolated angles."""
    n_dims, n_ctx = t.param_i32(1), t.param_i32(4)
    base, beta_fast, beta_slow = t.param_f32(5), t.param_f32(9), t.param_f32(10)

    def pair_of(rotations: float) -> np.float32:
        wavelength = np.float32(n_ctx / (rotations * 2 * np.pi))
        return np.float32(n_dims * np.log(wavelength) / (2 * np.log(np.float32(base))))

    low = max(np.float32(0), np.floor(pair_of(beta_fast)))
    high = min(np.float32(n_dims - 1), np.ceil(pair_of(beta_slow)))
    return float(low), float(high)


def _table(t: Tensor, planner: Planner, pairs: int) -> int:
    """Address of the table of angles for ``t``, made once per graph."""
    positions, factors = t.src[1], t.src[2]
    assert positions is not None
    count = t.ne[2]
    key = ("rope table", t.op, t.op_params[1:15], pairs, count)
    sources = [positions] if factors is None else [positions, factors]
    address, fresh = planner.shared_scratch(key, sources, count * pairs * 8)
    if fresh:
        n_dims, ext_factor = t.param_i32(1), t.param_f32(7)
        low, high, magnitude = 0.0, 0.0, np.float32(t.param_f32(8))
        if ext_factor != 0:
            with np.errstate(all="ignore"):
                low, high = _correction_range(t)
                magnitude *= np.float32(1 + 0.1 * np.log(np.float32(1 / t.param_f32(6))))
        ratio = np.float32(t.param_f32(5)) ** np.float32(-2.0 / n_dims)
        planner.emit(
            rope_table,
            t,
            slots=(t, None, positions, factors),
            extra=(
                address,
                pairs,
                count,
                float_word(ratio),
                float_word(low),
                float_word(high),
                float_word(magnitude),
                float_word(1.0 if t.op is Op.ROPE else -1.0),
            ),
        )
    return address


@lowers(Op.ROPE, Op.ROPE_BACK)
def _lower_rope(t: Tensor, planner: Planner) -> bool:
    source, mode, n_dims, first = t.src[0], t.param_i32(2), t.param_i32(1), t.param_i32(15)
    assert source is not None
    if t.type not in (GgmlType.F32, GgmlType.F16) or source.type is not t.type:
        return False
    if not (t.contiguous_rows and source.contiguous_rows) or n_dims < 2:
        return False
    if mode not in (MODE_NORMAL, MODE_NEOX, MODE_MROPE, MODE_VISION, MODE_IMROPE):
        return False
    vision = mode == MODE_VISION
    pairs = t.ne[0] // 2 if vision else n_dims // 2
    distance = n_dims if vision else pairs
    table = _table(t, planner, pairs)
    planner.emit(rope_kernel(mode == MODE_NORMAL), t, extra=(table, pairs, first, distance))
    return True
