"""The graphs that a client sent last, and the plans that were made of them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from rpc_server.devices.base import Plan
from rpc_server.session.graph_memory import Share

# So many of them, the newest, may have so many bytes, payloads and plans together. llama.cpp
# alternates between a few (prefill, decode, by the size of its cache).
_FEW = 8
_BYTES_OF_FEW = 256 << 20
# Beyond these, graphs are kept as long as all have no more than this together. A coordinator of a
# split sends a server a small graph for each exchange: a token of a model has 65 or 129 of them.
_BYTES_OF_MANY = 32 << 20
_MANY = 1024

# Of a payload at its begin, its middle and its end: nearly always enough to tell graphs apart, and
# quick with payloads of a megabyte.
_SAMPLED = 256


def _fingerprint(payload: bytearray) -> int:
    """Return a number by which graphs are found; what has the same one is compared."""
    middle = len(payload) // 2
    sampled = (
        payload[:_SAMPLED],
        payload[middle : middle + _SAMPLED],
        payload[max(len(payload) - _SAMPLED, 0) :],
    )
    return hash((len(payload), *map(bytes, sampled)))


@dataclass(slots=True, eq=False)
class _Known:
    payload: bytearray
    plan: Plan
    nodes: int
    # What is counted for it, which stays the same although a plan may be made anew.
    nbytes: int


class PlanCache:
    """The graphs a client sent last to one device, and their plans; the newest comes last.

    Payloads are kept as bytearrays: those compare at memory speed, memoryviews item by item. What
    is kept counts against the client's ``share``.
    """

    def __init__(self, share: Share) -> None:
        self._share = share
        self._nbytes = 0
        # By identity, in the order of use.
        self._plans: OrderedDict[int, _Known] = OrderedDict()
        self._alike: dict[int, list[_Known]] = {}

    def find(self, payload: bytearray) -> tuple[Plan, int] | None:
        """Return the plan and the nodes of a graph with just these bytes; it becomes the newest."""
        for known in self._alike.get(_fingerprint(payload), ()):
            if known.payload == payload:
                self._plans.move_to_end(id(known))
                return known.plan, known.nodes
        return None

    def add(self, payload: bytearray, plan: Plan, nodes: int) -> None:
        """Add ``plan``, of so many nodes, as the newest; those that are used least go for it.

        Raises LimitReached if it doesn't fit even then.
        """
        new = _Known(payload, plan, nodes, len(payload) + plan.nbytes)
        while self._plans and (self._full(new.nbytes) or not self._share.fits(new.nbytes)):
            self._forget_oldest()
        self._share.take(new.nbytes, "a plan")
        self._plans[id(new)] = new
        self._alike.setdefault(_fingerprint(payload), []).append(new)
        self._nbytes += new.nbytes

    def _full(self, more: int) -> bool:
        """Return whether the oldest has to go before so many bytes come."""
        count, nbytes = len(self._plans), self._nbytes + more
        if count < _FEW:
            # Beside the newest: one that is larger by itself is kept.
            return self._nbytes > _BYTES_OF_FEW
        return nbytes > _BYTES_OF_MANY or count >= _MANY

    def _forget_oldest(self) -> None:
        _, known = self._plans.popitem(last=False)
        fingerprint = _fingerprint(known.payload)
        alike = self._alike[fingerprint]
        alike.remove(known)
        if not alike:
            del self._alike[fingerprint]
        self._nbytes -= known.nbytes
        self._share.give_back(known.nbytes)

    @property
    def last(self) -> tuple[Plan, int] | None:
        """The plan that ran last, what GRAPH_RECOMPUTE runs, and its number of nodes."""
        if not self._plans:
            return None
        known = self._plans[next(reversed(self._plans))]
        return known.plan, known.nodes

    def clear(self) -> None:
        """Forget all of them."""
        while self._plans:
            self._forget_oldest()
