"""The graphs that a client sent last, and the plans that were made of them."""

from __future__ import annotations

from rpc_server.devices.base import Plan

# Graphs remembered per device. llama.cpp alternates between a few (prefill, decode, per KV size).
_PLANS = 8


class PlanCache:
    """The graphs a client sent last to one device, and their plans; the newest comes first.

    Payloads are kept as bytearrays: those compare at memory speed, memoryviews item by item.
    """

    def __init__(self) -> None:
        self._plans: list[tuple[bytearray, Plan]] = []

    def find(self, payload: bytearray) -> Plan | None:
        """The plan of a graph with exactly these bytes; it becomes the newest."""
        for i, (known, plan) in enumerate(self._plans):
            if known == payload:
                self._plans.insert(0, self._plans.pop(i))
                return plan
        return None

    def add(self, payload: bytearray, plan: Plan) -> None:
        """``plan`` becomes the newest."""
        self._plans.insert(0, (payload, plan))
        del self._plans[_PLANS:]

    @property
    def last(self) -> Plan | None:
        """The plan that ran last: what GRAPH_RECOMPUTE runs."""
        return self._plans[0][1] if self._plans else None

    def clear(self) -> None:
        self._plans.clear()
