"""Lowering: from the nodes of a validated graph to the records that compiled code runs.

Each family of ops has a file in ``lower/`` whose functions, registered with :func:`lowers`, pick
the kernels of a node and emit their records. What they decline runs as the op's array reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from protocol.ggml.ops import Op
from protocol.messages import MAX_PARAM_WORDS
from protocol.tensor import Tensor
from rpc_server.devices.cpu.catalog import CONVERTERS, Kernel
from rpc_server.devices.cpu.kernels.interface.layout import RowForm, row_bytes
from rpc_server.devices.cpu.kernels.interface.schedule import SERIAL_BELOW, Span
from rpc_server.devices.planning.nodes import registers
from rpc_server.devices.planning.records import record_words
from rpc_server.devices.planning.scratch import Arena, Labelled, ScratchPlanner

# Up to so many of them for each thread it isn't worth to count them.
_UNCUT = 2

Lowering = Callable[[Tensor, "Planner"], bool]
LOWERINGS: dict[Op, Lowering] = {}


def lowers(*ops: Op) -> Callable[[Lowering], Lowering]:
    """Register the lowering of ``ops``: returns False where it has no kernel for a node."""
    return registers(LOWERINGS, ops)


class PlanItem(Labelled, Protocol):
    """Work of a plan that is no node of the graph."""

    def emit(self, planner: Planner) -> None:
        """Append its records."""
        ...


@dataclass(slots=True)
class Emitted:
    """One record to be: the kernel, its words, and the node it belongs to (for messages)."""

    kernel: Kernel
    words: list[int]
    node: Labelled
    # What it touches and how much it has to do, for the schedule.
    reads: list[Span]
    writes: list[Span]
    work: int
    # Whether it uses scratch that belongs to the thread which runs it.
    private: bool
    # Into how many parts it is cut, between which others may have the device; 0: one a thread.
    parts: int


class Planner(ScratchPlanner):
    """Collects the records of one graph.

    ``n_threads`` is how many threads will run each record; ``items`` are as of ScratchPlanner.
    ``pause_address`` is where the word lies by which a run is paused.
    """

    # What a part of a record has to do at most: some milliseconds of a thread.
    part_bytes = 8 << 20
    part_products = 1 << 27

    def __init__(
        self,
        n_threads: int,
        scratch: Arena,
        items: Sequence[Tensor | PlanItem] = (),
        pause_address: int = 0,
    ) -> None:
        super().__init__(scratch, items)
        self.n_threads = n_threads
        self.pause_address = pause_address
        self.records: list[Emitted] = []
        # Scratch that the node at hand has for itself; whether it uses that of threads.
        self._local: list[Span] = []
        self._private = False
        # Most bytes that threads have for themselves.
        self.thread_bytes = 0

    def begin(self, node: Labelled) -> None:
        """Start lowering ``node``: scratch of the node before is given back."""
        super().begin(node)
        self._local = []
        self._private = False

    @property
    def _limit(self) -> int:
        """The beginning of the arena's second half, which belongs to threads (thread_scratch)."""
        return self._arena.size // 2

    @property
    def scratch_touched(self) -> int:
        """Most bytes of scratch that are written, those of threads too."""
        return self.scratch_peak + self.thread_bytes

    def take(self) -> list[Emitted]:
        """Return the records since the last time."""
        records, self.records = self.records, []
        return records

    def emit(
        self,
        kernel: Kernel,
        t: Tensor,
        *,
        extra: Sequence[int] = (),
        slots: Sequence[Tensor | None] | None = None,
        work: int | None = None,
        products: int = 0,
        parts: int | None = None,
    ) -> None:
        """Append a record of ``kernel`` for node ``t``.

        ``slots`` are the tensors of DST, SRC0, ... (default: the node and its sources); the kernel
        writes DST and scratch only. ``extra`` are the kernel's own words. ``work`` is how many
        bytes it reads and writes where that isn't all of its tensors, ``products`` how many numbers
        it multiplies where these are more: by them a record is cut into ``parts``, unless that is
        given (0: one for each thread). Raises ValueError if there are too many slots or extra
        words.
        """
        tensors = (t, *t.src) if slots is None else slots
        words = record_words(kernel, tensors, t.op_params, extra)
        assert self._node is not None
        sizes = [0 if x is None else x.nbytes for x in tensors]
        spans = [
            None if x is None or x.empty else (x.address, x.address + size)
            for x, size in zip(tensors, sizes, strict=True)
        ]
        reads = [span for span in spans[1:] if span] + self._reading
        writes = [spans[0]] if spans[0] is not None else []
        if work is None:
            # Elements that lie over one another are as much work as others.
            work = sum(
                max(size, x.row_size * x.nrows)
                for x, size in zip(tensors, sizes, strict=True)
                if x is not None
            )
        if parts is None:
            parts = self.parts(work, products)
        if parts:
            work = max(work, SERIAL_BELOW)
        writes += [*self._filling, *self._local]
        self._add(Emitted(kernel, words, self._node, reads, writes, work, self._private, parts))
        # Whatever the node does next reads what this record has filled.
        self._reading = self._reading + self._filling
        self._filling = []

    def _add(self, record: Emitted) -> None:
        self.records.append(record)

    def parts(self, work: int, products: int) -> int:
        """Return how many parts to cut so much work into; 0 if it is not much."""
        parts = max(-(-work // self.part_bytes), -(-products // self.part_products))
        if parts <= _UNCUT * self.n_threads:
            return 0
        # As many for each thread.
        return -(-parts // self.n_threads) * self.n_threads

    def scratch(self, size: int) -> int:
        """Do what ScratchPlanner says; records of the node at hand write it."""
        address = super().scratch(size)
        self._local = [*self._local, (address, address + -(-size // 64) * 64)]
        return address

    def thread_scratch(self, size: int) -> tuple[int, int]:
        """Return (address, stride) of ``size`` bytes for each thread, thread 0's first.

        They are good while a record runs. As no thread ever sees another's, records that use them
        need not wait for one another. Raises MemoryError if a thread can't have so much.
        """
        start = self._limit
        stride = (self._arena.size - start) // self.n_threads // 4096 * 4096
        if size > stride:
            raise MemoryError(f"graph needs {size} bytes of scratch for a thread, limit {stride}")
        self._private = True
        self.thread_bytes = max(self.thread_bytes, size * self.n_threads)
        return self._arena.address(start, stride * self.n_threads), stride

    def converted_rows(self, t: Tensor, form: RowForm) -> int:
        """Return the address of ``t``'s rows in ``form``, row_bytes apart in ne1, ne2, ne3 order.

        Emits the conversion once for all products that read the same rows; must be called before
        :meth:`scratch` within a node. Coded forms take F32 of whole runs of 32, the others any
        float type.
        """
        stride = row_bytes(form, t.ne[0])
        key = (form, t.type, t.ne, t.nb)
        address, fresh = self.shared_scratch(key, (t,), stride * t.nrows)
        if fresh:
            # What the source itself is computed by is nothing to its rows.
            rows = replace(t, op_params=(0,) * MAX_PARAM_WORDS)
            self.emit(CONVERTERS[form], rows, slots=(None, t), extra=(address, stride, int(form)))
        return address
