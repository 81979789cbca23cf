"""5: graphs: what is no graph, and ends the connection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from client.tensors import Tensor
from conformance.cases.groups import GRAPHS
from conformance.suite import Context, Peer, RemoteBuffer
from conformance.suite.arrays import (
    Bench,
    values,
)
from conformance.suite.tensors import Fields, graph_bytes, sources
from protocol.commands import Command
from protocol.dialects import compatible_dialects
from protocol.ggml.ops import Op, UnaryOp
from protocol.ggml.types import GgmlType

_COMPUTE = "ggml-rpc.cpp rpc_server::graph_compute, since 1.0"
_NODE = "ggml-rpc.cpp rpc_server::create_node, since 1.0"
_TENSOR = "ggml-rpc.cpp rpc_server::deserialize_tensor, since 1.0"


def _refused(
    c: Context,
    change: Callable[[Peer, RemoteBuffer, list[Fields]], list[Fields] | None],
    *,
    differs: str | None = None,
) -> None:
    """Send ADD of two leaves (ids 1 and 2) as node 3 after ``change``: it must be refused.

    ``change`` may replace the tensors.
    """
    peer = c.connect()
    buffer = peer.alloc(4096)
    peer.set(buffer.whole(), bytes(4096))
    tensors = [
        buffer.leaf(1, (32,)),
        buffer.leaf(2, (32,), at=128),
        buffer.node(3, (32,), Op.ADD, 1, 2, at=256),
    ]
    changed = change(peer, buffer, tensors)
    nodes, leaves = [tensors[2]], tensors[:2]
    if changed is not None:
        nodes, leaves = changed[-1:], changed[:-1]
    peer.send(Command.GRAPH_COMPUTE, graph_bytes(peer.dialect, nodes, leaves))
    c.refused(peer, Command.GRAPH_COMPUTE, differs=differs)
    peer.close()


def _set(tensor: Fields, **fields: Any) -> None:
    tensor.update(fields)


@GRAPHS.case(
    40,
    sends="nodes with op numbers that this version doesn't have",
    expects="the connection is closed",
    source="ggml-cpu.c ggml_compute_forward (GGML_ABORT); enum ggml_op of the version",
    hostile=True,
)
def unknown_op(c: Context) -> None:
    """Nobody knows what it would compute; to go on would give a result that is none."""
    # A server can't tell versions that differ in their ops only.
    most = max(len(d.ops) for d in compatible_dialects(c.dialect))
    for number in (most, 1000, 0xFFFFFFFF):
        _refused(c, lambda _p, _b, t, n=number: _set(t[2], op=n))  # type: ignore[misc]


@GRAPHS.case(
    41,
    sends="a graph that names a node that is not among its tensors",
    expects="the connection is closed",
    source=_COMPUTE + " ('failed to create graph node')",
    hostile=True,
)
def node_that_is_not_there(c: Context) -> None:
    """The rest of the graph may stand on it."""
    peer = c.connect()
    buffer = peer.alloc(4096)
    leaf, node = buffer.leaf(1, (32,)), buffer.node(2, (32,), Op.SQR, 1, at=128)
    payload = graph_bytes(peer.dialect, [node], [leaf], ids=[2, 77])
    peer.send(Command.GRAPH_COMPUTE, payload)
    c.refused(peer, Command.GRAPH_COMPUTE)


@GRAPHS.case(
    42,
    sends="a node with a source that is not among the tensors",
    expects="the connection is closed",
    source=_NODE + " ('failed to create source node')",
    hostile=True,
)
def source_that_is_not_there(c: Context) -> None:
    """An id says nothing without its tensor."""
    _refused(c, lambda _p, _b, t: _set(t[2], src=sources(1, 99)))
    _refused(c, lambda _p, _b, t: _set(t[2], view_src=99))


@GRAPHS.case(
    43,
    sends="ADD with one source, and with none",
    expects="the connection is closed",
    source="ggml-cpu ops.cpp ggml_compute_forward_add reads both",
    hostile=True,
)
def sources_that_are_missing(c: Context) -> None:
    """A source of 0 is none: the op would read a null pointer."""
    for ids in ((1,), ()):
        _refused(c, lambda _p, _b, t, ids=ids: _set(t[2], src=sources(*ids)))  # type: ignore[misc]


@GRAPHS.case(
    44,
    sends="two nodes that are each other's source",
    expects="the connection is closed",
    source=_NODE + ": a tensor is made before its sources are",
    hostile=True,
)
def cycle(c: Context) -> None:
    """There is no order in which they could be computed."""

    def change(peer: Peer, buffer: RemoteBuffer, t: list[Fields]) -> list[Fields]:
        return [
            t[0],
            buffer.node(2, (32,), Op.ADD, 1, 3, at=128),
            buffer.node(3, (32,), Op.ADD, 1, 2, at=256),
        ]

    _refused(c, change, differs="whatever is in the memory of the source is read")


@GRAPHS.case(
    45,
    sends="GET_ROWS with the index that is one too large, and with -1",
    expects="the connection is closed",
    source="ggml-cpu ops.cpp ggml_compute_forward_get_rows (GGML_ASSERT(i01 >= 0 && i01 < ne01))",
    hostile=True,
)
def index_out_of_range_of_get_rows(c: Context) -> None:
    """It would read memory that is not the table's."""
    for index in (4, -1, 1 << 30):
        _indexed(c, lambda b, ids: b.g.get_rows(b.leaf(values(4, 8)), ids), index, np.int32)


