"""Ops on signals as the client builds them: the same values from llama.cpp's server and this one.

The bounds are those that ggml's own tests hold its backends to; what only moves is exact.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from client.backend import Backend
from client.builder.signals import (
    POOL_AVG,
    POOL_MAX,
    SCALE_ALIGN_CORNERS,
    SCALE_ANTIALIAS,
    SCALE_BICUBIC,
    SCALE_BILINEAR,
    SCALE_NEAREST,
)
from client.tensors import Array
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from tests.ops.harness import nmse
from tests.upstream_server import Endpoint

pytestmark = pytest.mark.upstream

F32, F16, BF16 = GgmlType.F32, GgmlType.F16, GgmlType.BF16
EXACT, PLAIN, PRODUCT = 0.0, 1e-7, 5e-4

Spec = tuple[GgmlType, tuple[int, ...]]
# Builder and sources to the node.
Make = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    name: str
    sources: tuple[Spec, ...]
    make: Make
    bound: float = PLAIN

    def __str__(self) -> str:
        types = "-".join(type_.name for type_, _ in self.sources)
        return f"{self.name}-{types}" if types else self.name


# Stride, padding, dilation of width and height.
PICTURES: tuple[Any, ...] = (
    ((1, 1), (0, 0), (1, 1)),
    ((2, 1), (1, 2), (1, 2)),
    ((1, 3), (9, 0), (2, 1)),
    ((1, 2), (-1, -1), (1, 1)),
    # More kernel than picture, by less than a stride.
    ((3, 1), (0, 0), (4, 1)),
)
VOLUMES: tuple[Any, ...] = (
    ((1, 1, 1), (0, 0, 0), (1, 1, 1)),
    ((2, 1, 3), (1, 2, 1), (1, 2, 1)),
    ((1, 2, 1), (3, -1, 0), (2, 1, 1)),
)
IMAGE = (9, 8, 5, 2)


def columns() -> Iterator[Case]:
    for i, numbers in enumerate(PICTURES[:4]):
        for x, result in ((F32, F32), (F32, F16), (F16, F16)):
            yield Case(
                f"im2col-{i}-{result.name}", ((F16, (3, 2, 5, 4)), (x, IMAGE)),
                lambda g, k, x, n=numbers, type_=result: g.im2col(k, x, *n, type=type_), EXACT,
            )  # fmt: skip
    yield Case(
        "im2col-lines", ((F16, (3, 5, 4)), (F32, (9, 5, 2))),
        lambda g, k, x: g.im2col(k, x, (2, 0), (1, 0), (2, 0), is_2d=False), EXACT,
    )  # fmt: skip
    for i, numbers in enumerate(VOLUMES):
        for result in (F32, F16):
            yield Case(
                f"im2col_3d-{i}-{result.name}", ((F16, (3, 2, 2, 12)), (F32, (7, 6, 5, 7))),
                lambda g, k, x, n=numbers, type_=result: g.im2col_3d(k, x, 3, *n, type=type_),
                EXACT,
            )  # fmt: skip
    for i, (numbers, places) in enumerate(
        zip(PICTURES[:4], ((7, 7), (5, 8), (23, 3), (5, 3)), strict=True)
    ):
        for kernel in (F32, F16):
            yield Case(
                f"im2col_back-{i}", ((F32, (30, *places, 2)), (kernel, (3, 2, 5, 4))),
                lambda g, x, k, n=numbers: g.im2col_back(x, k, IMAGE, *n),
            )  # fmt: skip
    yield Case(
        "im2col_back-lines", ((F32, (15, 4, 2)), (F16, (3, 5, 4))),
        lambda g, x, k: g.im2col_back(x, k, (9, 5, 2), (2, 0), (1, 0), (2, 0), is_2d=False),
    )  # fmt: skip
    for type_ in (F32, F16, BF16):
        for taps, channels, n, stride, padding in (
            (16, 8, 97, 8, 0), (4, 3, 7, 2, 0), (1, 5, 13, 3, 0), (6, 4, 11, 3, 1),
            (2, 3, 9, 3, 0), (8, 4, 13, 4, 2), (4, 3, 1, 2, 0), (8, 2, 3, 2, 5),
        ):  # fmt: skip
            yield Case(
                f"col2im_1d-{taps}-{channels}", ((type_, (taps * channels, n)),),
                lambda g, x, n=(stride, channels, padding): g.col2im_1d(x, *n),
                PLAIN if type_ is F32 else PRODUCT,
            )  # fmt: skip


def convolutions() -> Iterator[Case]:
    for kernel in (F32, F16):
        for i, numbers in enumerate(PICTURES):
            sources = ((kernel, (3, 2, 5, 7)), (F32, IMAGE))
            yield Case(
                f"conv_2d-{i}", sources,
                lambda g, k, x, n=numbers: g.conv_2d_direct(k, x, *n), PRODUCT,
            )  # fmt: skip
            yield Case(
                f"conv_2d_dw-{i}", ((kernel, (3, 2, 1, 5)), (F32, IMAGE)),
                lambda g, k, x, n=numbers: g.conv_2d_dw_direct(k, x, *n),
            )  # fmt: skip
            # Channels innermost in memory: 17 of them, to fill vectors and leave some over.
            yield Case(
                f"conv_2d_dw-channels-{i}", ((kernel, (17, 1, 3, 2)), (F32, (17, 9, 8, 2))),
                lambda g, k, x, n=numbers: g.cont(
                    g.conv_2d_dw_direct(g.permute(k, 3, 2, 0, 1), g.permute(x, 2, 0, 1, 3), *n)
                ),
            )  # fmt: skip
        yield Case(
            "conv_2d-permuted", ((kernel, (3, 2, 5, 7)), (F32, (5, 9, 8, 2))),
            lambda g, k, x: g.conv_2d_direct(k, g.permute(x, 2, 0, 1, 3), *PICTURES[1]), PRODUCT,
        )  # fmt: skip
        yield Case(
            "conv_2d-large", ((kernel, (3, 3, 32, 33)), (F32, (70, 61, 32, 2))),
            lambda g, k, x: g.conv_2d_direct(k, x, (1, 1), (1, 1), (1, 1)), PRODUCT,
        )  # fmt: skip
        for i, numbers in enumerate(VOLUMES):
            yield Case(
                f"conv_3d-{i}", ((kernel, (3, 2, 2, 12)), (F32, (7, 6, 5, 6))),
                lambda g, k, x, n=numbers: g.conv_3d_direct(k, x, *n, 3, 2, 4), PRODUCT,
            )  # fmt: skip
        for stride in (1, 2, 5):
            yield Case(
                f"conv_transpose_1d-{stride}", ((kernel, (3, 4, 65)), (F32, (11, 65))),
                lambda g, k, x, s=stride: g.conv_transpose_1d(k, x, s),
            )  # fmt: skip
            yield Case(
                f"conv_transpose_2d-{stride}", ((kernel, (3, 2, 4, 9)), (F32, (6, 5, 9, 2))),
                lambda g, k, x, s=stride: g.conv_transpose_2d_p0(k, x, s), PRODUCT,
            )  # fmt: skip


def pools() -> Iterator[Case]:
    for kind in (POOL_MAX, POOL_AVG):
        for size, stride, padding in (
            ((2, 2), (2, 2), (0, 0)), ((3, 1), (1, 3), (1, 0)), ((1, 5), (3, 1), (2, 4)),
            ((9, 8), (1, 1), (0, 0)), ((3, 2), (2, 2), (-1, -2)), ((3, 3), (2, 1), (5, 4)),
            ((2, 2), (1, 1), (0.5, 0.5)),
        ):  # fmt: skip
            numbers: Any = (kind, size, stride, padding)
            name = f"{kind}-{size[0]}-{padding[0]}"
            for type_ in (F32, F16):
                yield Case(
                    f"pool_2d-{name}", ((type_, IMAGE),), lambda g, x, n=numbers: g.pool_2d(x, *n)
                )
                yield Case(
                    f"pool_1d-{name}", ((type_, IMAGE),),
                    lambda g, x, n=numbers: g.pool_1d(x, n[0], n[1][0], n[2][0], int(n[3][0])),
                )  # fmt: skip
            yield Case(
                f"pool_2d_back-{name}", ((F32, IMAGE),),
                lambda g, x, n=numbers: g.pool_2d_back(g.sqr(g.pool_2d(x, *n)), x, *n),
            )  # fmt: skip


def sizes() -> Iterator[Case]:
    modes = {
        "nearest": SCALE_NEAREST, "bilinear": SCALE_BILINEAR, "bicubic": SCALE_BICUBIC,
        "corners-nearest": SCALE_ALIGN_CORNERS, "corners": SCALE_BILINEAR | SCALE_ALIGN_CORNERS,
        "corners-bicubic": SCALE_BICUBIC | SCALE_ALIGN_CORNERS,
        "antialias": SCALE_BILINEAR | SCALE_ANTIALIAS,
        "corners-antialias": SCALE_BILINEAR | SCALE_ANTIALIAS | SCALE_ALIGN_CORNERS,
    }  # fmt: skip
    for name, mode in modes.items():
        for ne in ((18, 16, 5, 2), (4, 3, 10, 1), (1, 1, 5, 2), (5, 20, 3, 4)):
            yield Case(
                f"interpolate-{name}-{ne[0]}", ((F32, IMAGE),),
                lambda g, x, m=mode, ne=ne: g.interpolate(x, ne, m),
            )  # fmt: skip
        yield Case(
            f"upscale-{name}-transposed", ((F32, IMAGE),),
            lambda g, x, m=mode: g.upscale(g.transpose(x), 3, m),
        )  # fmt: skip
        yield Case(
            f"interpolate-{name}-line", ((F32, (4, 1, 3)),),
            lambda g, x, m=mode: g.interpolate(x, (1, 1, 3), m),
        )  # fmt: skip
    for around in (False, True):
        for before, behind in (
            ((1, 2, 0, 1), (2, 0, 1, 1)), ((-1, 0, 2, 0), (1, -3, -2, 0)),
            ((-2, -3, 0, 0), (-4, 0, 0, 0)),
        ):  # fmt: skip
            yield Case(
                f"pad-{around}-{before[0]}", ((F32, IMAGE),),
                lambda g, x, b=before, e=behind, c=around: g.pad_ext(x, b, e, circular=c), EXACT,
            )  # fmt: skip
    for pads in ((0, 0), (3, 2), (8, 8)):
        yield Case(
            f"pad_reflect_1d-{pads[0]}", ((F32, IMAGE),),
            lambda g, x, p=pads: g.pad_reflect_1d(x, *p), EXACT,
        )  # fmt: skip
    yield Case("roll", ((F32, IMAGE),), lambda g, x: g.roll(x, 3, -2, 1, -1), EXACT)
    yield Case(
        "roll-permuted",
        ((F32, IMAGE),),
        lambda g, x: g.roll(g.permute(x, 0, 3, 1, 2), 3, -1),
        EXACT,
    )
    for numbers in ((0.0, 10.0, 1.0), (-1.5, 2.0, 0.1), (0.0, 65536.0, 1.0)):
        yield Case(f"arange-{numbers[1]}", (), lambda g, n=numbers: g.arange(*n))
    for dim in (2, 320, 9):
        yield Case(
            f"timestep_embedding-{dim}", ((F32, (5,)),),
            lambda g, x, d=dim: g.timestep_embedding(x, d, 10000),
        )  # fmt: skip


CASES = [*columns(), *convolutions(), *pools(), *sizes()]


def content(spec: Spec, seed: int) -> Array:
    type_, ne = spec
    values = np.random.default_rng(seed).standard_normal(ne[::-1]).astype(np.float32)
    if type_ is BF16:
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16) if type_ is F16 else values


def floats(result: Array) -> Array:
    if result.dtype == np.uint16:
        return (result.astype(np.uint32) << 16).view(np.float32)
    return result


@pytest.fixture
async def both(upstream: Endpoint, ours: Endpoint) -> AsyncIterator[tuple[Backend, Backend]]:
    async with (
        Backend.connect(upstream.host, upstream.port) as expected,
        Backend.connect(ours.host, ours.port) as actual,
    ):
        yield expected, actual


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_both_servers_agree(both: tuple[Backend, Backend], case: Case) -> None:
    results = []
    for backend in both:
        sources = [
            await backend.tensor(*spec, content(spec, i)) for i, spec in enumerate(case.sources)
        ]
        results.append(floats(await backend.compute(case.make(backend.graph, *sources))))
    expected, actual = results
    assert expected.shape == actual.shape
    if case.bound == EXACT:
        np.testing.assert_array_equal(actual, expected)
    else:
        assert nmse(expected, actual) < case.bound
