"""6: GRAPH_RECOMPUTE: which graph is run again, and when there is none."""

from __future__ import annotations

import numpy as np

from conformance.cases.groups import RECOMPUTE
from conformance.suite import Context, Peer, RemoteBuffer
from conformance.suite.arrays import Bench, same, values
from protocol.commands import Command
from protocol.ggml.ops import Op

_RECOMPUTE = "ggml-rpc.cpp rpc_server::graph_recompute, since 3.5"
_FREE = "ggml-rpc.cpp rpc_server::free_buffer: stored graphs are dropped (3.5: on any buffer)"
_NEEDS = (Command.GRAPH_RECOMPUTE,)


def _again(peer: Peer, device: int = 0) -> None:
    peer.call(Command.GRAPH_RECOMPUTE, device=device)


def _refused(c: Context, peer: Peer, device: int = 0, differs: str | None = None) -> None:
    peer.send(Command.GRAPH_RECOMPUTE, device=device)
    c.refused(peer, differs=differs)


def _doubled(peer: Peer, buffer: RemoteBuffer, factor: float = 2.0, at: int = 0) -> None:
    """Run a graph that doubles 32 F32 at ``at`` into the ones behind them."""
    bits = int(np.float32(factor).view(np.int32))
    node = buffer.node(2, (32,), Op.SCALE, 1, at=at + 128, op_params=[bits, *[0] * 15])
    peer.compute([node], [buffer.leaf(1, (32,), at)])


@RECOMPUTE.case(
    1,
    sends="a graph, other values for its leaf, GRAPH_RECOMPUTE",
    expects="the result of the other values",
    source=_RECOMPUTE,
    needs=_NEEDS,
)
def right_after_the_graph(c: Context) -> None:
    """The next token: the same graph over other data, in a few bytes."""
    b = Bench(c.connect())
    x, y, w = values(4, 32, seed=1), values(4, 32, seed=2), values(32, seed=3)
    leaf = b.leaf(x)
    t = b.g.mul(leaf, b.leaf(w))
    b.compute(t)
    b.set(leaf, y)
    _again(b.peer)
    same(c, b.get(t), y * w, "the result")


@RECOMPUTE.case(
    2,
    sends="a graph that adds in place, and GRAPH_RECOMPUTE twenty times without waiting",
    expects="as many additions as runs",
    source=_RECOMPUTE,
    needs=_NEEDS,
)
def each_run_counts(c: Context) -> None:
    """Runs are neither merged nor left out."""
    b = Bench(c.connect())
    total = b.leaf(np.zeros(16, np.float32))
    b.compute(b.g.add_inplace(total, b.leaf(np.full(16, 0.5, np.float32))))
    for _ in range(20):
        b.peer.send(Command.GRAPH_RECOMPUTE)
    same(c, b.get(total), np.full(16, 10.5), "the sum")


@RECOMPUTE.case(
    3,
    sends="two graphs, then GRAPH_RECOMPUTE",
    expects="the second one runs again, the first doesn't",
    source=_RECOMPUTE,
    needs=_NEEDS,
)
def the_last_graph(c: Context) -> None:
    """There is one graph a device: the last."""
    b = Bench(c.connect())
    one, two = b.leaf(np.ones(8, np.float32)), b.leaf(np.ones(8, np.float32))
    b.compute(b.g.scale(one, 2.0, inplace=True))
    b.compute(b.g.scale(two, 3.0, inplace=True))
    _again(b.peer)
    same(c, b.get(one), np.full(8, 2), "what the first graph wrote")
    same(c, b.get(two), np.full(8, 9), "what the second graph wrote")


