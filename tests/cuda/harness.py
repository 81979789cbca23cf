"""Runs nodes by the CUDA device's kernels in the emulation, on tensors of tests/ops/harness.py."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import rpc_server.devices.cuda.lower
import rpc_server.ops  # noqa: F401  (fills the op table)
from protocol.tensor import Tensor
from rpc_server.devices.cpu.kernels.interface.abi import EXTRA_WORD, RECORD_WORDS
from rpc_server.devices.cuda.kernels import Unit
from rpc_server.devices.cuda.planner import (
    COUNTERS,
    CudaPlanner,
    Launch,
    Product,
    lower_to_launches,
    place_scratch,
)
from rpc_server.devices.planning.nodes import lower_node
from rpc_server.graph.errors import GraphError
from rpc_server.ops.table import ContractError, OpSpec, check
from tests.cuda import emulation
from tests.ops import harness
from tests.ops.tensors import CONTEXT, raw, values

needs_compiler = pytest.mark.skipif(emulation.compiler() is None, reason=emulation.NO_COMPILER)

# Where records have the address of the status word and the number of their node.
STATUS_WORD, NODE_WORD = EXTRA_WORD - 2, EXTRA_WORD - 1


def plan(
    nodes: Sequence[Tensor], capability: int = emulation.CAPABILITY
) -> tuple[list[Launch | Product], int]:
    """Launches and bytes of scratch of nodes; fails if one has no kernel."""
    planner = CudaPlanner(nodes, multiprocessors=4, capability=capability)
    for node in nodes:
        check(node)
        planner.begin(node)
        assert lower_to_launches(node, planner), f"no kernel for {node.label}"
        planner.finish(node)
    return planner.launches, planner.scratch_peak


def plan_graph(nodes: Sequence[Tensor]) -> tuple[list[Launch | Product], int]:
    """Launches and bytes of scratch of a graph's nodes.

    Raises GraphError, also where one has no kernel or is for cuBLAS.
    """
    planner = CudaPlanner(nodes, multiprocessors=4, capability=61)

    def decline(node: Tensor, spec: OpSpec) -> None:
        raise GraphError(f"{node.label}: no kernel")

    for node in nodes:
        lower_node(node, planner, lambda t: lower_to_launches(t, planner), decline)
    if any(isinstance(launch, Product) for launch in planner.launches):
        raise GraphError("a product by cuBLAS")
    return planner.launches, planner.scratch_peak


def run(
    nodes: Tensor | Sequence[Tensor], *, seed: int = 1, capability: int = emulation.CAPABILITY
) -> None:
    """Plan and run nodes with every access checked: sources may be read, results written.

    Raises ContractError for an index out of range, EmulationError for what kernels must not do.
    """
    listed = [nodes] if isinstance(nodes, Tensor) else list(nodes)
    launches, scratch_size = plan(listed, capability)
    extents = _extents(listed)
    run_launches(launches, scratch_size, extents, seed=seed, capability=capability)


def run_launches(
    launches: Sequence[Launch | Product],
    scratch_size: int,
    extents: Sequence[tuple[int, int, bool]],
    *,
    seed: int = 1,
    overlapping: bool = False,
    capability: int = emulation.CAPABILITY,
) -> None:
    """Run launches on ``extents``: start and end of memory, and whether it may be written.

    Where tensors are ``overlapping`` threads may meet in their memory: races are none, and threads
    take turns at any access. Raises as :func:`run`.
    """
    launches = [copy.deepcopy(launch) for launch in launches]
    memory = emulation.Memory()
    status = np.zeros(1 + COUNTERS, np.uint32)
    scratch = np.full(scratch_size + 256, 0xA5, np.uint8)
    base = -(-int(scratch.ctypes.data) // 256) * 256
    if scratch_size:
        memory.add(base, scratch_size)
    memory.add(int(status.ctypes.data), status.nbytes)
    for start, end, writable in extents:
        memory.add(start, end - start, writable=writable)
    for number, launch in enumerate(launches):
        assert isinstance(launch, Launch), "products by cuBLAS run on the stand-in only"
        place_scratch(launch, base)
        words = launch.words
        words[STATUS_WORD], words[NODE_WORD] = int(status.ctypes.data), number
        assert len(words) == RECORD_WORDS
        unit(launch.kernel.unit, capability).launch(
            launch.kernel.name,
            words,
            launch.grid,
            (launch.threads,),
            memory,
            shared=launch.shared,
            races=not overlapping,
            interleaved=overlapping,
            seed=seed,
        )
        assert not status[1:].any(), f"{launch.kernel.label}: leaves counters that are not 0"
    if status[0]:
        failed = launches[int(status[0]) >> 8]
        assert isinstance(failed, Launch)
        raise ContractError(f"{failed.node.label}: an index")


def unit(of: Unit, capability: int) -> emulation.Module:
    return emulation.build(of.label, of.text, capability=capability)


def _extents(nodes: Sequence[Tensor]) -> list[tuple[int, int, bool]]:
    """Memory that nodes touch, overlapping pieces joined; what is only read may not be written."""
    pieces = []
    for node in nodes:
        pieces.append((node.address, node.address + node.nbytes, True))
        pieces += [(s.address, s.address + s.nbytes, False) for s in node.src if s is not None]
    joined: list[tuple[int, int, bool]] = []
    for start, end, writable in sorted(p for p in pieces if p[0] < p[1]):
        if joined and start < joined[-1][1]:
            last = joined.pop()
            joined.append((last[0], max(last[1], end), last[2] or writable))
        else:
            joined.append((start, end, writable))
    return joined


def by_both(
    t: Tensor, capability: int = emulation.CAPABILITY
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(reference, kernels): the node's values run each way from the same memory."""
    touched = {t.address: t, **{s.address: s for s in t.src if s is not None}}
    before = [(s, raw(s)) for s in touched.values()]
    harness.run(t, kernels=False)
    expected = values(t)
    for s, content in before:
        CONTEXT.memory(s.address, s.nbytes)[...] = content
    run(t, capability=capability)
    if t.view_src is None:
        assert harness.guards_intact(t), f"{t.label}: wrote outside its memory"
    return expected, values(t)
