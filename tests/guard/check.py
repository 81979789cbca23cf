"""Runs a case with each tensor's memory at a guard page, and looks at every byte afterwards."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from conformance.differential.case import GraphCase
from conformance.differential.runner import Image
from protocol.dialects import DIALECTS
from protocol.ggml.ops import VIEWS
from protocol.ggml.types import TYPE_INFO
from protocol.tensor import Tensor
from rpc_server.devices.cpu.device import CpuDevice, CpuQueue
from rpc_server.graph.errors import GraphError
from tests.guard.mapping import GuardedMemory, Side

Bytes = npt.NDArray[np.uint8]

DIALECT = DIALECTS[0]


@functools.cache
def queue(kernels: bool) -> CpuQueue:
    """The CPU device: by kernels on two threads, or by references alone."""
    return CpuDevice(2, use_kernels=kernels).queue()


def _elements(mask: npt.NDArray[np.bool_], t: Tensor, start: int, value: bool) -> None:
    """Mark the bytes of the elements of ``t``, the first of which is at ``start``."""
    if not t.nelements:
        return
    info = TYPE_INFO[t.type]
    shape = (*reversed(t.ne[1:]), t.ne[0] // info.block_size, info.type_size)
    np.ndarray(shape, np.bool_, mask, start, (*reversed(t.nb), 1))[...] = value


@dataclass(frozen=True, slots=True)
class Layout:
    """Of each root: the bytes it starts with, others that must do as well, and what is written.

    ``disturbed`` differs wherever no node reads, or reads only what another wrote before.
    """

    data: Mapping[Tensor, Bytes]
    disturbed: Mapping[Tensor, Bytes]
    written: Mapping[Tensor, npt.NDArray[np.bool_]]

    @classmethod
    def of(cls, case: GraphCase) -> Layout:
        image = Image.of(case)
        read = np.zeros(len(image.data), np.bool_)
        for node in case.graph.nodes:
            for t in node.src if node.op not in VIEWS else ():
                if t is not None:
                    root = t if t.view_src is None else t.view_src
                    _elements(read, t, image.offsets[root] + t.view_offs, True)
        leaves = set(case.graph.leaves)
        written = ~image.untouched(case)
        data, disturbed, writes = {}, {}, {}
        for root, start in image.offsets.items():
            place = slice(start, start + root.nbytes)
            data[root], writes[root] = image.data[place], written[place]
            disturbed[root] = data[root] ^ np.uint8(0x5A)
            if root in leaves:
                np.copyto(disturbed[root], data[root], where=read[place])
        return cls(data, disturbed, writes)


@contextmanager
def placed(case: GraphCase, side: Side) -> Iterator[dict[Tensor, GuardedMemory]]:
    """Memory of its own for each root of the case, known to clients by its real address."""
    memory: dict[Tensor, GuardedMemory] = {}
    try:
        for root in case.graph.roots:
            memory[root] = GuardedMemory(root.nbytes, side)
        for i, (root, place) in enumerate(memory.items()):
            root.place(i + 1, place.base)
        yield memory
    finally:
        for place in memory.values():
            place.close()


def _run(
    case: GraphCase,
    memory: Mapping[Tensor, GuardedMemory],
    content: Mapping[Tensor, Bytes],
    kernels: bool,
) -> str:
    """Empty, or why the graph was refused."""
    for root, place in memory.items():
        place.write(content[root].tobytes())
    handles = {root.buffer: place for root, place in memory.items()}
    payload = case.graph.payload(DIALECT)
    try:
        queue(kernels).plan_here(payload, DIALECT, handles.get).run()
    except GraphError as error:
        return str(error)
    return ""


def findings(case: GraphCase, layout: Layout, side: Side, kernels: bool) -> tuple[str, list[str]]:
    """Why the case was refused (empty if it ran), and what is wrong with what it did to memory.

    A byte read or written beyond a guard page ends the process.
    """
    wrong: list[str] = []
    with placed(case, side) as memory:
        refused = _run(case, memory, layout.data, kernels)
        first = {root: np.frombuffer(place.read(), np.uint8) for root, place in memory.items()}
        for i, (root, place) in enumerate(memory.items()):
            changed = np.flatnonzero((first[root] != layout.data[root]) & ~layout.written[root])
            if len(changed):
                wrong.append(
                    f"root {i}: wrote {len(changed)} bytes between elements: {changed[:4]}"
                )
            if not place.canaries_intact:
                wrong.append(f"root {i}: wrote outside its memory")
        if refused:
            return refused, wrong
        _run(case, memory, layout.disturbed, kernels)
        for i, (root, place) in enumerate(memory.items()):
            again = np.frombuffer(place.read(), np.uint8)
            # What neither run wrote isn't a result: snapshots of tokens that there are not.
            kept = (first[root] == layout.data[root]) & (again == layout.disturbed[root])
            changed = np.flatnonzero((first[root] != again) & layout.written[root] & ~kept)
            if len(changed):
                wrong.append(
                    f"root {i}: {len(changed)} bytes depend on memory that is none of its sources: "
                    f"{changed[:4]}"
                )
    return "", wrong
