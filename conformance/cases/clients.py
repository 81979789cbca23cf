"""8: several clients, at once and one after the other."""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Callable

from conformance.cases.groups import CLIENTS
from conformance.suite import Closed, Context, Peer, RemoteBuffer
from protocol.commands import Command
from protocol.ggml.ops import Op

_SERVER = "ggml-rpc.cpp rpc_server::"
_ONE_SERVER_A_CLIENT = "ggml-rpc.cpp rpc_serve_client: buffers are of one connection, since 1.0"
_SERVES_ONE = "upstream's server serves one client at a time (ggml_backend_rpc_start_server)"


def _floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def _doubled(peer: Peer, buffer: RemoteBuffer, value: float) -> None:
    """Compute twice ``value`` 8 times, 64 bytes behind it."""
    leaf = buffer.leaf(1, (8,))
    peer.set(leaf, _floats(*[value] * 8))
    peer.compute([buffer.node(2, (8,), Op.ADD, 1, 1, at=64)], [leaf])


@CLIENTS.case(1, source=_SERVES_ONE)
def second_client_is_served(c: Context) -> None:
    """Where it isn't, a second llama.cpp hangs until the first one ends, without a word.

    Sends: requests of a second client while a first is connected
    Expects: answers
    """
    if not c.facts.concurrent:
        c.differs("a second client waits until the first one leaves")
    first, second = c.connect(), c.connect()
    for peer in (first, second, first):
        peer.ping()


@CLIENTS.case(3, source=_ONE_SERVER_A_CLIENT, concurrent=True)
def many_clients_in_turn(c: Context) -> None:
    """What is kept for a client must be kept by connection.

    Sends: 20 clients, or as many as the server takes, that upload, compute and read in turn
    Expects: each gets its own results
    """
    peers = [c.connect(), c.connect()]
    # A server may have a limit; two clients show what is kept by connection, too.
    with contextlib.suppress(Closed):
        for _ in range(18):
            peers.append(c.connect())
    buffers = [peer.alloc(4096) for peer in peers]
    for i, (peer, buffer) in enumerate(zip(peers, buffers, strict=True)):
        _doubled(peer, buffer, float(i))
    for i, (peer, buffer) in enumerate(zip(peers, buffers, strict=True)):
        found = peer.get(buffer.leaf(2, (8,), at=64), 32)
        c.equal(found, _floats(*[2.0 * i] * 8), f"the result of client {i}")


def _declare_foreign(
    number: int,
    name: str,
    shown: str,
    command: Command,
    use: Callable[[Peer, RemoteBuffer], None],
) -> None:
    @CLIENTS.case(
        number,
        name=name,
        sends=f"{command.name} {shown} a buffer of another client",
        expects="the connection is closed; the other client's data are as before",
        source=_ONE_SERVER_A_CLIENT,
        why="Handles and addresses are numbers that one can guess or keep.",
        needs=(command,),
        concurrent=True,
        hostile=True,
    )
    def check(c: Context) -> None:
        owner, stranger = c.connect("owner"), c.connect("stranger")
        buffer = owner.alloc(4096)
        content = random.Random(c.seed).randbytes(buffer.size)
        owner.set(buffer.whole(), content)
        use(stranger, buffer)
        c.refused(stranger, command)
        c.equal(owner.get(buffer.whole(), buffer.size), content, "the other client's data")


def _copy_from(peer: Peer, buffer: RemoteBuffer) -> None:
    own = peer.alloc(256)
    peer.send(Command.COPY_TENSOR, src=buffer.leaf(1, (8,)), dst=own.leaf(2, (8,)))


def _copy_to(peer: Peer, buffer: RemoteBuffer) -> None:
    own = peer.alloc(256)
    peer.send(Command.COPY_TENSOR, src=own.leaf(2, (8,)), dst=buffer.leaf(1, (8,)))


def _compute_from(peer: Peer, buffer: RemoteBuffer) -> None:
    own = peer.alloc(256)
    peer.send(
        Command.GRAPH_COMPUTE,
        peer.graph([own.node(2, (8,), Op.ADD, 1, 1)], [buffer.leaf(1, (8,))]),
    )


def _compute_to(peer: Peer, buffer: RemoteBuffer) -> None:
    own = peer.alloc(256)
    peer.send(
        Command.GRAPH_COMPUTE,
        peer.graph([buffer.node(2, (8,), Op.ADD, 1, 1)], [own.leaf(1, (8,))]),
    )