@RECOMPUTE.case(
    4,
    sends="a graph; uploads, COPY_TENSOR, BUFFER_CLEAR of its leaf, GRAPH_RECOMPUTE after each",
    expects="each run reads what is in memory then",
    source=_RECOMPUTE,
    needs=_NEEDS,
)
def memory_as_it_is_at_the_time(c: Context) -> None:
    """A graph that is kept has addresses, not values."""
    peer = c.connect()
    buffer = peer.alloc(1024)
    leaf, result = buffer.leaf(1, (32,)), buffer.leaf(2, (32,), 128)
    spare = buffer.leaf(3, (32,), 512)
    x, y = values(32, seed=4), values(32, seed=5)
    peer.set(buffer.whole(), bytes(1024))
    peer.set(leaf, x.tobytes())
    _doubled(peer, buffer)

    def doubled() -> np.ndarray:  # type: ignore[type-arg]
        return np.frombuffer(peer.get(result, 128), np.float32)

    same(c, doubled(), 2 * x, "after the graph")
    peer.set(spare, y.tobytes())
    if peer.call(Command.COPY_TENSOR, src=spare, dst=leaf).result:
        _again(peer)
        same(c, doubled(), 2 * y, "after COPY_TENSOR")
    peer.set(leaf, x[:5].tobytes(), 4 * 7)
    _again(peer)
    expected = np.frombuffer(peer.get(leaf, 128), np.float32)
    same(c, doubled(), 2 * expected, "after an upload of a part")
    peer.call(Command.BUFFER_CLEAR, remote_ptr=buffer.handle, value=0)
    _again(peer)
    same(c, doubled(), np.zeros(32), "after BUFFER_CLEAR")


@RECOMPUTE.case(
    5,
    sends="GRAPH_RECOMPUTE on a new connection",
    expects="the connection is closed",
    source=_RECOMPUTE + " (graph == nullptr)",
    needs=_NEEDS,
    hostile=True,
)
def without_a_graph(c: Context) -> None:
    """There is nothing to run, and no answer that could say so."""
    peer = c.connect()
    peer.alloc(64)
    _refused(c, peer)


@RECOMPUTE.case(
    6,
    sends="a graph, FREE_BUFFER of its buffer, GRAPH_RECOMPUTE",
    expects="the connection is closed",
    source=_FREE,
    needs=_NEEDS,
    hostile=True,
)
def after_its_buffer_was_freed(c: Context) -> None:
    """Stale: the graph would write memory that is no longer the client's."""
    peer = c.connect()
    buffer = peer.alloc(1024)
    peer.set(buffer.whole(), bytes(1024))
    _doubled(peer, buffer)
    peer.call(Command.FREE_BUFFER, remote_ptr=buffer.handle)
    _refused(c, peer)


@RECOMPUTE.case(
    7,
    sends="a graph, FREE_BUFFER, ALLOC_BUFFER of the same size, GRAPH_RECOMPUTE",
    expects="the connection is closed, and nothing is written into the new buffer before",
    source=_FREE,
    needs=_NEEDS,
    hostile=True,
)
def after_its_buffer_was_replaced(c: Context) -> None:
    """The new buffer may lie where the old one was: the graph would write into it."""
    peer = c.connect()
    buffer = peer.alloc(1024)
    peer.set(buffer.whole(), b"\x3f" * 1024)
    _doubled(peer, buffer)
    peer.call(Command.FREE_BUFFER, remote_ptr=buffer.handle)
    new = peer.alloc(1024)
    kept = values(256, seed=6).tobytes()
    peer.set(new.whole(), kept[: new.size])
    c.equal(peer.get(new.whole(), 1024), kept, "the new buffer")
    _refused(c, peer)


@RECOMPUTE.case(
    8,
    sends="a graph, FREE_BUFFER of a buffer that it doesn't use, GRAPH_RECOMPUTE",
    expects="the connection is closed",
    source=_FREE,
    needs=_NEEDS,
    hostile=True,
)
def after_another_buffer_was_freed(c: Context) -> None:
    """Upstream's server doesn't look which buffers a graph uses; clients send the graph again."""
    peer = c.connect()
    buffer, other = peer.alloc(1024), peer.alloc(1024)
    peer.set(buffer.whole(), bytes(1024))
    _doubled(peer, buffer)
    peer.call(Command.FREE_BUFFER, remote_ptr=other.handle)
    _refused(c, peer, differs="a server may know which buffers a graph uses")


@RECOMPUTE.case(
    9,
    sends="a graph, another client's graph, GRAPH_RECOMPUTE of the first",
    expects="each client's own graph runs, in its own memory",
    source="rpc_server of ggml-rpc.cpp is made for each connection",
    needs=_NEEDS,
    concurrent=True,
)
def after_another_clients_graph(c: Context) -> None:
    """The last graph is the connection's, not the device's."""
    benches = [Bench(c.connect(f"client {i}")) for i in (1, 2)]
    totals = []
    for i, b in enumerate(benches, 1):
        total = b.leaf(np.full(16, i, np.float32))
        totals.append(total)
        b.compute(b.g.scale(total, 1.0 + i, inplace=True))
    for b in (*benches, benches[0]):
        _again(b.peer)
    same(c, benches[0].get(totals[0]), np.full(16, 8), "the first client's: 1 doubled three times")
    same(c, benches[1].get(totals[1]), np.full(16, 18), "the second client's: 2 tripled twice")


