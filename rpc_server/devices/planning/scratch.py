"""Scratch of a plan: memory for one node at a time, and what later nodes find again.

The same on every device: a planner places it while it lowers a graph, node by node.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Protocol

from protocol.tensor import Tensor
from rpc_server.devices.cpu.kernels.interface.planning import MOST_KEPT
from rpc_server.devices.cpu.kernels.interface.schedule import Span


class Labelled(Protocol):
    """A thing that messages name when a record fails."""

    @property
    def label(self) -> str: ...


class Arena(Protocol):
    """A range of addresses for scratch, ``size`` bytes in one piece."""

    @property
    def size(self) -> int: ...

    def address(self, offset: int, size: int) -> int:
        """Return where ``size`` bytes at ``offset`` lie; MemoryError if beyond the end."""
        ...


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


class ScratchPlanner:
    """Places scratch for the nodes of one graph.

    ``items`` are what will begin, in this order; without them, what is kept between nodes is kept
    as long as it is good.
    """

    def __init__(self, scratch: Arena, items: Sequence[Tensor | Labelled] = ()) -> None:
        self._node: Labelled | None = None
        # Scratch of the node at hand: what its next record fills, and what it reads.
        self._filling: list[Span] = []
        self._reading: list[Span] = []
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
        self._filling, self._reading = [], []

    def finish(self, node: Tensor) -> None:
        """Finish ``node``, which writes its memory.

        What was made of what lay there is no longer good.
        """
        if not node.empty:
            self.overwritten(node.address, node.address + node.nbytes)

    def overwritten(self, start: int, end: int) -> None:
        """Let go of what was made of memory from ``start`` to ``end``."""
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
    def _limit(self) -> int:
        """The bytes of the arena for scratch of nodes."""
        return self._arena.size

    def _place(self, offset: int, size: int) -> int:
        """Address of scratch. Raises MemoryError beyond the limit."""
        if offset + size > self._limit:
            raise MemoryError(f"graph needs {offset + size} bytes of scratch, limit {self._limit}")
        return self._arena.address(offset, size)

    @property
    def _shared_end(self) -> int:
        return max((kept.end for kept in self._shared.values()), default=0)

    def scratch(self, size: int) -> int:
        """Return the address of ``size`` bytes (64-byte aligned), good until the next node.

        Raises MemoryError if the graph needs more than the arena reserves.
        """
        aligned = -(-size // 64) * 64
        address = self._place(self._shared_end + self._local_used, aligned)
        self._local_used += aligned
        self.scratch_peak = max(self.scratch_peak, self._shared_end + self._local_used)
        return address

    def shared_scratch(
        self, key: Hashable, sources: Sequence[Tensor], size: int
    ) -> tuple[int, bool]:
        """Return (address, fresh) of ``size`` bytes that later nodes find again under ``key``.

        They stay good until one of ``sources``, which they are made of, is written to; where these
        lie is part of the key. ``fresh``: the caller must emit what fills them. To be called before
        :meth:`scratch` within a node.
        """
        key = (key, *(source.address for source in sources))
        known = self._shared.get(key)
        if known is not None:
            known.used = self._begun
            address = self._arena.address(known.start, size)
            self._reading = [*self._reading, (address, address + size)]
            return address, False
        if self._local_used:
            raise RuntimeError("shared scratch asked for after scratch in one node")
        if len(self._shared) >= MOST_KEPT:
            self._forget()
        aligned = -(-size // 64) * 64
        start = self._gap(aligned)
        address = self._place(start, aligned)
        until = max(self._last_use.get(source.address, inf) for source in sources)
        self._shared[key] = _Kept(sources, start, start + aligned, until, self._begun)
        self.scratch_peak = max(self.scratch_peak, self._shared_end)
        self._filling = [*self._filling, (address, address + aligned)]
        return address, True
