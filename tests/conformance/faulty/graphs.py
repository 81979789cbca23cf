"""Faults of graphs: what is run, when, and by which numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from protocol.commands import Command
from protocol.dialects import DIALECTS
from protocol.ggml.ops import Op
from protocol.requests import Request
from rpc_server.devices.cpu.device import CpuQueue
from rpc_server.graph.errors import GraphError
from rpc_server.session.graph_memory import Share
from rpc_server.session.plan_cache import PlanCache
from rpc_server.session.state import Session
from tests.conformance.faulty.registry import Handler, fault, instead_of, put


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
@instead_of(Command.GRAPH_RECOMPUTE)
def recompute_of_nothing(right: Handler, s: Session, request: Request) -> None:
    if s.plans[0].last is not None:
        right(s, request)


@fault("GRAPH_RECOMPUTE does nothing", "right-after-the-graph", "tokens-by-running-again",
       "tokens-in-one-write", "prompts-between-tokens", "adapter-replaced")  # fmt: skip
def recompute_does_nothing() -> None:
    put(Command.GRAPH_RECOMPUTE, lambda right, s, request: None)


@fault("GRAPH_RECOMPUTE runs what another client sent last", "after-another-clients-graph")
def graphs_shared_by_clients() -> None:
    shared: list[PlanCache] = []

    def init(right: Any, self: PlanCache, share: Share) -> None:
        right(self, share)
        shared.append(self)
        self._plans, self._alike = shared[0]._plans, shared[0]._alike

    put((PlanCache, "__init__"), init)
    PlanCache.clear = lambda self: None  # type: ignore[method-assign]


@fault("two graphs of the same size are taken for the same", "ids-mean-something-in-one-graph-only")
@instead_of(PlanCache, "find")
def graphs_known_by_size(right: Any, self: PlanCache, payload: bytearray) -> Any:
    for known in reversed(self._plans.values()):
        if len(known.payload) == len(payload):
            self._plans.move_to_end(id(known))
            return known.plan
    return None


def _before_planning(change: Any) -> None:
    """Change a graph's payload before it is planned."""

    def prepare(right: Any, self: CpuQueue, graph: Any, *more: Any) -> Any:
        return right(self, change(graph), *more)

    put((CpuQueue, "prepare"), prepare)


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


@fault("what a graph's nodes were computed from is computed too", "graph-with-all-its-ancestors",
       "graph-in-two-parts", "one-node-a-graph")  # fmt: skip
def ancestors_computed_again() -> None:
    def change(graph: Any) -> Any:
        made = graph.tensors[graph.tensors["op"] != 0]
        graph.nodes = np.array([*made["id"][::-1], *graph.nodes[-1:]], np.uint64)
        return graph

    _before_planning(change)


@fault("ancestors without memory are refused", "ancestors-on-another-server")
def ancestors_refused() -> None:
    def change(graph: Any) -> Any:
        if (graph.tensors["data"] == 0).any():
            raise GraphError("a tensor without memory")
        return graph

    _before_planning(change)


@fault("nodes of no elements are refused", "part-without-rows")
def empty_nodes_refused() -> None:
    def change(graph: Any) -> Any:
        nodes = graph.tensors[np.isin(graph.tensors["id"], graph.nodes)]
        if (nodes["ne"] == 0).any():
            raise GraphError("a node of no elements")
        return graph

    _before_planning(change)


def _op_left_out(op: Op) -> None:
    """Compute none of a graph's nodes of this op."""
    number = DIALECTS[0].op_number(op)

    def change(graph: Any) -> Any:
        left_out = graph.tensors["id"][graph.tensors["op"] == number]
        graph.nodes = graph.nodes[~np.isin(graph.nodes, left_out)]
        return graph

    _before_planning(change)


_CACHES = ("f16", "f32", "q80", "q40")


@fault("SET_ROWS isn't computed", *(f"cells-filled-{t}" for t in (*_CACHES, "bf16")),
       "transposed-cells-filled-f16", "transposed-cells-filled-f32")  # fmt: skip
def set_rows_left_out() -> None:
    _op_left_out(Op.SET_ROWS)


@fault("ROPE isn't computed", *(f"context-shifted-{t}" for t in _CACHES))
def rope_left_out() -> None:
    _op_left_out(Op.ROPE)


@fault("CPY isn't computed", *(f"cells-moved-{t}" for t in _CACHES))
def copies_left_out() -> None:
    _op_left_out(Op.CPY)


@fault("FLASH_ATTN_EXT isn't computed", *(f"cells-read-by-flash-attention-{t}" for t in _CACHES))
def flash_attention_left_out() -> None:
    _op_left_out(Op.FLASH_ATTN_EXT)


@fault("a mask that SOFT_MAX is given is left out", "slots-that-share-a-cache",
       "drafted-token-taken-back", "cleared-cache", "cells-read-without-flash-attention-f16",
       "cells-read-without-flash-attention-f32")  # fmt: skip
def soft_max_without_its_mask() -> None:
    number = DIALECTS[0].op_number(Op.SOFT_MAX)

    def change(graph: Any) -> Any:
        tensors = graph.tensors.copy()
        for row in tensors[tensors["op"] == number]:
            tensors["src"][tensors["id"] == row["id"], 1] = 0
        graph.tensors = tensors
        return graph

    _before_planning(change)


@fault("GET_ROWS isn't computed", "logits-of-the-last-token", "logits-of-drafted-tokens",
       "logits-of-several-slots", "embedding-of-the-first-token",
       "embedding-of-the-last-token")  # fmt: skip
def get_rows_left_out() -> None:
    _op_left_out(Op.GET_ROWS)


@fault("MUL_MAT isn't computed", "two-models-on-one-connection", "products-of-half-a-weight",
       "prompts-between-tokens", "tokens-by-whole-graphs", "weights-that-nobody-has",
       "embedding-by-the-mean", *(f"adapter-beside-{t}" for t in _CACHES))  # fmt: skip
def products_left_out() -> None:
    _op_left_out(Op.MUL_MAT)


@fault("SCALE isn't computed", "dry-run-then-the-real-one", "session-between-others",
       *(f"adapter-beside-{t}" for t in _CACHES))  # fmt: skip
def scale_left_out() -> None:
    _op_left_out(Op.SCALE)


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
