"""What each command does, in every dialect, over a real socket."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import DIALECTS, Dialect
from tests.parameters import mostly_slow
from tests.server.process import ClosedError, ServerProcess, Wire, running, sources, tensor

MAJORS = [d for d in DIALECTS if d.version in {(7, 0, 0), (5, 1, 0), (3, 0, 0), (1, 0, 0)}]


@pytest.fixture(params=mostly_slow(DIALECTS, quick=3), ids=lambda d: d.name)
def dialect(request: pytest.FixtureRequest) -> Dialect:
    made: Dialect = request.param
    return made


def test_a_client_of_every_dialect_computes(dialect: Dialect) -> None:
    """From HELLO to the result of a graph, with the server pinned to the client's version."""
    major, minor, _ = dialect.version
    with (
        running("--protocol", f"{major}.{minor}", "--log-level", "debug") as server,
        Wire(server.port, dialect) as wire,
    ):
        assert wire.version is not None
        assert wire.version[0] == major
        assert wire.version[1] <= minor
        if Command.DEVICE_COUNT in dialect.commands:
            assert wire.call(Command.DEVICE_COUNT).device_count == 1
        assert wire.call(Command.GET_ALIGNMENT, {"device": 0}).alignment in (32, 64, 128)
        assert wire.call(Command.GET_MAX_SIZE, {"device": 0}).max_size > 1 << 40
        memory = wire.call(Command.GET_DEVICE_MEMORY, {"device": 0})
        assert 0 < memory.free_mem <= memory.total_mem

        handle, base = wire.alloc(4096)
        a = tensor(1, (8, 2), handle, base)
        b = tensor(2, (8, 1), handle, base + 64)
        c = tensor(3, (8, 2), handle, base + 128, op=wire.op("ADD"), src=sources(1, 2))
        x = np.arange(16, dtype=np.float32).reshape(2, 8)
        y = np.linspace(-1, 1, 8, dtype=np.float32)
        wire.set_tensor(a, x.tobytes())
        wire.set_tensor(b, y.tobytes())
        wire.call(Command.INIT_TENSOR, {"tensor": c})
        size = {"device": 0, "tensor": c, "srcs": [a, b] + [tensor(0, (0,))] * 8}
        assert wire.call(Command.GET_ALLOC_SIZE, size).alloc_size >= 64
        wire.compute([c], [a, b])
        result = np.frombuffer(wire.get_tensor(c, 64), np.float32).reshape(2, 8)
        np.testing.assert_array_equal(result, x + y)

        if Command.GRAPH_RECOMPUTE in dialect.commands:
            wire.set_tensor(a, (2 * x).tobytes())
            wire.call(Command.GRAPH_RECOMPUTE, {"device": 0})
            result = np.frombuffer(wire.get_tensor(c, 64), np.float32).reshape(2, 8)
            np.testing.assert_array_equal(result, 2 * x + y)
        assert wire.call(Command.COPY_TENSOR, {"src": b, "dst": a}).result == 1
        assert wire.get_tensor(a, 32) == y.tobytes()
        if Command.MEMSET_TENSOR in dialect.commands:
            fields = {"tensor": b, "offset": 4, "size": 8, "value": 7}
            wire.call(Command.MEMSET_TENSOR, fields)
            expected = y.tobytes()[:4] + b"\x07" * 8 + y.tobytes()[12:]
            assert wire.get_tensor(b, 32) == expected
        wire.call(Command.BUFFER_CLEAR, {"remote_ptr": handle, "value": 3})
        assert wire.get_tensor(a, 32, offset=16) == b"\x03" * 32
        hashed = {"tensor": a, "offset": 0, "hash": 0x1234}
        assert wire.call(Command.SET_TENSOR_HASH, hashed).result == 0
        wire.call(Command.FREE_BUFFER, {"remote_ptr": handle})
        server.wait_for("speaks protocol")


def test_memory_is_zero_and_private(server: ServerProcess) -> None:
    with Wire(server.port) as one, Wire(server.port) as two:
        handle, base = one.alloc(1 << 20)
        assert one.get_tensor(tensor(1, (1 << 18,), handle, base), 1 << 20) == bytes(1 << 20)
        two.send(Command.BUFFER_GET_BASE, handle.to_bytes(8, "little"))
        assert two.closed_by_server()
        server.wait_for(f"{handle:#x} is no buffer of this client")
        assert len(one.get_tensor(tensor(1, (4,), handle, base), 16)) == 16


