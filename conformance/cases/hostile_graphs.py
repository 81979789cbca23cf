"""9.1 to 9.40 and 9.60: graphs that lie about counts, ids, types, shapes and addresses."""

from __future__ import annotations

import struct
from collections.abc import Callable

from conformance.cases.attacks import (
    BUFFER_SIZE,
    INDEX_WHY,
    Attack,
    endured_graph,
    refused_graph,
)
from conformance.suite.tensors import Fields
from protocol.commands import Command
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.messages import RPC_TENSOR_SIZE

_GRAPH = "ggml-rpc.cpp rpc_server::graph_compute"
_NODE = "ggml-rpc.cpp rpc_server::create_node"
_TENSOR = "ggml-rpc.cpp rpc_server::deserialize_tensor"

# -- counts ----------------------------------------------------------------------------------------

_COUNT_WHY = "Counts are the client's word: multiplied by a size they must fit what was sent."


def _declare_count(number: int, which: str, count: int, name: str, shown: str) -> None:
    @refused_graph(
        number,
        name,
        f"a graph of one node and two tensors that claims {shown} {which}",
        _COUNT_WHY,
        f"{_GRAPH} (input.size() < ...), since 1.0",
    )
    def send(a: Attack) -> None:
        payload = bytearray(a.sound())
        struct.pack_into("<I", payload, a.count_at(which), count)
        a.send_payload(bytes(payload))


_declare_count(1, "nodes", 0xFFFFFFFF, "nodes-2-32", "2^32 - 1")
_declare_count(2, "nodes", 1 << 29, "nodes-2-29", "2^29 (times 8 it is 2^32)")
_declare_count(3, "nodes", 200, "nodes-too-many", "200")
_declare_count(4, "tensors", 0xFFFFFFFF, "tensors-2-32", "2^32 - 1")
_declare_count(5, "tensors", 3, "tensors-one-too-many", "3")
_declare_count(6, "tensors", 0x0DD67C8B, "tensors-that-wrap", "232160395 (times 296 it wraps)")


@endured_graph(
    7,
    "tensors-one-too-few",
    "a graph whose count of tensors leaves the last one over",
    "What lies behind the last tensor has no meaning; upstream's server ignores it.",
    f"{_GRAPH}, since 1.0",
)
def _tensors_one_too_few(a: Attack) -> None:
    payload = a.peer.graph([a.add(2, 1, 1)], [a.leaf(1)])
    a.send_payload(payload + bytes(RPC_TENSOR_SIZE))


@endured_graph(
    8,
    "graph-of-nothing",
    "a graph without nodes and without tensors",
    "Nothing is to be done, which is sound.",
    f"{_GRAPH}, since 1.0",
)
def _graph_of_nothing(a: Attack) -> None:
    a.send([], [])


@refused_graph(
    9,
    "graph-that-ends-within-its-nodes",
    "a graph that ends within the list of its nodes",
    _COUNT_WHY,
    f"{_GRAPH} (input.size() < ...), since 1.0",
)
def _ends_within_nodes(a: Attack) -> None:
    payload = a.sound()
    a.send_payload(payload[: a.count_at("nodes") + 8])


@refused_graph(
    10,
    "graph-that-ends-within-its-tensors",
    "a graph that ends within its last tensor",
    _COUNT_WHY,
    f"{_GRAPH} (input.size() < ...), since 1.0",
)
def _ends_within_tensors(a: Attack) -> None:
    a.send_payload(a.sound()[:-1])


# -- ids -------------------------------------------------------------------------------------------


@refused_graph(
    11,
    "node-that-is-no-tensor",
    "a graph whose node is none of its tensors",
    "There is nothing to compute under that id.",
    f"{_GRAPH} ('failed to create graph node'), since 1.0",
)
def _node_that_is_missing(a: Attack) -> None:
    a.send([a.add(2, 1, 1)], [a.leaf(1)], ids=[12345])


@refused_graph(
    12,
    "node-0",
    "a graph whose node is 0",
    "0 means 'none' for sources; a node that is none would be computed by following no address.",
    f"{_GRAPH}: passes a null node on, since 1.0",
)
def _node_zero(a: Attack) -> None:
    a.send([a.add(2, 1, 1)], [a.leaf(1)], ids=[2, 0])


@refused_graph(
    13,
    "source-that-is-no-tensor",
    "a node whose second source is none of the graph's tensors",
    "An operand is missing.",
    f"{_NODE} ('failed to create source node'), since 1.0",
)
def _source_that_is_missing(a: Attack) -> None:
    a.send([a.add(2, 1, 99)], [a.leaf(1)])


@refused_graph(
    14,
    "view-of-no-tensor",
    "a node that views what is none of the graph's tensors",
    "What a view lies in is part of the graph.",
    f"{_NODE} ('failed to create view_src node'), since 1.0",
)
def _view_that_is_missing(a: Attack) -> None:
    a.send([a.add(2, 1, 1, view_src=99)], [a.leaf(1)])


