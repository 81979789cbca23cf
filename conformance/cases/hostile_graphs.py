"""9.1 to 9.60: graphs that lie about counts, ids, types and places."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from conformance.cases.groups import HOSTILE
from conformance.suite import Context, Peer, RemoteBuffer
from conformance.suite.refusals import Refusal, Send, declare, endured
from conformance.suite.tensors import Fields
from protocol.commands import Command
from protocol.dialects import Answer
from protocol.ggml.ops import Op
from protocol.messages import RPC_TENSOR_SIZE

_GRAPH = "ggml-rpc.cpp rpc_server::graph_compute"
_NODE = "ggml-rpc.cpp rpc_server::create_node"
_TENSOR = "ggml-rpc.cpp rpc_server::deserialize_tensor"
_BUFFER_SIZE = 64 << 10
# Where results lie in the buffer; leaves start at its base.
_RESULTS_AT = 32 << 10
_INDEX_WHY = "The number is an index into a table."
_EMPTY: Fields = {"ne": [0, 1, 1, 1], "nb": [4, 0, 0, 0]}
_OWN_MEMORY = "it computes with what was in the memory"


class GraphMaker:
    """A connection with a buffer of zeros, and tensors in it."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.buffer: RemoteBuffer = peer.alloc(_BUFFER_SIZE)
        peer.call(Command.BUFFER_CLEAR, remote_ptr=self.buffer.handle)

    def leaf(self, id: int, at: int = 0, **fields: object) -> Fields:
        return {**self.buffer.leaf(id, (8,), at), **fields}

    def add(self, id: int, *src: int, **fields: object) -> Fields:
        return {**self.buffer.node(id, (8,), Op.ADD, *src, at=_RESULTS_AT), **fields}

    def encode(
        self, nodes: Sequence[Fields], leaves: Sequence[Fields], ids: Sequence[int] | None = None
    ) -> bytes:
        return self.peer.graph(nodes, leaves, ids=ids)

    def sound(self) -> bytes:
        """Return the payload of a graph with nothing wrong: one node, two tensors."""
        return self.encode([self.add(2, 1, 1)], [self.leaf(1)])

    def count_at(self, which: str) -> int:
        """Return where the count of ``nodes`` or ``tensors`` lies in the sound graph's payload."""
        nodes = 4 if self.peer.dialect.graph_device else 0
        return nodes if which == "nodes" else nodes + 4 + 8


def _sending(make: Callable[[GraphMaker], bytes]) -> Send:
    """Send the payload that ``make`` gives as a graph."""
    return lambda c, peer: peer.send(Command.GRAPH_COMPUTE, make(GraphMaker(peer)))


def _not_computed(c: Context, peer: Peer, row: Refusal) -> None:
    """Judge: up to 3.4 a status may say that the graph failed, later the connection ends."""
    outcome = peer.outcome(Command.GRAPH_COMPUTE)
    if outcome.closed:
        return
    if peer.spec(Command.GRAPH_COMPUTE).answer is not Answer.NEVER and outcome.answer.result != 0:
        return
    if row.differs:
        c.differs(f"the server went on: {row.differs}")
    c.fail("the server went on as if the graph were sound")


def _claiming(which: str, count: int) -> Send:
    def make(g: GraphMaker) -> bytes:
        payload = bytearray(g.sound())
        struct.pack_into("<I", payload, g.count_at(which), count)
        return bytes(payload)

    return _sending(make)


def _of_leaf(change: Fields) -> Send:
    """Send a graph that reads a leaf of which something is wrong."""
    return _sending(lambda g: g.encode([g.add(2, 1, 1)], [{**g.leaf(1), **change}]))


def _nodes(
    make: Callable[[GraphMaker], Sequence[Fields]], ids: Sequence[int] | None = None
) -> Send:
    """Send a graph of these nodes, and one leaf of id 1."""
    return _sending(lambda g: g.encode(make(g), [g.leaf(1)], ids))


