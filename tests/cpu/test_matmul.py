"""Matrix products: kernels of every weight type against products of the decoded values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from protocol.ggml_ops import Op
from protocol.ggml_types import TYPE_INFO, GgmlType
from rpc_server.devices.cpu.kernels import vector
from rpc_server.devices.cpu.kernels.formats import FORMATS, PLAIN, QUANTIZED
from rpc_server.devices.cpu.kernels.vector import Isa
from rpc_server.graph.errors import GraphError
from rpc_server.graph.tensor import Tensor
from tests.ops.harness import (
    CONTEXT,
    guards_intact,
    nmse,
    node,
    permuted,
    run,
    tensor,
    values,
    view,
)

# What ggml's own tests allow. Activations of 8 bits make about 1e-5; floats are another matter.
NMSE_LIMIT = 5e-4
NMSE_LIMIT_FLOAT = 1e-10

# Where the F16 scales lie in a block, and how they are chosen: sane ones, as any bits may be there.
SCALES_AT: dict[GgmlType, Sequence[int]] = {
    GgmlType.Q4_0: (0,),
    GgmlType.Q4_1: (0, 2),
    GgmlType.Q5_0: (0,),
    GgmlType.Q5_1: (0, 2),
    GgmlType.Q8_0: (0,),
    GgmlType.IQ4_NL: (0,),
    GgmlType.Q2_K: (80, 82),
    GgmlType.Q3_K: (108,),
    GgmlType.Q4_K: (0, 2),
    GgmlType.Q5_K: (0, 2),
    GgmlType.Q6_K: (208,),
    GgmlType.IQ4_XS: (0,),
    GgmlType.MXFP4: (),
}


def weights(type_: GgmlType, ne: Sequence[int], seed: int = 0) -> Tensor:
    """Random weights: any codes, scales of both signs."""
    rng = np.random.default_rng([seed, int(type_), *ne])
    t = tensor(type_, ne)
    if type_ not in QUANTIZED:
        CONTEXT.store(t, rng.standard_normal(t.ne[::-1], np.float32))
        return t
    blocks = CONTEXT.memory(t.address, t.nbytes).reshape(-1, t.type_size)
    blocks[...] = rng.integers(0, 256, blocks.shape, np.uint8)
    for at in SCALES_AT[type_]:
        scales = rng.uniform(-0.1, 0.1, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8)
    if type_ is GgmlType.MXFP4:
        blocks[:, 0] = rng.integers(120, 130, len(blocks), np.uint8)
    return t


def activations(ne: Sequence[int], type_: GgmlType = GgmlType.F32) -> Tensor:
    rng = np.random.default_rng([99, *ne])
    t = tensor(type_, ne)
    CONTEXT.store(t, rng.standard_normal(t.ne[::-1], np.float32))
    return t


def product(a: Tensor, b: Tensor) -> np.ndarray[Any, Any]:
    """MUL_MAT in float64, shape (ne3, ne2, ne1, ne0)."""
    x, w = values(b).astype(np.float64), values(a).astype(np.float64)
    w = w.repeat(b.ne[2] // a.ne[2], axis=1).repeat(b.ne[3] // a.ne[3], axis=0)
    return np.matmul(x, w.swapaxes(-1, -2))


def check_product(a: Tensor, b: Tensor, n_threads: int = 2) -> None:
    expected = product(a, b)
    t = node(Op.MUL_MAT, GgmlType.F32, (a.ne[1], *b.ne[1:]), [a, b])
    run(t, kernels=True, n_threads=n_threads)
    limit = NMSE_LIMIT if a.type in QUANTIZED else NMSE_LIMIT_FLOAT
    assert nmse(expected, values(t)) < limit
    assert guards_intact(t)


@pytest.mark.parametrize("type_", FORMATS, ids=lambda t: t.name)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 33])
def test_every_type(type_: GgmlType, n: int) -> None:
    block = max(TYPE_INFO[type_].block_size, 32)
    # Rows that are no multiple of a tile; an odd number of blocks; more than one chunk of k.
    for rows, k in ((37, block), (16, 9 * block), (5, 11 * 256)):
        for n_threads in (1, 2, 3):
            check_product(weights(type_, (k, rows)), activations((k, n)), n_threads)