@refused_graph(
    15,
    "tensor-that-occurs-twice",
    "a graph with two tensors of one id",
    "Which of them a source means is open.",
    f"{_GRAPH} (tensor_ptrs.emplace: the first one counts), since 1.0",
    differs="it takes one of the two",
)
def _same_id_twice(a: Attack) -> None:
    a.send([a.add(2, 1, 1)], [a.leaf(1), a.leaf(1, at=64)])


@refused_graph(
    16,
    "tensor-that-is-its-own-source",
    "a node whose source is itself",
    "A tensor can't be computed from what it is going to be.",
    f"{_NODE} (tensor_map before the recursion), since 1.0",
    differs="it computes with what was in the memory",
)
def _own_source(a: Attack) -> None:
    a.send([a.add(2, 1, 2)], [a.leaf(1)])


@refused_graph(
    17,
    "tensors-that-are-each-others-source",
    "two nodes, each the source of the other",
    "Neither can be computed first; following sources never ends.",
    f"{_NODE} (tensor_map before the recursion), since 1.0",
    differs="it computes with what was in the memory",
)
def _cycle(a: Attack) -> None:
    a.send([a.add(2, 1, 3), a.add(3, 1, 2)], [a.leaf(1)])


@refused_graph(
    18,
    "view-of-itself",
    "a node that views itself",
    "Following what a view lies in never ends.",
    f"{_NODE} (tensor_map before the recursion), since 1.0",
    differs="it doesn't follow views",
)
def _view_of_itself(a: Attack) -> None:
    a.send([a.add(2, 1, 1, view_src=2)], [a.leaf(1)])


@refused_graph(
    19,
    "node-before-its-source",
    "two nodes in the wrong order: the first one's source is the second one",
    "Nodes come in the order of execution; the first would read what isn't computed.",
    f"{_GRAPH}: computes in the order given, since 1.0",
    differs="it computes with what was in the memory",
)
def _wrong_order(a: Attack) -> None:
    a.send([a.add(2, 1, 3), a.add(3, 1, 1)], [a.leaf(1)])


@endured_graph(
    20,
    "chain-of-120000-sources",
    "a node whose source has a source, and so on, 120000 deep",
    "Whoever follows sources by calling itself runs out of stack.",
    f"{_NODE} (recursive), since 1.0",
)
def _deep_chain(a: Attack) -> None:
    chain = [a.leaf(1)]
    first = a.add(2, 1, 1, flags=0)
    payload = a.peer.graph([a.add(2, 1, 1)], chain)
    head = len(payload) - 2 * RPC_TENSOR_SIZE
    row = bytearray(a.peer.graph([first], [])[-RPC_TENSOR_SIZE:])
    src = 124
    rows = [payload[head : head + RPC_TENSOR_SIZE]]
    depth = 120000
    for i in range(2, depth + 1):
        struct.pack_into("<Q", row, 0, i)
        struct.pack_into("<QQ", row, src, i - 1, i - 1)
        rows.append(bytes(row))
    start = bytearray(payload[:head])
    at = a.count_at("nodes")
    struct.pack_into("<Q", start, at + 4, depth)
    struct.pack_into("<I", start, a.count_at("tensors"), depth)
    a.send_payload(bytes(start) + b"".join(rows))


# -- tensors ---------------------------------------------------------------------------------------


def _declare_leaf(
    number: int, name: str, wrong: str, change: Callable[[Attack], Fields], why: str, source: str
) -> None:
    @refused_graph(number, name, f"a graph that reads a tensor {wrong}", why, source)
    def send(a: Attack) -> None:
        a.send([a.add(2, 1, 1)], [{**a.leaf(1), **change(a)}])


