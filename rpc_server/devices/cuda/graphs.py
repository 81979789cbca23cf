"""Captured graphs whose kernels get other records and blocks, by calls that CuPy hasn't got.

These are the driver's own, of CUDA 12 and newer (cuda.h has them). A kernel of a captured graph is
changed only if what the driver tells of it is what it was captured with: so no mistake about which
of them is which can change another one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Record = np.ndarray[Any, np.dtype[np.int64]]

# CUgraphNodeType of a kernel.
_KERNEL = 0


class UpdateError(Exception):
    """The driver can't change a captured graph: it is to be captured anew."""


@dataclass(frozen=True, slots=True)
class KernelLaunch:
    """A kernel with all that it is launched with.

    ``function`` is CuPy's; ``shared`` are bytes of a block's dynamic shared memory.
    """

    function: Any
    words: Record
    grid: tuple[int, int, int]
    threads: int
    shared: int

    def does(self, other: KernelLaunch) -> bool:
        """Return whether this does what ``other`` does, which is of the same function."""
        mine, others = ((x.grid, x.threads, x.shared, x.words.tobytes()) for x in (self, other))
        return mine == others


class KernelParameters(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2 of cuda.h."""

    _fields_ = (
        ("func", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("values", ctypes.POINTER(ctypes.c_void_p)),
        ("extra", ctypes.c_void_p),
        ("kern", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )


def _parameters(launch: KernelLaunch) -> KernelParameters:
    """Return a launch's parameters but for the kernel; they point into its record."""
    return KernelParameters(
        grid=launch.grid,
        block=(launch.threads, 1, 1),
        shared=launch.shared,
        values=(ctypes.c_void_p * 1)(launch.words.ctypes.data),
    )


def _told(parameters: KernelParameters, size: int) -> tuple[Any, ...]:
    """Return grid, block, shared memory and record, of so many bytes, of a kernel."""
    values = parameters.values
    record = ctypes.string_at(values[0], size) if values and values[0] else b""
    return tuple(parameters.grid), tuple(parameters.block), parameters.shared, record


_HANDLE = ctypes.c_void_p
_HANDLES = ctypes.POINTER(ctypes.c_void_p)
_COUNT = ctypes.POINTER(ctypes.c_size_t)
_PARAMETERS = ctypes.POINTER(KernelParameters)

# What is called, by name, with what it takes; all return a CUresult.
CALLS: dict[str, tuple[Any, ...]] = {
    "cuGraphGetRootNodes": (_HANDLE, _HANDLES, _COUNT),
    "cuGraphNodeGetDependentNodes": (_HANDLE, _HANDLES, _COUNT),
    "cuGraphNodeGetType": (_HANDLE, ctypes.POINTER(ctypes.c_int)),
    "cuGraphKernelNodeGetParams_v2": (_HANDLE, _PARAMETERS),
    "cuGraphExecKernelNodeSetParams_v2": (_HANDLE, _HANDLE, _PARAMETERS),
}


class GraphCalls:
    """The driver's calls for captured graphs; ``library`` is the driver's.

    The card whose graphs these are is the current one. Raises UpdateError where calls are missing.
    """

    def __init__(self, library: Any) -> None:
        self._calls: dict[str, Any] = {}
        for name, takes in CALLS.items():
            call = getattr(library, name, None)
            if call is None:
                raise UpdateError(f"the driver has no {name}")
            call.argtypes, call.restype = takes, ctypes.c_int
            self._calls[name] = call

    def _call(self, name: str, *arguments: Any) -> None:
        status = self._calls[name](*arguments)
        if status:
            raise UpdateError(f"{name} returns {status}")

    def _only(self, name: str, of: int) -> int:
        """Return the one node that ``name`` lists, 0 if there is none."""
        # Room for one more than there may be.
        nodes, count = (ctypes.c_void_p * 2)(), ctypes.c_size_t(2)
        self._call(name, of, nodes, ctypes.byref(count))
        if count.value > 1:
            raise UpdateError("a captured graph that isn't one line")
        return (nodes[0] or 0) if count.value else 0

    def kernels(self, graph: Any) -> list[int]:
        """Return a captured graph's kernels in the order in which they run. Raises UpdateError."""
        found = []
        node = self._only("cuGraphGetRootNodes", graph.graph)
        while node:
            kind = ctypes.c_int()
            self._call("cuGraphNodeGetType", node, ctypes.byref(kind))
            if kind.value == _KERNEL:
                found.append(node)
            node = self._only("cuGraphNodeGetDependentNodes", node)
        return found

    def change(
        self, graph: Any, captured: Sequence[KernelLaunch], changed: Mapping[int, KernelLaunch]
    ) -> None:
        """Let kernels of a graph be launched with something else from its next launch on.

        ``captured`` are the launches that it was captured with, ``changed`` others by the number of
        what they take the place of. Raises UpdateError; of these some may be changed then.
        """
        nodes = self.kernels(graph)
        if len(nodes) != len(captured):
            raise UpdateError(f"{len(nodes)} kernels in a graph of {len(captured)}")
        for number, launch in changed.items():
            self._change(graph.graphExec, nodes[number], captured[number], launch)

    def _change(self, graph: int, node: int, captured: KernelLaunch, launch: KernelLaunch) -> None:
        there = KernelParameters()
        self._call("cuGraphKernelNodeGetParams_v2", node, ctypes.byref(there))
        size = captured.words.nbytes
        if _told(there, size) != _told(_parameters(captured), size):
            raise UpdateError("a kernel is not what it was captured as")
        given = _parameters(launch)
        for name in ("func", "kern", "context"):
            setattr(given, name, getattr(there, name))
        # The driver copies what it is given.
        self._call("cuGraphExecKernelNodeSetParams_v2", graph, node, ctypes.byref(given))
