"""What goes wrong around a server: clients that vanish, and machines that have run out of things.

Whatever it is, others are served on, and when it is over the server is as it was before.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import DIALECTS
from protocol.ggml.hashing import fnv1a_64
from tests.server.process import ClosedError, ServerProcess, Wire, running, sources, tensor

if sys.platform != "win32":
    import resource

MIB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="sets limits of another process")


@contextlib.contextmanager
def sound(*options: str) -> Iterator[ServerProcess]:
    """A server that is there at the end, without an error of its own."""
    with running("--mem", "512", "--threads", "1", *options) as started:
        yield started
        assert started.alive, started.log
        assert "Traceback" not in started.log
        assert "never retrieved" not in started.log


@pytest.fixture(scope="module")
def shared() -> Iterator[ServerProcess]:
    """For clients that go: they leave nothing."""
    with sound() as started:
        yield started


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    """For what is done to the process."""
    with sound() as started:
        yield started


def used(server: ServerProcess) -> int:
    """Bytes that clients have."""
    with Wire(server.port) as wire:
        memory = wire.call(Command.GET_DEVICE_MEMORY, {"device": 0})
        return int(memory.total_mem - memory.free_mem)


def freed(server: ServerProcess) -> None:
    """Wait until nothing is left of the clients that are gone."""
    server.wait_until(lambda: used(server) == 0, 20, "memory of lost clients")


def reset(wire: Wire) -> None:
    """End a connection as the death of a process with unread answers does."""
    wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wire.socket.close()


class Bystander:
    """Another client; calling it checks that it is served, and that its bytes are as they were."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.values = np.arange(1024, dtype=np.float32)
        handle, base = wire.alloc(8192)
        self.a = tensor(1, (1024,), handle, base)
        self.c = tensor(2, (1024,), handle, base + 4096, op=wire.op("ADD"), src=sources(1, 1))
        wire.set_tensor(self.a, self.values.tobytes())
        self()

    def __call__(self) -> None:
        self.wire.compute([self.c], [self.a])
        assert self.wire.get_tensor(self.c, 4096) == (2 * self.values).tobytes()
        assert self.wire.get_tensor(self.a, 4096) == self.values.tobytes()


# -- clients that vanish


def within_an_upload(wire: Wire) -> None:
    handle, base = wire.alloc(64 * MIB)
    whole = tensor(1, (16 * MIB,), handle, base)
    head = codec(wire.dialect.commands[Command.SET_TENSOR].request).build(
        {"tensor": whole, "offset": 0, "cache_flag": 1}
    )
    size = len(head) + 64 * MIB
    wire.socket.sendall(struct.pack("<BQ", Command.SET_TENSOR, size) + head)
    wire.socket.sendall(bytes(20 * MIB + 7))


def within_a_head(wire: Wire) -> None:
    wire.alloc(64 * MIB)
    wire.socket.sendall(struct.pack("<BQ", Command.SET_TENSOR, 1000) + bytes(100))


def within_a_command(wire: Wire) -> None:
    wire.alloc(64 * MIB)
    wire.socket.sendall(struct.pack("<BQ", Command.GET_ALIGNMENT, 4)[:5])


def within_a_graph_on_the_wire(wire: Wire) -> None:
    handle, base = wire.alloc(64 * MIB)
    payload = wire.graph(*chain(wire, handle, base, 500))
    wire.socket.sendall(struct.pack("<BQ", Command.GRAPH_COMPUTE, len(payload)) + payload[:-100])


def within_a_graph(wire: Wire) -> None:
    """One of seconds."""
    handle, base = wire.alloc(64 * MIB)
    wire.send(Command.GRAPH_COMPUTE, wire.graph(*chain(wire, handle, base, 1500)))
    time.sleep(0.2)


def begin_an_answer(wire: Wire) -> None:
    """Ask for more than sockets hold, and take the first of it."""
    handle, base = wire.alloc(64 * MIB)
    fields = {"tensor": tensor(1, (16 * MIB,), handle, base), "offset": 0, "size": 64 * MIB}
    request = codec(wire.dialect.commands[Command.GET_TENSOR].request).build(fields)
    wire.send(Command.GET_TENSOR, request)
    wire.read(MIB)


