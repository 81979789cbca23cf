"""From the nodes of a validated graph to launches of kernels.

Each family of ops has a file in ``lower/`` whose functions, registered with :func:`lowers`, choose
the kernels of a node and how many threads run them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import numpy as np

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.devices.cuda.kernels import CudaKernel
from rpc_server.devices.planning.nodes import registers
from rpc_server.devices.planning.records import record_words
from rpc_server.devices.planning.scratch import Labelled, ScratchPlanner
from rpc_server.ops.table import OPS, ContractError, check

Lowering = Callable[[Tensor, "CudaPlanner"], bool]
LOWERINGS: dict[Op, Lowering] = {}
# Lowerings of a node together with those behind it; they are tried first.
FUSIONS: dict[Op, Lowering] = {}

# What a device's grid may have at most of blocks in each dimension.
MAX_GRID = (0x7FFFFFFF, 0xFFFF, 0xFFFF)

# Words behind that of failures by which blocks of a launch are counted; all are 0 between launches.
COUNTERS = 4096

# While a plan is made, scratch lies here; its real place is known when its size is.
SCRATCH_BASE = 1 << 60
SCRATCH_LIMIT = 1 << 40

Grid = tuple[int, int, int]


class LaunchWords(TypedDict, total=False):
    """The words and tensors that :meth:`CudaPlanner.launch` may be given besides the grid."""

    extra: Sequence[int]
    slots: Sequence[Tensor | None] | None
    params: Sequence[int] | None


def lowers(*ops: Op) -> Callable[[Lowering], Lowering]:
    """Register the lowering of ``ops``: returns False where it has no kernel for a node."""
    return registers(LOWERINGS, ops)


def fuses(*ops: Op) -> Callable[[Lowering], Lowering]:
    """Register what lowers nodes of ``ops`` together with those behind them.

    It returns False, without a launch, where what follows isn't what it is made for, and tells the
    planner with :meth:`CudaPlanner.absorb` which nodes it has done besides.
    """
    return registers(FUSIONS, ops)


def lower_to_launches(node: Tensor, planner: CudaPlanner) -> bool:
    """Emit launches for ``node``, unless a node before it has done it.

    Returns False if it has no kernel.
    """
    if planner.absorbed(node):
        return True
    tried = (table.get(node.op) for table in (FUSIONS, LOWERINGS))
    return any(lowering is not None and lowering(node, planner) for lowering in tried)


@dataclass(slots=True)
class Launch:
    """One launch to be: the kernel, its record, its blocks and their threads, and the node."""

    kernel: CudaKernel
    words: np.ndarray[Any, np.dtype[np.int64]]
    grid: Grid
    threads: int
    # Bytes of dynamic shared memory of a block.
    shared: int
    node: Labelled


@dataclass(slots=True)
class Product:
    """``batch`` products by cuBLAS: ``c`` (m, n) is ``a`` (k, m) transposed times ``b`` (k, n).

    Dimensions are in ggml's order, innermost first. ``a`` and ``b`` are of ``type``, ``c`` and the
    sums are F32; leading dimensions and the strides between batches are elements. ``a`` is the same
    in all batches. At ``factor``, an address of the card's, is what ``c`` is multiplied with, and
    a zero behind it; 0: nothing.
    """

    m: int
    n: int
    k: int
    type: GgmlType
    a: int
    lda: int
    b: int
    ldb: int
    stride_b: int
    c: int
    ldc: int
    stride_c: int
    batch: int
    factor: int = 0


def is_valid(t: Tensor) -> bool:
    """Return whether a node keeps its op's contract; its client is told when the node's turn
    comes.
    """
    try:
        check(t)
    except ContractError:
        return False
    return True


def threads_for(n: int, most: int) -> int:
    """Return the threads of a block that walks ``n`` elements together: whole warps."""
    return min(most, max(-(-n // 32) * 32, 32))


class _ImaginedScratch:
    """Scratch by offsets from SCRATCH_BASE."""

    size = SCRATCH_LIMIT

    def address(self, offset: int, size: int) -> int:
        if offset + size > self.size:
            raise MemoryError(f"graph needs {offset + size} bytes of scratch")
        return SCRATCH_BASE + offset


def place_scratch(work: Launch | Product, address: int) -> None:
    """Let all addresses of scratch in a launch, wherever they stand, begin at ``address``."""
    if isinstance(work, Launch):
        words = work.words
        tentative = (words >= SCRATCH_BASE) & (words < SCRATCH_BASE + SCRATCH_LIMIT)
        words[tentative] += address - SCRATCH_BASE
        return
    for name in ("a", "b", "c", "factor"):
        value = getattr(work, name)
        if SCRATCH_BASE <= value < SCRATCH_BASE + SCRATCH_LIMIT:
            setattr(work, name, value - SCRATCH_BASE + address)


class CudaPlanner(ScratchPlanner):
    """Collects the launches of one graph; what is kept in scratch between nodes is as on the CPU.

    Launches run one after the other, so nothing else is to be scheduled. ``multiprocessors`` is
    how many the card has, ``capability`` what it can do (61 for 6.1).
    """

    def __init__(self, items: Sequence[Tensor], multiprocessors: int, capability: int) -> None:
        super().__init__(_ImaginedScratch(), items)
        self.multiprocessors = multiprocessors
        self.capability = capability
        self.launches: list[Launch | Product] = []
        self._nodes = items
        self._absorbed: set[Tensor] = set()
        # By the node with which each is to be done, nodes that are not done yet.
        self._waiting: dict[Tensor, Tensor] = {}

    def ahead(self) -> Iterator[Tensor]:
        """Yield the nodes behind the one at hand that are still to be done.

        Nobody has checked them.
        """
        # The node at hand is the one that has begun last.
        for number in range(self._begun + 1, len(self._nodes)):
            node = self._nodes[number]
            is_view = node.op in OPS and OPS[node.op].is_view
            if not (node.empty or is_view or node in self._absorbed):
                yield node

    def chain(self, *ops: Op) -> list[Tensor]:
        """Return the nodes that compute next, as far as they are ``ops`` in order, and valid."""
        found: list[Tensor] = []
        for op, node in zip(ops, self.ahead(), strict=False):
            if node.op is not op or not is_valid(node):
                break
            found.append(node)
        return found

    def absorb(self, nodes: Iterable[Tensor]) -> None:
        """Count ``nodes``, that at hand among them or later ones, as done by its launches.

        What is kept from here on was made after them.
        """
        for node in nodes:
            self._waiting = {at: t for at, t in self._waiting.items() if t is not node}
            self.finish(node)
            self._absorbed.add(node)

    def wait(self, node: Tensor, other: Tensor) -> None:
        """Leave ``node``, which is at hand, to the lowering of ``other``, which comes later.

        What lies between them must do as well before ``node``. That lowering absorbs it.
        """
        self._waiting[other] = node

    def waiting_for(self, node: Tensor) -> Tensor | None:
        """Return what is to be done together with ``node``, if anything."""
        return self._waiting.get(node)

    def waiting(self) -> list[Tensor]:
        """Return the nodes that are not done yet, though later ones are at hand."""
        return list(self._waiting.values())

    def is_pending(self, node: Tensor) -> bool:
        """Return whether what ``node`` writes is known already, or not yet to be."""
        return node in self._absorbed or node in self._waiting.values()

    def finish(self, node: Tensor) -> None:
        if not self.is_pending(node):
            super().finish(node)

    def filling(self) -> contextlib.AbstractContextManager[None]:
        """Return a context for launches that do nothing but fill fresh shared scratch."""
        return contextlib.nullcontext()

    def absorbed(self, node: Tensor) -> bool:
        return node in self._absorbed

    def launch(
        self,
        kernel: CudaKernel,
        t: Tensor,
        grid: Sequence[int],
        threads: int,
        *,
        extra: Sequence[int] = (),
        slots: Sequence[Tensor | None] | None = None,
        params: Sequence[int] | None = None,
        shared: int = 0,
    ) -> None:
        """Append a launch of ``kernel`` for node ``t``.

        ``slots`` are the tensors of DST, SRC0, ... (default: the node and its sources), ``params``
        what stands for op_params, ``extra`` the kernel's own words. Raises ValueError for a grid or
        a block that no card can run.
        """
        x, y, z = (*grid, 1, 1)[:3]
        if not all(1 <= n <= most for n, most in zip((x, y, z), MAX_GRID, strict=True)):
            raise ValueError(f"{kernel.label}: a grid of {x} x {y} x {z} blocks")
        if not 1 <= threads <= kernel.threads or threads % 32:
            raise ValueError(f"{kernel.label}: blocks of {threads} threads")
        tensors = (t, *t.src) if slots is None else slots
        params = t.op_params if params is None else params
        self._add(kernel, record_words(kernel, tensors, params, extra), (x, y, z), threads, shared)

    def _add(
        self, kernel: CudaKernel, words: list[int], grid: Grid, threads: int, shared: int
    ) -> None:
        """Append a launch whose record has these words."""
        assert self._node is not None
        record = np.array(words, np.int64)
        self.launches.append(Launch(kernel, record, grid, threads, shared, self._node))
        self._filling = []

    def take_launches(self) -> list[Launch | Product]:
        """Return the launches since the last time."""
        launches, self.launches = self.launches, []
        return launches

    def product(self, product: Product) -> None:
        """Append a product by cuBLAS."""
        self.launches.append(product)
        self._filling = []

    def rows(
        self,
        kernel: CudaKernel,
        t: Tensor,
        rows: int,
        columns: int,
        **given: Unpack[LaunchWords],
    ) -> None:
        """Emit a launch for a kernel of FOR_ROWS and FOR_COLUMNS: blocks for rows, then columns."""
        threads = threads_for(columns, kernel.threads)
        # Enough blocks for the card to be full; what is more, loops.
        along_rows = min(rows, MAX_GRID[0])
        along_columns = min(-(-columns // threads), MAX_GRID[1])
        self.launch(kernel, t, (along_rows, along_columns), threads, **given)

    def each_row(
        self,
        kernel: CudaKernel,
        t: Tensor,
        rows: int,
        n: int,
        **given: Unpack[LaunchWords],
    ) -> bool:
        """Emit a launch for a kernel whose blocks do whole rows of ``n`` elements.

        True, for lowerings to return.
        """
        grid = (min(rows, MAX_GRID[0]),)
        self.launch(kernel, t, grid, threads_for(n, kernel.threads), **given)
        return True