def test_large_tensors_arrive_whole(server: ServerProcess) -> None:
    rng = np.random.default_rng(1)
    data = rng.integers(0, 256, 30 << 20, np.uint8).tobytes()
    with Wire(server.port) as wire:
        handle, base = wire.alloc(len(data))
        whole = tensor(1, (len(data) // 4,), handle, base)
        for start in range(0, len(data), 10 << 20):
            wire.set_tensor(whole, data[start : start + (10 << 20)], start)
        assert wire.get_tensor(whole, len(data)) == data


def test_answers_come_in_order_when_requests_are_pipelined(server: ServerProcess) -> None:
    """A big answer in flight is not touched by what the client has already sent behind it."""
    size = 8 << 20
    with Wire(server.port) as wire:
        handle, base = wire.alloc(size)
        whole = tensor(1, (size // 4,), handle, base)
        wire.call(Command.BUFFER_CLEAR, {"remote_ptr": handle, "value": 1})
        fields = {"tensor": whole, "offset": 0, "size": size}
        get = codec(wire.dialect.commands[Command.GET_TENSOR].request).build(fields)
        for value in (2, 3, 4):
            wire.send(Command.GET_TENSOR, get)
            wire.send(Command.BUFFER_CLEAR, handle.to_bytes(8, "little") + bytes([value]))
        for value in (1, 2, 3):
            assert wire.read_answer() == bytes([value]) * size


def test_no_memory_is_answered_and_not_fatal(server: ServerProcess) -> None:
    with Wire(server.port) as wire:
        answer = wire.call(Command.ALLOC_BUFFER, {"device": 0, "size": 1 << 60})
        assert (answer.remote_ptr, answer.remote_size) == (0, 0)
        wire.alloc(16)


def test_mem_option_bounds_all_clients_together() -> None:
    with running("--mem", "8") as server, Wire(server.port) as one, Wire(server.port) as two:
        assert one.call(Command.GET_DEVICE_MEMORY, {"device": 0}).total_mem == 8 << 20
        handle, _ = one.alloc(6 << 20)
        assert two.call(Command.GET_DEVICE_MEMORY, {"device": 0}).free_mem == 2 << 20
        assert two.call(Command.ALLOC_BUFFER, {"device": 0, "size": 3 << 20}).remote_ptr == 0
        one.call(Command.FREE_BUFFER, {"remote_ptr": handle})
        one.call(Command.DEVICE_COUNT)
        two.alloc(3 << 20)


def test_memory_of_a_client_that_dies_is_freed(server: ServerProcess) -> None:
    size = 256 << 20
    before = server.rss()
    wire = Wire(server.port)
    handle, base = wire.alloc(size)
    wire.call(Command.BUFFER_CLEAR, {"remote_ptr": handle, "value": 1})
    assert wire.get_tensor(tensor(1, (4,), handle, base), 16) == b"\x01" * 16
    assert server.rss() > before + size * 0.9
    # An upload of which half comes.
    fields = {"tensor": tensor(1, (size // 4,), handle, base), "offset": 0, "cache_flag": 0}
    head = codec(wire.dialect.commands[Command.SET_TENSOR].request).build(fields)
    wire.socket.sendall(struct.pack("<BQ", Command.SET_TENSOR, len(head) + size) + head)
    wire.socket.sendall(bytes(size // 2))
    wire.socket.close()
    server.wait_for(r"hung up within SET_TENSOR")
    server.wait_for(r"freed 1 buffers, 256\.0 MiB")
    assert server.rss() < before + size * 0.1


def test_recompute_without_a_graph_is_refused(server: ServerProcess) -> None:
    with Wire(server.port) as wire:
        wire.send(Command.GRAPH_RECOMPUTE, bytes(4))
        assert wire.closed_by_server()


def test_a_freed_buffer_ends_its_graphs(server: ServerProcess) -> None:
    with Wire(server.port) as wire:
        handle, base = wire.alloc(4096)
        a = tensor(1, (8,), handle, base)
        c = tensor(2, (8,), handle, base + 64, op=wire.op("ADD"), src=sources(1, 1))
        wire.compute([c], [a])
        wire.call(Command.FREE_BUFFER, {"remote_ptr": handle})
        wire.send(Command.GRAPH_RECOMPUTE, bytes(4))
        with pytest.raises(ClosedError):
            wire.read(1)
