"""Each limit is reached by one client, who is told or closed; the log names the option.

Another client is there all the while, and what it has is as it was.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import DIALECTS
from protocol.graph_payload import decode_graph
from protocol.split import ProgramStep, encode_program, split_caps, with_split
from rpc_server.limits import ServerLimits
from rpc_server.net.timeouts import Deadlines
from rpc_server.observability.metrics import ClientStats, ServerStats
from tests.server.clients import Bystander, endless
from tests.server.process import ServerProcess, Wire, running, sources, tensor

MIB = 1 << 20
# Long enough for a client of the tests that is kept from the processor for a moment.
SHORT = "1"
# Well above what a coordinator that says nothing is given, which counts as its graph's time too.
GRAPH = "4"


@contextlib.contextmanager
def limited(*options: str) -> Iterator[tuple[ServerProcess, Bystander]]:
    """A server with limits, and a client that must not notice them."""
    with running("--threads", "1", *options) as server, Bystander(server) as bystander:
        yield server, bystander
        assert server.alive, server.log
        bystander.check()
        assert "Traceback" not in server.log, server.log


@pytest.fixture(scope="module")
def short() -> Iterator[tuple[ServerProcess, Bystander]]:
    """One server with many limits, all low."""
    options = [
        *("--max-message", "1", "--max-graph-nodes", "401", "--max-graph-tensors", "402"),
        *("--handshake-timeout", SHORT, "--stall-timeout", SHORT, "--peer-timeout", SHORT),
        *("--graph-timeout", GRAPH),
    ]
    with limited(*options) as made:
        yield made


Short = tuple[ServerProcess, Bystander]


def closed_for(server: ServerProcess, option: str, what: str) -> None:
    """The log says that a client was closed, why, and which option is the reason."""
    server.wait_for(rf"ERROR +client \d+ [^\n]*{what}[^\n]*\({option}\); closing the connection")


# -- memory


def test_memory_of_one_client() -> None:
    with (
        limited("--mem-per-client", "8", "--mem", "12") as (server, _),
        Wire(server.port) as wire,
        Wire(server.port) as other,
    ):
        memory = wire.call(Command.GET_DEVICE_MEMORY, {"device": 0})
        assert (memory.free_mem, memory.total_mem) == (8 * MIB, 8 * MIB)
        handle, _ = wire.alloc(6 * MIB)
        assert wire.call(Command.GET_DEVICE_MEMORY, {"device": 0}).free_mem == 2 * MIB
        with pytest.raises(MemoryError):
            wire.alloc(2 * MIB + 1)
        server.wait_for(r"no buffer of 2097153 bytes: .* 2097152 left .*\(--mem-per-client\)")
        # The rest of --mem is for others.
        with pytest.raises(MemoryError):
            other.alloc(6 * MIB)
        server.wait_for(r"no buffer of 6291456 bytes: .*\(--mem\)")
        wire.call(Command.FREE_BUFFER, {"remote_ptr": handle})
        wire.alloc(8 * MIB)


def test_what_the_system_refuses_is_no_room() -> None:
    with limited() as (server, _), Wire(server.port) as wire:
        for size in (1 << 46, (1 << 62) + 1, (1 << 64) - 1):
            with pytest.raises(MemoryError):
                wire.alloc(size)
        handle, base = wire.alloc(4096)
        wire.set_tensor(tensor(1, (8,), handle, base), bytes(32))


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="needs prlimit")
def test_a_mapping_that_fails_is_no_room() -> None:
    """The machine has the memory, the process may not have it."""
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("no prlimit here")
    with limited() as (server, _), Wire(server.port) as wire:
        pid = server.child.pid
        status = open(f"/proc/{pid}/status").read()  # noqa: SIM115
        found = re.search(r"VmSize:\s+(\d+) kB", status)
        assert found
        resource.prlimit(pid, resource.RLIMIT_AS, (int(found[1]) * 1024 + 64 * MIB, -1))
        with pytest.raises(MemoryError):
            wire.alloc(256 * MIB)
        server.wait_for(r"no buffer of 268435456 bytes: no mapping")
        handle, base = wire.alloc(4096)
        wire.set_tensor(tensor(1, (8,), handle, base), bytes(32))


# -- sizes


def big_message(wire: Wire) -> None:
    wire.socket.sendall(struct.pack("<BQ", Command.GRAPH_COMPUTE, 2 * MIB))


def many_nodes(wire: Wire) -> None:
    handle, base = wire.alloc(4096)
    leaf = tensor(1, (8,), handle, base)
    add = wire.op("ADD")
    nodes = [tensor(2 + i, (8,), handle, base + 64, op=add, src=sources(1, 1)) for i in range(402)]
    wire.send(Command.GRAPH_COMPUTE, wire.graph(nodes, [leaf]))


def many_tensors(wire: Wire) -> None:
    handle, base = wire.alloc(4096)
    leaves = [tensor(1 + i, (8,), handle, base) for i in range(403)]
    wire.send(Command.GRAPH_COMPUTE, wire.graph([], leaves))


@pytest.mark.parametrize(
    ("attack", "option", "what"),
    [
        (big_message, "--max-message", "GRAPH_COMPUTE of 2097152 bytes, the limit is 1048576"),
        (many_nodes, "--max-graph-nodes", "a graph of 402 nodes, the limit is 401"),
        (many_tensors, "--max-graph-tensors", "a graph of 403 tensors, the limit is 402"),
    ],
)
def test_sizes(short: Short, attack: Callable[[Wire], None], option: str, what: str) -> None:
    server, bystander = short
    with Wire(server.port) as wire:
        attack(wire)
        assert wire.closed_by_server()
    closed_for(server, option, what)
    bystander.check()


def test_announcing_a_graph_takes_no_memory() -> None:
    with limited() as (server, _), contextlib.ExitStack() as stack:
        before = server.rss()
        for _ in range(8):
            wire = stack.enter_context(Wire(server.port))
            wire.socket.sendall(struct.pack("<BQ", Command.GRAPH_COMPUTE, 60 * MIB) + bytes(100))
        with Wire(server.port) as wire:
            wire.call(Command.GET_ALIGNMENT, {"device": 0})
        assert server.rss() - before < 40 * MIB


# -- connections


def test_connections() -> None:
    with limited("--max-clients", "3") as (server, _), contextlib.ExitStack() as stack:
        admitted = [stack.enter_context(Wire(server.port)) for _ in range(2)]
        with Wire(server.port, hello=False) as wire:
            assert wire.closed_by_server()
        server.wait_for(r"refused, there are 3 connections already \(--max-clients\)")
        # Who tries again and again doesn't fill the log.
        for _ in range(5):
            with Wire(server.port, hello=False) as wire:
                assert wire.closed_by_server()
        assert server.log.count("refused") == 1
        admitted[0].socket.close()
        server.wait_until(lambda: _serves(server), 60, "room for another client")


def _serves(server: ServerProcess) -> bool:
    try:
        with Wire(server.port):
            return True
    except Exception:
        return False


def test_connections_from_one_address() -> None:
    with limited("--max-clients-per-address", "2") as (server, _), Wire(server.port):
        with Wire(server.port, hello=False) as wire:
            assert wire.closed_by_server()
        server.wait_for(
            r"refused, there are 2 connections from 127\.0\.0\.1 already "
            r"\(--max-clients-per-address\)"
        )
        with socket.create_connection(
            ("127.0.0.1", server.port), 10, ("127.0.0.2", 0)
        ) as elsewhere:
            elsewhere.sendall(struct.pack("<BQ", Command.HELLO, 24) + bytes(24))
            assert elsewhere.recv(8)


# -- times


def test_no_hello(short: Short) -> None:
    server, _ = short
    with Wire(server.port, hello=False) as silent, Wire(server.port, hello=False) as partial:
        partial.socket.sendall(struct.pack("<BQ", Command.HELLO, 24) + bytes(10))
        assert silent.closed_by_server()
        assert partial.closed_by_server()
    closed_for(server, "--handshake-timeout", f"no HELLO within {SHORT} s")


def in_a_head(wire: Wire) -> None:
    wire.socket.sendall(struct.pack("<BQ", Command.ALLOC_BUFFER, 12) + bytes(3))


def in_a_graph(wire: Wire) -> None:
    wire.socket.sendall(struct.pack("<BQ", Command.GRAPH_COMPUTE, 5000) + bytes(100))


def in_an_upload(wire: Wire) -> None:
    handle, base = wire.alloc(MIB)
    fields = {"tensor": tensor(1, (MIB // 4,), handle, base), "offset": 0, "cache_flag": 0}
    head = codec(wire.dialect.commands[Command.SET_TENSOR].request).build(fields)
    wire.socket.sendall(struct.pack("<BQ", Command.SET_TENSOR, len(head) + MIB) + head + bytes(9))


@pytest.mark.parametrize("stage", [in_a_head, in_a_graph, in_an_upload])
def test_a_message_that_does_not_go_on(short: Short, stage: Callable[[Wire], None]) -> None:
    server, bystander = short
    with Wire(server.port) as wire:
        stage(wire)
        assert wire.closed_by_server()
    closed_for(server, "--stall-timeout", f"a message does not go on for {SHORT} s")
    bystander.check()


def test_a_message_that_trickles(short: Short) -> None:
    """Some bytes now and then are no progress."""
    server, bystander = short
    with Wire(server.port) as wire:
        in_an_upload(wire)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(200):
                wire.socket.sendall(bytes(10))
                time.sleep(0.05)
            raise AssertionError("it was let be")
    bystander.check()


def ask_for_large_answers(wire: Wire) -> None:
    _ask(wire, 1, 32 * MIB)


def ask_for_many_answers(wire: Wire) -> None:
    _ask(wire, 4000, 16 << 10)


def _ask(wire: Wire, times: int, size: int) -> None:
    handle, base = wire.alloc(size)
    fields = {"tensor": tensor(1, (size // 4,), handle, base), "offset": 0, "size": size}
    head = codec(wire.dialect.commands[Command.GET_TENSOR].request).build(fields)
    wire.socket.settimeout(0.5)
    with contextlib.suppress(OSError):
        for _ in range(times):
            wire.send(Command.GET_TENSOR, head)


@pytest.mark.parametrize("ask", [ask_for_large_answers, ask_for_many_answers])
def test_answers_that_are_not_taken(ask: Callable[[Wire], None]) -> None:
    with limited("--stall-timeout", SHORT) as (server, bystander):
        before = server.rss()
        with Wire(server.port) as wire:
            ask(wire)
            closed_for(server, "--stall-timeout", f"answers are not taken for {SHORT} s")
        bystander.check()
        # 32 MiB of its buffer may be there; 64 MiB of answers must not have been gathered.
        assert server.peak_rss() - before < 48 * MIB


@pytest.mark.slow
def test_a_client_that_asks_nothing() -> None:
    with running("--threads", "1", "--idle-timeout", SHORT) as server, Wire(server.port) as wire:
        for _ in range(12):
            wire.call(Command.GET_ALIGNMENT, {"device": 0})
            time.sleep(0.2)
        assert wire.closed_by_server()
        closed_for(server, "--idle-timeout", f"idle for {SHORT} s")


def test_a_graph_that_takes_too_long(short: Short) -> None:
    server, bystander = short
    with Wire(server.port) as wire:
        wire.send(Command.GRAPH_COMPUTE, endless(wire))
        assert wire.closed_by_server()
    closed_for(server, "--graph-timeout", f"a graph runs longer than {GRAPH} s")
    # The device is free again.
    bystander.check()


def test_a_graph_of_a_client_that_is_gone() -> None:
    with limited() as (server, bystander):
        with Wire(server.port) as wire:
            wire.send(Command.GRAPH_COMPUTE, endless(wire))
            time.sleep(0.2)
        started = time.monotonic()
        bystander.check()
        assert time.monotonic() - started < 10
        server.wait_for(r"disconnected; freed 1 buffers")


@contextlib.contextmanager
def running_a_program(server: ServerProcess) -> Iterator[Wire]:
    """A coordinator whose program waits for its input, and with it the device."""
    dialect = with_split(DIALECTS[0])
    with Wire(server.port, dialect, hello=False) as wire:
        wire.send(Command.HELLO, split_caps())
        wire.answer(Command.HELLO)
        handle, base = wire.alloc(4096)
        a = tensor(1, (8,), handle, base)
        c = tensor(2, (8,), handle, base + 64, op=wire.op("ADD"), src=sources(1, 1))
        tensors = decode_graph(wire.graph([c], [a]), dialect).tensors
        program = encode_program([ProgramStep((1,), (2,), (2,))], tensors)
        wire.call(Command.SPLIT_PROGRAM, {"device": 0, "program": 0}, program)
        # Once to show that it works.
        wire.call(Command.SPLIT_RUN, {"device": 0, "program": 0})
        wire.socket.sendall(np.ones(8, np.float32).tobytes())
        assert np.frombuffer(wire.read(32), np.float32).tolist() == [2.0] * 8
        wire.call(Command.SPLIT_RUN, {"device": 0, "program": 0})
        yield wire


def test_a_coordinator_that_falls_silent(short: Short) -> None:
    """Its program holds the device for a bounded time."""
    server, bystander = short
    with running_a_program(server) as wire:
        port = wire.socket.getsockname()[1]
        bystander.check()
        assert wire.closed_by_server()
    server.wait_for(rf"client \d+ \([^)]*:{port}\)[^\n]*did not answer in time \(--peer-timeout\)")


def test_a_coordinator_that_trickles(short: Short) -> None:
    """A byte before each time limit is no progress."""
    server, bystander = short
    with running_a_program(server) as wire:
        port = wire.socket.getsockname()[1]
        with contextlib.suppress(ConnectionError):
            # Not all that the program waits for: 32 bytes.
            for _ in range(30):
                wire.socket.sendall(bytes(1))
                time.sleep(0.15)
        # Already, and not only some time after the last byte.
        wire.socket.settimeout(0.05)
        assert wire.closed_by_server()
        bystander.check()
    server.wait_for(rf"client \d+ \([^)]*:{port}\)[^\n]*did not answer in time \(--peer-timeout\)")


# -- the rules by themselves


class Peer:
    """What the sweep sees."""

    def __init__(self) -> None:
        self.handled = self.received = self.taken = 0
        self.greeted = True
        self.awaits_rest = self.awaits_taking = False
        self.at_rest = True
        self.running = 0.0
        self.ended: list[str] = []

    def graph_seconds(self, now: float) -> float:
        return self.running

    def overran(self, error: Exception) -> None:
        self.ended.append(str(error))

    def end(self, error: Exception) -> None:
        self.ended.append(str(error))


def test_a_slow_message_that_goes_on_is_let_be() -> None:
    clock, peer = Deadlines(ServerLimits(stall=60), 0), Peer()
    peer.awaits_rest = True
    for second in range(1000):
        peer.received += 2000
        clock.look(peer, second)
    assert peer.ended == []
    for second in range(1000, 1100):
        peer.received += 500
        clock.look(peer, second)
    assert any("--stall-timeout" in text for text in peer.ended)


def test_many_small_messages_are_no_stall() -> None:
    """By chance each look may find it within one."""
    clock, peer = Deadlines(ServerLimits(stall=60), 0), Peer()
    peer.awaits_rest = True
    for second in range(1000):
        peer.received += 20
        peer.handled += 1
        clock.look(peer, second)
    assert peer.ended == []


def test_no_limit_is_none() -> None:
    clock, peer = Deadlines(ServerLimits(stall=None, graph=None, idle=None), 0), Peer()
    peer.awaits_rest = peer.awaits_taking = True
    peer.running = 1e9
    clock.look(peer, 1e9)
    assert peer.ended == []


def test_figures_outlive_their_client() -> None:
    stats = ServerStats()
    client = ClientStats(number=1)
    stats.connected(client)
    client.bytes_in += 10
    client.commands[Command.GET_TENSOR] += 2
    client.graph(3, 0.004)
    before = stats.total()
    stats.disconnected(client)
    after = stats.total()
    assert before.by_command() == after.by_command() == {"GET_TENSOR": 2}
    assert (after.bytes_in, after.graphs, after.nodes, sum(after.graph_times)) == (10, 1, 3, 1)
    assert stats.clients == {}