@GRAPHS.case(
    46,
    sends="SET_ROWS with the index that is one too large, and with -1",
    expects="the connection is closed",
    source="ggml-cpu ops.cpp ggml_compute_forward_set_rows (GGML_ASSERT(i1 >= 0 && i1 < ne1))",
    hostile=True,
)
def index_out_of_range_of_set_rows(c: Context) -> None:
    """It would write memory that is not the table's."""

    def made(b: Bench, ids: Tensor) -> Tensor:
        return b.g.set_rows(b.leaf(values(4, 8)), b.leaf(values(2, 8)), ids)

    for index in (4, -1, 1 << 40):
        _indexed(c, made, index, np.int64)


def _indexed(c: Context, made: Callable[[Bench, Tensor], Tensor], index: int, dtype: Any) -> None:
    b = Bench(c.connect())
    type = GgmlType.I32 if dtype is np.int32 else GgmlType.I64
    t = made(b, b.leaf(np.array([1, index], dtype), type))
    b.peer.send(Command.GRAPH_COMPUTE, b.build([t]).encode(b.peer.dialect))
    c.refused(b.peer, Command.GRAPH_COMPUTE)
    b.peer.close()


@GRAPHS.case(
    47,
    sends="tensors that begin before or end behind their buffer: leaf and node",
    expects="the connection is closed",
    source=_TENSOR + " (GGML_ASSERT of the range)",
    hostile=True,
)
def tensor_outside_its_buffer(c: Context) -> None:
    """It would read or write memory of somebody else."""
    for which in (0, 2):
        for offset in (-128, 4096 - 64, 1 << 40):

            def change(
                _p: Peer, b: RemoteBuffer, t: list[Fields], which: int = which, at: int = offset
            ) -> None:
                t[which]["data"] = b.base + at

            _refused(c, change)


@GRAPHS.case(
    48,
    sends="strides that lead beyond the buffer from a place that is inside",
    expects="the connection is closed",
    source=_TENSOR + " (ggml_nbytes counts strides)",
    hostile=True,
)
def strides_that_lead_outside(c: Context) -> None:
    """Where the last element is, strides say, not the number of elements."""
    _refused(
        c,
        lambda _p, b, t: [
            b.leaf(1, (8, 4), nb=[4, 2048, 8192, 8192]),
            t[1],
            b.node(3, (8, 4), Op.ADD, 1, 1, at=256),
        ],
    )


@GRAPHS.case(
    49,
    sends="a graph whose source lies in a buffer that was freed",
    expects="the connection is closed",
    source="ggml-rpc.cpp rpc_server::deserialize_tensor: a buffer that isn't there is none",
    needs=(Command.FREE_BUFFER,),
    hostile=True,
)
def source_in_a_freed_buffer(c: Context) -> None:
    """Its memory may be anybody's by now."""

    def change(peer: Peer, _b: RemoteBuffer, t: list[Fields]) -> None:
        other = peer.alloc(4096)
        t[0].update(buffer=other.handle, data=other.base)
        peer.call(Command.FREE_BUFFER, remote_ptr=other.handle)

    _refused(c, change)


