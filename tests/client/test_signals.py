"""Constructors of ops on signals: what ggml's own make of the same operands, and what they refuse.

Nothing is computed here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from client.builder.graph import GraphBuilder
from client.builder.signals import SCALE_ALIGN_CORNERS, SCALE_ANTIALIAS, SCALE_BICUBIC
from client.tensors import ShapeError, encode_params
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor, padded_sources
from tests.ops.tensors import four, tensor
from tests.ops.test_against_ggml import Ggml
from tests.ops.test_against_ggml import ggml as ggml  # the fixture

F32, F16, BF16 = GgmlType.F32, GgmlType.F16, GgmlType.BF16
POOL_MAX, POOL_AVG = 0, 1
IMAGE = (9, 8, 5, 2)


class Made(ctypes.Structure):
    """The part of ``struct ggml_tensor`` that goes over the wire."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
    ]


@dataclass(frozen=True)
class Case:
    """``make`` builds what ``function`` of ggml does with ``arguments`` behind the sources."""

    op: Op
    type: GgmlType
    ne: tuple[int, ...]
    params: tuple[int | float, ...]
    sources: tuple[tuple[GgmlType, tuple[int, ...]], ...]
    make: Callable[..., Tensor]
    function: str
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.function}-{'-'.join(map(str, self.params))}"