def chain(wire: Wire, handle: int, base: int, n: int) -> tuple[list[Any], list[Any]]:
    """Nodes and leaf of a graph of ``n`` sums, each of 8 MiB and after the other."""
    leaf = tensor(1, (2 * MIB,), handle, base)
    nodes = [
        tensor(
            i,
            (2 * MIB,),
            handle,
            base + (i % 2 + 1) * 8 * MIB,
            op=wire.op("ADD"),
            src=sources(i - 1, 1),
        )
        for i in range(2, n + 2)
    ]
    return nodes, [leaf]


STAGES: list[Callable[[Wire], None]] = [
    within_an_upload,
    within_a_head,
    within_a_command,
    within_a_graph_on_the_wire,
    within_a_graph,
]


@pytest.mark.parametrize("end", ["closed", "reset", "half"])
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_a_client_ends(shared: ServerProcess, stage: Callable[[Wire], None], end: str) -> None:
    """Its process ends, is killed with answers unread, or closes its half of the connection."""
    with Wire(shared.port) as other, Wire(shared.port) as wire:
        bystander = Bystander(other)
        before = 8192
        stage(wire)
        if end == "half":
            wire.socket.shutdown(socket.SHUT_WR)
            # What was asked before may still be answered.
            assert wire.closed_by_server()
        elif end == "reset":
            reset(wire)
        else:
            wire.socket.close()
        shared.wait_until(lambda: used(shared) == before, 20, "memory of the lost client")
        bystander()
    freed(shared)


def test_a_client_that_takes_its_answer_says_no_more(shared: ServerProcess) -> None:
    """It closes its half of the connection, and what was asked before is still answered."""
    with Wire(shared.port) as other, Wire(shared.port) as wire:
        bystander = Bystander(other)
        begin_an_answer(wire)
        wire.socket.shutdown(socket.SHUT_WR)
        assert wire.closed_by_server()
        bystander()
    freed(shared)


@pytest.mark.parametrize("dialect", [DIALECTS[0], DIALECTS[-1]], ids=lambda d: d.name)
@pytest.mark.parametrize("sent", [0, 1, 8, 20])
def test_a_client_ends_within_its_hello(shared: ServerProcess, dialect: Any, sent: int) -> None:
    hello = struct.pack("<BQ", Command.HELLO, dialect.hello_size) + bytes(dialect.hello_size)
    with Wire(shared.port, hello=False) as wire:
        wire.socket.sendall(hello[:sent])
    with Wire(shared.port) as wire:
        Bystander(wire)


def test_many_clients_end_at_once(shared: ServerProcess) -> None:
    with Wire(shared.port) as other:
        bystander = Bystander(other)
        wires = [Wire(shared.port) for _ in range(20)]
        for i, wire in enumerate(wires):
            handle, base = wire.alloc(4 * MIB)
            wire.send(Command.GET_ALIGNMENT, struct.pack("<I", 0))
            if i % 2:
                head = {"tensor": tensor(1, (MIB,), handle, base), "offset": 0, "cache_flag": 0}
                built = codec(wire.dialect.commands[Command.SET_TENSOR].request).build(head)
                frame = struct.pack("<BQ", Command.SET_TENSOR, len(built) + 4 * MIB)
                wire.socket.sendall(frame + built + bytes(MIB))
        for wire in wires:
            reset(wire)
        shared.wait_until(lambda: used(shared) == 8192, 20, "memory of the lost clients")
        bystander()


@linux
def test_a_machine_that_is_gone_is_noticed(shared: ServerProcess) -> None:
    """Nobody says so then: the system asks, by the timer that the connection has (2)."""
    with Wire(shared.port) as wire:
        ours = wire.socket.getsockname()[1]
        ends = (f":{shared.port:04X}", f":{ours:04X}")

        def timers() -> list[str]:
            rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
            found = [row for row in rows if row[1].endswith(ends[0]) and row[2].endswith(ends[1])]
            return [row[5].partition(":")[0] for row in found]

        # Until the last answer is acknowledged it is the timer of that (1).
        shared.wait_until(lambda: timers() == ["02"], 20, "timer of an idle connection")