_FOREIGN: tuple[tuple[str, str, Command, Callable[[Peer, RemoteBuffer], None]], ...] = (
    (
        "base-of-another-clients-buffer",
        "of",
        Command.BUFFER_GET_BASE,
        lambda p, b: p.send(Command.BUFFER_GET_BASE, remote_ptr=b.handle),
    ),
    (
        "free-of-another-clients-buffer",
        "of",
        Command.FREE_BUFFER,
        lambda p, b: p.send(Command.FREE_BUFFER, remote_ptr=b.handle),
    ),
    (
        "clear-of-another-clients-buffer",
        "of",
        Command.BUFFER_CLEAR,
        lambda p, b: p.send(Command.BUFFER_CLEAR, remote_ptr=b.handle, value=1),
    ),
    (
        "set-in-another-clients-buffer",
        "of a tensor in",
        Command.SET_TENSOR,
        lambda p, b: p.send(Command.SET_TENSOR, bytes(32), tensor=b.leaf(1, (8,))),
    ),
    (
        "get-from-another-clients-buffer",
        "of a tensor in",
        Command.GET_TENSOR,
        lambda p, b: p.send(Command.GET_TENSOR, tensor=b.leaf(1, (8,)), size=32),
    ),
    (
        "memset-in-another-clients-buffer",
        "of a tensor in",
        Command.MEMSET_TENSOR,
        lambda p, b: p.send(Command.MEMSET_TENSOR, tensor=b.leaf(1, (8,)), size=32),
    ),
    ("copy-from-another-clients-buffer", "from", Command.COPY_TENSOR, _copy_from),
    ("copy-to-another-clients-buffer", "to", Command.COPY_TENSOR, _copy_to),
    ("compute-from-another-clients-buffer", "that reads", Command.GRAPH_COMPUTE, _compute_from),
    ("compute-to-another-clients-buffer", "that writes", Command.GRAPH_COMPUTE, _compute_to),
)
for _number, (_name, _shown, _command, _use) in enumerate(_FOREIGN, 10):
    _declare_foreign(_number, _name, _shown, _command, _use)


@CLIENTS.case(
    20,
    source=f"{_SERVER}graph_recompute (stored_graphs of this connection), since 3.5",
    needs=(Command.GRAPH_RECOMPUTE,),
    concurrent=True,
    hostile=True,
)
def recompute_of_another_clients_graph(c: Context) -> None:
    """'The last graph' is that of this client.

    Sends: GRAPH_RECOMPUTE on a connection that computed nothing, while another one has
    Expects: the connection is closed
    """
    owner, stranger = c.connect("owner"), c.connect("stranger")
    _doubled(owner, owner.alloc(256), 1.0)
    stranger.send(Command.GRAPH_RECOMPUTE)
    c.refused(stranger, Command.GRAPH_RECOMPUTE)


@CLIENTS.case(21, source=_SERVES_ONE, concurrent=True)
def client_that_stops_within_a_request(c: Context) -> None:
    """A client on a bad network must not hold up the others.

    Sends: part of a request, and nothing more, while another client works
    Expects: the other client is served
    """
    slow = c.connect("slow")
    buffer = slow.alloc(4096)
    message = slow.message(Command.SET_TENSOR, bytes(4096), tensor=buffer.whole())
    slow.send_bytes(message[:1000], command="SET_TENSOR")
    other = c.connect("other")
    _doubled(other, other.alloc(256), 1.0)
    other.ping()
    slow.send_bytes(message[1000:], command="SET_TENSOR")
    slow.answer(Command.SET_TENSOR)
    slow.ping()


@CLIENTS.case(22, source=_SERVES_ONE, concurrent=True)
def client_that_does_not_read(c: Context) -> None:
    """Answers that nobody takes must wait without holding up the others.

    Sends: 64 GET_TENSOR of 1 MiB by a client that doesn't read, while another one works
    Expects: the other client is served
    """
    slow = c.connect("slow")
    size = 1 << 20
    buffer = slow.alloc(size)
    slow.send_bytes(
        64 * slow.message(Command.GET_TENSOR, tensor=buffer.whole(), size=size),
        command="GET_TENSOR",
    )
    other = c.connect("other")
    _doubled(other, other.alloc(256), 1.0)
    other.ping()


