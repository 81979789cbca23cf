"""Lowering: from the nodes of a validated graph to the records that compiled code runs.

Each family of ops has a file in ``lower/`` whose functions, registered with :func:`lowers`, pick
the kernels of a node and emit their records. What they decline runs as the op's array reference.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Protocol

import numpy as np

from protocol.ggml.ops import Op
from rpc_server.devices.cpu.catalog import CONVERTERS, Kernel
from rpc_server.devices.cpu.kernels.interface.abi import (
    EXTRA_WORD,
    N_EXTRA,
    N_SLOTS,
    PARAM_WORD,
    RECORD_WORDS,
    SLOT_WORDS,
    Status,
)
from rpc_server.devices.cpu.kernels.interface.layout import RowForm, row_bytes
from rpc_server.devices.cpu.kernels.interface.schedule import Span
from rpc_server.graph.tensor import Tensor

Lowering = Callable[[Tensor, "Planner"], bool]
LOWERINGS: dict[Op, Lowering] = {}


def lowers(op: Op) -> Callable[[Lowering], Lowering]:
    """Register the lowering of ``op``: returns False where it has no kernel for a node."""

    def register(function: Lowering) -> Lowering:
        if op in LOWERINGS:
            raise RuntimeError(f"two lowerings for {op}")
        LOWERINGS[op] = function
        return function

    return register


# What a status says of the node whose kernel returned it.
STATUS_TEXT: dict[int, str] = {Status.INDEX_OUT_OF_RANGE: "an index in its data is out of range"}


class Labelled(Protocol):
    """What messages name when a record fails."""

    @property
    def label(self) -> str: ...


class Arena(Protocol):
    """A range of addresses for scratch, ``size`` bytes."""

    @property
    def size(self) -> int: ...

    def address(self, offset: int, size: int) -> int:
        """Where ``size`` bytes at ``offset`` lie; MemoryError if beyond the end."""
        ...


class PlanItem(Labelled, Protocol):
    """Work of a plan that is no node of the graph."""

    def emit(self, planner: Planner) -> None:
        """Append its records."""
        ...


@dataclass(slots=True)
class Emitted:
    """One record to be: the kernel, its words, and the node it belongs to (for messages)."""

    kernel: Kernel
    words: np.ndarray[Any, np.dtype[np.int64]]
    node: Labelled
    # What it touches and how much it has to do, for the schedule.
    reads: list[Span]
    writes: list[Span]
    work: int
    # Whether it uses scratch that belongs to the thread which runs it.
    private: bool


# Kept at once: each node looks through all of it, and a graph may have a million nodes.
_MOST_KEPT = 64


@dataclass(slots=True)
class _Kept:
    """Scratch that later nodes may find again: from ``start`` to ``end`` of the arena.

    It is good until one of ``sources`` is written to, and of no use behind node number ``until``.
    """

    sources: Sequence[Tensor]
    start: int
    end: int
    until: float
    # The number of the last node that found or made it.
    used: int


def record_words(
    label: str, tensors: Sequence[Tensor | None], op_params: Sequence[int], extra: Sequence[int]
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The words of a record; ``label`` names the kernel in the message.

    Raises ValueError if there are more tensors than slots, or too many extra words.
    """
    if len(tensors) > N_SLOTS or len(extra) > N_EXTRA:
        raise ValueError(f"record of {label}: too many slots or extra words")
    words = np.zeros(RECORD_WORDS, np.int64)
    for slot, tensor in enumerate(tensors):
        if tensor is not None:
            word = slot * SLOT_WORDS
            words[word : word + SLOT_WORDS] = (
                tensor.address,
                int(tensor.type),
                *tensor.ne,
                *tensor.nb,
            )
    words[PARAM_WORD : PARAM_WORD + 16] = op_params
    words[EXTRA_WORD : EXTRA_WORD + len(extra)] = extra
    return words


