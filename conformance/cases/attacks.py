"""Graphs that must not be computed: a connection about to send one, and cases made of that."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from conformance.cases.groups import HOSTILE
from conformance.suite import Context, Peer, RemoteBuffer
from conformance.suite.tensors import Fields
from protocol.commands import Command
from protocol.dialects import Answer
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType

BUFFER_SIZE = 64 << 10
# Where results lie in the buffer; leaves start at its base, integers at half of this.
RESULTS_AT = 32 << 10

INDEX_WHY = "The number is an index into a table."


class Attack:
    """A connection with a buffer of zeros, about to send a graph that it must not."""

    def __init__(self, c: Context) -> None:
        self.peer: Peer = c.connect()
        self.buffer: RemoteBuffer = self.peer.alloc(BUFFER_SIZE)
        self.peer.call(Command.BUFFER_CLEAR, remote_ptr=self.buffer.handle)

    def leaf(self, id: int, ne: Sequence[int] = (8,), at: int = 0, **fields: object) -> Fields:
        return {**self.buffer.leaf(id, ne, at), **fields}

    def node(
        self, id: int, op: Op, *src: int, ne: Sequence[int] = (8,), **fields: object
    ) -> Fields:
        return {**self.buffer.node(id, ne, op, *src, at=RESULTS_AT), **fields}

    def add(self, id: int, *src: int, **fields: object) -> Fields:
        return {**self.buffer.node(id, (8,), Op.ADD, *src, at=RESULTS_AT), **fields}

    def integers(self, id: int, values: Sequence[int], at: int = RESULTS_AT // 2) -> Fields:
        """A leaf of I32 with these values."""
        leaf = self.buffer.leaf(id, (len(values),), at, GgmlType.I32)
        self.peer.set(leaf, struct.pack(f"<{len(values)}i", *values))
        return leaf

    def send(
        self, nodes: Sequence[Fields], leaves: Sequence[Fields], ids: Sequence[int] | None = None
    ) -> None:
        payload = self.peer.graph(nodes, leaves, ids=ids)
        self.peer.send(Command.GRAPH_COMPUTE, payload)

    def sound(self) -> bytes:
        """The payload of a graph with nothing wrong."""
        return self.peer.graph([self.add(2, 1, 1)], [self.leaf(1)])

    def count_at(self, which: str) -> int:
        """Where the count of ``nodes`` or ``tensors`` lies in the sound graph's payload."""
        nodes = 4 if self.peer.dialect.graph_device else 0
        return nodes if which == "nodes" else nodes + 4 + 8

    def send_payload(self, payload: bytes) -> None:
        self.peer.send(Command.GRAPH_COMPUTE, payload)


Send = Callable[[Attack], None]


def graph_fails(c: Context, attack: Attack, differs: str | None) -> None:
    """The graph must not be computed: up to 3.4 a status may say so, later the connection ends."""
    command = Command.GRAPH_COMPUTE
    outcome = attack.peer.outcome(command)
    if outcome.closed:
        return
    answered = attack.peer.spec(command).answer is not Answer.NEVER
    if answered and outcome.answer.result != 0:
        return
    if differs:
        c.differs(f"the server went on: {differs}")
    c.fail("the server went on as if the graph were sound")


def refused_graph(
    number: int,
    name: str,
    sends: str,
    why: str,
    source: str,
    *,
    differs: str | None = None,
) -> Callable[[Send], Send]:
    """A graph that must not be computed; ``differs`` says why a server may compute it anyway."""

    def declare(send: Send) -> Send:
        @HOSTILE.case(
            number,
            name=name,
            sends=sends,
            expects="the connection is closed (up to 3.4 the answer may be a failure instead)",
            why=why,
            source=source,
            hostile=True,
        )
        def check(c: Context) -> None:
            attack = Attack(c)
            send(attack)
            graph_fails(c, attack, differs)

        return send

    return declare


def endured_graph(
    number: int, name: str, sends: str, why: str, source: str
) -> Callable[[Send], Send]:
    """A graph of which the protocol doesn't say what becomes of it, only that others live."""

    def declare(send: Send) -> Send:
        @HOSTILE.case(
            number,
            name=name,
            sends=sends,
            expects="the connection is closed or goes on; the server lives",
            why=why,
            source=source,
            hostile=True,
        )
        def check(c: Context) -> None:
            attack = Attack(c)
            send(attack)
            attack.peer.outcome(Command.GRAPH_COMPUTE)

        return send

    return declare
