"""Bad input: a clear log line, a closed connection, and nobody else notices.

What is sent here other servers refuse as well. The rest of what is refused has its tests where it
is refused, without a message: ``tests/graph/test_parse.py`` what tensors say of their places,
``tests/ops/test_refusals.py`` what nodes ask for, ``tests/server/test_memory.py`` ranges of bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from protocol.codec import codec
from protocol.commands import Command
from tests.server.process import ServerProcess, Wire, sources, tensor

BUFFER = 4096


class Attack:
    """A connection with one buffer, about to send what it must not."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.handle, self.base = wire.alloc(BUFFER)

    def leaf(self, id: int, ne: tuple[int, ...] = (8,), at: int = 0, **fields: Any) -> Any:
        return tensor(id, ne, self.handle, self.base + at, **fields)

    def add(self, id: int, *src: int, at: int = 1024, **fields: Any) -> Any:
        return self.leaf(id, at=at, op=self.wire.op("ADD"), src=sources(*src), **fields)

    def graph(self, nodes: list[Any], leaves: list[Any]) -> None:
        self.wire.send(Command.GRAPH_COMPUTE, self.wire.graph(nodes, leaves))

    def request(self, command: Command, **fields: Any) -> None:
        head = codec(self.wire.dialect.commands[command].request).build(fields)
        self.wire.send(command, head)


def unknown_command(a: Attack) -> None:
    a.wire.send(77, b"abc")


def size_beyond_the_limit(a: Attack) -> None:
    a.wire.socket.sendall(struct.pack("<BQ", Command.GRAPH_COMPUTE, 1 << 62))


def wrong_size(a: Attack) -> None:
    a.wire.send(Command.ALLOC_BUFFER, bytes(5))


def graph_counts_that_do_not_fit(a: Attack) -> None:
    a.wire.send(Command.GRAPH_COMPUTE, struct.pack("<II", 0, 0xFFFFFFFF) + bytes(100))


def unknown_type(a: Attack) -> None:
    a.graph([a.add(2, 1, 1)], [{**a.leaf(1), "type": 5000}])


def removed_type(a: Attack) -> None:
    a.graph([a.add(2, 1, 1)], [{**a.leaf(1), "type": 4}])


def data_in_no_buffer(a: Attack) -> None:
    a.graph([a.add(2, 1, 1)], [{**a.leaf(1), "buffer": 0xDEAD}])


def source_that_is_missing(a: Attack) -> None:
    a.graph([a.add(2, 1, 99)], [a.leaf(1)])


def node_that_is_missing(a: Attack) -> None:
    payload = bytearray(a.wire.graph([a.add(2, 1, 1)], [a.leaf(1)]))
    payload[8:16] = struct.pack("<Q", 12345)
    a.wire.send(Command.GRAPH_COMPUTE, bytes(payload))


def cycle(a: Attack) -> None:
    a.graph([a.add(2, 1, 3), a.add(3, 2, 1, at=2048)], [a.leaf(1)])


def own_source(a: Attack) -> None:
    a.graph([a.add(2, 1, 2)], [a.leaf(1)])


def same_id_twice(a: Attack) -> None:
    a.graph([a.add(2, 1, 1)], [a.leaf(1), a.leaf(1)])


def upload_beyond_the_buffer(a: Attack) -> None:
    fields = {"tensor": a.leaf(1), "offset": BUFFER - 4, "cache_flag": 0}
    head = codec(a.wire.dialect.commands[Command.SET_TENSOR].request).build(fields)
    a.wire.send(Command.SET_TENSOR, head + bytes(8))


def upload_offset_that_wraps(a: Attack) -> None:
    fields = {"tensor": a.leaf(1), "offset": (1 << 64) - 64, "cache_flag": 0}
    head = codec(a.wire.dialect.commands[Command.SET_TENSOR].request).build(fields)
    a.wire.send(Command.SET_TENSOR, head + bytes(64))


def download_beyond_the_buffer(a: Attack) -> None:
    a.request(Command.GET_TENSOR, tensor=a.leaf(1), offset=0, size=BUFFER + 1)


def download_that_wraps(a: Attack) -> None:
    a.request(Command.GET_TENSOR, tensor=a.leaf(1), offset=8, size=(1 << 64) - 4)


def memset_beyond_the_buffer(a: Attack) -> None:
    a.request(Command.MEMSET_TENSOR, tensor=a.leaf(1), offset=0, size=1 << 40, value=1)


