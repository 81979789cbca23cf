"""Weights that a coordinator cuts: their bytes, how they are uploaded, and how results compare."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from client.backend import Backend
from client.tensors import Array
from protocol.commands import Command
from protocol.ggml.types import TYPE_INFO, GgmlType, row_size
from protocol.split import MAX_PARTS
from protocol.tensor import Tensor

# A name that makes a coordinator split what is uploaded under it.
NAME = "blk.0.ffn_up.weight"
# Where the F16 scales of blocks are.
_SCALES = {
    GgmlType.Q4_0: (0,),
    GgmlType.Q4_1: (0, 2),
    GgmlType.Q8_0: (0,),
    GgmlType.Q4_K: (0, 2),
    GgmlType.Q6_K: (208,),
}


def values(*shape: int, seed: int = 0) -> Array:
    """F32 of this shape, outermost dimension first."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def content(type_: GgmlType, ne: Sequence[int], seed: int = 0) -> bytes:
    """The bytes of random weights."""
    shape = tuple(reversed(ne))
    if type_ is GgmlType.F32:
        return values(*shape, seed=seed).tobytes()
    if type_ is GgmlType.F16:
        return values(*shape, seed=seed).astype(np.float16).tobytes()
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (*shape[:-1], row_size(type_, ne[0])), np.uint8)
    blocks = raw.reshape(-1, TYPE_INFO[type_].type_size)
    for at in _SCALES[type_]:
        scales = rng.uniform(-0.1, 0.1, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8)
    return raw.tobytes()


async def allocate(b: Backend, size: int, shares: Sequence[float] = ()) -> tuple[int, int]:
    """Handle and base of a new buffer, whose weights are cut in ``shares`` if given."""
    c = b.connection
    if not shares:
        handle, _ = await c.alloc_buffer(size)
    else:
        answer = await c.request(
            Command.SPLIT_ALLOC_BUFFER,
            device=0,
            size=size,
            n_proportions=len(shares),
            proportions=[*shares, *[0.0] * (MAX_PARTS - len(shares))],
        )
        handle = answer.remote_ptr
        assert handle, "the server has no such buffer"
    return handle, await c.buffer_get_base(handle)


async def weight(
    b: Backend,
    type_: GgmlType,
    ne: Sequence[int],
    data: bytes | None = None,
    *,
    shares: Sequence[float] = (),
    name: str = NAME,
) -> Tensor:
    """A weight in a buffer of its own, uploaded if there are ``data``."""
    leaf = b.graph.new_tensor(type_, ne, name)
    leaf.place(*await allocate(b, leaf.nbytes, shares))
    if data is not None:
        await b.connection.set_tensor(leaf, data)
    return leaf


def nmse(measured: Array, expected: Array) -> float:
    wanted = expected.astype(np.float64)
    return float(np.mean((measured - wanted) ** 2) / np.mean(wanted**2))
