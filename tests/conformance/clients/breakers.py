"""Clients that break one rule each, for the test that the scripted server notices."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from client.backend import HASH_THRESHOLD
from conformance.suite.tensors import NO_TENSOR, Fields, graph_bytes, tensor
from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import DIALECTS
from protocol.ggml.hashing import fnv1a_64
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from tools.wire import Wire

_SIZE = 16384
_OVER = HASH_THRESHOLD + 4096


class Breaker:
    """A connection with a buffer, about to do something wrong."""

    def __init__(self, port: int) -> None:
        self.wire = Wire(port, timeout=10)
        # What most clients ask first, so that nothing but the rule in question is broken.
        self.wire.call(Command.DEVICE_COUNT)
        self.handle, self.base = self.wire.alloc(_SIZE)

    def leaf(self, ne: tuple[int, ...] = (8,), at: int = 0, **fields: Any) -> Fields:
        place = {"buffer": self.handle, "data": self.base + at}
        return tensor(fields.pop("id", 1), ne, **{**place, **fields})

    def node(self, op: Op, *src: int, at: int = 1024, **fields: Any) -> Fields:
        number = self.wire.dialect.op_number(op)
        sources = [*src, *[0] * (10 - len(src))]
        return self.leaf(at=at, op=number, src=sources, flags=16, **fields)

    def graph(self, nodes: list[Fields], leaves: list[Fields]) -> None:
        payload = graph_bytes(self.wire.dialect, nodes, leaves)
        self.wire.send(Command.GRAPH_COMPUTE, payload)

    def request(self, command: Command, body: bytes = b"", **fields: Any) -> None:
        head = codec(self.wire.dialect.commands[command].request).build(fields)
        self.wire.send(command, head, body)

    def ask_size(self, fields: Fields) -> int:
        asked = {"device": 0, "tensor": fields, "srcs": [NO_TENSOR] * 10}
        return int(self.wire.call(Command.GET_ALLOC_SIZE, asked).alloc_size)

    def free(self) -> None:
        self.request(Command.FREE_BUFFER, remote_ptr=self.handle)

    def large(self) -> Fields:
        """A tensor that is large enough to be offered by its hash."""
        handle, base = self.wire.alloc(_OVER)
        return tensor(1, (_OVER,), type=GgmlType.I8, buffer=handle, data=base)

    def offer(self, fields: Fields, digest: int) -> bool:
        asked = {"tensor": fields, "offset": 0, "hash": digest}
        return bool(self.wire.call(Command.SET_TENSOR_HASH, asked).result)


Break = Callable[[Breaker], None]
BREAKERS: dict[str, Break] = {}


def breaks(rule: str) -> Callable[[Break], Break]:
    def register(function: Break) -> Break:
        BREAKERS[rule] = function
        return function

    return register


@breaks("hello/once")
def second_hello(b: Breaker) -> None:
    b.wire.send(Command.HELLO, bytes(24))


@breaks("request/known")
def unknown_command(b: Breaker) -> None:
    b.wire.send(77, b"")


@breaks("request/size")
def wrong_size(b: Breaker) -> None:
    b.wire.send(Command.ALLOC_BUFFER, bytes(5))


@breaks("request/whole")
def half_a_request(b: Breaker) -> None:
    b.wire.socket.sendall(struct.pack("<BQ", Command.GET_ALIGNMENT, 4) + b"\0")


@breaks("device/exists")
def device_7(b: Breaker) -> None:
    b.request(Command.GET_ALIGNMENT, device=7)


@breaks("buffer/handle")
def handle_from_nowhere(b: Breaker) -> None:
    b.request(Command.BUFFER_GET_BASE, remote_ptr=0)


@breaks("buffer/freed")
def use_after_free(b: Breaker) -> None:
    b.free()
    b.request(Command.GET_TENSOR, tensor=b.leaf(), offset=0, size=4)


@breaks("buffer/max-size")
def more_than_the_largest(b: Breaker) -> None:
    b.wire.call(Command.ALLOC_BUFFER, {"device": 0, "size": 1 << 63})


@breaks("tensor/type")
def removed_type(b: Breaker) -> None:
    b.request(Command.GET_TENSOR, tensor=b.leaf() | {"type": 4}, offset=0, size=4)


@breaks("tensor/alignment")
def tensor_off_its_alignment(b: Breaker) -> None:
    b.wire.get_tensor(b.leaf(at=16), 4)


@breaks("tensor/alloc-size")
def no_room_behind(b: Breaker) -> None:
    weights = b.leaf((32, 7), type=GgmlType.Q4_0, at=_SIZE - 128)
    assert b.ask_size(weights) > 128
    b.request(Command.INIT_TENSOR, tensor=weights)
    b.request(Command.SET_TENSOR, bytes(126), tensor=weights, cache_flag=0, offset=0)


@breaks("set/range")
def upload_beyond_the_tensor(b: Breaker) -> None:
    b.request(Command.SET_TENSOR, bytes(33), tensor=b.leaf(), cache_flag=0, offset=_SIZE)


@breaks("get/range")
def download_beyond_the_tensor(b: Breaker) -> None:
    b.request(Command.GET_TENSOR, tensor=b.leaf(), offset=_SIZE, size=32)


@breaks("memset/range")
def memset_beyond_the_tensor(b: Breaker) -> None:
    b.request(Command.MEMSET_TENSOR, tensor=b.leaf(), offset=32, size=1, value=0)


@breaks("copy/range")
def copy_over_the_edge(b: Breaker) -> None:
    dst = b.leaf((8,), at=_SIZE - 64)
    b.request(Command.COPY_TENSOR, src=b.leaf((2048,)), dst=dst)


@breaks("hash/large")
def small_data_by_hash(b: Breaker) -> None:
    b.offer(b.leaf(), fnv1a_64(bytes(32)))
    b.wire.set_tensor(b.leaf(), bytes(32))


@breaks("hash/fnv")
def wrong_hash(b: Breaker) -> None:
    fields = b.large()
    b.offer(fields, 12345)
    b.request(Command.SET_TENSOR, bytes(_OVER), tensor=fields, cache_flag=1, offset=0)


@breaks("hash/data")
def no_data_after_a_miss(b: Breaker) -> None:
    b.offer(b.large(), 12345)


@breaks("hash/hit")
def data_after_a_hit(b: Breaker) -> None:
    fields, data = b.large(), bytes(_OVER)
    for _ in range(2):
        b.offer(fields, fnv1a_64(data))
        b.request(Command.SET_TENSOR, data, tensor=fields, cache_flag=1, offset=0)


@breaks("graph/counts")
def counts_that_lie(b: Breaker) -> None:
    b.wire.send(Command.GRAPH_COMPUTE, struct.pack("<II", 0, 100))


@breaks("graph/ids")
def source_that_is_missing(b: Breaker) -> None:
    b.graph([b.node(Op.SQR, 9, id=2)], [b.leaf()])


@breaks("graph/order")
def result_before_its_source(b: Breaker) -> None:
    first, second = b.node(Op.SQR, 1, id=2), b.node(Op.SQR, 2, id=3, at=2048)
    b.graph([second, first], [b.leaf()])


@breaks("graph/recompute")
def recompute_after_free(b: Breaker) -> None:
    b.graph([b.node(Op.SQR, 1, id=2)], [b.leaf()])
    b.free()
    b.wire.send(Command.GRAPH_RECOMPUTE, bytes(4))


@breaks("stream/answers")
def leave_before_the_answer(b: Breaker) -> None:
    fields = b.large()
    for _ in range(8):
        b.request(Command.GET_TENSOR, tensor=fields, offset=0, size=_OVER)


@breaks("buffer/all-freed")
def leave_a_buffer(b: Breaker) -> None:
    b.wire.call(Command.GET_ALIGNMENT, {"device": 0})


@breaks("alloc-size/asked")
def size_not_asked(b: Breaker) -> None:
    weights = b.leaf((32, 7), type=GgmlType.Q4_0)
    b.request(Command.INIT_TENSOR, tensor=weights)
    b.request(Command.SET_TENSOR, bytes(126), tensor=weights, cache_flag=0, offset=0)


@breaks("init/sent")
def not_initialised(b: Breaker) -> None:
    weights = b.leaf((32, 7), type=GgmlType.Q4_0)
    b.ask_size(weights)
    b.request(Command.SET_TENSOR, bytes(126), tensor=weights, cache_flag=0, offset=0)


def not_hello(port: int) -> None:
    """A connection that begins with another command: the one rule without a buffer."""
    with Wire(port, DIALECTS[0], hello=False) as wire:
        wire.send(Command.GET_ALIGNMENT, bytes(4))
        assert not wire.socket.recv(1)