# -- a machine that has run out of something


@contextlib.contextmanager
def limited(server: ServerProcess, what: int, value: int) -> Iterator[None]:
    """A limit of the server's process, while it runs."""
    before = resource.prlimit(server.child.pid, what)
    resource.prlimit(server.child.pid, what, (value, before[1]))
    try:
        yield
    finally:
        resource.prlimit(server.child.pid, what, before)


def address_space(server: ServerProcess) -> int:
    pages = Path(f"/proc/{server.child.pid}/statm").read_text().split()[0]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@linux
def test_no_memory_for_a_buffer(server: ServerProcess) -> None:
    """As --mem, but it's the system that has none left: the client is told so, and may go on."""
    with Wire(server.port) as wire:
        bystander = Bystander(wire)
        with limited(server, resource.RLIMIT_AS, address_space(server) + 32 * MIB):
            with pytest.raises(MemoryError):
                wire.alloc(128 * MIB)
            bystander()
        wire.alloc(128 * MIB)
    assert "no buffer of 134217728 bytes" in server.log
    freed(server)


@linux
def test_no_memory_within_a_graph(server: ServerProcess) -> None:
    """An op without a kernel makes arrays as large as its tensors."""
    with Wire(server.port) as other, Wire(server.port) as wire:
        # With these the memory that graphs use is there: a client's own, and what all share.
        bystander = Bystander(other)
        Bystander(wire)()
        handle, base = wire.alloc(256 * MIB)
        leaf = tensor(1, (32 * MIB,), handle, base)
        roll: dict[str, Any] = {
            "op": wire.op("ROLL"),
            "src": sources(1),
            "op_params": [1] + [0] * 15,
        }
        node = tensor(2, (32 * MIB,), handle, base + 128 * MIB, **roll)
        payload = wire.graph([node], [leaf])
        with limited(server, resource.RLIMIT_AS, address_space(server) + 32 * MIB):
            wire.send(Command.GRAPH_COMPUTE, payload)
            assert wire.closed_by_server()
            bystander()
        # With memory there it is computed.
        with Wire(server.port) as again:
            handle, base = again.alloc(2 * MIB)
            leaf = tensor(1, (1024,), handle, base)
            again.set_tensor(leaf, np.arange(1024, dtype=np.float32).tobytes())
            node = tensor(2, (1024,), handle, base + MIB, **roll)
            again.compute([node], [leaf])
            rolled = np.frombuffer(again.get_tensor(node, 4096), np.float32)
            assert (rolled == np.roll(np.arange(1024), 1)).all()
    server.wait_for(r"ERROR[^\n]*ROLL 't2'[^\n]*; closing the connection")
    freed(server)


@linux
def test_no_memory_for_a_message(server: ServerProcess) -> None:
    with Wire(server.port) as other, Wire(server.port) as wire:
        bystander = Bystander(other)
        with limited(server, resource.RLIMIT_AS, address_space(server) + 16 * MIB):
            with contextlib.suppress(ConnectionError):
                wire.send(Command.GRAPH_COMPUTE, bytes(60 * MIB))
            assert wire.closed_by_server()
            bystander()
    server.wait_for(r"ERROR[^\n]*out of memory; closing the connection")


@linux
def test_no_more_open_files(server: ServerProcess) -> None:
    """Clients that are in stay; others get in when some have gone."""
    with Wire(server.port) as other:
        bystander = Bystander(other)
        n_files = len(list(Path(f"/proc/{server.child.pid}/fd").iterdir()))
        with limited(server, resource.RLIMIT_NOFILE, n_files + 3), contextlib.ExitStack() as stack:
            for _ in range(10):
                with contextlib.suppress(OSError):
                    stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 5))
            bystander()
            time.sleep(0.3)
            bystander()
    with Wire(server.port) as wire:
        Bystander(wire)


