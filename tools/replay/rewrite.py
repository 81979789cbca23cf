"""Handles and addresses of a recording as the server has them that it is played to.

A server chooses the handles of buffers and the addresses that they begin at, and clients send both
back: with every tensor. So requests are sent with the numbers that this server chose for the buffer
that the recorded one was answered with. Ids of tensors are the client's own and stay.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from construct import Array

from protocol.codec import Message, codec
from protocol.commands import Command
from protocol.dialects import Body
from protocol.messages import RPC_TENSOR_DTYPE, RPC_TENSOR_SIZE, RpcTensor
from protocol.observe.events import ObservedMessage
from protocol.requests import FRAME
from protocol.split import ProgramPayload

_WRAP = 1 << 64
# Numbers for buffers of other servers; high, where no server has its own.
_FOREIGN = 0xFFFF_0000_0000_0000


class Rewriter:
    """Translates the requests of one connection."""

    def __init__(self) -> None:
        self._handles: dict[int, int] = {}
        # Recorded and live address of the first byte, by recorded handle.
        self._bases: dict[int, tuple[int, int]] = {}

    def allocated(self, recorded: int, live: int) -> None:
        """Take note that a buffer had the handle ``recorded`` and now has ``live``."""
        self._handles[recorded] = live
        self._bases.pop(recorded, None)

    def based(self, handle: int, recorded: int, live: int) -> None:
        """Take note that the buffer with ``handle`` began at ``recorded`` and now at ``live``."""
        self._bases[handle] = (recorded, live)

    def request(self, message: ObservedMessage) -> bytes:
        """Return the bytes to send for a recorded request; all of it must have been recorded."""
        head = codec(message.spec.request)
        record = head.parse(message.head, FRAME.size)
        self._translate(record, message.spec.request)
        if message.command is Command.SPLIT_PEERS:
            # Whoever plays comes to the server as all others; it is to look for nobody.
            for part in record.parts:
                part.reach = 0
        sent = message.head[: FRAME.size] + head.build(record)
        if message.spec.body is Body.GRAPH:
            return sent + self._graph(bytes(message.body or b""), message)
        if message.command is Command.FREE_BUFFER:
            self._bases.pop(message.fields.remote_ptr, None)
            self._handles.pop(message.fields.remote_ptr, None)
        return sent + bytes(message.body or b"")

    def handle(self, recorded: int) -> int:
        """Return the live handle for a recorded one."""
        if recorded == 0:
            return 0
        live = self._handles.get(recorded)
        if live is not None:
            return live
        # A buffer of another server, or one that was given back: it must not meet one of these.
        return _FOREIGN | recorded if recorded in self._handles.values() else recorded

    def address(self, handle: int, recorded: int) -> int:
        """Return the live address for one recorded in the buffer with the recorded ``handle``."""
        base = self._bases.get(handle)
        if base is None or recorded == 0:
            return recorded
        return (recorded - base[0] + base[1]) % _WRAP

    def _translate(self, record: Message, declaration: Any) -> None:
        for field in declaration.subcons:
            kind = field.subcon
            if kind is RpcTensor:
                self._tensor(getattr(record, field.name))
            elif isinstance(kind, Array) and kind.subcon is RpcTensor:
                for tensor in getattr(record, field.name):
                    self._tensor(tensor)
            elif field.name == "remote_ptr":
                record.remote_ptr = self.handle(record.remote_ptr)

    def _tensor(self, tensor: Message) -> None:
        tensor.data = self.address(tensor.buffer, tensor.data)
        tensor.buffer = self.handle(tensor.buffer)

    def _graph(self, body: bytes, message: ObservedMessage) -> bytes:
        """The body of a graph or program: its tensors are followed by swaps or nothing."""
        graph = message.graph
        if graph is None:
            return body
        count = len(graph.tensors)
        end = len(body) - (graph.tail_size if isinstance(graph, ProgramPayload) else 0)
        at = end - RPC_TENSOR_SIZE * count
        tensors = np.frombuffer(body, RPC_TENSOR_DTYPE, count, at).copy()
        self._tensors(tensors)
        return body[:at] + tensors.tobytes() + body[end:]

    def _tensors(self, tensors: npt.NDArray[Any]) -> None:
        pairs = zip(tensors["buffer"].tolist(), tensors["data"].tolist(), strict=True)
        buffers: list[int] = []
        data: list[int] = []
        for buffer, address in pairs:
            buffers.append(self.handle(buffer))
            data.append(self.address(buffer, address))
        tensors["buffer"], tensors["data"] = buffers, data