def flat(numbers: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    return tuple(n for group in numbers for n in group)


def case(
    op: Op, type_: GgmlType, ne: tuple[int, ...], params: tuple[int | float, ...], *sources: Any,
    make: Callable[..., Tensor], function: str, arguments: tuple[Any, ...] | None = None,
) -> Case:  # fmt: skip
    """Arguments of most functions are the parameters."""
    of = tuple(s if isinstance(s[0], GgmlType) else (F32, s) for s in sources)
    return Case(
        op, type_, ne, params, of, make, function, params if arguments is None else arguments
    )


def cases() -> Iterator[Case]:
    yes, no = ctypes.c_bool(True), ctypes.c_bool(False)
    numbers: Any = ((2, 1), (1, 2), (1, 3))
    words = flat(numbers)
    for type_ in (F32, F16):
        yield case(
            Op.IM2COL, type_, (30, 5, 9, 2), (*words, 1), (F16, (3, 2, 5, 4)), IMAGE,
            make=lambda g, k, x, t=type_: g.im2col(k, x, *numbers, type=t),
            function="ggml_im2col", arguments=(*words, yes, int(type_)),
        )  # fmt: skip
    line: Any = ((2, 0), (1, 0), (2, 0))
    yield case(
        Op.IM2COL, F16, (15, 4, 2), (*flat(line), 0), (F16, (3, 5)), (9, 5, 2),
        make=lambda g, k, x: g.im2col(k, x, *line, is_2d=False),
        function="ggml_im2col", arguments=(*flat(line), no, int(F16)),
    )  # fmt: skip
    yield case(
        Op.IM2COL_BACK, F32, IMAGE, (*words, 1), (30, 5, 9, 2), (F16, (3, 2, 5, 4)),
        make=lambda g, x, k: g.im2col_back(x, k, IMAGE, *numbers),
        function="ggml_im2col_back",
        arguments=((ctypes.c_int64 * 4)(*IMAGE), *words, yes),
    )  # fmt: skip
    volume: Any = ((2, 1, 3), (1, 2, 1), (1, 2, 1))
    yield case(
        Op.IM2COL_3D, F16, (36, 4, 8, 4), (*flat(volume), 3), (F16, (3, 2, 2, 12)), (7, 6, 5, 7),
        make=lambda g, k, x: g.im2col_3d(k, x, 3, *volume),
        function="ggml_im2col_3d",
        arguments=(ctypes.c_int64(3), *flat(volume), int(F16)),
    )  # fmt: skip
    for type_ in (F32, F16, BF16):
        yield case(
            Op.COL2IM_1D, type_, (34, 4), (3, 4, 1), (type_, (24, 11)),
            make=lambda g, x: g.col2im_1d(x, 3, 4, 1), function="ggml_col2im_1d",
        )  # fmt: skip
    # The last is a kernel that is larger than the picture by less than a stride.
    for some, ne in (
        (numbers, (5, 9)), (((1, 2), (-1, 0), (1, 1)), (5, 4)), (((3, 1), (0, 0), (4, 1)), (1, 7)),
        (((3, 1), (0, 0), (5, 1)), (1, 7)),
    ):  # fmt: skip
        yield case(
            Op.CONV_2D, F32, (*ne, 7, 2), flat(some), (F16, (3, 2, 5, 7)), IMAGE,
            make=lambda g, k, x, n=some: g.conv_2d_direct(k, x, *n),
            function="ggml_conv_2d_direct",
        )  # fmt: skip
        yield case(
            Op.CONV_2D_DW, F32, (*ne, 5, 2), flat(some), (F16, (3, 2, 1, 5)), IMAGE,
            make=lambda g, k, x, n=some: g.conv_2d_dw_direct(k, x, *n),
            function="ggml_conv_2d_dw_direct",
        )  # fmt: skip
    yield case(
        Op.CONV_3D, F32, (4, 8, 2, 8), (*flat(volume), 3, 2, 4), (F16, (3, 2, 2, 12)), (7, 6, 5, 6),
        make=lambda g, k, x: g.conv_3d_direct(k, x, *volume, 3, 2, 4),
        function="ggml_conv_3d_direct",
    )  # fmt: skip
    yield case(
        Op.CONV_TRANSPOSE_1D, F32, (13, 4), (2, 0, 1), (F16, (3, 4, 5)), (6, 5),
        make=lambda g, k, x: g.conv_transpose_1d(k, x, 2), function="ggml_conv_transpose_1d",
    )  # fmt: skip
    yield case(
        Op.CONV_TRANSPOSE_2D, F32, (13, 8, 4, 2), (2,), (F16, (3, 2, 4, 5)), (6, 4, 5, 2),
        make=lambda g, k, x: g.conv_transpose_2d_p0(k, x, 2),
        function="ggml_conv_transpose_2d_p0",
    )  # fmt: skip
    yield case(
        Op.POOL_1D, F32, (5, 8, 5, 2), (POOL_MAX, 3, 2, 1), IMAGE,
        make=lambda g, x: g.pool_1d(x, POOL_MAX, 3, 2, 1), function="ggml_pool_1d",
    )  # fmt: skip
    for padding, ne in (((1, 2), (10, 3)), ((0.5, 1.75), (9, 3)), ((-1, 0), (6, 2))):
        params = (POOL_AVG, 2, 4, 1, 3, *map(int, padding))
        floats = (*params[:5], *map(float, padding))
        yield case(
            Op.POOL_2D, F32, (*ne, 5, 2), params, IMAGE,
            make=lambda g, x, p=padding: g.pool_2d(x, POOL_AVG, (2, 4), (1, 3), p),
            function="ggml_pool_2d", arguments=floats,
        )  # fmt: skip
        yield case(
            Op.POOL_2D_BACK, F32, IMAGE, params, (*ne, 5, 2), (F16, IMAGE),
            make=lambda g, x, y, p=padding: g.pool_2d_back(x, y, POOL_AVG, (2, 4), (1, 3), p),
            function="ggml_pool_2d_back", arguments=floats,
        )  # fmt: skip
    size = (3, 20, 1, 4)
    mode = SCALE_BICUBIC | SCALE_ALIGN_CORNERS
    yield case(
        Op.UPSCALE, F32, size, (mode,), IMAGE,
        make=lambda g, x: g.interpolate(x, size, mode),
        function="ggml_interpolate", arguments=(*map(ctypes.c_int64, size), mode),
    )  # fmt: skip
    yield case(
        Op.UPSCALE, F32, (27, 24, 5, 2), (1,), IMAGE,
        make=lambda g, x: g.upscale(x, 3, 1), function="ggml_upscale", arguments=(3, 1),
    )  # fmt: skip
    yield case(
        Op.PAD_REFLECT_1D, F32, (20, 8, 5, 2), (8, 3), IMAGE,
        make=lambda g, x: g.pad_reflect_1d(x, 8, 3), function="ggml_pad_reflect_1d",
    )  # fmt: skip
    for steps, n in (((0.0, 10.0, 1.0), 10), ((-1.5, 2.0, 0.1), 35), ((0.1, 0.7, 0.2), 3)):
        yield case(
            Op.ARANGE, F32, (n,), steps,
            make=lambda g, s=steps: g.arange(*s), function="ggml_arange",
        )  # fmt: skip
    yield case(
        Op.TIMESTEP_EMBEDDING, F32, (9, 6), (9, 1000), (6,),
        make=lambda g, x: g.timestep_embedding(x, 9, 1000), function="ggml_timestep_embedding",
    )  # fmt: skip


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_results(case: Case) -> None:
    g = GraphBuilder()
    sources = [g.new_tensor(*spec) for spec in case.sources]
    result = case.make(g, *sources)
    assert (result.op, result.type, result.ne) == (case.op, case.type, four(case.ne))
    assert result.op_params == encode_params(case.params)
    assert result.src == padded_sources(sources)


@pytest.mark.upstream
@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_results_are_what_ggml_makes(ggml: Ggml, case: Case) -> None:
    g = GraphBuilder()
    ours = case.make(g, *(g.new_tensor(*spec) for spec in case.sources))
    sources = [ggml.tensor(tensor(type_, ne)) for type_, ne in case.sources]
    address = ggml.call(case.function, ggml._context, *sources, *case.arguments).value
    assert address is not None
    made = Made.from_address(address)
    assert (ours.type, ours.ne, ours.nb) == (made.type, tuple(made.ne), tuple(made.nb))
    assert ours.op_params == tuple(made.op_params)


@pytest.mark.upstream
def test_innermost_channels_stay_innermost(ggml: Ggml) -> None:
    g = GraphBuilder()
    kernel, x = (
        g.new_tensor(F32, (3, 2, 1, 5)),
        g.permute(g.new_tensor(F32, (5, 9, 8, 2)), 2, 0, 1, 3),
    )
    ours = g.conv_2d_dw_direct(kernel, x, (1, 2), (1, 0), (1, 1))
    assert ours.nb == (20, 180, 4, 9 * 4 * 20)
    sources = [ggml.tensor(tensor(F32, ne)) for ne in ((3, 2, 1, 5), (5, 9, 8, 2))]
    sources[1] = ggml.call("ggml_permute", ggml._context, sources[1], 2, 0, 1, 3)
    address = ggml.call("ggml_conv_2d_dw_direct", ggml._context, *sources, 1, 2, 1, 0, 1, 1).value
    assert address is not None
    assert ours.nb == tuple(Made.from_address(address).nb)


def t(g: GraphBuilder, *ne: int, type: GgmlType = F32) -> Tensor:
    return g.new_tensor(type, ne)


PLAIN: Any = ((1, 1), (0, 0), (1, 1))
PLAIN_3D: Any = ((1, 1, 1), (0, 0, 0), (1, 1, 1))
REFUSED: dict[str, Callable[[GraphBuilder], Any]] = {
    "im2col channels": lambda g: g.im2col(t(g, 3, 3, 2), t(g, 9, 9, 3), *PLAIN),
    "im2col of lines": lambda g: g.im2col(
        t(g, 3, 2), t(g, 9, 2, 1, 2), (1, 0), (0, 0), (1, 0), is_2d=False
    ),
    "im2col small": lambda g: g.im2col(t(g, 3, 3, 1), t(g, 2, 9, 1), *PLAIN),
    "im2col stride": lambda g: g.im2col(t(g, 3, 3, 1), t(g, 9, 9, 1), (1, 0), (0, 0), (1, 1)),
    "im2col_3d channels": lambda g: g.im2col_3d(t(g, 1), t(g, 1), 0, *PLAIN_3D),
    "im2col_3d small": lambda g: g.im2col_3d(t(g, 3, 3, 3), t(g, 9, 9, 2), 1, *PLAIN_3D),
    "col2im_1d type": lambda g: g.col2im_1d(t(g, 6, 3, type=GgmlType.I32), 1, 2),
    "col2im_1d matrix": lambda g: g.col2im_1d(t(g, 6, 3, 2), 1, 2),
    "col2im_1d contiguous": lambda g: g.col2im_1d(g.transpose(t(g, 6, 3)), 1, 3),
    "col2im_1d stride": lambda g: g.col2im_1d(t(g, 6, 3), 0, 2),
    "col2im_1d channels": lambda g: g.col2im_1d(t(g, 6, 3), 1, 4),
    "col2im_1d padding": lambda g: g.col2im_1d(t(g, 6, 3), 1, 2, -1),
    "col2im_1d nothing": lambda g: g.col2im_1d(t(g, 6, 3), 1, 2, 3),
    "conv_2d channels": lambda g: g.conv_2d_direct(t(g, 3, 3, 2), t(g, 9, 9, 3), *PLAIN),
    "conv_2d small": lambda g: g.conv_2d_direct(t(g, 5, 3, 2), t(g, 3, 9, 2), *PLAIN),
    "conv_3d kernel": lambda g: g.conv_3d_direct(
        t(g, 1, 1, 1, 5), t(g, 1, 1, 1, 6), *(*PLAIN_3D, 3, 2, 2)
    ),
    "conv_3d volumes": lambda g: g.conv_3d_direct(
        t(g, 1, 1, 1, 6), t(g, 1, 1, 1, 5), *(*PLAIN_3D, 3, 2, 2)
    ),
    "conv_2d_dw kernel": lambda g: g.conv_2d_dw_direct(t(g, 3, 3, 2), t(g, 9, 9, 1), *PLAIN),
    "conv_2d_dw channels": lambda g: g.conv_2d_dw_direct(t(g, 3, 3, 1, 2), t(g, 9, 9, 3), *PLAIN),
    "conv_transpose_1d lines": lambda g: g.conv_transpose_1d(t(g, 3, 1, 2), t(g, 9, 2, 2), 1),
    "conv_transpose_1d channels": lambda g: g.conv_transpose_1d(t(g, 3, 1, 2), t(g, 9, 3), 1),
    "conv_transpose_1d kernel": lambda g: g.conv_transpose_1d(t(g, 3, 1, 2, 2), t(g, 9, 2), 1),
    "conv_transpose_2d": lambda g: g.conv_transpose_2d_p0(t(g, 3, 3, 1, 2), t(g, 9, 9, 3), 1),
    "pool_1d": lambda g: g.pool_1d(t(g, 3), POOL_MAX, 4, 2),
    "pool_2d": lambda g: g.pool_2d(t(g, 9, 3), POOL_MAX, (1, 5), (1, 1), (0, 0.5)),
    "pool_2d stride": lambda g: g.pool_2d(t(g, 9, 3), POOL_MAX, (1, 1), (1, 0)),
    "interpolate mode": lambda g: g.interpolate(t(g, 9), (3,), 3),
    "interpolate antialias": lambda g: g.interpolate(
        t(g, 9), (3,), SCALE_BICUBIC | SCALE_ANTIALIAS
    ),
    "interpolate type": lambda g: g.interpolate(t(g, 9, type=F16), (3,)),
    "upscale": lambda g: g.upscale(t(g, 9), 1),
    "pad_reflect_1d": lambda g: g.pad_reflect_1d(t(g, 9), 9, 0),
    "pad_reflect_1d behind": lambda g: g.pad_reflect_1d(t(g, 9), 0, -1),
    "pad_reflect_1d type": lambda g: g.pad_reflect_1d(t(g, 9, type=F16), 1, 1),
    "pad_reflect_1d view": lambda g: g.pad_reflect_1d(g.transpose(t(g, 9, 9)), 1, 1),
    "arange": lambda g: g.arange(1, 1, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_ggml_asserts_is_refused(name: str) -> None:
    with pytest.raises(ShapeError):
        REFUSED[name](GraphBuilder())