def copy_to_behind_the_buffer(a: Attack) -> None:
    a.request(Command.COPY_TENSOR, src=a.leaf(1, (64,)), dst=a.leaf(2, at=BUFFER - 32))


def free_of_no_buffer(a: Attack) -> None:
    a.request(Command.FREE_BUFFER, remote_ptr=a.handle + 12345)


def free_twice(a: Attack) -> None:
    a.request(Command.FREE_BUFFER, remote_ptr=a.handle)
    a.request(Command.FREE_BUFFER, remote_ptr=a.handle)


def upload_of_no_type(a: Attack) -> None:
    head = {"tensor": {**a.leaf(1), "type": 77}, "offset": 0, "cache_flag": 0}
    built = codec(a.wire.dialect.commands[Command.SET_TENSOR].request).build(head)
    a.wire.send(Command.SET_TENSOR, built + bytes(8))


def device_that_is_not_there(a: Attack) -> None:
    a.request(Command.GET_ALIGNMENT, device=7)


def graph_for_no_device(a: Attack) -> None:
    payload = bytearray(a.wire.graph([a.add(2, 1, 1)], [a.leaf(1)]))
    payload[0:4] = struct.pack("<I", 3)
    a.wire.send(Command.GRAPH_COMPUTE, bytes(payload))


# What is sent, and what the log says of it.
ATTACKS: list[tuple[Callable[[Attack], None], str]] = [
    (unknown_command, "unknown command 77"),
    (size_beyond_the_limit, "the limit is"),
    (wrong_size, "ALLOC_BUFFER of 5 bytes, it takes 12"),
    (graph_counts_that_do_not_fit, "can't hold 4294967295 nodes"),
    (unknown_type, "unknown type 5000"),
    (removed_type, "unknown type 4"),
    (data_in_no_buffer, "data of source 0 't1' not here"),
    (source_that_is_missing, "source 0x63 is not in the graph"),
    (node_that_is_missing, "node 0x3039 is not among"),
    (cycle, "depends on itself"),
    (own_source, "depends on itself"),
    (same_id_twice, "occurs twice"),
    (upload_beyond_the_buffer, "outside the buffer"),
    (upload_offset_that_wraps, "outside the buffer"),
    (download_beyond_the_buffer, "outside the buffer"),
    (download_that_wraps, "outside the buffer"),
    (memset_beyond_the_buffer, "outside the buffer"),
    (copy_to_behind_the_buffer, "outside the buffer"),
    (free_of_no_buffer, "is no buffer of this client"),
    (free_twice, "is no buffer of this client"),
    (upload_of_no_type, "unknown type 77"),
    (device_that_is_not_there, "for device 7, this server has 1"),
    (graph_for_no_device, "for device 3, this server has 1"),
]


@pytest.fixture(scope="module")
def bystander(server: ServerProcess) -> Iterator[Callable[[], None]]:
    """Another client with data and a graph; calling it checks that both are as they were."""
    with Wire(server.port) as wire:
        handle, base = wire.alloc(1 << 16)
        values = np.arange(1024, dtype=np.float32)
        a = tensor(1, (1024,), handle, base)
        c = tensor(2, (1024,), handle, base + 8192, op=wire.op("ADD"), src=sources(1, 1))
        wire.set_tensor(a, values.tobytes())
        wire.compute([c], [a])

        def check() -> None:
            wire.call(Command.GRAPH_RECOMPUTE, {"device": 0})
            assert wire.get_tensor(c, 4096) == (2 * values).tobytes()
            assert wire.get_tensor(a, 4096) == values.tobytes()

        yield check


@pytest.mark.parametrize(("attack", "message"), ATTACKS, ids=[a.__name__ for a, _ in ATTACKS])
def test_bad_input(
    server: ServerProcess,
    bystander: Callable[[], None],
    attack: Callable[[Attack], None],
    message: str,
) -> None:
    before = len(server.log)
    with Wire(server.port) as wire:
        attack(Attack(wire))
        assert wire.closed_by_server()
    server.wait_for(rf"(?s)^.{{{before}}}.*ERROR[^\n]*{message}[^\n]*closing the connection")
    assert "Traceback" not in server.log
    bystander()


def test_a_stream_that_is_not_ggml_rpc(server: ServerProcess) -> None:
    with Wire(server.port, hello=False) as wire:
        wire.socket.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert wire.closed_by_server()
    server.wait_for("not ggml RPC")
