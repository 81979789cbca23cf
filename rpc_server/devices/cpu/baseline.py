"""What graphs run by while their kernels are being compiled: nobody waits for all of them.

The first graph on a machine finds none of its kernels. Most of its nodes are small, and array code
does them in less time than a compiler takes for their kernel. Products with large weights wait, but
only for a kernel that is compiled soon (``baseline_of`` of the catalog). What a plan runs by so is
replaced, within the plan, once all of its kernels are there. Those that nobody waits for are begun
a moment later: who has just come needs the processors.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from protocol.ggml.ops import Op
from protocol.tensor import Tensor
from rpc_server.devices.cpu.catalog import Kernel, baseline_of, library
from rpc_server.devices.cpu.kinds import CpuKind
from rpc_server.devices.planning.shapes import touched_elements
from rpc_server.graph.table import Ints
from rpc_server.ops.table import OPS

# What array code may take for all nodes of a kernel before one waits for that, seconds: a third
# of what a small one takes to be compiled.
_WORTH_WAITING = 0.25

# When compilers begin with what nobody waits for, seconds. A small model has been loaded and has
# given its first token by then, and of a large one hardly anything has arrived.
_LATER = 1.0

# What array code takes for some ten calls, and does on one core: less than most.
_CALLS_SECONDS = 1.5e-4
_ELEMENTS_A_SECOND = 1e8
_PRODUCTS_A_SECOND = 2e9
# Of quantized tensors elements are decoded first.
_DECODED_A_SECOND = 1e7


class LaterKernels:
    """Has kernels compiled from a moment on. May be used by any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # When each may be asked for, by the monotonic clock.
        self._due: dict[Kernel, float] = {}

    def absent(self, kernels: Iterable[Kernel], *, urgent: bool = True) -> list[Kernel]:
        """Return those that are not there yet; what is on disk is loaded.

        All others will be asked for, and what is ``urgent`` comes before what is not.
        """
        compiled, wanted = library(), list(dict.fromkeys(kernels))
        without_code = compiled.missing(wanted)
        unknown = [k for k in without_code if not compiled.has(k) and not compiled.failed(k)]
        put_off = self._put_off(unknown, urgent)
        asked = compiled.pending([k for k in wanted if k not in put_off], urgent=urgent)
        return [k for k in wanted if k in put_off or k in asked]

    def _put_off(self, kernels: Sequence[Kernel], urgent: bool) -> set[Kernel]:
        """Return those whose moment isn't over; that of new ones begins now."""
        now = time.monotonic()
        with self._lock:
            new = [k for k in kernels if k not in self._due]
            self._due.update(dict.fromkeys(new, now + _LATER))
            put_off = {k for k in kernels if self._due[k] > now}
        if new:
            timer = threading.Timer(_LATER, _request, (new, urgent))
            timer.daemon = True
            timer.start()
        return put_off


def _request(kernels: Sequence[Kernel], urgent: bool) -> None:
    library().pending(kernels, urgent=urgent)


later_kernels = LaterKernels()


def seconds_without(node: Tensor) -> float:
    """Return about how long a node takes by array code; infinity for what has none."""
    if OPS[node.op].reference is None:
        return float("inf")
    times, products, decoded = 1, 0, 0
    if node.op in (Op.MUL_MAT, Op.MUL_MAT_ID) and node.src[0] is not None:
        decoded = node.src[0].nelements * node.src[0].quantized
        # Matrix by matrix.
        times = node.ne[2] * node.ne[3]
        products = node.nelements * node.src[0].ne[0]
    elif node.op is Op.FLASH_ATTN_EXT:
        q, k, v = node.src[:3]
        if q is not None and k is not None and v is not None:
            decoded = k.nelements * k.quantized + v.nelements * v.quantized
            # Head by head.
            times = q.ne[2] * q.ne[3]
            products = q.ne[1] * q.ne[2] * q.ne[3] * k.ne[1] * (k.ne[0] + v.ne[0])
    return (
        times * _CALLS_SECONDS
        + touched_elements(node) / _ELEMENTS_A_SECOND
        + products / _PRODUCTS_A_SECOND
        + decoded / _DECODED_A_SECOND
    )


Costs = Sequence[tuple[CpuKind, float]]


def costs_without(kinds: Sequence[CpuKind], which: Ints, node: Callable[[int], Tensor]) -> Costs:
    """Return the kinds of a graph with the seconds that all nodes of each take by array code.

    ``which`` is the kind of each position of a plan by its number, ``node`` gives the node there.
    """
    _, first, counts = np.unique(which, return_index=True, return_counts=True)
    return [
        (kind, n * seconds_without(node(at)) if kind.op is not None else float("inf"))
        for kind, at, n in zip(kinds, first.tolist(), counts.tolist(), strict=True)
    ]


def stand_ins_for(
    absent: Iterable[Kernel], costs: Costs
) -> tuple[dict[Kernel, Kernel], list[Kernel]]:
    """Return what stands in for which kernels, and what has to be there before a graph can run.

    ``absent`` are kernels that are being compiled.
    """
    stand_ins: dict[Kernel, Kernel] = {}
    awaited: list[Kernel] = []
    for kernel in absent:
        other = baseline_of(kernel)
        seconds = sum(seconds for kind, seconds in costs if kernel in kind.kernels)
        if other is not None and library().has(other):
            stand_ins[kernel] = other
        elif seconds > _WORTH_WAITING:
            if other is not None and not library().failed(other):
                stand_ins[kernel] = other
            awaited.append(stand_ins.get(kernel, kernel))
    return stand_ins, awaited


def as_it_runs(
    kind: CpuKind, absent: Sequence[Kernel], stand_ins: Mapping[Kernel, Kernel]
) -> CpuKind:
    """Return how a kind runs while these kernels are absent, all others there."""
    lacks = [kernel for kernel in kind.kernels if kernel in absent]
    if not lacks:
        return kind
    if all(kernel in stand_ins for kernel in lacks):
        return kind.by(stand_ins)
    return kind.without_kernel()
