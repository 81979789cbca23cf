"""Nodes that have no implementation on a card, run on the host (--allow-host-ops).

What the node reads and writes comes to the host, its array reference runs there, and what it wrote
goes back. That is slow, and right for every op that the CPU device knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from protocol.tensor import Tensor
from rpc_server.ops.arrays import ArrayContext
from rpc_server.ops.table import OPS

Span = tuple[int, int]


def _spans(tensors: list[Tensor]) -> list[Span]:
    """The memory of tensors as ranges of addresses, those that overlap joined."""
    joined: list[Span] = []
    for start, end in sorted((t.address, t.address + t.nbytes) for t in tensors if not t.empty):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def run_on_host(
    node: Tensor,
    download: Callable[[int, int], memoryview],
    upload: Callable[[int, memoryview], None],
) -> None:
    """Run ``node`` by its reference; ``download`` and ``upload`` move bytes of the card's memory.

    Raises what the reference raises.
    """
    spec = OPS[node.op]
    assert spec.reference is not None
    sources = [s for s in node.src if s is not None]
    spans = _spans([node, *sources])
    held = {start: np.array(download(start, end - start), np.uint8) for start, end in spans}

    def here(t: Tensor) -> Tensor:
        for start, end in spans:
            if start <= t.address < end:
                return replace(t, address=int(held[start].ctypes.data) + t.address - start)
        return t

    copies = {id(s): here(s) for s in sources}
    moved = replace(here(node), src=tuple(None if s is None else copies[id(s)] for s in node.src))
    with np.errstate(all="ignore"):
        spec.reference(ArrayContext(), moved)
    written = spec.written(node)
    for start, end in _spans(written):
        first = next(a for a, b in spans if a <= start < b)
        upload(start, held[first][start - first : end - first].data)