@GRAPHS.case(
    50,
    sends="a graph whose source lies in a buffer of another client",
    expects="the connection is closed",
    source="docs/protocol.md, Buffers and addresses; upstream has one table of buffers a client",
    concurrent=True,
    hostile=True,
)
def source_of_another_client(c: Context) -> None:
    """Handles are small numbers or pointers: they can be guessed."""
    other = c.connect("other")
    theirs = other.alloc(4096)
    _refused(c, lambda _p, _b, t: _set(t[0], buffer=theirs.handle, data=theirs.base))
    other.ping()


@GRAPHS.case(
    51,
    sends="a node, and a source, without memory (buffer and data 0)",
    expects="the connection is closed",
    source="ggml-cpu ops.cpp: the ops read and write tensor->data",
    hostile=True,
)
def tensors_without_memory(c: Context) -> None:
    """A client may name a tensor that lives elsewhere as long as no node here reads it."""
    for which in (0, 2):
        _refused(
            c,
            lambda _p, _b, t, which=which: _set(t[which], buffer=0, data=0),  # type: ignore[misc]
        )


@GRAPHS.case(
    52,
    sends="two tensors with the same id",
    expects="the connection is closed",
    source="docs/protocol.md, Tensors: ids are unique within a graph",
    hostile=True,
)
def an_id_twice(c: Context) -> None:
    """Which of them a source means can't be told."""
    _refused(
        c,
        lambda _p, _b, t: _set(t[1], id=1),
        differs="the first of the two is taken, and the source that is missing then is the reason",
    )


@GRAPHS.case(
    53,
    sends="tensors of types that are none: 4, 38, 1000, 2**32 - 1",
    expects="the connection is closed",
    source=_TENSOR + " ('invalid tensor type received')",
    hostile=True,
)
def unknown_type(c: Context) -> None:
    """Its elements have no size."""
    for number in (4, 38, 1000, 0xFFFFFFFF):
        _refused(c, lambda _p, _b, t, n=number: _set(t[0], type=n))  # type: ignore[misc]


@GRAPHS.case(
    54,
    sends="ADD of shapes of which neither is the other repeated; a result of another shape",
    expects="the connection is closed",
    source="ggml-cpu binary-ops.cpp apply_binary_op (GGML_ASSERT(ggml_can_repeat(src1, src0)))",
    hostile=True,
)
def shapes_that_do_not_fit(c: Context) -> None:
    """The op's loops run over one shape and read by another."""
    _refused(c, lambda _p, b, t: [t[0], b.leaf(2, (5,), at=128), t[2]])
    _refused(c, lambda _p, b, t: [t[0], t[1], b.node(3, (64,), Op.ADD, 1, 2, at=256)])


@GRAPHS.case(
    55,
    sends="a graph for a device that isn't there",
    expects="the connection is closed",
    source=_COMPUTE + " (device >= backends.size()), since 3.0",
    hostile=True,
)
def device_that_is_not_there(c: Context) -> None:
    """Device numbers come with every graph."""
    if not c.dialect.graph_device:
        c.skip("graphs name a device since protocol 3.0")
    for device in (c.facts.devices, 0xFFFFFFFF):
        peer = c.connect()
        buffer = peer.alloc(4096)
        node = buffer.node(2, (32,), Op.SQR, 1, at=128)
        payload = graph_bytes(peer.dialect, [node], [buffer.leaf(1, (32,))], device=device)
        peer.send(Command.GRAPH_COMPUTE, payload)
        c.refused(peer, Command.GRAPH_COMPUTE)
        peer.close()


@GRAPHS.case(
    56,
    sends="UNARY and GLU of kinds that are none",
    expects="the connection is closed",
    source="ggml-cpu ops.cpp ggml_compute_forward_unary (GGML_ABORT)",
    hostile=True,
)
def unknown_kind_of_function(c: Context) -> None:
    """Which function, op_params say."""
    for op in (Op.UNARY, Op.GLU):
        params = [max(UnaryOp) + 100, *[0] * 15]
        _refused(
            c,
            lambda _p, b, t, op=op, params=params: [  # type: ignore[misc]
                t[0],
                t[1],
                b.node(3, (32,), op, 1, *([2] if op is Op.GLU else []), at=256, op_params=params),
            ],
        )
