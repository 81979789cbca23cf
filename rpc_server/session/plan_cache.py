"""The graphs that a client sent last, and the plans that were made of them."""

from __future__ import annotations

from dataclasses import dataclass

from rpc_server.devices.base import Plan
from rpc_server.session.graph_memory import Share

# Graphs remembered per device. llama.cpp alternates between a few (prefill, decode, per KV size).
_PLANS = 8
# Bytes of them, and of their plans, beside the newest.
_PLAN_BYTES = 256 << 20


@dataclass(slots=True)
class _Known:
    payload: bytearray
    plan: Plan
    nodes: int
    # What is counted for it, which stays the same although a plan may be made anew.
    nbytes: int


class PlanCache:
    """The graphs a client sent last to one device, and their plans; the newest comes first.

    Payloads are kept as bytearrays: those compare at memory speed, memoryviews item by item. What
    is kept counts against the client's ``share``.
    """

    def __init__(self, share: Share) -> None:
        self._share = share
        self._plans: list[_Known] = []

    def find(self, payload: bytearray) -> Plan | None:
        """The plan of a graph with exactly these bytes; it becomes the newest."""
        for i, known in enumerate(self._plans):
            if known.payload == payload:
                if i:
                    self._plans.insert(0, self._plans.pop(i))
                return known.plan
        return None

    def add(self, payload: bytearray, plan: Plan, nodes: int) -> None:
        """``plan``, of so many nodes, becomes the newest; those that are used least go for it.

        Raises LimitReached if it doesn't fit even then.
        """
        new = _Known(payload, plan, nodes, len(payload) + plan.nbytes)
        while self._plans and (
            len(self._plans) >= _PLANS
            or sum(known.nbytes for known in self._plans) > _PLAN_BYTES
            or not self._share.fits(new.nbytes)
        ):
            self._share.give_back(self._plans.pop().nbytes)
        self._share.take(new.nbytes, "a plan")
        self._plans.insert(0, new)

    @property
    def last(self) -> tuple[Plan, int] | None:
        """The plan that ran last, what GRAPH_RECOMPUTE runs, and its number of nodes."""
        return (self._plans[0].plan, self._plans[0].nodes) if self._plans else None

    def clear(self) -> None:
        """Forget all of them."""
        while self._plans:
            self._share.give_back(self._plans.pop().nbytes)