_BOUNDS = "What a graph reads and writes is found by addresses that the client computed."
_ENDS = f"{_TENSOR} (GGML_ASSERT of the end), since 1.0"
_declare_leaf(
    21, "type-9999", "of type 9999", lambda a: {"type": 9999}, INDEX_WHY, f"{_TENSOR}, since 1.0"
)
_declare_leaf(
    22, "type-2-32", "of type 2^32 - 1", lambda a: {"type": 0xFFFFFFFF}, INDEX_WHY,
    f"{_TENSOR}, since 1.0",
)  # fmt: skip
_declare_leaf(
    23, "removed-type", "of type 4, which ggml has removed", lambda a: {"type": 4},
    "Its blocks have 0 elements: dividing by that is the end of a process.",
    f"{_TENSOR} ('blck_size is 0'), since 1.0",
)  # fmt: skip
_declare_leaf(
    24, "part-of-a-block", "of 33 elements of Q4_0, whose blocks have 32",
    lambda a: {"type": int(GgmlType.Q4_0), "ne": [33, 1, 1, 1]},
    "A row is whole blocks.", "ggml.c ggml_row_size (assert), since 1.0",
)  # fmt: skip
_declare_leaf(
    25, "tensor-before-its-buffer", "64 bytes before its buffer",
    lambda a: {"data": a.buffer.base - 64}, _BOUNDS, _ENDS,
)  # fmt: skip
_declare_leaf(
    26, "tensor-behind-its-buffer", "that ends 4 bytes behind its buffer",
    lambda a: {"data": a.buffer.base + a.buffer.size - 28}, _BOUNDS, _ENDS,
)  # fmt: skip
_declare_leaf(
    27, "tensor-at-the-end-of-addresses", "at 2^64 - 16", lambda a: {"data": (1 << 64) - 16},
    _BOUNDS, _ENDS,
)  # fmt: skip
_declare_leaf(
    28, "shape-of-2-32", "of 2^32 - 1 elements", lambda a: {"ne": [0xFFFFFFFF, 1, 1, 1]},
    "A negative size on the wire is a very large one.", _ENDS,
)  # fmt: skip
_declare_leaf(
    29, "shape-that-wraps", "of 2^128 elements", lambda a: {"ne": [0xFFFFFFFF] * 4},
    "The number of elements wraps in 64 bits, to a small one if chosen so.", _ENDS,
)  # fmt: skip
_declare_leaf(
    30, "strides-that-wrap", "of 2^31 rows, 2^32 - 4 bytes apart",
    lambda a: {"ne": [1, 1 << 31, 1, 1], "nb": [4, 0xFFFFFFFC, 4, 4]},
    "The size wraps in 64 bits.", _ENDS,
)  # fmt: skip
_declare_leaf(
    31, "row-behind-its-buffer", "of two rows, the second of which is behind its buffer",
    lambda a: {"ne": [8, 2, 1, 1], "nb": [4, *[BUFFER_SIZE] * 3]}, _BOUNDS, _ENDS,
)  # fmt: skip
_declare_leaf(
    32, "data-without-a-buffer", "with an address and no buffer", lambda a: {"buffer": 0},
    "Following an address of the client's making reads anything.",
    f"{_NODE} ('invalid data ptr'), since 1.0",
)  # fmt: skip
_declare_leaf(
    33, "data-in-an-unknown-buffer", "in a buffer that was never given out",
    lambda a: {"buffer": 0xDEAD_BEEF_0000},
    "Following an address of the client's making reads anything.",
    f"{_NODE} ('invalid data ptr'), since 1.0",
)  # fmt: skip
_declare_leaf(
    34, "tensor-without-data", "that lies nowhere (buffer and data are 0)",
    lambda a: {"buffer": 0, "data": 0},
    "A source on another server may be named, as long as nothing reads it; this node does.",
    f"{_NODE}: passes it on, since 1.0",
)  # fmt: skip


@refused_graph(
    35,
    "result-behind-its-buffer",
    "a node whose result ends behind its buffer",
    _BOUNDS,
    _ENDS,
)
def _result_behind(a: Attack) -> None:
    a.send([a.add(2, 1, 1, data=a.buffer.base + a.buffer.size - 28)], [a.leaf(1)])


@refused_graph(
    36,
    "result-without-data",
    "a node whose result lies nowhere (buffer and data are 0)",
    "There is nowhere to write to.",
    f"{_NODE}: passes it on, since 1.0",
)
def _result_nowhere(a: Attack) -> None:
    a.send([a.add(2, 1, 1, data=0, buffer=0)], [a.leaf(1)])


@endured_graph(
    37,
    "tensor-at-an-odd-address",
    "a graph that reads F32 at an address that is no multiple of 4",
    "ggml aligns by construction; what reads it anyway depends on the machine.",
    "open in the protocol",
)
def _odd_address(a: Attack) -> None:
    a.send([a.add(2, 1, 1)], [a.leaf(1, at=2)])


@endured_graph(
    38,
    "strides-of-0",
    "a graph that reads a tensor whose strides are 0",
    "It reads one element again and again, within its buffer.",
    "open in the protocol",
)
def _strides_of_zero(a: Attack) -> None:
    a.send([a.add(2, 1, 1)], [a.leaf(1, nb=[0, 0, 0, 0])])


@endured_graph(
    39,
    "tensors-of-no-elements",
    "a graph that adds tensors of no elements",
    "ggml computes such nodes without doing anything.",
    "ggml.c ggml_is_empty, since 1.0",
)
def _no_elements(a: Attack) -> None:
    empty: Fields = {"ne": [0, 1, 1, 1], "nb": [4, 0, 0, 0]}
    a.send([a.add(2, 1, 1, **empty)], [a.leaf(1, **empty)])


@endured_graph(
    40,
    "view-offset-beyond-what-it-views",
    "a view whose view_offs is 2^63, and whose data is within its buffer",
    "A view lies where its data points; the offset is there for the client.",
    "ggml-rpc.cpp create_node (result->view_offs), since 1.0",
)
def _view_offset(a: Attack) -> None:
    view = a.node(2, Op.VIEW, 1, view_src=1, view_offs=1 << 63)
    a.send([view, a.add(3, 2, 2)], [a.leaf(1)])


@refused_graph(
    60,
    "source-in-a-freed-buffer",
    "a graph that reads a tensor in a buffer that was freed",
    "The memory may be anybody's by now.",
    f"{_NODE} ('invalid data ptr'), since 1.0",
)
def _freed_source(a: Attack) -> None:
    other = a.peer.alloc(4096)
    a.peer.call(Command.FREE_BUFFER, remote_ptr=other.handle)
    a.send([a.add(2, 1, 1)], [other.leaf(1, (8,))])
