"""Faults of graphs: what is run, when, and by which numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from protocol.commands import Command
from protocol.dialects import DIALECTS
from protocol.requests import Request
from rpc_server.devices.cpu.device import CpuQueue
from rpc_server.session.graph_memory import Share
from rpc_server.session.plan_cache import PlanCache
from rpc_server.session.state import Session
from tests.conformance.faulty.registry import (
    Handler,
    fault,
    handle,
    replace_method,
)


@fault(
    "GRAPH_RECOMPUTE runs the last graph though a buffer was freed",
    "after-another-buffer-was-freed",
)
def stale_graph_after_free() -> None:
    PlanCache.clear = lambda self: None  # type: ignore[method-assign]


@fault("GRAPH_RECOMPUTE runs the first graph of the connection", "the-last-graph")
def recompute_runs_the_first() -> None:
    PlanCache.last = property(  # type: ignore[assignment]
        lambda self: next(((k.plan, k.nodes) for k in self._plans.values()), None)
    )


@fault("GRAPH_RECOMPUTE without a graph is taken for done", "without-a-graph")
def recompute_of_nothing() -> None:
    def make(right: Handler) -> Handler:
        def wrong(s: Session, request: Request) -> None:
            if s.plans[0].last is not None:
                right(s, request)

        return wrong

    handle(Command.GRAPH_RECOMPUTE, make)


@fault("GRAPH_RECOMPUTE does nothing", "right-after-the-graph")
def recompute_does_nothing() -> None:
    handle(Command.GRAPH_RECOMPUTE, lambda right: lambda s, request: None)


@fault("GRAPH_RECOMPUTE runs what another client sent last", "after-another-clients-graph")
def graphs_shared_by_clients() -> None:
    shared: list[PlanCache] = []

    def make(right: Any) -> Any:
        def init(self: PlanCache, share: Share) -> None:
            right(self, share)
            shared.append(self)
            self._plans, self._alike = shared[0]._plans, shared[0]._alike

        return init

    replace_method(PlanCache, "__init__", make)
    PlanCache.clear = lambda self: None  # type: ignore[method-assign]


@fault("two graphs of the same size are taken for the same", "ids-mean-something-in-one-graph-only")
def graphs_known_by_size() -> None:
    def find(self: PlanCache, payload: bytearray) -> Any:
        for known in reversed(self._plans.values()):
            if len(known.payload) == len(payload):
                self._plans.move_to_end(id(known))
                return known.plan
        return None

    PlanCache.find = find  # type: ignore[method-assign]


def _before_planning(change: Any) -> None:
    """Change a graph's payload before it is planned."""

    def make(right: Any) -> Any:
        def prepare(self: CpuQueue, graph: Any, *more: Any) -> Any:
            return right(self, change(graph), *more)

        return prepare

    replace_method(CpuQueue, "prepare", make)


@fault("the last node of a graph isn't computed", "nodes-in-their-order")
def last_node_left_out() -> None:
    def change(graph: Any) -> Any:
        if len(graph.nodes) > 1:
            graph.nodes = graph.nodes[:-1]
        return graph

    _before_planning(change)


@fault("nodes without the compute flag are computed too", "node-without-the-flag")
def compute_flag_ignored() -> None:
    def change(graph: Any) -> Any:
        tensors = graph.tensors.copy()
        tensors["flags"] |= np.int32(16)
        graph.tensors = tensors
        return graph

    _before_planning(change)


@fault("a view's offset is left out", "views-are-read")
def view_offset_ignored() -> None:
    def change(graph: Any) -> Any:
        tensors = graph.tensors.copy()
        views = tensors["view_src"] != 0
        tensors["data"][views] -= tensors["view_offs"][views]
        graph.tensors = tensors
        return graph

    _before_planning(change)


def _shift_ops(major: int) -> None:
    """Number the ops from ADD1 on one too high, in the versions of one major number."""
    for dialect in DIALECTS:
        if dialect.version[0] == major:
            ops = dialect.ops
            shifted = replace(dialect.numbering, ops=(*ops[:4], ops[3], *ops[4:-1]))
            object.__setattr__(dialect, "numbering", shifted)


@fault("ops are numbered one off from ADD1 on", "ops-by-this-versions-numbers")
def op_numbers_off_by_one() -> None:
    _shift_ops(7)


@fault(
    "in protocol 5 ops are numbered one off from ADD1 on",
    "ops-by-this-versions-numbers",
    options=("--protocol", "5.1"),
)
def op_numbers_off_by_one_in_5() -> None:
    _shift_ops(5)


@fault(
    "requests for any device number go to device 0", "get-alignment-of-the-device-behind-the-last"
)
def device_number_ignored() -> None:
    Session.existing_device = lambda self, command, index: 0  # type: ignore[method-assign]
