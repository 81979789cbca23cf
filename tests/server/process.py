"""Starts `python -m rpc_server` as users do and speaks to it over a plain blocking socket."""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import DIALECTS, Answer, Dialect
from protocol.ggml_types import GgmlType, row_size
from protocol.graph_payload import GraphPayload, encode_graph
from protocol.messages import RPC_TENSOR_DTYPE

NEWEST = DIALECTS[0]
REPOSITORY = Path(__file__).parents[2]


class ServerProcess:
    """A running server; ``log`` is all it has printed so far."""

    def __init__(self, *options: str, env: dict[str, str] | None = None) -> None:
        descriptor, name = tempfile.mkstemp(prefix="rpc-server-", suffix=".log")
        self._log = Path(name)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rpc_server", "--port", "0", *options],
            cwd=REPOSITORY,
            env=env,
            stdout=descriptor,
            stderr=subprocess.STDOUT,
        )
        # Read by its name: a shared descriptor has one position, the server would write there.
        os.close(descriptor)
        self.port = int(self.wait_for(r"endpoint +: \S+:(\d+)")[1])

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def wait_for(self, pattern: str, timeout: float = 20.0) -> re.Match[str]:
        """The first match of ``pattern`` in the log, waiting for it to appear."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if match := re.search(pattern, self.log):
                return match
            if not self.alive:
                break
            time.sleep(0.02)
        raise AssertionError(f"no {pattern!r} in the server's log:\n{self.log}")

    def rss(self) -> int:
        """Resident bytes of the process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        match = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert match is not None
        return int(match[1]) * 1024

    def forget(self) -> None:
        """Delete the log."""
        self._log.unlink()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.process.wait(20)


@contextmanager
def running(*options: str, env: dict[str, str] | None = None) -> Iterator[ServerProcess]:
    server = ServerProcess(*options, env=env)
    try:
        yield server
    finally:
        if server.alive:
            server.stop()
        server.forget()


class ClosedError(Exception):
    """The server closed the connection."""


class Wire:
    """One connection. Requests are built from the declarations in protocol/."""

    def __init__(self, port: int, dialect: Dialect = NEWEST, *, hello: bool = True) -> None:
        self.dialect = dialect
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.version: tuple[int, int, int] | None = None
        if hello:
            self.send(Command.HELLO, bytes(dialect.hello_size))
            answer = self.answer(Command.HELLO)
            self.version = (answer.major, answer.minor, answer.patch)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, command: int, payload: bytes) -> None:
        self.socket.sendall(struct.pack("<BQ", command, len(payload)) + payload)

    def read(self, n: int) -> bytes:
        data = bytearray()
        while len(data) < n:
            try:
                part = self.socket.recv(n - len(data))
            except ConnectionError:
                part = b""
            if not part:
                raise ClosedError
            data += part
        return bytes(data)

    def read_answer(self) -> bytes:
        (size,) = struct.unpack("<Q", self.read(8))
        return self.read(size)

    def answer(self, command: Command) -> Any:
        """The answer to ``command``: a record, or bytes, or None where it has none."""
        spec = self.dialect.commands[command]
        if spec.answer is Answer.NEVER:
            return None
        body = self.read_answer()
        return body if spec.answer is Answer.DATA else codec(spec.response).parse(body)

    def call(
        self, command: Command, fields: dict[str, Any] | None = None, body: bytes = b""
    ) -> Any:
        head = codec(self.dialect.commands[command].request).build(fields or {})
        self.send(command, head + body)
        return self.answer(command)

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

    # -- what most tests need ------------------------------------------------------------------

    def alloc(self, size: int) -> tuple[int, int]:
        """Handle and base of a new buffer."""
        answer = self.call(Command.ALLOC_BUFFER, {"device": 0, "size": size})
        assert answer.remote_ptr, "no memory"
        base = self.call(Command.BUFFER_GET_BASE, {"remote_ptr": answer.remote_ptr})
        return answer.remote_ptr, base.base_ptr

    def set_tensor(self, tensor: dict[str, Any], data: bytes, offset: int = 0) -> None:
        fields = {"tensor": tensor, "offset": offset, "cache_flag": 0}
        self.call(Command.SET_TENSOR, fields, data)

    def get_tensor(self, tensor: dict[str, Any], size: int, offset: int = 0) -> bytes:
        fields = {"tensor": tensor, "offset": offset, "size": size}
        answer = self.call(Command.GET_TENSOR, fields)
        assert isinstance(answer, bytes)
        return answer

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