class Planner:
    """Collects the records of one graph.

    ``n_threads`` is how many threads will run each record. ``items`` are what will begin,
    in this order; without them, what is kept between nodes is kept as long as it is good.
    """

    def __init__(
        self, n_threads: int, scratch: Arena, items: Sequence[Tensor | PlanItem] = ()
    ) -> None:
        self.n_threads = n_threads
        self.records: list[Emitted] = []
        self._node: Labelled | None = None
        # Scratch of the node at hand: what its next record fills, what it reads, what is its own.
        self._filling: list[Span] = []
        self._reading: list[Span] = []
        self._local: list[Span] = []
        self._private = False
        self._arena = scratch
        # Scratch of the node at hand lies on top of what is kept between nodes.
        self._local_used = 0
        self.scratch_peak = 0
        self._shared: dict[Hashable, _Kept] = {}
        self._begun = -1
        # The number of the last node that reads what lies at an address.
        self._last_use = {
            source.address: number
            for number, item in enumerate(items)
            if isinstance(item, Tensor)
            for source in item.src
            if source is not None
        }

    def begin(self, node: Labelled) -> None:
        """Start lowering ``node``: scratch of the node before is given back."""
        self._node = node
        self._begun += 1
        self._drop([key for key, kept in self._shared.items() if kept.until < self._begun])
        self._local_used = 0
        self._filling, self._reading, self._local = [], [], []
        self._private = False

    def finish(self, node: Tensor) -> None:
        """``node`` writes its memory: what was made of what lay there is no longer good."""
        if node.empty:
            return
        start, end = node.address, node.address + node.nbytes
        self._drop(
            [
                key
                for key, kept in self._shared.items()
                if any(s.address < end and start < s.address + s.nbytes for s in kept.sources)
            ]
        )

    def _drop(self, keys: list[Hashable]) -> None:
        for key in keys:
            del self._shared[key]

    def _forget(self) -> None:
        """Let go of what no node has used for longest; of nothing that the node at hand uses."""
        key, oldest = min(self._shared.items(), key=lambda item: item[1].used)
        if oldest.used < self._begun:
            self._drop([key])

    def _gap(self, size: int) -> int:
        """The first place where ``size`` bytes fit beside what is kept."""
        at = 0
        for kept in sorted(self._shared.values(), key=lambda k: k.start):
            if kept.start - at >= size:
                break
            at = kept.end
        return at

    @property
    def _threads_start(self) -> int:
        """Where the arena's second half begins, which belongs to threads (thread_scratch)."""
        return self._arena.size // 2

    def _place(self, offset: int, size: int) -> int:
        """Address of scratch for all threads. Raises MemoryError if it would reach the others'."""
        if offset + size > self._threads_start:
            raise MemoryError(
                f"graph needs {offset + size} bytes of scratch, limit {self._threads_start}"
            )
        return self._arena.address(offset, size)

    @property
    def _shared_end(self) -> int:
        return max((kept.end for kept in self._shared.values()), default=0)

    def take(self) -> list[Emitted]:
        """The records since the last time."""
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
    ) -> None:
        """Append a record of ``kernel`` for node ``t``.

        ``slots`` are the tensors of DST, SRC0, ... (default: the node and its sources); the kernel
        writes DST and scratch only. ``extra`` are the kernel's own words. ``work`` is how many
        bytes it reads and writes where that isn't all of its tensors. Raises ValueError if there
        are too many slots or extra words.
        """
        tensors = (t, *t.src) if slots is None else slots
        words = record_words(kernel.label, tensors, t.op_params, extra)
        assert self._node is not None
        spans = [
            None if x is None or x.empty else (x.address, x.address + x.nbytes) for x in tensors
        ]
        reads = [span for span in spans[1:] if span] + self._reading
        writes = [spans[0]] if spans[0] is not None else []
        if work is None:
            work = sum(end - start for start, end in filter(None, spans))
        writes += [*self._filling, *self._local]
        self.records.append(Emitted(kernel, words, self._node, reads, writes, work, self._private))
        # Whatever the node does next reads what this record has filled.
        self._reading = self._reading + self._filling
        self._filling = []

    def scratch(self, size: int) -> int:
        """Address of ``size`` bytes (64-byte aligned) that stay good until the next node.

        Raises MemoryError if the graph needs more than the arena reserves.
        """
        aligned = -(-size // 64) * 64
        address = self._place(self._shared_end + self._local_used, aligned)
        self._local_used += aligned
        self._local = [*self._local, (address, address + aligned)]
        self.scratch_peak = max(self.scratch_peak, self._shared_end + self._local_used)
        return address

    def thread_scratch(self, size: int) -> tuple[int, int]:
        """(address, stride): ``size`` bytes for each thread, thread 0's first, ``stride`` apart.

        They are good while a record runs. As no thread ever sees another's, records that use them
        need not wait for one another. Raises MemoryError if a thread can't have so much.
        """
        start = self._threads_start
        stride = (self._arena.size - start) // self.n_threads // 4096 * 4096
        if size > stride:
            raise MemoryError(f"graph needs {size} bytes of scratch for a thread, limit {stride}")
        self._private = True
        return self._arena.address(start, stride * self.n_threads), stride

    def shared_scratch(
        self, key: Hashable, sources: Sequence[Tensor], size: int
    ) -> tuple[int, bool]:
        """(address, fresh) of ``size`` bytes that later nodes find again under ``key``.

        They stay good until one of ``sources``, which they are made of, is written to. ``fresh``:
        the caller must emit what fills them. To be called before :meth:`scratch` within a node.
        """
        known = self._shared.get(key)
        if known is not None:
            known.used = self._begun
            address = self._arena.address(known.start, size)
            self._reading = [*self._reading, (address, address + size)]
            return address, False
        if self._local_used:
            raise RuntimeError("shared scratch asked for after scratch in one node")
        if len(self._shared) >= _MOST_KEPT:
            self._forget()
        aligned = -(-size // 64) * 64
        start = self._gap(aligned)
        address = self._place(start, aligned)
        until = max(self._last_use.get(source.address, inf) for source in sources)
        self._shared[key] = _Kept(sources, start, start + aligned, until, self._begun)
        self.scratch_peak = max(self.scratch_peak, self._shared_end)
        self._filling = [*self._filling, (address, address + aligned)]
        return address, True

    def converted_rows(self, t: Tensor, form: RowForm) -> int:
        """Address of ``t``'s rows in ``form``, row_bytes apart in ne1, ne2, ne3 order.

        Emits the conversion once for all products that read the same rows; must be called before
        :meth:`scratch` within a node. Coded forms take F32 of whole runs of 32, the others any
        float type.
        """
        stride = row_bytes(form, t.ne[0])
        key = (form, t.address, t.type, t.ne, t.nb)
        address, fresh = self.shared_scratch(key, (t,), stride * t.nrows)
        if fresh:
            self.emit(CONVERTERS[form], t, slots=(None, t), extra=(address, stride, int(form)))
        return address
