"""Starts `python -m rpc_server` as users do and speaks to it over a plain blocking socket."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from protocol.commands import Command
from protocol.ggml.types import GgmlType, row_size
from protocol.graph_payload import GraphPayload, encode_graph
from protocol.messages import RPC_TENSOR_DTYPE
from tools.serving.processes import PROJECT as REPOSITORY
from tools.serving.processes import Process, ProgramError, own_command
from tools.wire import NEWEST, ClosedError
from tools.wire import Wire as BlockingWire

__all__ = [
    "NEWEST", "REPOSITORY", "ClosedError", "ServerProcess", "Wire", "running", "sources", "tensor",
]  # fmt: skip


class ServerProcess(Process):
    """A running server, on a port that the system chose."""

    def __init__(self, *options: str, env: Mapping[str, str] | None = None) -> None:
        super().__init__(own_command(0, *options), env=env)
        try:
            self.port = int(self.wait_for(r"endpoint +: \S+:(\d+)")[1])
        except ProgramError:
            self.stop()
            raise


@contextmanager
def running(*options: str, env: Mapping[str, str] | None = None) -> Iterator[ServerProcess]:
    with ServerProcess(*options, env=env) as server:
        yield server


class Wire(BlockingWire):
    """One connection, and what most tests need of it."""

    def closed_by_server(self) -> bool:
        """Whether the server ends the connection (waits for it)."""
        try:
            while self.socket.recv(1 << 16):
                pass
        except ConnectionError:
            pass
        except TimeoutError:
            return False
        return True

    def compute(self, nodes: list[dict[str, Any]], leaves: list[dict[str, Any]]) -> None:
        """Send a graph: tensors are the leaves and then the nodes."""
        self.send(Command.GRAPH_COMPUTE, self.graph(nodes, leaves))
        answer = self.answer(Command.GRAPH_COMPUTE)
        assert answer is None or answer.result == 0, "not GGML_STATUS_SUCCESS"

    def graph(self, nodes: list[dict[str, Any]], leaves: list[dict[str, Any]]) -> bytes:
        tensors = [*leaves, *nodes]
        array = np.zeros(len(tensors), RPC_TENSOR_DTYPE)
        for row, tensor in zip(array, tensors, strict=True):
            for name, value in tensor.items():
                row[name] = value
        ids = np.array([node["id"] for node in nodes], "<u8")
        return encode_graph(GraphPayload(0, ids, array), self.dialect)

    def op(self, name: str) -> int:
        return next(i for i, op in enumerate(self.dialect.ops) if op == name)


def tensor(
    id: int,
    ne: tuple[int, ...],
    buffer: int = 0,
    data: int = 0,
    type: GgmlType = GgmlType.F32,
    **fields: Any,
) -> dict[str, Any]:
    """The fields of a contiguous rpc_tensor."""
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