@linux
def test_a_disk_that_is_full_is_nothing_to_clients(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(12 * MIB)
    with running("--cache-dir", str(tmp_path)) as server, Wire(server.port) as wire:
        handle, base = wire.alloc(len(data))
        whole = tensor(1, (len(data) // 4,), handle, base)
        fields = {"tensor": whole, "offset": 0, "cache_flag": 1}
        with limited(server, resource.RLIMIT_FSIZE, MIB):
            wire.call(Command.SET_TENSOR, fields, data)
            assert wire.get_tensor(whole, len(data)) == data
        assert "could not cache" in server.log
        assert [p for p in tmp_path.iterdir() if p.is_file()] == []
        wire.call(Command.SET_TENSOR, fields, data)
        assert wire.get_tensor(whole, len(data)) == data
        assert len([p for p in tmp_path.iterdir() if p.is_file()]) == 1


# -- the server itself


def test_sigterm_while_a_graph_runs() -> None:
    """Who has asked for something gets it; who comes now does not get in."""
    with running("--threads", "1") as server, Wire(server.port) as wire:
        handle, base = wire.alloc(64 * MIB)
        nodes, (leaf,) = chain(wire, handle, base, 60)
        wire.set_tensor(leaf, np.ones(2 * MIB, np.float32).tobytes())
        wire.send(Command.GRAPH_COMPUTE, wire.graph(nodes, [leaf]))
        fields = {"tensor": nodes[-1], "offset": 0, "size": 8 * MIB}
        wire.send(
            Command.GET_TENSOR,
            codec(wire.dialect.commands[Command.GET_TENSOR].request).build(fields),
        )
        # They have arrived, that is.
        time.sleep(0.1)
        server.child.terminate()
        values = np.frombuffer(wire.read_answer(), np.float32)
        assert (values == 61).all()
        assert wire.closed_by_server()
        with pytest.raises((ClosedError, OSError)):
            Wire(server.port)
        assert server.child.wait(20) == 0


@linux
@pytest.mark.slow
def test_sigterm_and_a_graph_that_does_not_end() -> None:
    """It is stopped behind the node that it is at."""
    with running("--threads", "1", "--drain-seconds", "0.2") as server, Wire(server.port) as wire:
        handle, base = wire.alloc(64 * MIB)
        wire.send(Command.GRAPH_COMPUTE, wire.graph(*chain(wire, handle, base, 4000)))
        begun = seconds_of(server)
        server.wait_until(lambda: seconds_of(server) > begun + 0.5, 20, "graph on its way")
        server.child.terminate()
        assert wire.closed_by_server()
        assert server.child.wait(20) == 0
        assert "Traceback" not in server.log


def seconds_of(server: ServerProcess) -> float:
    """Processor time that the server has taken."""
    user = int(Path(f"/proc/{server.child.pid}/stat").read_text().rpartition(")")[2].split()[11])
    return user / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
def test_a_server_that_was_killed_starts_again_where_it_was(tmp_path: Path) -> None:
    """At once, on the same port, and with a cache that is sound."""
    data = np.random.default_rng(0).bytes(12 * MIB)
    options = ("--cache-dir", str(tmp_path))
    with running(*options) as server, Wire(server.port) as wire:
        port = server.port
        handle, base = wire.alloc(len(data))
        whole = tensor(1, (len(data) // 4,), handle, base)
        wire.call(Command.SET_TENSOR, {"tensor": whole, "offset": 0, "cache_flag": 1}, data)
        assert wire.get_tensor(whole, 4) == data[:4]
        # Within a second upload.
        other = {"tensor": whole, "offset": 0, "cache_flag": 1}
        built = codec(wire.dialect.commands[Command.SET_TENSOR].request).build(other)
        frame = struct.pack("<BQ", Command.SET_TENSOR, len(built) + len(data))
        wire.socket.sendall(frame + built + bytes(MIB))
        server.child.send_signal(signal.SIGKILL)
        server.child.wait()
        with pytest.raises((ClosedError, ConnectionError)):
            wire.call(Command.GET_ALIGNMENT, {"device": 0})
    with running(*options, "--port", str(port)) as server, Wire(server.port) as wire:
        handle, base = wire.alloc(len(data))
        whole = tensor(1, (len(data) // 4,), handle, base)
        offer = {"tensor": whole, "offset": 0, "hash": fnv1a_64(data)}
        assert wire.call(Command.SET_TENSOR_HASH, offer).result == 1
        assert wire.get_tensor(whole, len(data)) == data
