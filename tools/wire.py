"""One connection to a server over a plain blocking socket, a request at a time.

This is how llama.cpp speaks, with nothing of an event loop between the socket and whoever measures
or tests; ``client/`` is the client to use a server with. Requests and answers are built from the
declarations in ``protocol/``.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import DIALECTS, Answer, Dialect
from protocol.ggml.types import GgmlType, row_size
from protocol.graph_payload import GraphPayload, encode_graph
from protocol.messages import RPC_TENSOR_DTYPE
from protocol.requests import encode_frame

Bytes = bytes | bytearray | memoryview

NEWEST = DIALECTS[0]
# A body up to this is joined with its head: one segment, one system call.
_JOIN_UP_TO = 64 << 10


class ClosedError(Exception):
    """The server closed the connection."""


class Wire:
    """A connection; with ``hello`` (the default) ``version`` is what the server answered.

    ``timeout`` is in seconds: on a busy machine the kernels of a first graph are long in coming.
    """

    def __init__(
        self, port: int, dialect: Dialect = NEWEST, *, hello: bool = True, timeout: float = 120
    ) -> None:
        self.dialect = dialect
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.version: tuple[int, int, int] | None = None
        if hello:
            self.send(Command.HELLO, bytes(dialect.hello_size))
            answer = self.answer(Command.HELLO)
            self.version = (answer.major, answer.minor, answer.patch)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, command: int, payload: bytes, body: Bytes = b"") -> None:
        """Send a message: a command, its payload, and more payload that isn't copied if large."""
        size = len(payload) + len(body)
        head = encode_frame(command, size) + payload
        if len(body) <= _JOIN_UP_TO:
            self.socket.sendall(head + bytes(body))
        else:
            self.socket.sendall(head)
            self.socket.sendall(body)

    def read_into(self, target: memoryview) -> None:
        """Fill ``target`` from the stream. Raises ClosedError where it ends."""
        while target:
            try:
                n = self.socket.recv_into(target)
            except ConnectionError:
                n = 0
            if not n:
                raise ClosedError
            target = target[n:]

    def read(self, n: int) -> bytes:
        data = bytearray(n)
        self.read_into(memoryview(data))
        return bytes(data)

    def read_size(self) -> int:
        """Return the size that an answer begins with."""
        return int.from_bytes(self.read(8), "little")

    def read_answer(self) -> bytes:
        return self.read(self.read_size())

    def answer(self, command: Command) -> Any:
        """Return the answer to ``command``: a record, or bytes, or None where it has none."""
        spec = self.dialect.commands[command]
        if spec.answer is Answer.NEVER:
            return None
        body = self.read_answer()
        return body if spec.answer is Answer.DATA else codec(spec.response).parse(body)

    def call(
        self, command: Command, fields: Mapping[str, Any] | None = None, body: Bytes = b""
    ) -> Any:
        head = codec(self.dialect.commands[command].request).build(fields or {})
        self.send(command, head, body)
        return self.answer(command)

    # -- what most users need ------------------------------------------------------------------

    def alloc(self, size: int) -> tuple[int, int]:
        """Handle and base of a new buffer. Raises MemoryError where the server has no room."""
        answer = self.call(Command.ALLOC_BUFFER, {"device": 0, "size": size})
        if not answer.remote_ptr:
            raise MemoryError(f"no buffer of {size} bytes")
        base = self.call(Command.BUFFER_GET_BASE, {"remote_ptr": answer.remote_ptr})
        return answer.remote_ptr, base.base_ptr

    def set_tensor(self, tensor: Mapping[str, Any], data: Bytes, offset: int = 0) -> None:
        fields = {"tensor": tensor, "offset": offset, "cache_flag": 0}
        self.call(Command.SET_TENSOR, fields, data)

    def get_tensor(self, tensor: Mapping[str, Any], size: int, offset: int = 0) -> bytes:
        fields = {"tensor": tensor, "offset": offset, "size": size}
        answer = self.call(Command.GET_TENSOR, fields)
        assert isinstance(answer, bytes)
        return answer

    def graph(self, nodes: list[dict[str, Any]], leaves: list[dict[str, Any]]) -> bytes:
        return encode_graph(graph_of(nodes, leaves), self.dialect)

    def op(self, name: str) -> int:
        return next(i for i, op in enumerate(self.dialect.ops) if op == name)


def graph_of(nodes: list[dict[str, Any]], leaves: list[dict[str, Any]]) -> GraphPayload:
    """Return a graph of rpc_tensors that are given by their fields."""
    tensors = [*leaves, *nodes]
    array = np.zeros(len(tensors), RPC_TENSOR_DTYPE)
    for row, fields in zip(array, tensors, strict=True):
        for name, value in fields.items():
            row[name] = value
    return GraphPayload(0, np.array([node["id"] for node in nodes], "<u8"), array)


def tensor(
    id: int,
    ne: tuple[int, ...],
    buffer: int = 0,
    data: int = 0,
    type: GgmlType = GgmlType.F32,
    **fields: Any,
) -> dict[str, Any]:
    """Return the fields of a contiguous rpc_tensor."""
    full = (*ne, 1, 1, 1, 1)[:4]
    nb1 = row_size(type, full[0])
    nb0 = row_size(type, 32) // 32 if type in (GgmlType.F32, GgmlType.I32) else nb1
    strides = [nb0, nb1, nb1 * full[1], nb1 * full[1] * full[2]]
    made: dict[str, Any] = {
        "id": id,
        "type": int(type),
        "buffer": buffer,
        "ne": list(full),
        "nb": strides,
        "op": 0,
        "op_params": [0] * 16,
        "flags": 16,
        "src": [0] * 10,
        "view_src": 0,
        "view_offs": 0,
        "data": data,
        "name": f"t{id}".encode(),
        "use_count": 0,
    }
    made.update(fields)
    return made


def sources(*ids: int) -> list[int]:
    return [*ids, *[0] * (10 - len(ids))]
