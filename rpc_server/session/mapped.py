"""Graphs over weights that are mapped from files: to those who read them they are buffers.

A mapped weight lies elsewhere than its buffer's memory. A tensor that lies within one is handed on
with the weight in the place of its buffer, so that what checks and plans graphs needs no word about
mappings.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.ggml.types import TYPE_INFO, GgmlType
from rpc_server.devices.base import Resolve
from rpc_server.devices.cpu.mapped import MappedStorage
from rpc_server.graph.parse import BufferLike
from rpc_server.session.buffers import Buffer

Table = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class _Weight:
    """A mapped weight as a buffer: where it lies on the wire and in memory, in bytes."""

    base: int
    size: int
    address: int


def redirect(buffers: Iterable[Buffer], tensors: Table, resolve: Resolve) -> tuple[Table, Resolve]:
    """Return tensors off the wire with weights as buffers where they lie in mapped ones.

    ``buffers`` are the client's. What is returned beside asks ``resolve`` for them too, if it
    keeps account of the buffers that are used. Weights that some tensor has a part of only become
    ordinary memory. Blocks while they do: for threads of a device.
    """
    storages = [(b, b.storage) for b in buffers if isinstance(b.storage, MappedStorage)]
    mapped = [(b, s, o) for b, s in storages for o in s.overlays]
    if not mapped or not len(tensors):
        return tensors, resolve
    begin = tensors["data"]
    end = begin + np.minimum(_sizes(tensors), 1 << 62).astype(np.uint64)
    here: dict[int, tuple[int, BufferLike]] = {}
    tensors = tensors.copy()
    for buffer, storage, overlay in mapped:
        base = buffer.base + overlay.start
        inside = (begin >= base) & (end <= base + overlay.size)
        ours = tensors["buffer"] == buffer.handle
        if np.any(ours & ~inside & (begin < base + overlay.size) & (end > base)):
            storage.settle(overlay.start, overlay.size)
            continue
        # An address on the wire, which no handle is.
        here[base] = buffer.handle, _Weight(base, overlay.size, overlay.address)
        tensors["buffer"][ours & inside] = base

    def find(handle: int) -> BufferLike | None:
        whole, weight = here.get(handle, (handle, None))
        buffer = resolve(whole)
        return weight or buffer

    return tensors, find


def _sizes(tensors: Table) -> npt.NDArray[np.float64]:
    """Bytes that each tensor takes, at least one; only roughly from some petabytes on."""
    ne, nb = tensors["ne"].astype(np.float64), tensors["nb"].astype(np.float64)
    known = [i.value for i in GgmlType]
    info = np.ones((max(known) + 2, 2))
    for type_ in GgmlType:
        info[type_] = TYPE_INFO[type_].block_size, TYPE_INFO[type_].type_size
    block, size = info[np.minimum(tensors["type"], max(known) + 1)].T
    # As ggml_nbytes: blocks of a row side by side, elements of a row by their stride.
    row = np.where(block == 1, size + (ne[:, 0] - 1) * nb[:, 0], ne[:, 0] / block * size)
    total: npt.NDArray[np.float64] = row + ((ne[:, 1:] - 1) * nb[:, 1:]).sum(axis=1)
    return np.maximum(total, 1)
