"""6: GRAPH_RECOMPUTE: which graph is run again, and when there is none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from conformance.cases.groups import RECOMPUTE
from conformance.suite import Context, Peer, RemoteBuffer
from conformance.suite.arrays import Bench, same, values
from conformance.suite.refusals import Refusal, Send, declare
from protocol.commands import Command
from protocol.ggml.ops import Op

_RECOMPUTE = "ggml-rpc.cpp rpc_server::graph_recompute, since 3.5"
_FREE = "ggml-rpc.cpp rpc_server::free_buffer: stored graphs are dropped (3.5: on any buffer)"
_NEEDS = (Command.GRAPH_RECOMPUTE,)


def _again(peer: Peer, device: int = 0) -> None:
    peer.call(Command.GRAPH_RECOMPUTE, device=device)


def _refused(c: Context, peer: Peer, device: int = 0) -> None:
    peer.send(Command.GRAPH_RECOMPUTE, device=device)
    c.refused(peer)


def _doubled(peer: Peer, buffer: RemoteBuffer, factor: float = 2.0, at: int = 0) -> None:
    """Run a graph that doubles 32 F32 at ``at`` into the ones behind them."""
    bits = int(np.float32(factor).view(np.int32))
    node = buffer.node(2, (32,), Op.SCALE, 1, at=at + 128, op_params=[bits, *[0] * 15])
    peer.compute([node], [buffer.leaf(1, (32,), at)])


@RECOMPUTE.case(1, source=_RECOMPUTE, needs=_NEEDS)
def right_after_the_graph(c: Context) -> None:
    """The next token: the same graph over other data, in a few bytes.

    Sends: a graph, other values for its leaf, GRAPH_RECOMPUTE
    Expects: the result of the other values
    """
    b = Bench(c.connect())
    x, y, w = values(4, 32, seed=1), values(4, 32, seed=2), values(32, seed=3)
    leaf = b.leaf(x)
    t = b.g.mul(leaf, b.leaf(w))
    b.compute(t)
    b.set(leaf, y)
    _again(b.peer)
    same(c, b.get(t), y * w, "the result")


@RECOMPUTE.case(2, source=_RECOMPUTE, needs=_NEEDS)
def each_run_counts(c: Context) -> None:
    """Runs are neither merged nor left out.

    Sends: a graph that adds in place, and GRAPH_RECOMPUTE twenty times without waiting
    Expects: as many additions as runs
    """
    b = Bench(c.connect())
    total = b.leaf(np.zeros(16, np.float32))
    b.compute(b.g.add_inplace(total, b.leaf(np.full(16, 0.5, np.float32))))
    for _ in range(20):
        b.peer.send(Command.GRAPH_RECOMPUTE)
    same(c, b.get(total), np.full(16, 10.5), "the sum")


@RECOMPUTE.case(3, source=_RECOMPUTE, needs=_NEEDS)
def the_last_graph(c: Context) -> None:
    """There is one graph a device: the last.

    Sends: two graphs, then GRAPH_RECOMPUTE
    Expects: the second one runs again, the first doesn't
    """
    b = Bench(c.connect())
    one, two = b.leaf(np.ones(8, np.float32)), b.leaf(np.ones(8, np.float32))
    b.compute(b.g.scale(one, 2.0, inplace=True))
    b.compute(b.g.scale(two, 3.0, inplace=True))
    _again(b.peer)
    same(c, b.get(one), np.full(8, 2), "what the first graph wrote")
    same(c, b.get(two), np.full(8, 9), "what the second graph wrote")


@RECOMPUTE.case(4, source=_RECOMPUTE, needs=_NEEDS)
def memory_as_it_is_at_the_time(c: Context) -> None:
    """A graph that is kept has addresses, not values.

    Sends: a graph; uploads, COPY_TENSOR, BUFFER_CLEAR of its leaf, GRAPH_RECOMPUTE after each
    Expects: each run reads what is in memory then
    """
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
    9,
    source="rpc_server of ggml-rpc.cpp is made for each connection",
    needs=_NEEDS,
    concurrent=True,
)
def after_another_clients_graph(c: Context) -> None:
    """The last graph is the connection's, not the device's.

    Sends: a graph, another client's graph, GRAPH_RECOMPUTE of the first
    Expects: each client's own graph runs, in its own memory
    """
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


@RECOMPUTE.case(12, source=_RECOMPUTE, needs=_NEEDS, devices=2, hostile=True)
def one_graph_a_device(c: Context) -> None:
    """A scheduler sends each device its part of a model's graph.

    Sends: a graph on device 0, GRAPH_RECOMPUTE of device 1, and of each after graphs on both
    Expects: the first is refused; then each device runs its own graph
    """
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


@RECOMPUTE.case(13, source=_RECOMPUTE, needs=_NEEDS)
def other_commands_leave_it_alone(c: Context) -> None:
    """Only a graph takes the place of a graph; ALLOC_BUFFER that is answered 0 changes nothing.

    Sends: a graph, ALLOC_BUFFER with and without success, GET_ALLOC_SIZE, GRAPH_RECOMPUTE
    Expects: the graph runs again
    """
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


def _doubled_on(device_to_run: Callable[[Context], int]) -> Send:
    """Run a graph, and run that of another device again."""

    def send(c: Context, peer: Peer) -> None:
        _doubled(peer, _zeros(peer))
        peer.send(Command.GRAPH_RECOMPUTE, device=device_to_run(c))

    return send


def _zeros(peer: Peer) -> RemoteBuffer:
    buffer = peer.alloc(1024)
    peer.set(buffer.whole(), bytes(1024))
    return buffer


def _without_a_graph(c: Context, peer: Peer) -> None:
    peer.alloc(64)
    peer.send(Command.GRAPH_RECOMPUTE)


def _after_another_was_freed(c: Context, peer: Peer) -> None:
    buffer, other = _zeros(peer), peer.alloc(1024)
    _doubled(peer, buffer)
    peer.call(Command.FREE_BUFFER, remote_ptr=other.handle)
    peer.send(Command.GRAPH_RECOMPUTE)


declare(
    RECOMPUTE,
    [
        Refusal(
            5, "without-a-graph", "GRAPH_RECOMPUTE on a new connection", _without_a_graph, None,
            "There is nothing to run, and no answer that could say so.",
            f"{_RECOMPUTE} (graph == nullptr)", needs=_NEEDS,
        ),
        Refusal(
            8, "after-another-buffer-was-freed",
            "a graph, FREE_BUFFER of a buffer that it doesn't use, GRAPH_RECOMPUTE",
            _after_another_was_freed, None,
            "Upstream's server doesn't look which buffers a graph uses; clients send it again.",
            _FREE, "a server may know which buffers a graph uses", needs=_NEEDS,
        ),
        Refusal(
            11, "device-that-is-not-there", "GRAPH_RECOMPUTE for a device that isn't there",
            (_doubled_on(lambda c: c.facts.devices), _doubled_on(lambda c: 0xFFFFFFFF)), None,
            "Graphs are kept by device.", f"{_RECOMPUTE} (device >= backends.size())", needs=_NEEDS,
        ),
    ],
)  # fmt: skip


@RECOMPUTE.case(
    10, source="rpc_server of ggml-rpc.cpp is made for each connection", needs=_NEEDS, hostile=True
)
def graph_of_an_earlier_connection(c: Context) -> None:
    """With the connection its buffers are gone, and with them the graph.

    Sends: a graph on one connection, GRAPH_RECOMPUTE on the next of the same client
    Expects: the connection is closed
    """
    first = c.connect()
    _doubled(first, _zeros(first))
    first.ping()
    first.close()
    _refused(c, c.connect())
