"""What lowerings say of their records: the schedule lets threads pass one another by it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

import rpc_server.devices.cpu.lower
import rpc_server.ops  # noqa: F401  (fills the op table)
from protocol.dialects import DIALECTS
from rpc_server.devices.cpu.kernels.interface.abi import EXTRA_WORD, N_SLOTS, SLOT_WORDS
from rpc_server.devices.cpu.planner import LOWERINGS, Emitted, Planner
from rpc_server.devices.cpu.scratch import ScratchArena
from rpc_server.graph.parse import parse_graph
from rpc_server.ops.table import check
from tests.guard.arena import Arena
from tests.guard.mapping import Side
from tests.guard.overlaps import MOST_BYTES, draw_small, families, side_by_side, size_of


def _lowered() -> Iterator[tuple[str, ScratchArena, list[Emitted]]]:
    """Records of small graphs of all ops, with two threads."""
    arena = Arena(MOST_BYTES * 2)
    for name, overlapping in families().items():
        variants = overlapping.family.variants
        for variant in variants[:: max(len(variants) // 2, 1)]:
            for case in draw_small(overlapping.family, variant, 1, 1):
                places = side_by_side(case, None, np.random.default_rng(1))
                arena.take(size_of(places), Side.BEGIN)
                for root, offset in places.items():
                    root.place(1, arena.base + offset)
                payload = case.graph.payload(DIALECTS[0])
                scratch = ScratchArena(1 << 24)
                planner = Planner(2, scratch)
                for node in parse_graph(payload, DIALECTS[0], {1: arena}.get).nodes:
                    planner.begin(node)
                    spec = check(node)
                    lowering = LOWERINGS.get(node.op)
                    if lowering and not spec.is_view and not node.empty:
                        lowering(node, planner)
                        planner.finish(node)
                yield name, scratch, planner.take()


def _inside(address: int, spans: Sequence[tuple[int, int]]) -> bool:
    return any(start <= address < end for start, end in spans)


def test_records_say_what_they_touch() -> None:
    """All tensors, indices among them, and all scratch but that of single threads."""
    seen, in_scratch = set(), 0
    for name, scratch, records in _lowered():
        start = scratch.address(0, 0)
        for record in records:
            words, touched = record.words, [*record.reads, *record.writes]
            for slot in range(N_SLOTS):
                first = slot * SLOT_WORDS
                address, *ne = (int(words[first + i]) for i in (0, 2, 3, 4, 5))
                if address and 0 not in ne:
                    spans = record.reads if slot else record.writes
                    assert _inside(address, spans), f"{name}: slot {slot} of {record.kernel.label}"
            for word in map(int, words[EXTRA_WORD:]):
                if start <= word < start + scratch.size // 2:
                    assert _inside(word, touched), f"{name}: scratch of {record.kernel.label}"
                    in_scratch += 1
                elif start <= word < start + scratch.size:
                    assert record.private
            seen.add(record.kernel.label)
    assert in_scratch > 50
    assert {"matmul.route_columns", "reduce.argsort", "rows.add_id", "rope.rope_table"} <= seen