def _in_freed(g: GraphMaker) -> bytes:
    other = g.peer.alloc(4096)
    g.peer.call(Command.FREE_BUFFER, remote_ptr=other.handle)
    return g.encode([g.add(2, 1, 1)], [other.leaf(1, (8,))])


_COUNTS = (
    (1, "nodes", 0xFFFFFFFF, "nodes-2-32", "2^32 - 1"),
    (2, "nodes", 1 << 29, "nodes-2-29", "2^29 (times 8 it is 2^32)"),
    (3, "nodes", 200, "nodes-too-many", "200"),
    (4, "tensors", 0xFFFFFFFF, "tensors-2-32", "2^32 - 1"),
    (5, "tensors", 3, "tensors-one-too-many", "3"),
    (6, "tensors", 0x0DD67C8B, "tensors-that-wrap", "232160395 (times 296 it wraps)"),
)
declare(
    HOSTILE,
    [
        *(
            Refusal(
                number, name, f"a graph of one node and two tensors that claims {shown} {which}",
                _claiming(which, count),
            )
            for number, which, count, name, shown in _COUNTS
        ),
        Refusal(
            9, "graph-that-ends-within-its-nodes", "a graph that ends within the list of its nodes",
            _sending(lambda g: g.sound()[: g.count_at("nodes") + 8]),
        ),
        Refusal(
            10, "graph-that-ends-within-its-tensors", "a graph that ends within its last tensor",
            _sending(lambda g: g.sound()[:-1]),
        ),
    ],
    expects="the connection is closed (up to 3.4 the answer may be a failure instead)",
    why="Counts are the client's word: multiplied by a size they must fit what was sent.",
    source=f"{_GRAPH} (input.size() < ...), since 1.0",
    judge=_not_computed,
)  # fmt: skip
declare(
    HOSTILE,
    [
        Refusal(
            7, "tensors-one-too-few", "a graph whose count of tensors leaves the last one over",
            _sending(lambda g: g.sound() + bytes(RPC_TENSOR_SIZE)),
            why="What lies behind the last tensor has no meaning; upstream's server ignores it.",
        ),
        Refusal(
            8, "graph-of-nothing", "a graph without nodes and without tensors",
            _sending(lambda g: g.encode([], [])), why="Nothing is to be done, which is sound.",
        ),
        Refusal(
            39, "tensors-of-no-elements", "a graph that adds tensors of no elements",
            _sending(
                lambda g: g.encode([g.add(2, 1, 1, **_EMPTY)], [g.leaf(1, **_EMPTY)])
            ),
            why="ggml computes such nodes without doing anything.",
            source="ggml.c ggml_is_empty, since 1.0",
        ),
        Refusal(
            40, "view-offset-beyond-what-it-views",
            "a view whose view_offs is 2^63, and whose data is within its buffer",
            _nodes(
                lambda g: [
                    g.buffer.node(
                        2, (8,), Op.VIEW, 1, at=_RESULTS_AT, view_src=1, view_offs=1 << 63
                    ),
                    g.add(3, 2, 2),
                ]
            ),
            why="A view lies where its data points; the offset is there for the client.",
            source=f"{_NODE} (result->view_offs), since 1.0",
        ),
    ],
    expects="the connection is closed or goes on; the server lives",
    source=f"{_GRAPH}, since 1.0",
    judge=endured,
)  # fmt: skip
_NOWHERE = f"{_NODE} ('invalid data ptr'), since 1.0"
_FOLLOWED = "Following an address of the client's making reads anything."
declare(
    HOSTILE,
    [
        Refusal(
            11, "node-that-is-no-tensor", "a graph whose node is none of its tensors",
            _nodes(lambda g: [g.add(2, 1, 1)], ids=[12345]), None,
            "There is nothing to compute under that id.",
            f"{_GRAPH} ('failed to create graph node'), since 1.0",
        ),
        Refusal(
            13, "source-that-is-no-tensor",
            "a node whose second source is none of the graph's tensors",
            _nodes(lambda g: [g.add(2, 1, 99)]), None, "An operand is missing.",
            f"{_NODE} ('failed to create source node'), since 1.0",
        ),
        Refusal(
            14, "view-of-no-tensor", "a node that views what is none of the graph's tensors",
            _nodes(lambda g: [g.add(2, 1, 1, view_src=99)]), None,
            "What a view lies in is part of the graph.",
            f"{_NODE} ('failed to create view_src node'), since 1.0",
        ),
        Refusal(
            15, "tensor-that-occurs-twice", "a graph with two tensors of one id",
            _sending(lambda g: g.encode([g.add(2, 1, 1)], [g.leaf(1), g.leaf(1, 64)])), None,
            "Which of them a source means is open.",
            f"{_GRAPH} (tensor_ptrs.emplace: the first one counts), since 1.0",
            "it takes one of the two",
        ),
        Refusal(
            16, "tensor-that-is-its-own-source", "a node whose source is itself",
            _nodes(lambda g: [g.add(2, 1, 2)]), None,
            "A tensor can't be computed from what it is going to be.", differs=_OWN_MEMORY,
        ),
        Refusal(
            17, "tensors-that-are-each-others-source", "two nodes, each the source of the other",
            _nodes(lambda g: [g.add(2, 1, 3), g.add(3, 1, 2)]), None,
            "Neither can be computed first; following sources never ends.", differs=_OWN_MEMORY,
        ),
        Refusal(
            18, "view-of-itself", "a node that views itself",
            _nodes(lambda g: [g.add(2, 1, 1, view_src=2)]), None,
            "Following what a view lies in never ends.", differs="it doesn't follow views",
        ),
        Refusal(
            19, "node-before-its-source",
            "two nodes in the wrong order: the first one's source is the second one",
            _nodes(lambda g: [g.add(2, 1, 3), g.add(3, 1, 1)]), None,
            "Nodes come in the order of execution; the first would read what isn't computed.",
            f"{_GRAPH}: computes in the order given, since 1.0", _OWN_MEMORY,
        ),
        Refusal(
            21, "type-9999", "a graph that reads a tensor of type 9999",
            _of_leaf({"type": 9999}), None, _INDEX_WHY, f"{_TENSOR}, since 1.0",
        ),
        Refusal(
            22, "type-2-32", "a graph that reads a tensor of type 2^32 - 1",
            _of_leaf({"type": 0xFFFFFFFF}), None, _INDEX_WHY, f"{_TENSOR}, since 1.0",
        ),
        Refusal(
            23, "removed-type", "a graph that reads a tensor of type 4, which ggml has removed",
            _of_leaf({"type": 4}), None,
            "Its blocks have 0 elements: dividing by that is the end of a process.",
            f"{_TENSOR} ('blck_size is 0'), since 1.0",
        ),
        Refusal(
            32, "data-without-a-buffer", "a graph that reads an address without a buffer",
            _of_leaf({"buffer": 0}), None, _FOLLOWED, _NOWHERE,
        ),
        Refusal(
            33, "data-in-an-unknown-buffer",
            "a graph that reads a tensor in a buffer that was never given out",
            _of_leaf({"buffer": 0xDEAD_BEEF_0000}), None, _FOLLOWED, _NOWHERE,
        ),
        Refusal(
            60, "source-in-a-freed-buffer",
            "a graph that reads a tensor in a buffer that was freed", _sending(_in_freed), None,
            "The memory may be anybody's by now.", _NOWHERE,
        ),
    ],
    expects="the connection is closed (up to 3.4 the answer may be a failure instead)",
    source=f"{_NODE} (tensor_map before the recursion), since 1.0",
    judge=_not_computed,
)  # fmt: skip
