"""Tensors and nodes in this process's memory, for tests: how they are made, and what they hold."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from client.tensors import encode_params
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor, contiguous_strides, padded_sources
from rpc_server.ops.arrays import ArrayContext

_ids = itertools.count(1)
CONTEXT = ArrayContext()

# Bytes around a tensor's memory that a kernel must leave as they are.
GUARD = 64
GUARD_BYTE = 0xA5

# The memory of each tensor made here, guards included, by the tensor's id.
MEMORY: dict[int, np.ndarray[Any, Any]] = {}


def four(ne: Sequence[int]) -> tuple[int, int, int, int]:
    padded = [*ne, 1, 1, 1, 1][:4]
    return (padded[0], padded[1], padded[2], padded[3])


def tensor(
    type_: GgmlType,
    ne: Sequence[int],
    values: Any = None,
    *,
    nb: tuple[int, int, int, int] | None = None,
    name: str = "",
) -> Tensor:
    """A tensor with memory of its own between guard bytes.

    ``values`` (broadcast to (ne3, ne2, ne1, ne0)) are converted to ``type_``; ``nb`` gives other
    strides than the dense ones (the memory is as large as they need).
    """
    dims = four(ne)
    t = Tensor(
        id=next(_ids),
        name=name or f"t{dims}",
        type=type_,
        op=Op.NONE,
        ne=dims,
        nb=nb or contiguous_strides(type_, dims),
    )
    memory = np.full(t.nbytes + 2 * GUARD + 64, GUARD_BYTE, np.uint8)
    t.address = -(-(int(memory.ctypes.data) + GUARD) // 64) * 64
    MEMORY[t.id] = memory
    if values is not None:
        CONTEXT.store(t, np.asarray(values))
    return t


def permuted(t: Tensor, axes: Sequence[int]) -> Tensor:
    """A view with dimensions moved as ggml_permute does: dim i of ``t`` becomes dim axes[i]."""
    ne, nb = [0] * 4, [0] * 4
    for i, axis in enumerate(axes):
        ne[axis], nb[axis] = t.ne[i], t.nb[i]
    return view(t, ne, nb)


def view(t: Tensor, ne: Sequence[int], nb: Sequence[int], offset: int = 0) -> Tensor:
    """A view on the memory of ``t``."""
    result = Tensor(
        id=next(_ids),
        name=f"view of {t.name}",
        type=t.type,
        op=Op.VIEW,
        ne=four(ne),
        nb=(nb[0], nb[1], nb[2], nb[3]),
        view_src=t,
        address=t.address + offset,
    )
    result.src = padded_sources([t])
    return result


def params(*words: int | float) -> tuple[int, ...]:
    """op_params from ints and floats (floats by their bits)."""
    return encode_params(words)


def node(
    op: Op,
    type_: GgmlType,
    ne: Sequence[int],
    sources: Sequence[Tensor | None],
    op_params: tuple[int, ...] = (0,) * 16,
    *,
    inplace: Tensor | None = None,
    nb: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """A node with memory of its own, or that of ``inplace``."""
    result = tensor(type_, ne, nb=nb if inplace is None else inplace.nb)
    result.op, result.op_params = op, op_params
    result.src = padded_sources(sources)
    if inplace is not None:
        result.address, result.view_src = inplace.address, inplace
    return result


def noise(ne: Sequence[int], type_: GgmlType = GgmlType.F32, seed: int = 0) -> Tensor:
    """A tensor of normally distributed values."""
    return tensor(type_, ne, np.random.default_rng(seed).standard_normal(four(ne)[::-1]))


def indices(ne: Sequence[int], limit: int, seed: int = 0) -> Tensor:
    """A tensor of I32 from 0 on, below ``limit``."""
    t = tensor(GgmlType.I32, ne)
    CONTEXT.view(t)[...] = np.random.default_rng(seed).integers(0, limit, four(ne)[::-1])
    return t


def integers(*numbers: int) -> Tensor:
    """A tensor of I32 that holds these numbers."""
    t = tensor(GgmlType.I32, (len(numbers),))
    CONTEXT.view(t)[...] = numbers
    return t


def raw(t: Tensor) -> np.ndarray[Any, Any]:
    """A copy of the bytes of the tensor's extent."""
    return np.array(CONTEXT.memory(t.address, t.nbytes))


def values(t: Tensor) -> np.ndarray[Any, Any]:
    """A copy of the tensor's values as float32, shape (ne3, ne2, ne1, ne0)."""
    return np.array(CONTEXT.f32(t), np.float32)
