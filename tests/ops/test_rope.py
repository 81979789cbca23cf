"""References of ROPE and ROPE_BACK against rotations written out, and what the contract refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.ops.rope import Mode
from rpc_server.ops.table import check
from tests.ops.harness import guards_intact, refused, run
from tests.ops.tensors import CONTEXT, integers, node, noise, params, permuted, tensor, values

F32, F16, I32 = GgmlType.F32, GgmlType.F16, GgmlType.I32
Array = np.ndarray[Any, Any]
BASE = 500.0
PLAIN = (1.0, 0.0, 1.0, 32.0, 1.0)  # freq_scale, ext_factor, attn_factor, beta_fast, beta_slow


def words(
    n_dims: int,
    mode: int,
    scaling: tuple[float, ...] = PLAIN,
    sections: tuple[int, ...] = (0, 0, 0, 0),
    *,
    first: int = 0,
    n_ctx: int = 64,
    base: float = BASE,
) -> tuple[int, ...]:
    return params(0, n_dims, mode, 0, n_ctx, base, *scaling, *sections, first)


def rope(
    x: Tensor, at: Tensor, op_params: tuple[int, ...], factors: Tensor | None = None,
    op: Op = Op.ROPE,
) -> Tensor:  # fmt: skip
    return node(op, x.type, x.ne, [x, at, factors], op_params)


def section_of(mode: int, sizes: tuple[int, ...], pair: int) -> tuple[int, int]:
    """Which position turns a pair, and where in its section a pair is (VISION counts from there).

    MROPE: tttthhhwweee tttthhh ...; IMROPE: thwthwth...
    """
    if mode in (Mode.NORMAL, Mode.NEOX):
        return 0, pair
    line = [i for i in range(4) for _ in range(sizes[i])]
    at = pair % len(line)
    if mode == Mode.IMROPE:
        kind = "thw"[at % 3]
        left = {"t": sizes[0], "h": sizes[1], "w": sizes[2]}[kind]
        return ("thw".index(kind) if at // 3 < left else 3), pair
    if mode == Mode.VISION:
        return line[at], at - line.index(line[at])
    return line[at], pair


def expected_rope(t: Tensor) -> Array:
    x, at, factors = t.src[0], t.src[1], t.src[2]
    assert x is not None
    assert at is not None
    n_dims, mode, n_ctx, first = (t.param_i32(i) for i in (1, 2, 4, 15))
    base, scale, ext, magnitude, fast, slow = (t.param_f32(i) for i in range(5, 11))
    sizes = t.op_params[11:15]
    pairs = n_dims if mode == Mode.VISION else n_dims // 2
    result = values(x).astype(np.float64)
    tokens = x.ne[2]
    pos = CONTEXT.view(at).reshape(-1, tokens)
    if ext:
        magnitude *= 1 + 0.1 * math.log(1 / scale)
        # A pair turns n_ctx / (2 pi base^(2 i / n_dims)) times over the original context.
        low, high = (
            n_dims * math.log(n_ctx / (beta * 2 * math.pi)) / (2 * math.log(base))
            for beta in (fast, slow)
        )
        low, high = max(math.floor(low), 0), min(math.ceil(high), n_dims - 1)
    for token in range(tokens):
        for pair in range(pairs):
            section, step = section_of(mode, sizes, pair)
            angle = pos[section, token] * base ** (-2 * step / n_dims)
            if factors is not None:
                angle /= values(factors)[0, 0, 0, pair]
            theta = angle * scale
            if ext:
                ramp = min(max((pair - low) / max(0.001, high - low), 0), 1)
                mix = (1 - ramp) * ext
                theta = theta * (1 - mix) + angle * mix
            sine = math.sin(theta) * (-1 if t.op is Op.ROPE_BACK else 1)
            if mode == Mode.NORMAL:
                i, j = first + 2 * pair, first + 2 * pair + 1
            else:
                i, j = first + pair, first + pair + (n_dims if mode == Mode.VISION else pairs)
            a, b = result[:, token, :, i].copy(), result[:, token, :, j].copy()
            result[:, token, :, i] = (a * math.cos(theta) - b * sine) * magnitude
            result[:, token, :, j] = (a * sine + b * math.cos(theta)) * magnitude
    return result


def check_values(t: Tensor) -> None:
    expected = expected_rope(t)
    run(t, kernels=False)
    tolerance = 1e-5 if t.type is F32 else 2e-3
    np.testing.assert_allclose(values(t), expected, rtol=tolerance, atol=tolerance)
    assert guards_intact(t)


@pytest.mark.parametrize("op", [Op.ROPE, Op.ROPE_BACK])
@pytest.mark.parametrize("type_", [F32, F16])
@pytest.mark.parametrize("mode", [Mode.NORMAL, Mode.NEOX])
@pytest.mark.parametrize(("n_dims", "first"), [(12, 0), (8, 0), (6, 4), (2, 10)])
def test_one_position(op: Op, type_: GgmlType, mode: Mode, n_dims: int, first: int) -> None:
    x = noise((12, 3, 4, 2), type_)
    check_values(rope(x, integers(0, 1, 7, 40), words(n_dims, mode, first=first), op=op))


@pytest.mark.parametrize("mode", [Mode.MROPE, Mode.IMROPE])
@pytest.mark.parametrize(
    "sections", [(2, 2, 2, 0), (3, 2, 1, 2), (4, 0, 0, 0), (0, 1, 0, 1), (1, 1, 1, 9)]
)
def test_positions_of_pictures(mode: Mode, sections: tuple[int, ...]) -> None:
    x = noise((20, 2, 3))
    at = integers(1, 2, 3, 10, 20, 30, 5, 6, 7, 11, 13, 17)
    check_values(rope(x, at, words(16, mode, sections=sections)))


@pytest.mark.parametrize("sections", [(4, 4, 4, 4), (2, 3, 1, 1), (1, 1, 1, 0)])
def test_vision(sections: tuple[int, ...]) -> None:
    x = noise((16, 2, 3))
    at = integers(1, 2, 3, 10, 20, 30, 5, 6, 7, 11, 13, 17)
    check_values(rope(x, at, words(8, Mode.VISION, sections=sections)))


@pytest.mark.parametrize("mode", Mode)
def test_factors_and_scaling(mode: Mode) -> None:
    pairs = 8 if mode == Mode.VISION else 4
    x = noise((16, 2, 2))
    at = integers(*(range(1, 9) if mode >= Mode.MROPE else (5, 20)))
    sections = (2, 2, 2, 2) if mode >= Mode.MROPE else (0, 0, 0, 0)
    factors = tensor(F32, (pairs,), np.linspace(1, 3, pairs))
    for scaling in (
        (0.25, 0.0, 1.5, 32.0, 1.0),
        (0.25, 1.0, 1.0, 8.0, 0.5),
        (0.5, 0.7, 1.2, 32.0, 1.0),
    ):
        check_values(rope(x, at, words(8, mode, scaling, sections), factors))
        check_values(rope(x, at, words(8, mode, scaling, sections)))


def test_more_factors_than_pairs() -> None:
    x, factors = noise((8, 2, 2)), tensor(F32, (9,), np.linspace(1, 3, 9))
    check_values(rope(x, integers(3, 4), words(8, Mode.NEOX), factors))


def test_no_original_context() -> None:
    x = noise((8, 2, 2))
    t = rope(x, integers(3, 4), words(8, Mode.NEOX, (0.5, 1.0, 1.0, 1.0, 1.0), n_ctx=0))
    run(t, kernels=False)
    # All pairs turn too often to be extrapolated, but the first, at the end of the range.
    assert np.isfinite(values(t)).all()


@pytest.mark.parametrize("mode", [Mode.NORMAL, Mode.NEOX])
def test_in_place_and_permuted(mode: Mode) -> None:
    x = noise((8, 3, 4))
    t = rope(x, integers(1, 2, 3, 4), words(6, mode))
    expected = expected_rope(t)
    moved = permuted(noise((8, 4, 3)), (0, 2, 1, 3))
    check_values(rope(moved, integers(1, 2, 3, 4), words(6, mode)))
    run(node(Op.ROPE, F32, x.ne, t.src[:2], t.op_params, inplace=x), kernels=False)
    np.testing.assert_allclose(values(x), expected, rtol=1e-5, atol=1e-5)


def test_a_part_of_each_row() -> None:
    # Queries and keys side by side: a view of every other stretch.
    whole = noise((24, 3, 4))
    part = tensor(F32, (8, 3, 4), nb=whole.nb)
    CONTEXT.view(part)[...] = CONTEXT.view(whole)[..., :8]
    check_values(rope(part, integers(1, 2, 3, 4), words(8, Mode.NEOX)))


def test_back_undoes() -> None:
    x, at = noise((12, 3, 4)), integers(1, 5, 9, 30)
    there = rope(x, at, words(12, Mode.NEOX))
    back = rope(there, at, words(12, Mode.NEOX), op=Op.ROPE_BACK)
    run([there, back], kernels=False)
    np.testing.assert_allclose(values(back), values(x), atol=1e-5)


@pytest.mark.parametrize("op", [Op.ROPE, Op.ROPE_BACK])
def test_contract(op: Op) -> None:
    x, at = noise((16, 3, 4)), integers(1, 2, 3, 4)
    at4 = integers(*range(16))

    def made(x: Tensor = x, at: Tensor = at, words: tuple[int, ...] = words(8, 2),
             factors: Tensor | None = None) -> Tensor:  # fmt: skip
        return rope(x, at, words, factors, op)

    check(made())
    refused(node(op, F16, x.ne, [x, at], words(8, 2)), "source 0 must not be F32")
    refused(node(op, F32, (16, 3, 5), [x, at], words(8, 2)), "source 0 must be")
    refused(made(noise((16, 3, 4), GgmlType.BF16)), "the result must not be BF16")
    refused(made(permuted(noise((3, 16, 4)), (1, 0, 2, 3))), "source 0 must have dense")
    for mode in (1, 4, 9, 16, -2, 40 | 2):
        refused(made(words=words(8, mode)), f"no mode {mode}")
    for n_dims in (0, -2, 3, -(1 << 31)):
        refused(made(words=words(n_dims, 2)), f"can't turn {n_dims}")
    refused(made(words=words(18, 2)), "no elements 0 to 18 in 16")
    refused(made(words=words(8, 2, first=10)), "no elements 10 to 18 in 16")
    for first in (-2, 3, -(1 << 31)):
        refused(made(words=words(8, 2, first=first)), f"can't turn from element {first}")
    refused(made(at=integers(1, 2, 3)), "source 1 must be 4x1x1x1")
    refused(made(at=integers(*range(16))), "source 1 must be 4x1x1x1")
    refused(made(at=tensor(I32, (4, 2))), "source 1 must be")
    refused(made(at=tensor(F32, (4,))), "source 1 must not be F32")
    strided = tensor(I32, (4,), nb=(8, 32, 32, 32))
    refused(made(at=strided), "source 1 must have dense")
    refused(made(at=at, words=words(8, 8, sections=(4, 0, 0, 0))), "source 1 must be 16x1x1x1")
    check(made(at=at4, words=words(8, 8, sections=(4, 0, 0, 0))))
    for sections in ((0, 0, 0, 0), (0, 0, 0, 4), (4, -1, 0, 0), (9, 8, 0, 0)):
        refused(made(at=at4, words=words(8, 8, sections=sections)), "sections")
    huge = ((1 << 31) - 1, (1 << 31) - 1, 2, 4)
    refused(made(at=at4, words=words(8, 8, sections=huge)), "sections")
    refused(made(factors=noise((3,))), "3 factors for 4 pairs")
    refused(made(factors=noise((4, 2))), "source 2 must be 4x1x1x1")
    refused(made(factors=noise((4,), F16)), "source 2 must not be F16")
    sections = (4, 4, 4, 4)
    vision = words(8, 24, sections=sections)
    check(made(at=at4, words=vision, factors=noise((8,))))
    refused(made(at=at4, words=vision, factors=noise((7,))), "7 factors for 8 pairs")
    refused(made(at=at4, words=words(6, 24, sections=sections)), "turning 6 of 16")
    refused(made(at=at4, words=words(8, 24, sections=sections, first=2)), "turning 8 of 16")


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_scaling_that_is_none(bad: float) -> None:
    x, at = noise((16, 3, 4)), integers(1, 2, 3, 4)
    refused(rope(x, at, words(8, 2, base=bad)), "base of frequencies")
    refused(rope(x, at, words(8, 2, (bad, 1.0, 1.0, 32.0, 1.0))), "scale of frequencies")
    refused(rope(x, at, words(8, 2, (1.0, 1.0, 1.0, bad, 1.0))), "correction range")
    refused(rope(x, at, words(8, 2, (1.0, 1.0, 1.0, 32.0, bad))), "correction range")
    # Without YaRN they count for nothing.
    check(rope(x, at, words(8, 2, (bad, 0.0, 1.0, bad, bad))))