@RECOMPUTE.case(
    10,
    sends="a graph on one connection, GRAPH_RECOMPUTE on the next of the same client",
    expects="the connection is closed",
    source="rpc_server of ggml-rpc.cpp is made for each connection",
    needs=_NEEDS,
    hostile=True,
)
def graph_of_an_earlier_connection(c: Context) -> None:
    """With the connection its buffers are gone, and with them the graph."""
    first = c.connect()
    buffer = first.alloc(1024)
    first.set(buffer.whole(), bytes(1024))
    _doubled(first, buffer)
    first.ping()
    first.close()
    second = c.connect()
    _refused(c, second)


@RECOMPUTE.case(
    11,
    sends="GRAPH_RECOMPUTE for a device that isn't there",
    expects="the connection is closed",
    source=_RECOMPUTE + " (device >= backends.size())",
    needs=_NEEDS,
    hostile=True,
)
def device_that_is_not_there(c: Context) -> None:
    """Graphs are kept by device."""
    for device in (c.facts.devices, 0xFFFFFFFF):
        peer = c.connect()
        buffer = peer.alloc(1024)
        peer.set(buffer.whole(), bytes(1024))
        _doubled(peer, buffer)
        _refused(c, peer, device)
        peer.close()


@RECOMPUTE.case(
    12,
    sends="a graph on device 0, GRAPH_RECOMPUTE of device 1, and of each after graphs on both",
    expects="the first is refused; then each device runs its own graph",
    source=_RECOMPUTE,
    needs=_NEEDS,
    devices=2,
    hostile=True,
)
def one_graph_a_device(c: Context) -> None:
    """A scheduler sends each device its part of a model's graph."""
    peer = c.connect()
    buffer = peer.alloc(1024)
    peer.set(buffer.whole(), bytes(1024))
    _doubled(peer, buffer)
    _refused(c, peer, 1)
    peer.close()
    peer = c.connect()
    buffers = [peer.alloc(1024, device) for device in (0, 1)]
    ones = np.ones(32, np.float32)
    for device, b in enumerate(buffers):
        peer.set(b.whole(), ones.tobytes() * 8)
        bits = int(np.float32(2 + device).view(np.int32))
        node = b.node(2, (32,), Op.SCALE, 1, op_params=[bits, *[0] * 15], view_src=1)
        peer.compute([node], [b.leaf(1, (32,))], device)
    _again(peer, 0)
    found = [np.frombuffer(peer.get(b.leaf(1, (32,)), 128), np.float32) for b in buffers]
    same(c, found[0], 4 * ones, "device 0, run twice")
    same(c, found[1], 3 * ones, "device 1, run once")


@RECOMPUTE.case(
    13,
    sends="a graph, ALLOC_BUFFER with and without success, GET_ALLOC_SIZE, GRAPH_RECOMPUTE",
    expects="the graph runs again",
    source=_RECOMPUTE,
    needs=_NEEDS,
)
def other_commands_leave_it_alone(c: Context) -> None:
    """Only a graph takes the place of a graph; ALLOC_BUFFER that is answered 0 changes nothing."""
    peer = c.connect()
    buffer = peer.alloc(1024)
    x = values(32, seed=7)
    peer.set(buffer.whole(), x.tobytes() + bytes(1024 - 128))
    _doubled(peer, buffer)
    peer.call(Command.ALLOC_BUFFER, size=1 << 60)
    peer.alloc(64)
    peer.call(Command.GET_ALLOC_SIZE, tensor=buffer.leaf(1, (32,)))
    peer.set(buffer.leaf(1, (32,)), (3 * x).tobytes())
    _again(peer)
    found = np.frombuffer(peer.get(buffer.leaf(2, (32,), 128), 128), np.float32)
    same(c, found, 2 * (3 * x), "the result")