@CLIENTS.case(23, source=_SERVES_ONE, concurrent=True, hostile=True)
def mistake_of_another_client(c: Context) -> None:
    """Only the connection with the mistake is to end.

    Sends: an unknown command of one client while another one is connected
    Expects: the other client's connection goes on and its data are as before
    """
    good, bad = c.connect("good"), c.connect("bad")
    buffer = good.alloc(256)
    good.set(buffer.whole(), bytes(range(256)))
    bad.send_frame(77)
    c.refused(bad)
    c.equal(good.get(buffer.leaf(1, (64,)), 256), bytes(range(256)), "the good client's data")


@CLIENTS.case(24, source=_SERVES_ONE, concurrent=True, hostile=True)
def client_that_dies_while_it_computes(c: Context) -> None:
    """Its buffers are freed while the device may still be at its graph.

    Sends: a client that is reset while its graph and another client's graph are to be computed
    Expects: the other client gets its result
    """
    dying, other = c.connect("dying"), c.connect("other")
    size = 1 << 20
    buffer = dying.alloc(3 * 4 * size)
    leaf = buffer.leaf(1, (1024, 1024))
    nodes = [buffer.node(2, (1024, 1024), Op.ADD, 1, 1, at=4 * size)]
    nodes += [
        buffer.node(3 + i, (1024, 1024), Op.MUL, 2 + i, 1, at=(1 + (i + 1) % 2) * 4 * size)
        for i in range(20)
    ]
    dying.send(Command.GRAPH_COMPUTE, dying.graph(nodes, [leaf]))
    dying.reset()
    own = other.alloc(256)
    _doubled(other, own, 3.0)
    c.equal(other.get(own.leaf(2, (8,), at=64), 32), _floats(*[6.0] * 8), "the result")


@CLIENTS.case(30, source=_ONE_SERVER_A_CLIENT, hostile=True)
def handle_of_an_ended_connection(c: Context) -> None:
    """Buffers are freed with their connection; a client that reconnects starts anew.

    Sends: BUFFER_GET_BASE with a handle of a connection that has ended
    Expects: the connection is closed
    """
    first = c.connect()
    handles = [first.alloc(4096).handle for _ in range(3)]
    first.close()
    second = c.connect()
    second.send(Command.BUFFER_GET_BASE, remote_ptr=handles[1])
    c.refused(second, Command.BUFFER_GET_BASE)


@CLIENTS.case(
    31,
    source=f"{_SERVER}graph_recompute (stored_graphs of this connection), since 3.5",
    needs=(Command.GRAPH_RECOMPUTE,),
    hostile=True,
)
def recompute_of_an_ended_connections_graph(c: Context) -> None:
    """The graph's buffers are gone.

    Sends: a graph, a new connection, GRAPH_RECOMPUTE
    Expects: the connection is closed
    """
    first = c.connect()
    _doubled(first, first.alloc(256), 1.0)
    first.close()
    second = c.connect()
    second.send(Command.GRAPH_RECOMPUTE)
    c.refused(second, Command.GRAPH_RECOMPUTE)


@CLIENTS.case(33, source="ggml-rpc.cpp ggml_backend_rpc_start_server: accepts for ever, since 1.0")
def connections_one_after_the_other(c: Context) -> None:
    """llama.cpp connects several times in a run; a server runs for weeks.

    Sends: 100 connections, one after the other, each with HELLO and a question
    Expects: 100 answers
    """
    for _ in range(100):
        c.connect().close()


@CLIENTS.case(
    34, source=f"{_SERVER}~rpc_server: frees what a client leaves, since 1.0", deadline=60.0
)
def memory_of_ended_connections_comes_back(c: Context) -> None:
    """Clients are stopped more often than they end.

    Sends: 20 times: a connection that allocates 256 MiB, writes to it, and ends without freeing
    Expects: memory for each
    """
    size = 256 << 20
    peer = c.connect()
    free = peer.call(Command.GET_DEVICE_MEMORY).free_mem
    if free < 2 * size:
        c.skip(f"the device has {free >> 20} MiB free only")
    peer.close()
    for _ in range(20):
        peer = c.connect()
        buffer = peer.alloc(size)
        peer.set(buffer.leaf(1, (4,), at=size - 16), bytes(16))
        peer.ping()
        peer.close()
