"""The graphs that a client sent last, and the plans that were made of them."""

from __future__ import annotations

from rpc_server.devices.base import Plan

# Graphs remembered per device. llama.cpp alternates between a few (prefill, decode, per KV size).
_PLANS = 8
# Bytes of them beside the newest: a plan takes a few times as much as its graph.
_PLAN_BYTES = 32 << 20


class PlanCache:
    """The graphs a client sent last to one device, and their plans; the newest comes first.

    Payloads are kept as bytearrays: those compare at memory speed, memoryviews item by item.
    """

    def __init__(self) -> None:
        self._plans: list[tuple[bytearray, Plan, int]] = []

    def find(self, payload: bytearray) -> Plan | None:
        """The plan of a graph with exactly these bytes; it becomes the newest."""
        for i, (known, plan, _) in enumerate(self._plans):
            if known == payload:
                if i:
                    self._plans.insert(0, self._plans.pop(i))
                return plan
        return None

    def add(self, payload: bytearray, plan: Plan, nodes: int) -> None:
        """``plan``, of so many nodes, becomes the newest."""
        self._plans.insert(0, (payload, plan, nodes))
        del self._plans[_PLANS:]
        while sum(len(known) for known, _, _ in self._plans[1:]) > _PLAN_BYTES:
            self._plans.pop()

    @property
    def last(self) -> tuple[Plan, int] | None:
        """The plan that ran last, what GRAPH_RECOMPUTE runs, and its number of nodes."""
        return self._plans[0][1:] if self._plans else None

    def clear(self) -> None:
        self._plans.clear()
